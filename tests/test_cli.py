import dataclasses
import inspect
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from prototypes_lib import checkpoints, data
from prototypes_lib.cli import COMMANDS, run_command
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
    assert call("doctor", str(tmp_path / "export")) == 0 and capsys.readouterr().out == out
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
        (("evaluate",), r"Missing from prototypes evaluate: {knn} \(knn, [^()]*\), RUN-FOLDER \(a run [^()]*\)"),
        (("train", "dino", "--epochs", "x"), r"Error parsing --epochs: could not convert string to float: 'x'"),
        (("train", "dino", "--precision", "x"), r"precision='x': choose auto, fp32 or bf16"),
        (("doctor", "x", "--network", "y"), r"invalid choice 'y' for argument '--network'\. Expected .*'student'\)\."),
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
