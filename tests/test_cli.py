import re
import subprocess
import sys

import pytest

from prototypes_lib.cli import COMMANDS, run_command


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
        (("data", "no-such-set"), "no-such-set"),
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


def test_data_lists_every_data_set(capsys):
    assert call("data") == 0
    out = capsys.readouterr().out
    for name in ("cifar10-5k", "stl10", "inaturalist-2018"):
        assert name in out


def test_the_module_runs_and_help_needs_no_torch_seconds():
    ended = subprocess.run([sys.executable, "-m", "prototypes_lib", "nonsense"], capture_output=True, text=True)
    assert ended.returncode == 2 and "nonsense" in ended.stderr + ended.stdout
