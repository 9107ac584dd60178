"""The verbs of `prototypes evaluate` that ask more than accuracy: tails, corruptions, other test sets, prototypes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, arg

from prototypes_lib.cli.task import Classifier, Kind, On, check_votes, opened, positive, score, unofficial


def long_tail(
    on: OmitArgPrefixes[On],
    classifier: Classifier = "knn",
    k: int = 20,
    c: float = 1.0,
    groups: Literal["100,20", "thirds"] = "100,20",
    features: Kind = "C",
) -> int:
    """Accuracy of head, medium and tail classes; --data NAME-lt-FACTOR makes any data set long-tailed.

    Args:
        on: model, data and machine.
        classifier: nearest neighbors or logistic regression.
        k: neighbors.
        c: weight of logistic regression's errors.
        groups: head above 100 training images and tail below 20, or thirds of the classes.
        features: class token (C), of 4 blocks or with the mean patch (D), before the last norm (MSN).
    """
    from prototypes_lib import evaluate

    positive(c=c)
    check_votes(None, (k,) if classifier == "knn" else ())
    task = opened(on, "long-tail")
    check_votes(len(task.train), (k,) if classifier == "knn" else ())
    found = evaluate.long_tail(
        *task.features(features), classifier=classifier, k=k, c=c, seed=on.seed,
        groups="thirds" if groups == "thirds" else (100, 20), **task.machine(),
    )  # fmt: skip
    print(f"{classifier} on {task.where}, {found.n} test images of {found.classes} classes")
    rows = {"top-1": (found.accuracy, found.interval), "balanced": (found.balanced, found.balanced_interval)}
    rows |= {"macro-F1": (found.macro_f1, found.macro_f1_interval)}
    rows |= {name: (group.accuracy, group.interval) for name, group in found.groups.items() if group.classes}
    for name, row in rows.items():
        task.say(name, *row)
    scores = [score(task, f"{name} (%) [classifier={classifier}]", *row) for name, row in rows.items()]
    task.write(found, {"scores": scores}, classifier=classifier, k=k, c=c, groups=groups, features=features)
    return 0


def robustness(
    on: OmitArgPrefixes[On],
    corruptions: tuple[str, ...] = (),
    severities: tuple[int, ...] = (1, 2, 3, 4, 5),
    classifier: Classifier = "knn",
    k: int = 20,
    c: float = 1.0,
    baseline: str | None = None,
    features: Kind = "C",
) -> int:
    """Errors on corrupted test images (the 15 corruptions of ImageNet-C, made on the fly).

    Args:
        on: model, data and machine.
        corruptions: some of the 15; all of them by default.
        severities: from 1 to 5.
        classifier: nearest neighbors or logistic regression, trained on clean features.
        k: neighbors.
        c: weight of logistic regression's errors.
        baseline: what errors are divided by: alexnet (for ImageNet), or a file that --json wrote for the same data,
            severities and classifier; by default nothing.
        features: class token (C), of 4 blocks or with the mean patch (D), before the last norm (MSN).
    """
    from prototypes_lib import evaluate
    from prototypes_lib.evaluate.corruptions import CORRUPTIONS, check
    from prototypes_lib.evaluate.features import kind
    from prototypes_lib.evaluate.robustness import check_alike

    positive(c=c)
    check_votes(None, (k,) if classifier == "knn" else ())
    names = corruptions or CORRUPTIONS
    if not severities or len(set(names)) < len(names) or len(set(severities)) < len(severities):
        raise ValueError(f"give corruptions and severities, each once; got {names} and {severities}")
    for name in names:
        for severity in severities:
            check(name, severity)
    divided, about = _baseline(baseline, names)
    task = opened(on, "robustness")
    asked = {"data": str(Path(task.where)), "test images": len(task.test), "severities": severities}
    check_alike(about, asked | {"classifier": classifier}, f"baseline {baseline}")
    check_votes(len(task.train), (k,) if classifier == "knn" else ())
    view = kind(task.backbone, features) | task.colors
    own = {"size": task.size, "device": task.device}
    train = evaluate.extract(task.backbone, task.train, **view, **own, cache=on.cache, progress=on.progress)
    found = evaluate.robustness(
        task.backbone, train, task.test, corruptions=names, severities=severities, classifier=classifier, k=k, c=c,
        baseline=divided, seed=on.seed, progress=on.progress, cache=on.cache, **view, **own,
    )  # fmt: skip
    divided_by = f" in percent of {Path(baseline).name}'s" if baseline else ""
    print(f"{classifier} on corrupted {task.where}, {found.n} test images; errors{divided_by}")
    for name, value in found.ce.items():
        task.say(name, value)
    task.say("clean accuracy", found.accuracy, found.accuracy_interval)
    task.say("mean corruption error", found.mce, found.interval)
    task.say("relative", found.relative_mce, found.relative_interval)
    of = f"classifier={classifier}; baseline={'none' if baseline is None else Path(baseline).name}"
    unit = "%" if baseline is None else "percent of the baseline's"
    scores = [score(task, f"mean corruption error ({unit}) [{of}]", found.mce, found.interval)]
    if math.isfinite(found.relative_mce):
        metric = f"relative mean corruption error ({'points' if baseline is None else unit}) [{of}]"
        scores.append(score(task, metric, found.relative_mce, found.relative_interval))
    scores.append(score(task, f"top-1 (%) [classifier={classifier}]", found.accuracy, found.accuracy_interval))
    options = {"severities": severities, "classifier": classifier, "k": k, "c": c, "baseline": baseline}
    task.write(found, {"scores": scores}, corruptions=names, features=features, **options)
    return 0


def restricted(
    on: OmitArgPrefixes[On],
    test: Annotated[Path, arg(metavar="FOLDER")],
    classes: Annotated[Path, arg(metavar="FILE")],
    classifier: Classifier = "knn",
    k: int = 20,
    c: float = 1.0,
    features: Kind = "C",
) -> int:
    """Accuracy on a test set with a few of the training classes (ImageNet-A, ImageNet-R).

    Args:
        on: model, data and machine.
        test: that set, a folder CLASS/image.jpg.
        classes: a file with the names of its classes among the training classes, one a line.
        classifier: nearest neighbors or logistic regression.
        k: neighbors.
        c: weight of logistic regression's errors.
        features: class token (C), of 4 blocks or with the mean patch (D), before the last norm (MSN).
    """
    from dataclasses import replace

    import numpy as np

    from prototypes_lib import evaluate
    from prototypes_lib.data import load
    from prototypes_lib.evaluate.restricted import check_names, class_lines, label_map

    positive(c=c)
    check_votes(None, (k,) if classifier == "knn" else ())
    if not test.exists():
        raise FileNotFoundError(f"{test} is not there")
    class_lines(classes)
    task = opened(on, "restricted")
    kept = label_map(classes, task.train.classes)
    check_votes(int(np.isin(task.train.labels, kept).sum()), (k,) if classifier == "knn" else ())
    shifted = load(test, "train", image_size=task.stored, root=on.root, limit=on.limit, progress=on.progress)
    check_names(test, shifted.classes, classes, [task.train.classes[place] for place in kept])
    task = replace(task, test=shifted, where=test.name)
    found = evaluate.restricted(*task.features(features), kept, classifier=classifier, k=k, c=c, device=task.device)
    print(f"{classifier} on {test.name}, {found.n} test images of {found.classes} of {len(task.train.classes)} classes")
    task.say("accuracy", found.accuracy, found.interval)
    scores = [score(task, f"top-1 (%) [classifier={classifier}]", found.accuracy, found.interval)]
    options = {"classifier": classifier, "k": k, "c": c, "features": features}
    task.write(found, {"scores": scores}, test=test, classes=classes, **options)
    return 0


def clusters(on: OmitArgPrefixes[On]) -> int:
    """How a run's prototypes agree with the classes: NMI, ARI, matched accuracy of the test images.

    Args:
        on: model (a run folder), data and machine.
    """
    from prototypes_lib import evaluate
    from prototypes_lib.checkpoints import load_network
    from prototypes_lib.evaluate.clusters import prototype_assignments, prototypes_as_classes, score_of

    told = score_of(_run_folder(on), on.network)
    network = load_network(on.model, on.network)
    if network.prototypes is None:
        raise ValueError(f"{on.model}: this method has no prototypes (SimDINO, for example)")
    task = opened(on, "clusters")
    train, test = task.features()
    assigned = [prototype_assignments(network, part, told, device=task.device) for part in (train, test)]
    found = evaluate.clusters(assigned[1], test.labels, k=len(network.prototypes.w), seed=on.seed)
    named = prototypes_as_classes(assigned[0], train.labels, assigned[1], test.labels)
    print(f"clusters of {task.where}, {found.n} test images on {found.used} of {found.k} prototypes")
    for name, value, interval in (
        ("NMI", found.nmi, found.nmi_interval), ("ARI", found.ari, found.ari_interval),
        ("FMI", found.fmi, found.fmi_interval),
    ):  # fmt: skip
        task.say(name, value, interval, unit="")
    task.say("matched accuracy", found.accuracy, found.interval)
    task.say("purity", found.purity, found.purity_interval)
    task.say("prototypes as classes", named.accuracy, named.interval)
    scores = [
        score(task, "NMI (of 1)", found.nmi, found.nmi_interval),
        score(task, "ARI (of 1)", found.ari, found.ari_interval),
        score(task, "FMI (of 1)", found.fmi, found.fmi_interval),
        score(task, "matched accuracy (%)", found.accuracy, found.interval),
        score(task, "purity (%)", found.purity, found.purity_interval),
        score(task, "prototypes as classes top-1 (%)", named.accuracy, named.interval),
    ]
    task.write({"clusters": found, "prototypes_as_classes": named}, {"scores": scores})
    return 0


def precision(
    on: OmitArgPrefixes[On],
    k: int = 20,
    temperature: float = 0.07,
    bins: int = 10,
    eps: float = 0.025,
) -> int:
    """kNN accuracy by the precision of an image's prototype (vMF, Fig. 2); data by redundancy (PPC, Fig. 2).

    Args:
        on: model (a run folder), data and machine.
        k: neighbors.
        temperature: of the votes.
        bins: ranges of percentiles of the precision.
        eps: cosine distance below which two prototypes are copies.
    """
    from prototypes_lib.checkpoints import load_network
    from prototypes_lib.evaluate.clusters import score_of
    from prototypes_lib.evaluate.precision import precision_of_run, redundancy_of_run
    from prototypes_lib.scoreboard.paper import KNN, qualified

    positive(temperature=temperature, bins=bins, eps=eps)
    check_votes(None, (k,), temperature)
    score_of(_run_folder(on), on.network)
    if load_network(on.model, on.network).prototypes is None:
        raise ValueError(f"{on.model}: this method has no prototypes (SimDINO, for example)")
    task = opened(on, "precision")
    check_votes(len(task.train), (k,), temperature)
    train, test = task.features()
    options = {"k": k, "temperature": temperature, "bins": bins}
    found = precision_of_run(on.model, train, test, network=on.network, seed=on.seed, **options, **task.machine())
    held = redundancy_of_run(on.model, train, network=on.network, eps=eps, device=task.device)
    print(f"kNN (k = {k}) on {task.where} by percentile of precision, {sum(found.n)} test images")
    for i, n in enumerate(found.n):
        low, high = found.percentiles[i : i + 2]
        name = f"{low:g} to {high:g} ({n} images)"
        task.say(name, found.accuracy[i], found.interval[i]) if n else print(f"  {name}")
    task.say("rank correlation", found.trend, found.trend_interval, unit="")
    print(f"training images on {held.m} unique of {held.k} prototypes, by copies of a prototype")
    for i, factor in enumerate(held.factor):
        task.say(f"{factor} ({held.prototypes[i]} prototypes)", held.share[i])
    told = {"k": str(k)} | unofficial({"temperature": 0.07}, temperature=temperature)
    scores = [score(task, qualified(KNN, **told), found.overall)]
    if math.isfinite(found.trend):
        scores.append(score(task, "precision trend (rank correlation)", found.trend, found.trend_interval))
    task.write({"precision": found, "redundancy": held}, {"scores": scores}, eps=eps, **options)
    return 0


def _run_folder(on: On) -> str:
    """Only a run folder has projector and prototypes together with the method they belong to."""
    if not (Path(on.model) / "config.json").is_file():
        raise FileNotFoundError(f"{on.model} is no run folder: it has no config.json, hence no prototypes of a method")
    return on.model


def _baseline(name: str | None, corruptions: tuple[str, ...]) -> tuple[Mapping[str, float] | None, dict[str, Any]]:
    """Errors to divide by, of AlexNet or of a record, which must have all that is asked; and how they were measured."""
    from prototypes_lib.evaluate.robustness import ALEXNET, SEVERITIES

    if name is None or name == "alexnet":
        return (None, {}) if name is None else (ALEXNET, {"severities": SEVERITIES})
    if not Path(name).is_file():
        raise FileNotFoundError(f"baseline {name} is neither alexnet nor a file that --json wrote")
    try:
        run = json.loads(Path(name).read_text())["runs"][0]
        result = run["result"]
        found = {"clean": 100 - result["accuracy"]} | {c: sum(e) / len(e) for c, e in result["error"].items()}
        about = {"data": str(Path(run["data"])), "test images": run["n_test"]}
        about |= {"severities": tuple(result["severities"]), "classifier": result["classifier"]}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"baseline {name} is no record of `prototypes evaluate robustness --json`") from error
    if lacking := [c for c in corruptions if c not in found]:
        raise ValueError(f"baseline {name} has no error of {', '.join(lacking)}")
    return found, about
