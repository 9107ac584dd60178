"""What is examined: a run folder, an export or somebody's file, its prototypes, and the network that makes codes."""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prototypes_lib import checkpoints, official, scores
from prototypes_lib.evaluate.clusters import Score, score_of
from prototypes_lib.official import Found

STUDENT_TEMP = 0.1  # of every method of the papers; the scores' where a file does not say its own


@dataclass(frozen=True)
class Subject:
    """A path with the prototypes found there; config: config.json or about.json of what is ours, else empty.

    file, sha256, size: the file that holds the prototypes (of a run its newest good checkpoint's).
    """

    path: Path
    sets: tuple[Found, ...]
    config: dict[str, Any]
    file: Path
    sha256: str
    size: int

    @property
    def method(self) -> str | None:
        """Name of the run that trained it, where it is ours: by default its recipe or paper run."""
        return self.config.get("name") if "method" in self.config else None


def opened(path: str | Path, network: str | None = None) -> Subject:
    """Read all sets of prototypes of a run folder, an export or a checkpoint file; nothing in it is run.

    network: the one that is wanted; if the other's prototypes in a file cannot be read, it is looked at alone.

    Raises what `checkpoints.all_prototypes` does: FileNotFoundError, or ValueError for a damaged file, or one that
    has no prototypes.
    """
    path = Path(path)
    try:
        sets = checkpoints.all_prototypes(path)
    except ValueError:
        if network is None or not path.is_file():
            raise
        sets = official.prototypes(path, network)
    config = {}
    for name in ("config.json", "about.json"):
        if (path / name).is_file():
            config = json.loads((path / name).read_bytes())
            break
    file = _file(path)
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return Subject(path, sets, config, file, digest, file.stat().st_size)


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / "head.safetensors").is_file():
        return path / "head.safetensors"
    good = (step for step in reversed(checkpoints.steps(path)) if checkpoints.damage(path, step) is None)
    return path / "checkpoints" / f"step-{next(good):08d}" / "model.safetensors"


def chosen(sets: tuple[Found, ...], network: str | None, of: str | None) -> tuple[Found, ...]:
    """The sets that were asked for, the one to look at closely first: of the teacher, of crops.

    Raises ValueError, one line with what there is, where nothing fits.
    """
    fitting = [s for s in sets if network in (None, s.network) and of in (None, s.of)]
    if not fitting:
        asked = " ".join(word for word in (network and f"of the {network}", of and f"of {of}") if word)
        there = ", ".join(f"{s.network} of {s.of}" for s in sets)
        raise ValueError(f"no prototypes {asked} are there, only: {there}")
    return tuple(sorted(fitting, key=lambda s: (s.network != "teacher", s.of != "crops")))  # else in the file's order


def temperature(subject: Subject, network: str) -> float | None:
    """tau that the run's scores end with; None of a file that does not say it."""
    if "method" not in subject.config:
        return None
    tau = subject.config["method"]["student_temp" if network == "student" else "teacher_temp"]
    return float(tau["end"] if isinstance(tau, dict) else tau)


def score(subject: Subject, found: Found, tau: float | None) -> tuple[Score, str, float]:
    """How codes are compared with the prototypes, its name, and the temperature: the run's, or `tau`, or 0.1.

    Of a file the name is found.score, "dot" or "cosine": a vMF normalizer leaves no trace in it.
    """
    own = temperature(subject, found.network)
    tau = tau or own or STUDENT_TEMP
    if own is not None:
        told = _score_of(subject, found.network)
        name = getattr(told, "func", told).__name__
        return functools.partial(told, tau=tau), name, tau
    return functools.partial(getattr(scores, found.score), tau=tau), found.score, tau


def _score_of(subject: Subject, network: str) -> Score:
    if (subject.path / "config.json").is_file():
        return score_of(subject.path, network)
    told = subject.config["method"]["score"]  # an export's about.json is the run's config
    name = (told if isinstance(told, str) else told["name"]).removeprefix("scores.")
    options = {} if isinstance(told, str) else {key: v for key, v in told.items() if key not in ("name", "args")}
    return functools.partial(getattr(scores, name), **options)


class Codes(nn.Module):
    """A backbone and the projector behind it: features (n, dim) to unit codes."""

    def __init__(self, backbone: nn.Module, projector: nn.Module):
        super().__init__()
        self.backbone, self.projector = backbone, projector


@torch.no_grad()
def coder(subject: Subject, found: Found) -> Codes:
    """Backbone and projector of a set's network, in eval mode, to make codes that fit its prototypes.

    Raises ValueError, one line, for a file without either of them, or a projector that fits neither side.
    """
    backbone = checkpoints.load_backbone(subject.path, found.network)
    if (subject.path / "config.json").is_file():
        projector = checkpoints.load_network(subject.path, found.network).projector
    else:
        projector = official_projector(subject, found)
    try:
        codes = projector(torch.zeros(2, backbone.dim) + torch.arange(backbone.dim) / backbone.dim)
    except RuntimeError as error:
        raise ValueError(f"{subject.path}: its projector does not take {backbone.dim} features ({error})") from error
    if codes.shape[1] != found.w.shape[1]:
        there, here = codes.shape[1], found.w.shape[1]
        raise ValueError(f"{subject.path}: its projector makes codes of {there} dimensions, the prototypes have {here}")
    return Codes(backbone, projector).eval()


def official_projector(subject: Subject, found: Found) -> nn.Module:
    """The projector out of an export's head.safetensors or a file of others."""
    if (subject.path / "head.safetensors").is_file():
        return _exported(subject)
    from prototypes_lib import official

    return official.projector(subject.path, found.network, found.of)


def _exported(subject: Subject) -> nn.Module:
    from safetensors.torch import load_file

    from prototypes_lib.heads import Projector

    run, tensors = subject.config["run"], load_file(subject.path / "head.safetensors")
    own = {name: x for name, x in tensors.items() if name.startswith("mlp.")}
    sizes = ("hidden", "bottleneck", "head_layers", "head_batch_norm", "head_activation")
    projector = Projector(own["mlp.0.weight"].shape[1], *(run[name] for name in sizes))
    projector.load_state_dict(own)
    return projector.eval()
