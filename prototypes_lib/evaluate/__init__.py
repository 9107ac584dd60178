"""Evaluation protocols, one file each: a function from features (or a model and images) to a small frozen dataclass."""

from prototypes_lib.evaluate.features import Features, extract
from prototypes_lib.evaluate.knn import KNN, knn

__all__ = ["KNN", "Features", "extract", "knn"]
