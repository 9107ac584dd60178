"""Many runs, one evaluator: rows in order, divergence as a result, records that read back."""

import math
import shlex

import pytest

from prototypes_lib import checkpoints, data, evaluate, sweeps
from prototypes_lib.methods import METHODS, Views
from prototypes_lib.settings import Run
from prototypes_lib.sweeps import Job

RUN = Run.small(
    limit=200, batch_size=32, epochs=4 / 6, warmup_epochs=0.0, monitor_steps=2, checkpoint_epochs=1e6, device="cpu"
)


def job(name: str, tmp_path, **run) -> Job:
    method = METHODS[name].but(views=Views(2, 1), **({"n_prototypes": 16} if METHODS[name].n_prototypes else {}))
    return Job(name, method, RUN.but(out=tmp_path, **run), {"method": name})


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return sweeps.sweep([job("dino", out), job("simdino", out, seed=3), job("dino", out, seed=1)], workers=1)


@pytest.mark.slow
def test_rows_come_in_the_order_of_the_jobs_with_all_that_a_result_needs(rows):
    assert [row["method"] for row in rows] == ["dino", "simdino", "dino"] and rows[1]["seed"] == 3
    for row in rows:
        assert {"hash", "seconds", "environment", "config", "images_per_second", "side_by_side"} <= set(row)
        accuracy, low, high = sweeps.best(row)
        assert 0 <= low <= accuracy <= high <= 100 and row["diverged"] is None
        assert [point["step"] for point in row["curve"]] == [2, 4]
    assert rows[0]["last"]["M"] == 16 and "M" not in rows[1]["last"]


def test_rows_keep_the_order_of_the_jobs_whatever_ends_first(tmp_path, monkeypatch):
    ended = [(i, {"name": str(i), "seed": 0, "diverged": 1, "seconds": 0.0}) for i in (2, 0, 1)]
    monkeypatch.setattr(sweeps, "_each", lambda work, jobs, workers: ended)
    rows = sweeps.sweep([job("dino", tmp_path, seed=seed) for seed in range(3)], workers=2)
    assert [row["name"] for row in rows] == ["0", "1", "2"]


@pytest.mark.slow
def test_a_row_has_the_knn_of_the_runs_teacher_on_the_test_images_and_tells_the_best(rows):
    backbone = checkpoints.load_backbone(rows[0]["folder"])
    sets = [data.load("cifar10-5k", split, limit=200, progress=False) for split in ("train", "test")]
    found = evaluate.knn(*(evaluate.extract(backbone, images, size=32) for images in sets))
    assert rows[0]["knn"] == found.accuracy and rows[0]["n_test"] == 200
    assert sweeps.best(rows[0])[0] == max(found.accuracy.values()) > min(found.accuracy.values())


@pytest.mark.slow
def test_a_run_that_diverges_is_a_row_that_says_when(tmp_path):
    row = sweeps.sweep([job("dino", tmp_path, lr=1e12, clip_grad=0.0)], workers=1)[0]
    assert row["diverged"] in (2, 4) and row["knn"] == {} and math.isnan(sweeps.best(row)[0])
    assert "diverged by step" in sweeps.said(row) and {"commit", "hardware"} <= set(row["environment"])


@pytest.mark.slow
def test_a_record_reads_back_without_folders_and_with_one_config_a_name(rows, tmp_path):
    path = tmp_path / "results" / "x.json"
    untrained = [sweeps.untrained(job("dino", tmp_path))]
    sweeps.write(path, rows, notebook="x", command="c", parameters={}, untrained=untrained)
    assert "tmp" not in path.read_text()
    record = sweeps.read(path)
    assert "folder" not in record["runs"][0] and isinstance(record["runs"][2]["config"], str)
    assert sweeps.best(record["runs"][0])[0] == pytest.approx(sweeps.best(rows[0])[0])
    assert set(record["untrained"][0]["knn"]) == set(rows[0]["knn"])


def test_a_record_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no record"):
        sweeps.read(tmp_path / "none.json")


def test_a_metric_by_seed_is_of_scores_or_of_the_best_k():
    score = {"metric": "linear top-1 (%)", "dataset": "digits", "value": 40.0}
    good = {"seed": 1, "diverged": None, "knn": {10: 30.0, 20: 31.0}, "knn_interval": {10: (29, 31), 20: (30, 32)}}
    runs = [good | {"scores": [score]}, {"seed": 2, "diverged": 0, "knn": {}, "scores": [score]}, good | {"seed": 3}]
    assert sweeps.by_seed(runs) == {1: 31.0, 3: 31.0}
    assert sweeps.by_seed(runs, "linear top-1 (%)") == {1: 40.0}
    assert sweeps.by_seed(runs, "linear top-1 (%)", "digits") == {1: 40.0}
    assert sweeps.by_seed(runs, "linear top-1 (%)", "cifar10") == {}


def test_a_command_is_one_that_a_shell_takes_apart_again():
    said = sweeps.command(80, {"methods": ["a", "b c"], "data": "cifar10", "epochs": 2.0, "check": False})
    words = shlex.split(said)
    assert words[:4] == ["prototypes", "run", "--only", "80"]
    values = dict(zip(words[9::3], words[10::3], strict=True))
    assert values == {"methods": '["a", "b c"]', "data": "cifar10", "epochs": "2.0", "check": "false"}


def test_recipes_at_the_budget_keep_their_words_and_share_their_sizes():
    for name, method in METHODS.items():
        small = sweeps.at_budget(name, 64, ema=0.9)
        assert (small.score, small.targets, small.regularizers) == (method.score, method.targets, method.regularizers)
        assert small.n_prototypes == (64 if method.n_prototypes else method.n_prototypes), name
        assert small.views.n_local == 2 and small.ema == (None if method.ema is None else 0.9), name
    run = sweeps.short_run(31, limit=640)
    assert run.epochs * 10 == 31 and run.warmup_epochs * 10 == 3
