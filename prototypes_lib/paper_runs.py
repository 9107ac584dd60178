"""The full-scale settings behind the papers' numbers: PAPER_RUNS[name] is a method and a run, for a GPU server.

`prototypes train --paper-run NAME --data PATH` starts one; every other option still changes it. Data are "imagenet"
(a folder with train/ and val/, given by --data) or "inaturalist-2018". Batch sizes are of all GPUs together; times are
in passes over the data. Where a paper and the code of its released weights differ, the code's value stands here; what
the released runs did in float16 is bf16. Not here: iBOT's ViT-L, whose settings we could not read, and DINO's
ResNet-50, whose head (two layers, prototypes without any normalization) the library does not have. timm gives register
tokens positions, which DINOv2's have not; MSN crops bilinearly and resizes positions without DINO's 0.1.
"""

from dataclasses import dataclass, replace
from functools import partial

from prototypes_lib.assignment import Center
from prototypes_lib.methods import METHODS, Method, Views, Warmup
from prototypes_lib.regularizers import expansion, power_law_matching
from prototypes_lib.scores import dot
from prototypes_lib.settings import Run

VITS, VITB, VITL = (f"vit_{size}_patch16_224" for size in ("small", "base", "large"))


@dataclass(frozen=True)
class PaperRun:
    """A method and its run; source: where the values come from, and what could not be verified."""

    method: Method
    run: Run
    source: str


# DINO's defaults are Run's. Its released runs: batch 1024, and what differs between ViT-S and ViT-B.
_vit = Run(data="imagenet", backbone=VITS, backbone_options={"interpolation": "official"}, precision="fp32")
_cli = _vit.but(epochs=100.0, batch_size=512)  # without any argument, on 8 GPUs
_dino_s = _vit.but(epochs=800.0, batch_size=1024, min_lr=1e-5, clip_grad=0.0)
_dino_b = _vit.but(
    backbone=VITB, epochs=400.0, batch_size=1024, lr=7.5e-4, min_lr=2e-6, clip_grad=0.3, freeze_last_layer=3.0
)
_ibot_s = _vit.but(epochs=800.0, batch_size=1024, precision="bf16")

_msn = _vit.but(
    epochs=800.0, batch_size=1024, lr=1e-3, lr_scaling="none", warmup_lr=2e-4,
    warmup_epochs=15, schedule_stretch=1.25, momentum_schedule="linear", clip="global", clip_prototypes=False,
    prototype_weight_decay=0.0, freeze_last_layer=0.0, drop_path=0.0, head_batch_norm=True,
)  # fmt: skip

_swav = Run(
    data="imagenet", backbone="resnet50", epochs=800, batch_size=4096, optimizer="larc", lr=4.8, lr_scaling="none",
    min_lr=0.0048, warmup_lr=0.3, weight_decay=1e-6, weight_decay_end=1e-6, clip_grad=0.0, drop_path=0.0,
    head_layers=2, head_activation="relu", head_batch_norm=True, bottleneck=128, precision="bf16",
)  # fmt: skip

_EPOCH = 1250 * 2048 / 1_281_167  # DINOv2's epochs are 1250 steps, here of 2048 images
_uniform = {"interpolation": "official", "uniform_drop_path": True}
_dinov2 = _vit.but(
    backbone=VITL, backbone_options=_uniform | {"init_values": 1e-5}, epochs=100 * _EPOCH, batch_size=2048,
    lr=4e-3, lr_scaling="sqrt", lr_batch_size=1024, warmup_epochs=10 * _EPOCH, clip="module", layer_decay=0.9,
    patch_embed_lr=0.2, freeze_last_layer=_EPOCH, freeze_by="lr", drop_path=0.3, precision="bf16",
)  # fmt: skip
_dinov2_short = METHODS["dinov2"].but(
    n_prototypes=65536, targets=(Center,), ema=0.992, patch=replace(METHODS["dinov2"].patch, head="shared"),
    teacher_temp=Warmup(0.04, 0.07, epochs=30 * _EPOCH),
)  # fmt: skip

_dinov2_large = _dinov2.but(
    local_size=98, bottleneck=384, epochs=500 * _EPOCH, lr=2e-4, warmup_epochs=80 * _EPOCH, weight_decay_end=0.2,
    layer_decay=1.0, drop_path=0.4, backbone="vit_large_patch14_dinov2",
)  # fmt: skip
_dinov2_base = _dinov2.but(backbone=VITB, epochs=100.0, batch_size=1024, warmup_epochs=10.0, freeze_last_layer=1.0)

_simdino = _cli.but(backbone=VITB, freeze_last_layer=0.0, precision="bf16")
_simdinov2 = _vit.but(
    backbone=VITB, backbone_options={"init_values": 0.1, "reg_tokens": 4, "uniform_drop_path": True},
    epochs=100.0, batch_size=1024, lr=4e-3, lr_scaling="sqrt", lr_batch_size=1024, warmup_lr=1e-6, clip="module",
    layer_decay=0.9, patch_embed_lr=0.2, freeze_last_layer=0.0, drop_path=0.2, precision="bf16",
)  # fmt: skip
# Gram matrices of each of 8 GPUs by itself
_eight_gpus = (-1.0, partial(expansion, eps=0.05**0.5, groups=8), "averaged codes")


def _vit_sizes(plain: str, small: Run, base: Run, base_views: Views, source: str) -> dict[str, PaperRun]:
    """A method and its vMF kin (lengths of prototypes free in both sizes) for ViT-S and ViT-B."""
    found = {}
    for name in (plain, *(f"{plain}-vmf{addition}" for addition in ("", "-kd", "-kp"))):
        s, b = METHODS[name], METHODS[name].but(teacher_temp=Warmup(0.04, 0.07, 50), views=base_views)
        vmf = name != plain
        told = f"{source}; vMF section 5, PPC section 6.1" if vmf else source
        found[f"{name}-vits16"] = PaperRun(s if vmf else s.but(score=dot), small, told)
        found[f"{name}-vitb16"] = PaperRun(b, base.but(batch_size=512) if vmf else base, told)
    return found


def _on_inaturalist(method: Method, run: Run, source: str) -> PaperRun:
    return PaperRun(method, run.but(data="inaturalist-2018", epochs=300.0), f"{source}; PPC section 6.3")


PAPER_RUNS: dict[str, PaperRun] = {
    **_vit_sizes("dino", _dino_s, _dino_b, Views(), "args of the released checkpoints; clip of ViT-S unverified"),
    **_vit_sizes(
        "ibot", _ibot_s, _dino_b, Views(2, 10, (0.32, 1.0), (0.05, 0.32)),
        "README of the released runs; epochs of ViT-B unverified",
    ),
    "swav-resnet50": PaperRun(METHODS["swav"].but(queue=None), _swav, "script of the 800-epoch run"),
    "swav-resnet50-bs256": PaperRun(
        METHODS["swav"], _swav.but(epochs=400.0, batch_size=256, lr=0.6, min_lr=6e-4, warmup_epochs=0.0),
        "script of the run at batch 256 with its queue",
    ),
    "msn-vits16": PaperRun(METHODS["msn"], _msn, "released config"),
    "msn-vitb16": PaperRun(
        METHODS["msn"].but(mask_student=0.3), _msn.but(backbone=VITB, epochs=600.0),
        "released config of ViT-S; patch drop of ViT-B/16 unverified",
    ),
    "dinov2-vitl16-short": PaperRun(_dinov2_short, _dinov2, "config vitl16_short, the repository's default"),
    "dinov2-vitl14": PaperRun(
        METHODS["dinov2"].but(teacher_temp=Warmup(0.04, 0.07, 30 * _EPOCH)), _dinov2_large,
        "config vitl14, which was run on other data; its batch is unverified",
    ),
    "dinov2-vitb16": PaperRun(
        _dinov2_short.but(teacher_temp=Warmup(0.04, 0.07, 30), views=METHODS["simdino"].views), _dinov2_base,
        "Sim Table 4: the baseline of SimDINOv2",
    ),
}  # fmt: skip
for _size, _backbone in (("s", VITS), ("b", VITB), ("l", VITL)):
    _apart = METHODS["simdino"].but(regularizers=(_eight_gpus,))
    PAPER_RUNS |= {
        f"simdino-vit{_size}16": PaperRun(
            _apart, _simdino.but(backbone=_backbone),
            "README and log of ViT-B on 8 GPUs (Sim Table 4 prints learning rate 0.002, clip 0.3, momentum 0.995)",
        ),
        f"simdinov2-vit{_size}16": PaperRun(
            METHODS["simdinov2"].but(regularizers=(_eight_gpus,)), _simdinov2.but(backbone=_backbone),
            "released config with AdamW on 8 GPUs (Sim Table 4 prints drop path 0.3)",
        ),
        f"dino-vit{_size}16-100ep": PaperRun(
            METHODS["dino"].but(views=Views(2, 10, (0.4, 1.0), (0.05, 0.4))), _cli.but(backbone=_backbone),
            "Sim Table 1's baseline: the code's defaults with Table 4's crops and temperatures",
        ),
    }  # fmt: skip
for _name in ("dino-vmf", "ibot-vmf", "ibot-vmf-kd", "ibot-vmf-kp"):
    for _size in ("s", "b"):
        _on_imagenet = PAPER_RUNS[f"{_name}-vit{_size}16"]
        _k = {"n_prototypes": 8192} if _name.startswith("ibot") else {}
        PAPER_RUNS[f"{_name}-vit{_size}16-inat"] = _on_inaturalist(
            _on_imagenet.method.but(**_k), _on_imagenet.run, f"{_on_imagenet.source}; K on iNaturalist unverified"
        )
PAPER_RUNS["msn-vits16-inat"] = _on_inaturalist(METHODS["msn"].but(n_prototypes=8142), _msn, "lambda = 1")
PAPER_RUNS["pmsn-vits16-inat"] = _on_inaturalist(
    METHODS["pmsn"].but(
        n_prototypes=8142,
        regularizers=((5.0, partial(power_law_matching, exponent=0.25), "probabilities"),),
    ),
    _msn, "no code was released; lambda = 5, the exponent unverified",
)  # fmt: skip
