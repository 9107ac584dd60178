import dataclasses
import inspect
import io
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from real_features import backbone

from prototypes_lib import checkpoints, data, evaluate
from prototypes_lib.backbones import TransformerBackbone
from prototypes_lib.cli import COMMANDS, EVALUATE, run_command
from prototypes_lib.cli.task import On
from prototypes_lib.scoreboard import schema
from prototypes_lib.settings import Run


def call(*argv):
    try:
        return run_command(argv)
    except SystemExit as ended:  # tyro's own refusals and --help
        return ended.code


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert call(command, "--help") in (0, None)
    assert "usage: prototypes " + command in capsys.readouterr().out


@pytest.mark.parametrize("verb", EVALUATE)
def test_every_protocol_explains_its_own_options_and_no_others(verb, capsys):
    assert call("evaluate", verb, "--help") in (0, None)
    said = capsys.readouterr().out
    assert f"usage: prototypes evaluate {verb}" in said and "MODEL" in said
    own = {name for name in inspect.signature(EVALUATE[verb]).parameters if name != "on"}
    shared = {field.name for field in dataclasses.fields(On)} - {"model"}
    named = {name.replace("-", "_") for name in re.findall(r"^[│ ] --([a-z][a-z-]*)", said, re.MULTILINE)}
    assert named == own | shared


@pytest.mark.slow
def test_train_evaluate_and_doctor_follow_each_other(tmp_path, capsys):
    small = (
        "--small", "--limit", "64", "--batch-size", "16", "--epochs", "1", "--warmup-epochs", "0", "--hidden", "16",
        "--n-prototypes", "12", "--n-local", "1", "--out", str(tmp_path), "--no-progress",
    )  # fmt: skip
    assert call("train", "dino-vmf-kp", *small) == 0
    folder = capsys.readouterr().out.strip().splitlines()[-1]
    assert call("doctor", folder) == 0
    out = capsys.readouterr().out
    assert "K = 12 prototypes of dimension 16" in out and re.search(r"M = \d+ unique", out)
    assert re.search(r"index order\n    other orders give \d+ to \d+; \d+ connected components\n", out)
    assert call("export", folder, str(tmp_path / "export")) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'export'}\n"
    assert call("doctor", str(tmp_path / "export")) == 0  # it holds the teacher alone
    assert set(capsys.readouterr().out.splitlines()) < set(out.splitlines())
    assert call("export", folder, str(tmp_path / "export")) == 0 and call("export", folder, folder) == 2
    assert "is no export" in capsys.readouterr().err
    assert call("evaluate", "knn", folder, "--k", "5", "10") == 0
    assert re.search(r"k = 5 +\d+\.\d+ %", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("train", "dinov9"), "dinov9"),
        (("train", "dino", "--data", "no-such-set"), "no-such-set"),
        (("train", "dino", "--epochs", "-1"), "epochs"),
        (("train", "dino", "--ema", "2"), "ema"),
        (("doctor", "no-such-folder"), "no-such-folder"),
        (("evaluate", "knn", "no-such-folder"), "no-such-folder"),
        (("export", "no-such-folder", "there"), "no-such-folder"),
        (("data", "no-such-set"), "no-such-set"),
        (("run", "--timeout", "nan"), "timeout"),
        (("run", "--total-timeout", "-1"), "total-timeout"),
        (("run", "--only", "99"), "99"),
        (("run", "--only", "50", "-p", "epocs", "3"), "epocs"),
    ],
)
def test_a_wrong_request_is_one_line_and_status_2(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*argv) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and len(said.splitlines()) == 1
    assert not [p for p in tmp_path.iterdir() if p.name not in ("out",)]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("foo",), r"Unrecognized options: foo; Available subcommands: run, .*data"),
        ((), r"Missing subcommand: Expected one of {run, .*data}\."),
        (("train",), r"name a METHOD or a --paper-run NAME, one of the two"),
        (("evaluate",), r"Missing subcommand: Expected one of {knn, .*precision}\."),
        (("evaluate", "knn"), r"Missing from prototypes evaluate knn: MODEL \(run folder, [^()]*\)"),
        (("evaluate", "kmeans", "x"), r"Unrecognized options: kmeans, x; Available subcommands: knn, .*precision"),
        (
            ("evaluate", "knn", "x", "--lambd", "1"),
            r"Unrecognized or misplaced options: --lambd .* in prototypes evaluate few-shot --help\).*",
        ),
        (("train", "dino", "--epochs", "x"), r"Error parsing --epochs: could not convert string to float: 'x'"),
        (("train", "dino", "--precision", "x"), r"precision='x': choose auto, fp32 or bf16"),
        (("doctor", "x", "--network", "y"), r"invalid choice 'y' for argument '--network'\. Expected .*'teacher'.*"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # with a frame of lines, and without
def test_what_the_parser_refuses_reads_as_one_sentence(argv, said, encoding, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert call(*argv) == 2
    assert re.fullmatch(f"error: {said}\n", capsys.readouterr().err)


def test_every_setting_of_a_run_explains_itself():
    fields = [line for line in inspect.getsource(Run).splitlines() if re.match(r"    \w+: .* = ", line)]
    assert len(fields) == len(dataclasses.fields(Run))
    assert not [line for line in fields if "  # " not in line]


def test_the_time_limits_of_a_run_can_be_lifted_and_its_help_says_so(capsys):
    assert call("run", "--help") == 0
    assert capsys.readouterr().out.count("0 = no limit") == 2


def test_evaluation_refuses_parts_with_other_classes(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text('{"run": {}}')
    monkeypatch.setattr(checkpoints, "load_backbone", lambda _: None)
    pixels, labels = np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64)
    monkeypatch.setattr(data, "load", lambda _, split, **__: data.Images(pixels, labels, (split,), "toy"))
    assert call("evaluate", "knn", str(tmp_path)) == 2
    assert "class" in capsys.readouterr().err


def test_data_lists_every_data_set(capsys):
    assert call("data") == 0
    out = capsys.readouterr().out
    for name in ("cifar10-5k", "stl10", "inaturalist-2018"):
        assert name in out


def test_the_module_runs_and_help_needs_no_torch_seconds():
    ended = subprocess.run([sys.executable, "-m", "prototypes_lib", "nonsense"], capture_output=True, text=True)
    assert ended.returncode == 2 and "nonsense" in ended.stderr + ended.stdout


def test_small_is_a_set_of_defaults_and_every_option_given_counts(tmp_path, capsys):
    given = ("--epochs", "100", "--batch-size", "256", "--hidden", "2048", "--drop-path", "0.1")
    assert call("train", "dino", "--small", *given, "--data", "no-such-set", "--out", str(tmp_path)) == 2
    from prototypes_lib import cli

    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prototypes_lib.train.train", lambda method, run, name: seen.update(run=run) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.run_command(["train", "dino", "--small", *given])
    run = seen["run"]
    assert (run.epochs, run.batch_size, run.hidden, run.drop_path) == (100, 256, 2048, 0.1)
    assert run.image_size == 32 and run.backbone == "vit_pico_patch8"


def test_a_paper_run_gives_the_defaults_and_other_options_change_them(tmp_path, capsys):
    assert call("train", "--paper-run", "list") == 0
    assert "dinov2-vitl16-short" in capsys.readouterr().out
    assert call("train", "--paper-run", "msn-vits16", "--help") == 0
    assert "1.25" in capsys.readouterr().out
    for wrong in (["--paper-run", "dino-vitx"], ["dino", "--paper-run", "msn-vits16"], []):
        assert call("train", *wrong) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and "paper" in said
    assert call("train", "--paper-run", "msn-vits16", "--data", str(tmp_path / "nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err


def test_small_and_a_paper_run_exclude_each_other_and_imagenet_wants_a_folder(capsys):
    assert call("train", "--paper-run", "msn-vits16", "--small") == 2
    assert "leave one out" in capsys.readouterr().err
    assert call("train", "--paper-run", "msn-vits16") == 2
    assert "--data PATH" in capsys.readouterr().err


def test_an_option_of_the_backbone_reaches_it(tmp_path, capsys):
    small = ("--small", "--limit", "64", "--batch-size", "32", "--epochs", "1", "--warmup-epochs", "0", "--no-progress")
    words = ("--n-local", "1", "--out", str(tmp_path), "--backbone-option", "reg_tokens", "2", "--ema", "0")
    assert call("train", "simdino", *small, *words, "--ema-end", "0") == 0
    config = json.loads((tmp_path / capsys.readouterr().out.strip().splitlines()[-1] / "config.json").read_text())
    assert config["run"]["backbone_options"] == {"reg_tokens": 2} and config["method"]["ema_end"] == 0


# ------------------------------------------------------------------------------------------------ evaluate

LIMIT = ("--limit", "200", "--no-progress", "--device", "cpu")
ASKED = {
    "knn": ("--k", "5", "20", "--temperature", "0.1"),
    "knn-explorer": (),
    "linear": ("--frozen", "--epochs", "2", "--features", "D", "--lrs", "0.001", "0.01"),
    "few-shot": ("--images", "1", "2", "--share", "0.1", "--seed", "3"),
    "transfer": ("--metric", "mean_per_class", "--seed", "1", "--lambdas", "0.01", "1"),
    "fine-tune": ("--recipe", "cpu", "--epochs", "2"),
    "long-tail": ("--data", "cifar10-5k-lt-10-seed1", "--groups", "thirds"),
    "robustness": ("--corruptions", "fog", "contrast", "--severities", "2", "4"),
    "clusters": (),
    "precision": ("--bins", "2"),
}


PARTS = {"train": "train", "val": "train", "test": "test"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    small = (
        "--small",
        "--limit",
        "64",
        "--batch-size",
        "16",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--hidden",
        "16",
    )
    words = ("--n-prototypes", "12", "--n-local", "1", "--out", str(out), "--no-progress")
    assert call("train", "dino-vmf", *small, *words) == 0
    return next(path for path in out.iterdir() if (path / "config.json").is_file())


@pytest.mark.parametrize("verb", ASKED)
def test_a_record_is_whole_and_its_command_makes_it_again(verb, run_folder, tmp_path, capsys):
    file = tmp_path / "records" / "answer.json"
    assert call("evaluate", verb, str(run_folder), *LIMIT, *ASKED[verb], "--json", str(file)) == 0, capsys.readouterr()
    said, first = capsys.readouterr().out, schema.read(file)
    (run,) = first.runs
    assert run["hash"] == json.loads((run_folder / "config.json").read_text())["hash"] and run["n_test"] == 200
    values = [score["value"] for score in run.get("scores", [])] or list(run["knn"].values())
    assert any(f"{values[0]:.2f}" in line for line in said.splitlines())
    again = shlex.split(first.command)[1:]
    assert call(*again, "--no-progress", "--device", "cpu", "--json", str(file), "--cache", str(tmp_path / "kept")) == 0
    (other,) = schema.read(file).runs
    assert (other["result"], other.get("scores"), other["knn"]) == (run["result"], run.get("scores"), run["knn"])
    assert bool(list((tmp_path / "kept").glob("*.npy"))) == (verb != "fine-tune")


def test_a_verb_says_what_the_function_finds(run_folder, capsys):
    network = checkpoints.load_backbone(run_folder)
    sets = [data.load("cifar10-5k", split, limit=200, progress=False) for split in ("train", "test")]
    train, test = (evaluate.extract(network, images, size=32) for images in sets)
    capsys.readouterr()
    assert call("evaluate", "knn", str(run_folder), *LIMIT, "--k", "7", "--normalize", "centered") == 0
    accuracy = evaluate.knn(train, test, 7, normalize="centered").accuracy[7]
    assert f"k = 7    {accuracy:5.2f} %" in capsys.readouterr().out
    assert call("evaluate", "knn-explorer", str(run_folder), *LIMIT) == 0
    assert f"{evaluate.explore(train, test).spread:.2f} points" in capsys.readouterr().out


def test_robustness_is_divided_by_an_earlier_answer(run_folder, tmp_path, capsys):
    file, asked = str(tmp_path / "base.json"), ("--corruptions", "fog", "--severities", "3")
    assert call("evaluate", "robustness", str(run_folder), *LIMIT, *asked, "--json", file) == 0
    assert call("evaluate", "robustness", str(run_folder), *LIMIT, *asked, "--baseline", file) == 0
    assert re.search(r"mean corruption error +100\.00 %", capsys.readouterr().out)
    assert call("evaluate", "robustness", str(run_folder), "--corruptions", "snow", "--baseline", file) == 2
    assert "no error of snow" in capsys.readouterr().err


def test_a_baseline_on_other_data_or_measured_otherwise_is_refused(run_folder, tmp_path, monkeypatch, capsys):
    result = {"accuracy": 50.0, "error": {"fog": [60.0]}, "severities": [3], "classifier": "knn", "n": 200}
    run = {"data": "cifar10-5k", "n_test": 200, "result": result}
    monkeypatch.setattr("prototypes_lib.evaluate.extract", None)
    for change, asked, says in (
        ({"data": "cifar100"}, (), "data cifar100, not cifar10-5k"),
        ({"n_test": 100}, (), "test images 100, not 200"),
        ({}, ("--severities", "3", "4"), "severities [3], not [3, 4]"),
        ({}, ("--classifier", "logistic"), "classifier knn, not logistic"),
        ({}, ("--baseline", "alexnet"), "severities [1, 2, 3, 4, 5], not [3]"),
        ({"result": {k: v for k, v in result.items() if k != "severities"}}, (), "is no record of"),
    ):
        file = tmp_path / "base.json"
        file.write_text(json.dumps({"runs": [run | change]}))
        options = ("--corruptions", "fog", "--severities", "3", "--baseline", str(file), *asked)
        assert call("evaluate", "robustness", str(run_folder), *LIMIT, *options) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


def test_a_test_set_of_some_classes_is_read_from_a_folder(run_folder, tmp_path, capsys, monkeypatch):
    from PIL import Image

    images = data.load("cifar10-5k", "test", limit=40, progress=False)
    for i, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
        if images.classes[label] in ("cat", "ship"):
            folder = tmp_path / "natural" / images.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "classes.txt").write_text("cat\nship\n")
    places = ("--test", str(tmp_path / "natural"), "--classes", str(tmp_path / "classes.txt"))
    assert call("evaluate", "restricted", str(run_folder), *LIMIT, *places, "--json", str(tmp_path / "a.json")) == 0
    assert "8 test images of 2 of 10 classes" in capsys.readouterr().out
    (run,) = schema.read(tmp_path / "a.json").runs
    assert run["n_test"] == 8 and run["data"] == "natural"
    for listed, says in (
        ("cat\n", "'ship' is in"),
        ("cat\ntruck\n", "names 2: 'ship' is in"),
        ("cat\nship\n", "k=20 must lie between 1 and the 14 training images"),
    ):
        (tmp_path / "classes.txt").write_text(listed)
        limit = LIMIT if "k=20" not in says else ("--limit", "70", *LIMIT[2:])
        monkeypatch.setattr("prototypes_lib.evaluate.features.extract", None)  # before any work
        assert call("evaluate", "restricted", str(run_folder), *limit, *places) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


@pytest.mark.slow
def test_transfer_may_choose_by_a_folders_own_validation_images(run_folder, tmp_path, capsys, monkeypatch):
    from PIL import Image

    sets = {part: data.load("cifar10-5k", split, limit=40, progress=False) for part, split in PARTS.items()}
    for part, images in sets.items():
        for i, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
            folder = tmp_path / "mine" / part / images.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    asked = ("--data", str(tmp_path / "mine"), "--val", "--lambdas", "0.01", "1", "--json", str(tmp_path / "a.json"))
    assert call("evaluate", "transfer", str(run_folder), *LIMIT, *asked) == 0
    network = checkpoints.load_backbone(run_folder)
    features = {part: evaluate.extract(network, images, size=32) for part, images in sets.items()}
    expected = evaluate.transfer(features["train"], features["test"], val=features["val"], lambdas=(0.01, 1))
    (run,) = schema.read(tmp_path / "a.json").runs
    assert run["result"]["accuracy"] == expected.accuracy
    assert run["result"]["validation"] == pytest.approx(expected.validation)
    seen = []
    monkeypatch.setattr("prototypes_lib.evaluate.transfer", lambda *_, val, **__: seen.append(len(val.x)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # --limit is of validation images too
        call("evaluate", "transfer", str(run_folder), *LIMIT, *asked, "--limit", "20")
    assert seen == [20]


def test_transfer_chooses_by_official_validation_images_unless_told_otherwise(
    run_folder, tmp_path, capsys, monkeypatch
):
    from PIL import Image

    images = data.load("cifar10-5k", "train", limit=120, progress=False)
    own = {label: np.flatnonzero(images.labels == label) for label in (0, 1)}
    base, parts = tmp_path / "dtd" / "dtd", ("train", "val", "test")
    (base / "labels").mkdir(parents=True)
    for i, part in enumerate(parts):
        listed = [f"{name}/{j}.png" for label, name in enumerate("ab") for j in own[label][4 * i : 4 * i + 4]]
        (base / "labels" / f"{part}1.txt").write_text("".join(f"{line}\n" for line in listed))
        for line in listed:
            (base / "images" / line).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.pixels[int(line[2:-4])]).save(base / "images" / line)
    counted = {"train": 16, "test": 8, "train-without-val": 8, "val": 8}
    monkeypatch.setattr(data, "DATASETS", {"dtd": dataclasses.replace(data.DATASETS["dtd"], images=counted)})
    asked = ("--data", "dtd", "--root", str(tmp_path), "--lambdas", "0.01", "1", "--json", str(tmp_path / "a.json"))
    assert call("evaluate", "transfer", str(run_folder), *LIMIT, *asked) == 0
    (run,) = schema.read(tmp_path / "a.json").runs
    network = checkpoints.load_backbone(run_folder)
    own = {"root": tmp_path, "image_size": 32, "progress": False}
    sets = [data.load("dtd", split, **own) for split in ("train-without-val", "val", "test")]
    train, val, test = (evaluate.extract(network, images, size=32) for images in sets)
    expected = evaluate.transfer(train, test, val=val, lambdas=(0.01, 1), progress=False)
    assert run["result"]["accuracy"] == expected.accuracy and run["n_train"] == run["n_val"] == 8
    assert run["result"]["validation"] == pytest.approx(expected.validation)
    assert call("evaluate", "transfer", str(run_folder), *LIMIT, *asked, "--folds", "2") == 0
    (run,) = schema.read(tmp_path / "a.json").runs
    assert run["n_train"] == 16 and "n_val" not in run


@pytest.mark.slow
def test_a_score_of_another_protocol_than_the_official_one_says_so(run_folder, tmp_path, monkeypatch):
    file = tmp_path / "a.json"

    def metrics(verb, *options):
        assert call("evaluate", verb, str(run_folder), *LIMIT, *options, "--json", str(file)) == 0
        (run,) = schema.read(file).runs
        return [score["metric"] for score in run.get("scores", [])], run["knn"]

    assert metrics("knn", "--k", "5")[0] == [] and metrics("knn", "--k", "5")[1]
    uniform = metrics("knn", "--k", "5", "10", "--weights", "uniform", "--normalize", "none")
    assert uniform == ([f"kNN top-1 (%) [k={k}; normalize=none; weights=uniform]" for k in (5, 10)], {})
    fitted = []
    answer = evaluate.Linear(50.0, (40.0, 60.0), 1e-3, 50.0, {}, {}, {}, 200, 1, 0, "C", True)
    monkeypatch.setattr(evaluate, "linear", lambda *_, **__: fitted.append(1) or answer)
    assert metrics("linear")[0] == metrics("linear", "--sweep", "ibot")[0] == ["linear top-1 (%) [features=CLS]"]
    other = ("--frozen", "--epochs", "2", "--lrs", "0.1", "0.01", "--features", "D")
    assert metrics("linear", *other)[0] == ["linear top-1 (%) [features=DINO; epochs=2; frozen=yes; lrs=0.1/0.01]"]
    assert len(fitted) == 3


def test_fine_tuning_takes_the_models_own_colors(monkeypatch):
    seen = {}
    monkeypatch.setattr("prototypes_lib.backbones.Backbone", lambda name, size, **_: TransformerBackbone(name, size))
    monkeypatch.setattr("prototypes_lib.evaluate.fine_tune", lambda *_, **options: seen.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model = "timm:vit_tiny_patch16_224.augreg_in21k"
        call("evaluate", "fine-tune", model, *LIMIT, "--data", "cifar10-5k", "--recipe", "cpu", "--size", "32")
    assert seen["mean"] == seen["std"] == (0.5, 0.5, 0.5)


def test_a_checkpoint_file_is_a_model_where_data_are_given(tmp_path, capsys):
    weights = {f"backbone.{name}": x for name, x in next(backbone().children()).state_dict().items()}
    torch.save({"teacher": weights}, tmp_path / "checkpoint.pth")
    asked = ("evaluate", "knn", str(tmp_path / "checkpoint.pth"), *LIMIT, "--size", "32", "--k", "10")
    assert call(*asked) == 2 and "give --data" in capsys.readouterr().err
    assert call(*asked, "--data", "cifar10-5k", "--json", str(tmp_path / "a.json")) == 0
    sets = [data.load("cifar10-5k", split, limit=200, progress=False) for split in ("train", "test")]
    expected = evaluate.knn(*(evaluate.extract(backbone(), images) for images in sets), 10)
    (run,) = schema.read(tmp_path / "a.json").runs
    assert run["knn"] == expected.accuracy and run["config"] == {"backbone": "vit_pico_patch8"}
    asked = ("evaluate", "knn", str(tmp_path / "checkpoint.pth"), "--data", "cifar10-5k", "--network", "student")
    assert call(*asked) == 2 and "student" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_of_timm_comes_with_its_weights_colors_and_size_224(monkeypatch, capsys):
    asked, seen = {}, {}

    def pretrained(name, size, **options):
        asked.update(options, name=name, size=size)
        return TransformerBackbone(name, size)

    monkeypatch.setattr("prototypes_lib.backbones.Backbone", pretrained)
    monkeypatch.setattr(
        "prototypes_lib.evaluate.features.extract",
        lambda net, images, **options: (
            seen.update(options) or evaluate.Features(torch.randn(len(images), 4), torch.from_numpy(images.labels))
        ),
    )
    model = "timm:vit_tiny_patch16_224.augreg_in21k"
    assert call("evaluate", "knn", model, *LIMIT, "--data", "cifar10-5k", "--k", "3") == 0
    assert asked == {"name": "vit_tiny_patch16_224.augreg_in21k", "size": 224, "pretrained": True}
    assert seen["mean"] == seen["std"] == (0.5, 0.5, 0.5) and seen["size"] == 224
    capsys.readouterr()
    assert call("evaluate", "knn", "timm:vit_tiny", "--data", "cifar10-5k") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch, capsys):
    def offline(*_, **__):
        raise RuntimeError("no route to host\nTraceback ...")

    monkeypatch.setattr("prototypes_lib.backbones.Backbone", offline)
    assert call("evaluate", "knn", "timm:vit_tiny_patch16_224", "--data", "cifar10-5k") == 2
    assert capsys.readouterr().err == "error: weights of vit_tiny_patch16_224 could not be fetched: no route to host\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("knn", "--k", "4001"), "k=4001 must lie between 1 and the 4000 training images"),
        (("knn", "--temperature", "0"), "temperature=0.0 must be positive"),
        (("knn", "--weights", "inverse"), "metric='euclidean'"),
        (("knn", "--size", "33"), "33 px do not cut into patches of 8 px"),
        (("knn", "--data", "no-such-set"), "no-such-set"),
        (("knn", "--device", "tpu0"), "device"),
        (("knn", "--seed", "-1"), "seed=-1"),
        (("knn", "--limit", "0"), "limit=0"),
        (("knn", "--json", "."), "is a folder; name a file"),
        (("knn", "--json", "occupied/a.json"), "occupied is no folder"),
        (("knn", "--cache", "occupied"), "occupied is no folder"),
        (("linear", "--epochs", "0"), "epochs=0"),
        (("linear", "--lrs", "-1"), "lrs"),
        (("linear", "--holdout", "1"), "holdout=1.0"),
        (("few-shot", "--images", "401"), "401 a class"),
        (("few-shot", "--share", "2"), "share"),
        (("few-shot", "--lambd", "0"), "lambd=0"),
        (("few-shot", "--split-files", "nowhere.txt"), "nowhere.txt"),
        (("transfer", "--folds", "1"), "folds=1"),
        (("transfer", "--folds", "50", "--limit", "21"), "21 training images cannot be cut into 50 parts"),
        (("transfer", "--lambdas", "0"), "lambdas="),
        (("transfer", "--folds", "5", "--val"), "leave one out"),
        (("transfer", "--val"), "cifar10-5k has the splits train, test"),
        (("fine-tune", "--epochs", "10", "--warmup-epochs", "10"), "warmup_epochs=10"),
        (("long-tail", "--c", "0"), "c=0"),
        (("long-tail", "--data", "cifar10-5k-lt-0.5"), "0.5"),
        (("robustness", "--corruptions", "rain"), "rain"),
        (("robustness", "--severities", "6"), "6"),
        (("robustness", "--baseline", "nowhere.json"), "nowhere.json"),
        (("robustness", "--k", "0"), "k=0"),
        (("restricted", "--test", "nowhere", "--classes", "nowhere.txt"), "nowhere"),
        (("precision", "--bins", "0"), "bins=0"),
    ],
)
def test_a_wrong_evaluation_is_one_line_before_any_work(argv, says, run_folder, tmp_path, monkeypatch, capsys):
    def work(*_, **__):
        raise AssertionError("features were made")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "occupied").write_text("")
    for name in ("prototypes_lib.evaluate.features.extract", "prototypes_lib.evaluate.extract"):
        monkeypatch.setattr(name, work)
    verb, *options = argv
    assert call("evaluate", verb, str(run_folder), "--no-progress", *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and says in said
    assert [path.name for path in tmp_path.iterdir()] == ["occupied"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("knn", "--k"), "--k: give at least one"),
        (("knn", "--k", "0"), "k=0"),
        (("knn", "--weights", "inverse"), "metric='euclidean'"),
        (("linear", "--lrs", "0.1", "0.1"), "lrs=(0.1, 0.1): give positive learning rates, each once"),
        (("few-shot", "--split-files", "nowhere.txt"), "nowhere.txt"),
        (("few-shot", "--split-files", "latin.txt"), "latin.txt is no UTF-8 text"),
        (("long-tail", "--k", "0"), "k=0"),
        (("robustness", "--corruptions", "fog", "fog"), "each once; got ('fog', 'fog')"),
        (("robustness", "--severities", "3", "3"), "each once"),
        (("robustness", "--severities"), "give corruptions and severities"),
        (("restricted", "--test", ".", "--classes", "nowhere.txt"), "nowhere.txt"),
        (("restricted", "--test", ".", "--classes", "latin.txt"), "latin.txt is no UTF-8 text"),
        (("restricted", "--test", ".", "--classes", "empty.txt"), "empty.txt lists no class"),
        (("precision", "--k", "0"), "k=0"),
    ],
)
def test_what_needs_no_data_is_refused_before_any_are_read(argv, says, run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("größe\n".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("# none\n")
    monkeypatch.setattr(data, "load", None)
    verb, *options = argv
    assert call("evaluate", verb, str(run_folder), "--no-progress", *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and says in said


@pytest.mark.parametrize("verb", ["clusters", "precision"])
def test_prototypes_are_those_of_a_run_folder(verb, run_folder, tmp_path, capsys):
    assert call("export", str(run_folder), str(tmp_path / "export")) == 0
    assert call("evaluate", verb, str(tmp_path / "export"), *LIMIT) == 2
    assert "is no run folder" in capsys.readouterr().err
