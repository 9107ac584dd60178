"""Evaluation protocols, one file each: a function from features (or a model and images) to a small frozen dataclass.

A protocol and its file have one name; here it is the function's. The other functions of such a file are imported as
`from prototypes_lib.evaluate.knn import predict`.
"""

from prototypes_lib.evaluate import logistic
from prototypes_lib.evaluate.clusters import Clusters, PrototypesAsClasses, clusters, prototypes_as_classes
from prototypes_lib.evaluate.features import Features, extract
from prototypes_lib.evaluate.few_shot import FewShot, few_shot
from prototypes_lib.evaluate.fine_tune import FineTune, FineTuning, fine_tune
from prototypes_lib.evaluate.knn import KNN, knn
from prototypes_lib.evaluate.knn_protocols import KNNExplorer, explore
from prototypes_lib.evaluate.linear import Linear, linear
from prototypes_lib.evaluate.long_tail import LongTail, long_tail
from prototypes_lib.evaluate.precision import Precision, RedundancyShare, precision, redundancy_share
from prototypes_lib.evaluate.restricted import Restricted, restricted
from prototypes_lib.evaluate.robustness import Robustness, robustness
from prototypes_lib.evaluate.transfer import Transfer, transfer

__all__ = [
    "KNN", "Clusters", "Features", "FewShot", "FineTune", "FineTuning", "KNNExplorer", "Linear", "LongTail",
    "Precision", "PrototypesAsClasses", "RedundancyShare", "Restricted", "Robustness", "Transfer", "clusters",
    "explore", "extract", "few_shot", "fine_tune", "knn", "linear", "logistic", "long_tail", "precision",
    "prototypes_as_classes", "redundancy_share", "restricted", "robustness", "transfer",
]  # fmt: skip
