"""Evaluate a backbone, frozen or fine-tuned, by one protocol.

MODEL is a run folder, an export, a checkpoint file (DINO, iBOT, DINOv2, MSN, SwAV, SimDINO), or timm:NAME with timm's
pretrained weights. `prototypes evaluate PROTOCOL --help` has the options of each.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes

from prototypes_lib.cli.beyond_accuracy import clusters, long_tail, precision, restricted, robustness
from prototypes_lib.cli.task import Kind, On, check_votes, opened, positive, score, unofficial


def knn(
    on: OmitArgPrefixes[On],
    k: tuple[int, ...] = (10, 20, 100, 200),
    temperature: float = 0.07,
    weights: Literal["exp", "softmax", "uniform", "inverse"] = "exp",
    normalize: Literal["length", "centered", "none"] = "length",
    metric: Literal["dot", "euclidean"] = "dot",
    features: Kind = "C",
) -> int:
    """Weighted nearest neighbors on frozen features (DINO).

    Args:
        on: model, data and machine.
        k: numbers of neighbors.
        temperature: T of exp(cos / T).
        weights: of the votes.
        normalize: features to unit length, before that less the mean of the training features, or as they are.
        metric: what is near.
        features: class token (C), of 4 blocks or with the mean patch (D), before the last norm (MSN).
    """
    from prototypes_lib import evaluate
    from prototypes_lib.scoreboard.paper import KNN, qualified

    positive(temperature=temperature)
    prepared = {"length": True, "centered": "centered", "none": False}[normalize]
    if not k:
        raise ValueError("--k: give at least one number of neighbors")
    check_votes(None, k, temperature, weights, prepared, metric)
    task = opened(on, "knn")
    check_votes(len(task.train), k, temperature, weights, prepared, metric)
    options = {"temperature": temperature, "weights": weights, "metric": metric}
    found = evaluate.knn(*task.features(features), k, normalize=prepared, **options, **task.machine())
    print(f"kNN on {task.where}, {found.n} test images, T = {temperature}")
    for count, accuracy in found.accuracy.items():
        low, high = found.interval[count]
        print(f"  k = {count:<4d} {accuracy:5.2f} %  [{low:.2f}, {high:.2f}]")
    measured: dict = {"knn": found.accuracy, "knn_interval": found.interval}
    official = {"temperature": 0.07, "weights": "exp", "metric": "dot", "normalize": "length", "features": "C"}
    if changed := unofficial(official, normalize=normalize, features=features, **options):
        name = {count: qualified(KNN, k=str(count), **changed) for count in found.accuracy}
        measured = {"scores": [score(task, name[n], x, found.interval[n]) for n, x in found.accuracy.items()]}
    task.write(found, measured, k=k, normalize=normalize, features=features, **options)
    return 0


def knn_explorer(on: OmitArgPrefixes[On], features: Kind = "C") -> int:
    """The same features under everybody's kNN: how many points are protocol.

    Args:
        on: model, data and machine.
        features: class token (C), of 4 blocks or with the mean patch (D), before the last norm (MSN).
    """
    from prototypes_lib import evaluate

    task = opened(on, "knn-explorer")
    found = evaluate.explore(*task.features(features), **task.machine())
    print(f"kNN under {len(found.rows)} protocols on {task.where}, {found.n} test images")
    for row in found.rows:
        task.say(row.protocol.name, row.accuracy, row.interval)
    for name in found.left_out:
        print(f"  {name:<24s} needs more than the {len(task.train)} training images")
    print(f"  {found.spread:.2f} points between the best and the worst are protocol")
    scores = [score(task, f"kNN top-1 (%) [protocol={r.protocol.name}]", r.accuracy, r.interval) for r in found.rows]
    task.write(found, {"scores": scores}, features=features)
    return 0


def linear(
    on: OmitArgPrefixes[On],
    features: Literal["C", "D"] = "C",
    sweep: Literal["dino", "ibot", "dinov2"] = "dino",
    lrs: tuple[float, ...] = (),
    frozen: bool = False,
    epochs: int = 100,
    batch_size: int = 256,
    schedule: Literal["epoch", "step"] = "epoch",
    holdout: float = 0.1,
) -> int:
    """A linear layer trained by SGD on random crops through the frozen backbone (DINO).

    Args:
        on: model, data and machine.
        features: class token (C), or of 4 blocks or with the mean patch, by width (D).
        sweep: whose learning rates: DINO's one, iBOT's 45, DINOv2's 13, all in one pass.
        lrs: learning rates for a batch of 256 instead.
        frozen: train on features extracted once, without crops: not the official protocol, far less time.
        epochs: passes over the training images.
        batch_size: images a step.
        schedule: whether the learning rate changes after each epoch (DINO) or each step (DINOv2).
        holdout: share of the training images that chooses among learning rates; 0: the test images choose.
    """
    from prototypes_lib import evaluate
    from prototypes_lib.evaluate.linear import LRS_DINO, LRS_DINOV2, LRS_IBOT, check_options
    from prototypes_lib.scoreboard.paper import LINEAR, qualified

    rates = lrs or {"dino": LRS_DINO, "ibot": LRS_IBOT, "dinov2": LRS_DINOV2}[sweep]
    check_options(rates, epochs, batch_size, schedule, holdout)
    task = opened(on, "linear")
    options = {"epochs": epochs, "batch_size": batch_size, "schedule": schedule, "holdout": holdout}
    pixels = {"backbone": task.backbone, "size": task.size, **task.colors}
    sets = task.features(features) if frozen else (task.train, task.test)
    found = evaluate.linear(
        *sets, features=features, lrs=rates, seed=on.seed, **options, **({} if frozen else pixels), **task.machine()
    )
    print(f"linear classifier on {task.where}, {found.n} test images, {'frozen' if frozen else 'augmented'} features")
    task.say(f"learning rate {found.lr:g}", found.accuracy, found.interval)
    task.say("best on the test images", found.official)
    official = {"frozen": False, "lrs": "", "epochs": 100, "batch_size": 256, "schedule": "epoch", "holdout": 0.1}
    asked = options | {"frozen": frozen, "lrs": "/".join(f"{lr:g}" for lr in lrs)}
    if len(rates) == 1:  # nothing to choose
        del asked["holdout"]
    told = {"features": "CLS" if features == "C" else "DINO"} | unofficial(official, **asked)
    scores = [score(task, qualified(LINEAR, **told), found.accuracy, found.interval)]
    task.write(found, {"scores": scores}, features=features, lrs=rates, frozen=frozen, **options)
    return 0


def few_shot(
    on: OmitArgPrefixes[On],
    images: tuple[int, ...] = (1, 2, 5),
    share: float | None = None,
    splits: int = 3,
    split_files: tuple[Path, ...] = (),
    lambd: float = 0.075,
    features: Kind = "MSN",
) -> int:
    """Logistic regression on a few images of each class (MSN).

    Args:
        on: model, data and machine.
        images: of each class, an answer for each.
        share: also this share of each class (0.01).
        splits: how many to draw of each.
        split_files: lists of images, a file a split, instead of drawing them.
        lambd: strength of the regularization.
        features: class token before the last norm (MSN), after it (C), of 4 blocks or with the mean patch (D).
    """
    import torch

    from prototypes_lib import evaluate
    from prototypes_lib.evaluate.few_shot import draw_split, read_split, split_lines

    positive(lambd=lambd, splits=splits)
    for path in split_files:
        split_lines(path)
    task = opened(on, "few-shot")
    asked = (*images, *(() if share is None else (float(share),)))
    for number in () if split_files else asked:
        draw_split(torch.from_numpy(task.train.labels), number)
    given = [read_split(path, task.train) for path in split_files]
    options = {"images": images, "share": share, "lambd": lambd}
    found = evaluate.few_shot(
        *task.features(features), splits=given or splits, seed=on.seed, **options, **task.machine()
    )
    print(f"few-shot on {task.where}, {found.n} test images, lambda {found.lambd}")
    scores = []
    for name, values in found.values.items():
        what = name if "%" in name else f"{name}/class"
        task.say(f"{what}, {len(values)} split{'s' * (len(values) > 1)}", found.mean[name], found.interval[name])
        scores.append(score(task, f"few-shot top-1 (%) [images={what}]", found.mean[name], found.interval[name]))
    task.write(found, {"scores": scores}, splits=splits, split_files=split_files, features=features, **options)
    return 0


def transfer(
    on: OmitArgPrefixes[On],
    metric: Literal["auto", "top1", "mean_per_class"] = "auto",
    folds: int | None = None,
    val: bool = False,
    lambdas: tuple[float, ...] = (),
    features: Kind = "C",
) -> int:
    """Logistic regression with the best of 45 regularizations (Ericsson et al.; the vMF paper's tables).

    Args:
        on: model, data and machine.
        metric: what is told; auto is the official one, mean_per_class for Aircraft, Caltech-101, Flowers and Pets.
        folds: choose by so many folds of the training images (vMF: 5) instead of a fifth held out, or of official
            validation images, which choose for Aircraft, DTD and Flowers by default.
        val: choose by the images in a folder's val/, beside train/ and test/.
        lambdas: strengths to choose among instead of the 45.
        features: class token (C), of 4 blocks or with the mean patch (D), before the last norm (MSN).
    """
    from prototypes_lib import evaluate
    from prototypes_lib.data import load
    from prototypes_lib.data.datasets import OFFICIAL_VAL, WITHOUT_VAL
    from prototypes_lib.evaluate.transfer import LAMBDAS, METRIC, check_options

    if val and folds is not None:
        raise ValueError("--val and --folds both say how to choose: leave one out")
    check_options(folds=folds, lambdas=lambdas or LAMBDAS)
    task = opened(on, "transfer", dict.fromkeys(OFFICIAL_VAL if folds is None else (), WITHOUT_VAL))
    if folds is not None and folds > len(task.train):
        raise ValueError(f"folds={folds}: {len(task.train)} training images cannot be cut into {folds} parts")
    val = val or (folds is None and task.where in OFFICIAL_VAL)
    told = METRIC.get(task.where.split("-lt-")[0], "top1") if metric == "auto" else metric
    options = {"metric": told, "folds": folds, "lambdas": lambdas or LAMBDAS}
    own = {"root": on.root, "image_size": task.stored, "limit": on.limit, "progress": on.progress}
    held = [load(task.where, "val", **own)] if val else []
    train, test, *chooses = task.features(features, *held)
    options |= {"val": chooses[0]} if val else {}
    found = evaluate.transfer(train, test, seed=on.seed, **options, **task.machine())
    print(f"transfer to {task.where}, {found.n} test images, {told}, lambda {found.lam:g} of {len(found.lambdas)}")
    task.say("accuracy", found.accuracy, found.interval)
    if found.at_edge:
        print("  the chosen lambda is at the edge of those tried")
    if not found.converged:
        print("  the last fit stopped before its optimum")
    scores = [score(task, "linear accuracy (%)", found.accuracy, found.interval)]
    measured = {"scores": scores} | ({"n_val": len(held[0])} if held else {})
    task.write(found, measured, metric=told, folds=folds, val=val, lambdas=lambdas, features=features)
    return 0


def fine_tune(
    on: OmitArgPrefixes[On],
    recipe: Literal["auto", "vit-s", "vit-b", "small-sets", "inat-s", "inat-b", "cpu"] = "auto",
    lrs: tuple[float, ...] = (),
    epochs: int | None = None,
    warmup_epochs: int | None = None,
    batch_size: int | None = None,
    accumulate: int | None = None,
    workers: int = 0,
) -> int:
    """Train the whole backbone with a linear layer on it (BEiT's and DeiT's recipes, as iBOT).

    Args:
        on: model, data and machine.
        recipe: auto is vit-b from a width of 768 on, else vit-s.
        lrs: peak learning rates, each a run of its own, instead of the recipe's.
        epochs: instead of the recipe's.
        warmup_epochs: instead of the recipe's.
        batch_size: images a step, instead of the recipe's.
        accumulate: parts of a batch, one after the other, instead of the recipe's.
        workers: processes that augment images.
    """
    from prototypes_lib import evaluate
    from prototypes_lib.evaluate.recipes import PRESETS

    asked = {"lrs": lrs or None, "epochs": epochs, "warmup_epochs": warmup_epochs, "batch_size": batch_size}
    asked = {name: value for name, value in (asked | {"accumulate": accumulate}).items() if value is not None}
    PRESETS["vit-s" if recipe == "auto" else recipe].but(**asked)
    task = opened(on, "fine-tune")
    chosen = recipe if recipe != "auto" else "vit-b" if task.backbone.dim >= 768 else "vit-s"
    found = evaluate.fine_tune(
        task.backbone, task.train, task.test, settings=PRESETS[chosen].but(**asked), size=task.size, seed=on.seed,
        workers=workers, **task.colors, **task.machine(),
    )  # fmt: skip
    lr, epoch, best = found.best
    print(f"fine-tuned on {task.where} by {chosen}, {found.n} test images")
    task.say(f"learning rate {found.lr:g}", found.accuracy, found.interval)
    task.say("mean over classes", found.per_class)
    task.say(f"best: lr {lr:g}, epoch {epoch}", best)
    scores = [score(task, "fine-tuned top-1 (%)", found.accuracy, found.interval)]
    scores.append(score(task, "fine-tuned mean-per-class accuracy (%)", found.per_class))
    task.write(found, {"scores": scores}, recipe=chosen, **asked)
    return 0


VERBS: dict[str, Callable[..., int]] = {
    "knn": knn, "knn-explorer": knn_explorer, "linear": linear, "few-shot": few_shot, "transfer": transfer,
    "fine-tune": fine_tune, "long-tail": long_tail, "robustness": robustness, "restricted": restricted,
    "clusters": clusters, "precision": precision,
}  # fmt: skip
