"""Settings at the edge of what makes sense: each trains, or is refused in one line before the first step.

A run that works has finite losses and a result; one that is refused leaves no folder behind.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from resume import given, method, pictures, tiny

from prototypes_lib import train as training
from prototypes_lib.data import Images
from prototypes_lib.methods import METHODS, Method, Queue, Views, Warmup
from prototypes_lib.regularizers import expansion, koleo, mean_entropy

CLEAR = (ValueError, FileNotFoundError, FloatingPointError, OSError)


@dataclass(frozen=True)
class Case:
    """What is strange, how it ends (words of its refusal, "" where it trains), and how it is made."""

    name: str
    says: str
    run: dict[str, Any]
    method: Callable[[], Method]
    images: Callable[[], Images] | None  # None: what the run names


def _case(name: str, says: str = "", compose: str | Callable[[], Method] = "dino", images=pictures, **run) -> Case:
    return Case(name, says, run, partial(method, compose) if isinstance(compose, str) else compose, images)


def _but(name: str, **changes: Any) -> Callable[[], Method]:
    return lambda: method(name).but(**changes)


def _views(name: str, *views: Any, **options: Any) -> Callable[[], Method]:
    return lambda: method(name).but(views=Views(*views, **options))


def _masked(name: str, **changes: Any) -> Callable[[], Method]:
    return lambda: method(name).but(patch=replace(METHODS[name].patch, **changes))


def _plus(name: str, *regularizer: Any, **changes: Any) -> Callable[[], Method]:
    return lambda: method(name).but(**changes).plus(*regularizer)


def _constant(value: int) -> Images:
    return Images(np.full((48, 32, 32, 3), value, np.uint8), np.zeros(48, np.int64), ("a",), "one color")


def _resnet(**options: Any) -> dict[str, Any]:
    return {"backbone": "resnet18", "backbone_options": {}, "local_size": 32} | options


CASES = (
    # data and batches
    _case("more images in a batch than there are", "fewer than one batch", batch_size=100),
    _case("as many images in a batch as there are", batch_size=48),
    _case("a batch of one", batch_size=1, limit=3, images=lambda: pictures(3)),
    _case("a batch of one, SwAV", "", "swav", batch_size=1, images=lambda: pictures(3)),
    _case("a batch of one, SimDINO", "", "simdino", batch_size=1, images=lambda: pictures(3)),
    _case("a batch of one, DINOv2", "", "dinov2", batch_size=1, images=lambda: pictures(3)),
    _case("a batch of one through BatchNorm in a ResNet", "", batch_size=1, images=lambda: pictures(3), **_resnet()),
    _case("one image", batch_size=1, images=lambda: pictures(1), warmup_epochs=0.0),
    _case("one image, larger batch", "fewer than one batch", images=lambda: pictures(1)),
    _case("a batch of none", "batch_size", batch_size=0),
    _case("no images", "limit", images=None, limit=0),
    _case("a negative limit", "limit", images=None, limit=-3),
    _case("data that nobody knows", "no-such-data", images=None, data="no-such-data"),
    _case("a folder that is not there", "gone", images=None, data="./gone/away"),
    _case("a part of the data that is not there", "splits", images=None, split="weekend"),
    _case("black images", images=lambda: _constant(0)),
    _case("white images, SwAV", "", "swav", images=lambda: _constant(255)),
    _case("gray images, SimDINO", "", "simdino", images=lambda: _constant(128)),
    _case("gray images, DINOv2", "", "dinov2", images=lambda: _constant(128)),
    _case("all labels equal", images=lambda: replace(pictures(), labels=np.zeros(48, np.int64))),
    # sizes
    _case("crops that are no multiple of a patch", "multiple", image_size=30),
    _case("local crops that are no multiple of a patch", "multiple", local_size=12),
    _case("local crops smaller than a patch", "local_size|patch|multiple", local_size=4),
    _case("global crops smaller than a patch", "image_size|patch|multiple", image_size=4),
    _case("crops of one patch", image_size=8, local_size=8),
    _case("crops of one patch, masked", "too small", "ibot", image_size=8, local_size=8),
    _case("local crops as large as global ones", local_size=32),
    _case("local crops larger than global ones", local_size=40),
    _case("a projector of width 1", hidden=1),
    _case("codes of one dimension", "projector", bottleneck=1),
    _case("codes of two dimensions, vMF", "", "dino-vmf", bottleneck=2),
    _case("a head without layers", "head_layers", head_layers=0),
    _case("a head of one layer", head_layers=1),
    # views and masks
    _case("no local crops", "", _views("dino", 2, 0)),
    _case("no local crops and a size that fits nothing", "", _views("dino", 2, 0), local_size=13),
    _case("one global crop", "", _views("dino", 1, 1)),
    _case("one global crop, SimDINO", "averaged codes", _views("simdino", 1, 2)),
    _case("one crop", "two views", _views("dino", 1, 0)),
    _case("no patch is masked", "", _masked("ibot", probability=0.0)),
    _case("no patch is masked, DINOv2", "", _masked("dinov2", probability=0.0)),
    _case("no patch is masked, SimDINOv2", "", _masked("simdinov2", probability=0.0)),
    _case("every patch is masked", "", _masked("ibot", probability=1.0, ratio=(1.0, 1.0), shape="rand")),
    _case("every patch is masked in blocks", "", _masked("dinov2", probability=1.0, ratio=(1.0, 1.0))),
    _case("masks for a network that has no patches", "cannot hide patches", "ibot", **_resnet()),
    _case("every patch taken away", "mask_student", _but("msn", mask_student=1.0)),
    _case("nearly every patch taken away", "", _but("msn", mask_student=0.99)),
    # prototypes and targets
    _case("one prototype", "", _but("dino", n_prototypes=1)),
    _case("one prototype, Sinkhorn", "", _but("swav", n_prototypes=1)),
    _case("one prototype, KoLeo on it", "", _plus("dino", 0.1, koleo, "prototypes", n_prototypes=1)),
    _case("one prototype, entropy of the mean", "", _but("ibot-vmf-me", n_prototypes=1)),
    _case("one prototype, a power law", "", _but("pmsn", n_prototypes=1)),
    _case("more prototypes than images", "", _but("swav", n_prototypes=200)),
    _case("fewer prototypes than none", "n_prototypes", _but("dino", n_prototypes=-1)),
    _case("KoLeo in more parts than prototypes", "parts=", _plus("dino", 0.1, partial(koleo, parts=99), "prototypes")),
    _case("a coding rate of one row", "", "simdinov2", batch_size=1, images=lambda: pictures(3)),
    _case("a coding rate with eps 0", "eps", _plus("dino", -1.0, partial(expansion, eps=0.0), "codes")),
    _case("a temperature of 0", "temperatures", _but("dino", teacher_temp=Warmup(0.0, 0.07))),
    _case("a student's temperature of 0", "temperatures", _but("dino", student_temp=0.0)),
    _case("a temperature of 1e-6", "", _but("dino", teacher_temp=Warmup(1e-6, 1e-6))),
    _case("a temperature of 1e-6, SwAV", "", _but("swav", teacher_temp=Warmup(1e-6, 1e-6))),
    _case("a temperature of 1e6", "", _but("dino", teacher_temp=Warmup(1e6, 1e6), student_temp=1e6)),
    _case("a queue longer than the data", "", _but("swav", queue=Queue(500))),
    _case("a queue of one", "", _but("swav", queue=Queue(1))),
    _case("a queue of none", "length 0", lambda: method("swav").but(queue=Queue(0))),
    _case("a teacher that never moves", "", _but("dino", ema=1.0)),
    _case("a teacher that is the student of the step before", "", _but("dino", ema=0.0, ema_end=0.0)),
    _case("a momentum above 1", "ema", _but("dino", ema=1.5)),
    _case("an entropy of the mean that counts for nothing", "", _plus("dino", 0.0, mean_entropy, "probabilities")),
    # optimization
    _case("no epochs", "epochs", epochs=0.0),
    _case("less than a step", epochs=0.01, warmup_epochs=0.0),
    _case("an infinite number of epochs", "epochs", epochs=math.inf),
    _case("epochs that are no number", "epochs", epochs=math.nan),
    _case("a warm-up longer than the run", "warmup_epochs", warmup_epochs=9.0),
    _case("a learning rate of 0", lr=0.0, min_lr=0.0),
    _case("a learning rate that is no number", "lr", lr=math.nan),
    _case("an infinite learning rate", "lr", lr=math.inf),
    _case("a negative learning rate", "lr", lr=-1.0),
    _case("a huge learning rate, clipped", "", lr=1e3, clip="global"),
    _case("more parts than images in a batch", "accumulate", accumulate=32),
    _case("parts that do not divide a batch", "accumulate", accumulate=3),
    _case("parts of one image", accumulate=16),
    _case("no parts", "accumulate", accumulate=0),
    _case("frozen longer than the run", freeze_last_layer=99.0),
    _case("no weight decay, no clipping", weight_decay=0.0, weight_decay_end=0.0, clip_grad=0.0),
    _case("every residual branch dropped", "drop_path", drop_path=1.0),
    _case("nearly every residual branch dropped", drop_path=0.999),
    # machine
    _case("a negative seed", seed=-7),
    _case("a huge seed", "seed", seed=2**80),
    _case("fewer workers than none", "workers", workers=-1),
    _case("no bad step allowed", "bad_steps", bad_steps=0),
    _case("a checkpoint every step", checkpoint_epochs=1e-9),
    _case("a checkpoint never", checkpoint_epochs=1e9),
    _case("an infinite time between checkpoints", "checkpoint_epochs", checkpoint_epochs=math.inf),
    _case("metrics less often than the run is long", monitor_steps=10**6),
    _case("metrics never", "monitor_steps", monitor_steps=0),
    _case("a precision that does not exist", "precision", precision="fp8"),
    _case("a precision that is measured", precision="auto"),
    _case("a device that does not exist", "device", device="abacus"),
    _case("a device without a name", "device", device=""),
    _case("a ResNet whose blocks are compiled", "compil", compile=True, **_resnet()),
    _case("a ResNet that computes activations again", "", recompute=True, **_resnet()),
    _case("a sharded run of one process", shard=True),
    _case("a network that does not exist", "no-such-net", backbone="no-such-net"),
    _case("an option that the network does not have", "wheels", backbone_options={"wheels": 4}),
    _case("an optimizer that does not exist", "optimizer", optimizer="sgd"),
)  # fmt: skip


def outcome(case: Case, folder: Path) -> str | None:
    """What is wrong about how a case ends, or None."""
    out = folder / "runs"
    try:
        with given(case.images()) if case.images else mock.patch.object(training, "environment", dict):
            result = training.train(case.method(), tiny(out, **case.run), "x")
    except CLEAR as error:
        return _of_refusal(case, str(error), out)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if case.says:
        return "it trained"
    losses = [value for row in result.metrics for value in row.values()]
    if not all(map(math.isfinite, losses)) or not (result.folder / "result.json").is_file():
        return f"its metrics are {result.last}"
    return f"{result.summary['skipped_steps']} steps were skipped" if result.summary["skipped_steps"] else None


def _of_refusal(case: Case, text: str, out: Path) -> str | None:
    if not case.says:
        return f"it was refused: {text}"
    if not any(word in text for word in case.says.split("|")) or "\n" in text:
        return f"it says {text!r}"
    return f"it left {[p.name for p in out.rglob('*')]}" if out.exists() else None


def degenerate(cases: tuple[Case, ...] = CASES) -> Iterator[tuple[str, str | None]]:
    """Each case's name, and what was wrong, or None; at last, places that cannot be written."""
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            yield case.name, outcome(case, Path(folder))


def places() -> Iterator[tuple[str, str | None]]:
    """Folders that cannot be made are refused in one line of OSError, and what is in the way stays."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "file")
        file.write_text("mine")
        for name, out in (
            ("a file", file),
            ("below a file", file / "runs"),
            ("a name too long", Path(temporary, "x" * 300)),
        ):
            said = None
            try:
                with given(pictures()):
                    training.train(method("dino"), tiny(out), "x")
                said = "it trained"
            except OSError as error:
                said = f"it says {error}" if "\n" in str(error) or str(out) not in str(error) else None
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            yield f"runs go to {name}", said or (None if file.read_text() == "mine" else "the file has changed")
