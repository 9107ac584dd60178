"""Out of other people's checkpoint files: backbones (`load`), prototypes, and the projectors between the two."""

from prototypes_lib.official.backbones import load
from prototypes_lib.official.heads import Found, prototypes
from prototypes_lib.official.projectors import projector

__all__ = ["Found", "load", "projector", "prototypes"]
