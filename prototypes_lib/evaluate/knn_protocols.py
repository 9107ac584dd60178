"""The same features under everybody's nearest neighbors: how many points of a method's gain are protocol.

"kNN accuracy" is printed for k = 10 and for k = 200, normalized and not; the difference may exceed that of two methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prototypes_lib.evaluate.features import Features, check
from prototypes_lib.evaluate.intervals import wilson
from prototypes_lib.evaluate.knn import Vote, correct


@dataclass(frozen=True)
class Protocol:
    """One way to do it, and who does; the choices are those of `knn`."""

    name: str
    vote: Vote
    normalize: bool | str = True
    metric: str = "dot"
    source: str = ""


PROTOCOLS = (
    Protocol("DINO, k = 10", Vote(10), source="DINO's script; the k of the DINO-vMF paper"),
    Protocol("DINO, k = 20", Vote(20), source="DINO's script and its usual best; stable-pretraining's k"),
    Protocol("DINO, k = 100", Vote(100), source="DINO's script"),
    Protocol("DINO, k = 200", Vote(200), source="DINO's script; lightly's ViT-B/16 benchmark"),
    Protocol("softmax, k = 20", Vote(20, weights="softmax"), source="DINOv2's script: the winners of DINO's"),
    Protocol("nearest alone", Vote(1), source="common"),
    Protocol("majority of 20", Vote(20, weights="uniform"), source="common: no weights"),
    Protocol("centered, k = 20", Vote(20), "centered", source="common: the mean of the features taken off"),
    Protocol("not normalized, k = 20", Vote(20), False, source="a frequent slip: DINO's without unit length"),
    Protocol("distances, k = 20", Vote(20, weights="inverse"), False, "euclidean", "common: votes of 1 / distance"),
    Protocol("scikit-learn", Vote(5, weights="uniform"), False, "euclidean", "defaults of KNeighborsClassifier"),
)


@dataclass(frozen=True)
class Explored:
    """Accuracy of one protocol in percent, with a 95 % Wilson interval over the test images."""

    protocol: Protocol
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class KNNExplorer:
    """A row for each protocol, in the order given; left_out are the names of those that need more training images."""

    rows: tuple[Explored, ...]
    n: int
    left_out: tuple[str, ...] = ()

    @property
    def spread(self) -> float:
        """Points between the best protocol and the worst: a smaller difference of two methods may be the protocol's."""
        return self.best.accuracy - self.worst.accuracy

    @property
    def best(self) -> Explored:
        return max(self.rows, key=lambda row: row.accuracy)

    @property
    def worst(self) -> Explored:
        return min(self.rows, key=lambda row: row.accuracy)

    def gains(self, base: "KNNExplorer") -> dict[str, float]:
        """Points over another method's features, protocol by protocol: what remains when both are measured alike.

        Raises ValueError where the two share no protocol.
        """
        other = {row.protocol: row.accuracy for row in base.rows}
        found = {row.protocol.name: row.accuracy - other[row.protocol] for row in self.rows if row.protocol in other}
        if not found:
            raise ValueError("the two have no protocol in common")
        return found


def explore(
    train: Features,
    test: Features,
    protocols: Sequence[Protocol] = PROTOCOLS,
    *,
    device: str | torch.device = "cpu",
    block: int = 2**26,
    held: int | None = None,
    progress: bool = True,
) -> KNNExplorer:
    """kNN accuracy under each protocol; those that look at the same neighbors share one search.

    What differs from its source is what `knn` lists; other sources' images, crops and backbones are not imitated: the
    features are the same for all. Protocols with k beyond the training set are left out and named.

    Raises ValueError for features that `features.check` refuses, or where no protocol fits the training set.
    """
    check(train, test)
    fitting = [protocol for protocol in protocols if protocol.vote.k <= len(train.x)]
    if not fitting:
        raise ValueError(f"none of {len(protocols)} protocols can do with {len(train.x)} training images")
    found = {}
    for normalize, metric in dict.fromkeys((p.normalize, p.metric) for p in fitting):
        alike = [p for p in fitting if (p.normalize, p.metric) == (normalize, metric)]
        machine = {"device": device, "block": block, "held": held, "progress": progress}
        hits = correct(train, test, [p.vote for p in alike], normalize, metric, **machine)
        found |= dict(zip(alike, hits, strict=True))
    n = len(test.x)
    rows = tuple(Explored(p, 100 * found[p] / n, wilson(found[p], n)) for p in fitting)
    return KNNExplorer(rows, n, tuple(p.name for p in protocols if p.vote.k > len(train.x)))
