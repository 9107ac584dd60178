"""Is it collapsing, and how? Unique prototypes, the marginal latent class distribution, the void set, a verdict."""

from prototypes_lib.collapse.marginal import Marginal, VoidSet, marginal, void_set
from prototypes_lib.collapse.unique import UniquePrototypes, connected_components, unique_prototypes, unique_range
from prototypes_lib.collapse.verdict import Verdict, verdict

__all__ = [
    "Marginal",
    "UniquePrototypes",
    "Verdict",
    "VoidSet",
    "connected_components",
    "marginal",
    "unique_prototypes",
    "unique_range",
    "verdict",
    "void_set",
]
