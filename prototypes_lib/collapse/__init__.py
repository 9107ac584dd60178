"""Is it collapsing, and how? Unique prototypes, the marginal latent class distribution, the void set, a verdict."""

from prototypes_lib.collapse.diagnosis import Finding, diagnose
from prototypes_lib.collapse.marginal import Marginal, VoidSet, marginal, void_set
from prototypes_lib.collapse.meter import Meter
from prototypes_lib.collapse.pairs import CURVE, Neighbors, neighbors
from prototypes_lib.collapse.sphere import (
    effective_rank,
    nearest_cosine,
    uniform_nearest_cdf,
    uniform_nearest_quantile,
)
from prototypes_lib.collapse.unique import UniquePrototypes, connected_components, unique_prototypes, unique_range
from prototypes_lib.collapse.verdict import Verdict, verdict

__all__ = [
    "CURVE",
    "Finding",
    "Marginal",
    "Meter",
    "Neighbors",
    "UniquePrototypes",
    "Verdict",
    "VoidSet",
    "connected_components",
    "diagnose",
    "effective_rank",
    "marginal",
    "nearest_cosine",
    "neighbors",
    "uniform_nearest_cdf",
    "uniform_nearest_quantile",
    "unique_prototypes",
    "unique_range",
    "verdict",
    "void_set",
]
