"""torch.hub: backbones, projectors and prototypes of a checkpoint file, without installing this library.

    w = torch.hub.load("OWNER/REPOSITORY", "prototypes", "dino_deitsmall16_pretrain_full_checkpoint.pth")

The file is a run folder, an export, or what other people publish (docs/checkpoints.md); nothing in it is run.
"""

from prototypes_lib import checkpoints, official

dependencies = [
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "safetensors",
    "tqdm",
    "matplotlib",
    "PIL",
    "jaxtyping",
]


def backbone(path, network="teacher", **options):
    """The backbone in eval mode, of "teacher" or "student"; options (name=, num_heads=) for other people's files."""
    return official.load(path, network, **options) if options else checkpoints.load_backbone(path, network)


def projector(path, network="teacher", of="crops"):
    """The projector of other people's file in eval mode: features of its backbone (n, d) to unit codes (n, p)."""
    return official.projector(path, network, of)


def prototypes(path, network="teacher", of="crops"):
    """Prototypes w (K, p), float32, not normalized; of: "crops", "patches", "head 0" ..."""
    return checkpoints.load_prototypes(path, network, of)
