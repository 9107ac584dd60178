"""What every verb of `prototypes evaluate` shares: which model, on which data, where; and the record of the answer."""

import dataclasses
import json
import math
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from prototypes_lib.settings import Run

if TYPE_CHECKING:  # help is printed without loading torch
    import torch

    from prototypes_lib.backbones import Backbone
    from prototypes_lib.data import Images
    from prototypes_lib.evaluate import Features

Kind = Literal["C", "D", "MSN"]
Classifier = Literal["knn", "logistic"]

# data sets of small images of one size: kept as they are and enlarged on the device, not on the disk
_SIDES = {"cifar10-5k": 32, "cifar10": 32, "cifar100": 32, "fashion-mnist": 28, "stl10": 96}


@dataclass(frozen=True)
class On:
    """Options of every verb."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]  # run folder, export, checkpoint file, or timm:NAME
    data: str | None = None  # a data set or folder; by default the one the run was trained on
    size: int | None = None  # side of the evaluated view, px; by default the run's global crop, else 224
    root: Path | None = None  # where named data sets lie
    limit: int | None = None  # use only this many images of each split
    network: Literal["teacher", "student"] = "teacher"  # whose backbone, where there are two
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    cache: Path | None = None  # folder in which features are kept and found again
    seed: int = 0  # of everything random
    json: Path | None = None  # file for the answer with command, settings and environment
    progress: bool = True  # text bars for what takes long


@dataclass(frozen=True)
class Task:
    """A verb's model and data, opened and checked."""

    verb: str
    on: On
    backbone: "Backbone"
    train: "Images"
    test: "Images"
    where: str  # the data set
    size: int
    stored: int  # side at which images are kept
    device: "torch.device"
    colors: dict[str, tuple[float, ...]]  # mean and std the network was trained with
    config: dict[str, Any]  # of the run; of other models what is known
    start: float = field(default_factory=time.perf_counter)

    def features(self, kind: str = "C", *more: "Images") -> "tuple[Features, ...]":
        """Frozen features of training and test images and of more sets, of a kind of `evaluate.features.kind`."""
        from prototypes_lib.evaluate.features import check, extract
        from prototypes_lib.evaluate.features import kind as options

        view = options(self.backbone, kind) | self.colors | {"size": self.size}
        own = {"device": self.device, "cache": self.on.cache, "progress": self.on.progress}
        train, *others = (extract(self.backbone, images, **view, **own) for images in (self.train, self.test, *more))
        for other in others:
            check(train, other)
        return train, *others

    def machine(self) -> dict[str, Any]:
        """Device and progress, as protocols take them."""
        return {"device": self.device, "progress": self.on.progress}

    def say(self, name: str, value: float, interval: tuple[float, float] | None = None, unit: str = " %") -> None:
        """A line of the answer."""
        print(f"  {name:<24s} {value:6.2f}{unit}" + (f"  [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""))

    def write(self, result: Any, measured: dict[str, Any], **options: Any) -> None:
        """Write --json: a record as in notebooks/results, its one run with what was measured and the whole result.

        measured: "scores", or kNN's fields; options: of the verb, by their names on the command line.
        """
        if self.on.json is None:
            return
        from prototypes_lib.files.storage import write_text
        from prototypes_lib.records import environment
        from prototypes_lib.scoreboard import schema

        asked = {"data": self.where, "size": self.size, "network": self.on.network, "seed": self.on.seed}
        asked |= {"limit": self.on.limit} if self.on.limit else {}
        options = {name: value for name, value in options.items() if value is not None and value != ()}
        run = {
            "name": self.config.get("name") or Path(self.on.model).name, "protocol": self.verb, "model": self.on.model,
            "data": self.where, "size": self.size, "seed": self.on.seed, "hash": self._hash(),
            "seconds": time.perf_counter() - self.start, "environment": environment(self.device),
            "config": {k: v for k, v in self.config.items() if k in ("method", "run", "images", "backbone")},
            "last": {}, "n_train": len(self.train), "n_test": len(self.test), **measured, "result": result,
        }  # fmt: skip
        record = _plain(
            {
                "notebook": "prototypes evaluate",
                "command": _command(self.verb, self.on.model, asked | options),
                "parameters": {"model": self.on.model} | asked | options,
                "runs": [run],
            }
        )
        schema.validate(record, self.on.json.name)
        write_text(self.on.json, json.dumps(record, indent=1) + "\n")

    def _hash(self) -> str:
        """The run's own, or of the weights of a model that is not ours."""
        import hashlib

        if "hash" in self.config:
            return self.config["hash"][:12]
        digest = hashlib.sha256(self.backbone.name.encode())
        for name, tensor in self.backbone.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]


def score(task: Task, metric: str, value: float, interval: tuple[float, float] | None = None) -> dict[str, Any]:
    """An entry of a run's list `scores`; see notebooks/results/README.md."""
    from prototypes_lib.scoreboard.schema import Score

    low, high = interval if interval and all(map(math.isfinite, interval)) else (None, None)
    if low is not None:  # an interval around a mean may end a rounding error before it
        low, high = min(low, value), max(high, value)
    return vars(Score(task.verb, task.where, metric, value, low, high, len(task.test), task.on.seed))


def unofficial(official: dict[str, Any], **asked: Any) -> dict[str, str]:
    """A metric's qualifiers: the options that are not the official protocol's, so that a score is no other's."""
    plain = lambda x: ("no", "yes")[x] if isinstance(x, bool) else f"{x:g}" if isinstance(x, float) else str(x)
    return {name: plain(x) for name, x in asked.items() if x != official[name]}


def opened(on: On, verb: str, train_parts: Mapping[str, str] = MappingProxyType({})) -> Task:
    """Everything a verb needs, or one clear line: a model, data or place that is not there, classes that differ.

    train_parts: of some data sets, the split that trains instead of "train".
    """
    from prototypes_lib.data import check_classes, load
    from prototypes_lib.train import pick_device

    _check_places(on)
    positive(size=on.size, limit=on.limit)
    if on.seed < 0:
        raise ValueError(f"seed={on.seed} must not be negative")
    device = pick_device(on.device)
    config = _about(on.model)
    trained = Run(**config["run"]) if "run" in config else None
    if on.data is None and trained is None:
        raise ValueError(f"{on.model} does not say what it was trained on: give --data")
    where, size = on.data or trained.data, on.size or (trained.image_size if trained else 224)
    backbone, colors = _backbone(on.model, size, on.network)
    if backbone is not None:
        backbone.check_size(size)
    stored = (trained or Run()).but(image_size=size).stored_size
    if stored > (native := _SIDES.get(where.split("-lt-")[0], stored)):
        stored = native
    own = {"root": on.root, "image_size": stored, "limit": on.limit, "progress": on.progress}
    try:
        train, test = (load(where, split, **own) for split in (train_parts.get(where, "train"), "test"))
    except RuntimeError as error:  # torchvision's word for a file that is missing or fails its checksum
        raise ValueError(str(error)) from error
    check_classes(train, test)
    if trained is None:
        config = config | {"backbone": backbone.name}
    return Task(verb, on, backbone, train, test, where, size, stored, device, colors, config)


def _check_places(on: On) -> None:
    """Whether the answer can be written, before the work for it is done."""
    if on.json is not None and on.json.is_dir():
        raise ValueError(f"--json {on.json} is a folder; name a file")
    for flag, folder in (("--json", on.json and on.json.parent), ("--cache", on.cache)):
        there = folder and next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if there and not (there.is_dir() and os.access(there, os.W_OK)):
            raise ValueError(f"{flag} {folder}: {there} is no folder one may write into")


def positive(**numbers: float | None) -> None:
    """Raise ValueError for a number that is not above zero and finite; None is not asked."""
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be positive")


def check_votes(
    n: int | None, k: tuple[int, ...], temperature: float = 0.07, weights: str = "exp", *space: Any
) -> None:
    """Refuse what kNN among n training images would refuse after features are made; space: normalize and metric.

    n: None before data are opened.
    """
    from prototypes_lib.evaluate.knn import Vote, check_vote

    for count in k:
        if n is None and count < 1:
            raise ValueError(f"k={count} must be at least 1")
        check_vote(Vote(count, temperature, weights), count if n is None else n, *(space or (True, "dot")))


def _about(model: str) -> dict[str, Any]:
    """config.json of a run or about.json of an export; nothing is known of a file or timm's."""
    if model.startswith("timm:"):
        return {}
    folder = Path(model)
    if not folder.exists():
        raise FileNotFoundError(f"{model} is no run folder, export or checkpoint file, and no timm:NAME")
    if folder.name == "backbone.safetensors" and (folder.parent / "about.json").is_file():
        folder = folder.parent
    for name in ("config.json", "about.json"):
        if (folder / name).is_file():
            try:
                return dict(json.loads((folder / name).read_bytes()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{folder / name} is damaged ({error})") from error
    return {}


def _backbone(model: str, size: int, network: str) -> "tuple[Backbone, dict[str, tuple[float, ...]]]":
    from prototypes_lib import checkpoints
    from prototypes_lib.backbones import Backbone

    if not model.startswith("timm:"):
        return checkpoints.load_backbone(model, *([network] if network != "teacher" else [])), {}
    name = model.removeprefix("timm:")
    try:
        backbone = Backbone(name, size, pretrained=True)
    except ValueError:
        raise
    except Exception as error:  # of the network, the hub or its cache, whatever they raise
        raise ValueError(f"weights of {name} could not be fetched: {str(error).splitlines()[0]}") from error
    about = next(backbone.children()).pretrained_cfg
    return backbone.eval(), {"mean": tuple(about["mean"]), "std": tuple(about["std"])}


def _command(verb: str, model: str, options: dict[str, Any]) -> str:
    words = ["prototypes", "evaluate", verb, model]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return shlex.join(words)


def _plain(value: Any) -> Any:
    """What JSON can hold: names as keys, no numbers that are not finite, lists for all else that has members."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Path):
        return str(value)
    return [_plain(x) for x in (value.tolist() if hasattr(value, "tolist") else value)]
