"""A row of metrics says what is so, changes nothing, and a run that goes wrong writes down what is wrong."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from gloo import together
from safetensors.torch import load_file
from test_train import method, run, trainer

from prototypes_lib import checkpoints, data, distributed, scores
from prototypes_lib.meters import EPS, SAMPLE, Meters, distortion
from prototypes_lib.methods import Views, Warmup
from prototypes_lib.optimizers import make_optimizer
from prototypes_lib.records import Log
from prototypes_lib.train import Trainer, build, read, train

ALL = {
    "step", "loss", "image", "teacher_entropy", "kl", "marginal_entropy", "running_marginal_entropy", "k", "M",
    "M_student", "kappa_05", "kappa_50", "kappa_95", "effective_rank", "code_dim", "coding_rate", "void",
    "teacher_moved", "teacher_lag", "shared_memory", "score_max", "grad_norm", "weight_max", "lr", "teacher_temp",
}  # fmt: skip


def flat(network) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in network.parameters()]).double().numpy()


def entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def codes(network, crops) -> torch.Tensor:
    with torch.no_grad():
        return network.projector(network.backbone(crops)[0]).double()


def softmax(x: torch.Tensor) -> np.ndarray:
    return torch.softmax(x, -1).numpy()


def test_a_row_is_what_a_plain_computation_finds(tmp_path):
    """Two steps of DINO with prototypes of free lengths and without centers, each measured by other means."""
    composed = method("dino-vmf").but(targets=(), score=scores.dot, ema=0.5)
    settings = run(tmp_path, monitor_steps=1, lr=0.05, warmup_epochs=0.0, freeze_last_layer=0.0, drop_path=0.0)
    made, rows, mean = trainer(settings, composed), [], None
    for step in (0, 1):
        before = copy.deepcopy(made.learner)
        views, _ = made.batches.batch(step)
        made.step(step, rows.append)
        row, after = rows[-1], made.learner
        y = codes(before.teacher, torch.cat(views[:2]))
        q = softmax(y @ before.teacher.prototypes.w.double().T / made.temperature[step])
        mean = q.mean(0) if mean is None else 0.9 * mean + 0.1 * q.mean(0)
        y = y.numpy()
        values = np.linalg.svd(y, compute_uv=False) ** 2
        student = torch.cat([codes(before.student, torch.cat(crops)) for crops in (views[:2], views[2:])])
        told = student @ before.student.prototypes.w.detach().double().T / 0.1
        w, direction = after.teacher.prototypes.w.double().numpy(), y.mean(0) / np.linalg.norm(y.mean(0))
        lengths = np.linalg.norm(w, axis=1)
        out = before(views, None, float(made.temperature[step]))
        out.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in before.student.parameters() if p.grad is not None])
        expected = {
            "loss": out.loss.item(),
            "teacher_entropy": np.mean([entropy(p) for p in q]),
            "marginal_entropy": entropy(q.mean(0)),
            "running_marginal_entropy": entropy(mean),
            "k": 16,
            "kappa_05": np.quantile(lengths, 0.05),
            "kappa_50": np.quantile(lengths, 0.5),
            "kappa_95": np.quantile(lengths, 0.95),
            "effective_rank": math.exp(entropy(values / values.sum())),
            "code_dim": 8,
            "coding_rate": 0.5 * np.linalg.slogdet(np.eye(8) + 8 / 0.05 * y.T @ y / len(y))[1],
            "void": np.mean(1 + w @ direction / lengths < 0.025),
            "teacher_lag": np.linalg.norm(flat(after.teacher) - flat(after.student))
            / np.linalg.norm(flat(after.student)),
            "shared_memory": 0.0,
            "score_max": float(told.abs().max()),
            "grad_norm": float(gradient.norm()),
            "weight_max": np.abs(flat(after.student)).max(),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
        assert row["kl"] == pytest.approx(row["image"] - row["teacher_entropy"], abs=1e-5)
    assert set(rows[0]) == ALL - {"teacher_moved"} and set(rows[1]) == ALL
    moved = np.linalg.norm(flat(after.teacher) - flat(before.teacher)) / np.linalg.norm(flat(after.teacher))
    assert rows[1]["teacher_moved"] == pytest.approx(moved, rel=0.1)  # of a sample
    assert rows[0]["kappa_05"] != rows[0]["kappa_95"]


def test_copies_are_counted_for_each_network(tmp_path):
    made, rows = trainer(run(tmp_path, monitor_steps=1, freeze_last_layer=1.0), method("dino")), []
    for network, copies in ((made.learner.teacher, 3), (made.learner.student, 5)):
        with torch.no_grad():
            network.prototypes.weight_v[:copies] = network.prototypes.weight_v[0]
    made.step(0, rows.append)
    assert (rows[0]["M"], rows[0]["M_student"]) == (14, 12)


@pytest.mark.slow
def test_with_very_many_prototypes_the_students_are_counted_in_each_tenth_row(tmp_path, monkeypatch):
    monkeypatch.setattr("prototypes_lib.meters.OFTEN", 15)
    made, rows = trainer(run(tmp_path, monitor_steps=1, epochs=4.0)), []
    for step in range(11):
        made.step(step, rows.append)
    assert [row["step"] for row in rows if "M_student" in row] == [10] and all("M" in row for row in rows)


@pytest.mark.parametrize("name", ["simdino", "swav", "msn", "dinov2"])
def test_rows_speak_of_what_the_method_has(tmp_path, name):
    made, rows = trainer(run(tmp_path, monitor_steps=1), method(name)), []
    for step in (0, 1):
        made.step(step, rows.append)
    lacks = {
        "simdino": {"teacher_entropy", "kl", "marginal_entropy", "running_marginal_entropy", "k", "M", "M_student",
                    "void", "kappa_05", "kappa_50", "kappa_95", "score_max"},
        "swav": {"teacher_moved", "teacher_lag", "shared_memory"},
    }.get(name, set())  # fmt: skip
    assert ALL & set(rows[1]) == ALL - lacks
    assert ("M_patches" in rows[1]) == (name == "dinov2")
    assert all(math.isfinite(value) for value in rows[1].values())
    assert rows[1].get("shared_memory", 0.0) == 0.0  # MSN's prototypes are meant to be shared


def test_a_teacher_that_is_the_student_in_part_is_seen(tmp_path):
    made, rows = trainer(run(tmp_path, monitor_steps=1)), []
    made.learner.teacher.projector = made.learner.student.projector
    made.step(0, rows.append)
    made.learner.teacher.projector = copy.deepcopy(made.learner.student.projector)
    made.learner.teacher.projector.mlp[0].weight.data = made.learner.student.projector.mlp[0].weight.data
    made.step(1, rows.append)
    assert [row["shared_memory"] for row in rows] == [1.0, 1.0]


def test_the_sample_of_the_teacher_sees_a_move_of_any_tensor(tmp_path):
    made, rows = trainer(run(tmp_path, monitor_steps=1)), []
    teacher = made.learner.teacher
    made.step(0, rows.append)
    outs = [made.forward(*made.batches.batch(0), 0)]
    made.meters.row(1, outs)
    assert len(flat(teacher)) > 2 * SAMPLE and len(made.meters.teacher) < 2 * SAMPLE
    for parameter in teacher.parameters():
        with torch.no_grad():
            parameter += 1.0
        assert made.meters.row(2, outs)["teacher_moved"] > 0
    assert made.meters.row(3, outs)["teacher_moved"] == 0
    with torch.no_grad():
        torch._foreach_mul_(list(teacher.parameters()), 1.25)
    assert made.meters.row(4, outs)["teacher_moved"] == pytest.approx(0.2, rel=1e-5)


def test_prototypes_without_direction_are_not_counted_and_stop_nothing(tmp_path):
    made, rows = trainer(run(tmp_path, monitor_steps=1, freeze_last_layer=1.0), method("dino")), []
    with torch.no_grad():
        made.learner.student.prototypes.weight_v[3] = 0.0
    made.step(0, rows.append)
    assert (rows[0]["M"], rows[0]["M_student"]) == (16, 15)


def test_the_coding_rate_is_measured_with_the_methods_own_distortion():
    assert distortion(method("dino")) == EPS == 0.05**0.5
    own = method("simdino").regularizers[0][1]
    other = type(own)(own.func, eps=0.5)
    assert distortion(method("simdino").but(regularizers=((-1.0, other, "codes"),))) == 0.5


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("dino-vmf-kp", "msn", "simdino")]


@pytest.mark.parametrize("name", ["ibot", *OTHERS])
def test_measuring_changes_nothing_of_a_run(tmp_path, name):
    ends = []
    for steps in (1, 10**6):
        result = train(method(name), run(tmp_path, monitor_steps=steps, precision="fp32"), name)
        assert len(result.metrics) == (6 if steps == 1 else 1)
        place = result.folder / "checkpoints" / "step-00000006"
        ends.append([load_file(place / f"{part}.safetensors") for part in ("model", "optimizer")])
    for one, other in zip(*ends, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_unmonitored_steps_look_at_nothing(tmp_path):
    made = trainer(run(tmp_path))
    out = made.forward(*made.batches.batch(0), 0, meters=False)
    assert (out.meters, out.codes, out.target) == ({}, None, None)


@pytest.mark.slow
def test_what_rows_remember_survives_a_checkpoint_to_the_bit(tmp_path):
    result = train(method(), run(tmp_path, monitor_steps=1), "x", stop_after=4)
    state = json.loads((result.folder / "checkpoints" / "step-00000004" / "state.json").read_text())["meters"]
    again = Meters(build(method(), run(tmp_path)), 1, state)
    assert again.state() == state and len(again.marginal) == 16 and again.teacher.dtype == torch.float32
    assert checkpoints.steps(result.folder) == [3, 4]
    whole = train(method(), run(tmp_path / "whole", monitor_steps=1), "x")
    parts = train(method(), run(tmp_path, monitor_steps=1), "x")
    timeless = lambda rows: [{k: v for k, v in row.items() if k not in ("seconds", "data_wait")} for row in rows]
    assert timeless(whole.metrics) == timeless(parts.metrics)


def rows_of(rank, folder, name, shard=False):
    """The rows of three steps, each measured, by as many processes as there are."""
    settings, rows = run(folder, monitor_steps=1, drop_path=0.0, lr=0.05, freeze_last_layer=0.0), []
    learner = build(method(name), settings)
    model = distributed.wrap(learner, shard)
    optimizer = make_optimizer(learner.student, settings)
    images = data.load("cifar10-5k", "train", limit=96, progress=False)
    made = Trainer(learner, model, optimizer, settings, images, folder, torch.device("cpu"), {"step": 0})
    for step in range(3):
        made.step(step, rows.append)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shard"), [("dino-vmf", False), ("msn", False), ("dino-vmf", True), ("simdino", True)]
)
def test_two_processes_write_the_rows_of_one(tmp_path, name, shard):
    alone = rows_of(0, tmp_path, name)
    for rows in together(2, rows_of, tmp_path, name, shard, timeout=120):
        assert [set(row) for row in rows] == [set(row) for row in alone]
        for row, other in zip(rows, alone, strict=True):
            for key, value in other.items():
                assert row[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key


FAST = {"epochs": 23.0, "limit": 32, "batch_size": 8, "monitor_steps": 10, "freeze_last_layer": 0.0}


@pytest.mark.slow
def test_a_run_that_collapses_says_so_once_and_goes_on(tmp_path, capsys):
    blunt = method("dino-vmf").but(teacher_temp=Warmup(5.0, 5.0), views=Views(2, 0))
    train(blunt, run(tmp_path, progress=True, **FAST), "x", stop_after=85)
    said = capsys.readouterr().out
    result = train(blunt, run(tmp_path, progress=True, **FAST), "x")
    said += capsys.readouterr().out
    lines = [json.loads(line) for line in (result.folder / "findings.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["uniform"] and lines == result.summary["findings"]
    assert {"kind", "text", "causes", "remedies", "step"} == set(lines[0]) and 60 <= lines[0]["step"] <= 85
    assert said.count("uniform") == 1 and "ln K = 2.7726" in said and len(result.metrics) == 10
    assert read(result.folder).summary["findings"] == lines


@pytest.mark.slow
def test_a_healthy_run_writes_no_finding(tmp_path):
    result = train(method("dino-vmf").but(views=Views(2, 0)), run(tmp_path, **FAST), "x")
    assert result.summary["findings"] == [] and not (result.folder / "findings.jsonl").exists()


def row(step, shared=0.0):
    return {"step": step, "loss": 1.0, "teacher_entropy": 0.5, "seconds": 1.0, "shared_memory": shared}


def test_findings_after_the_checkpoint_are_forgotten_and_those_before_not_said_again(tmp_path, capsys):
    log = Log(tmp_path, "x", 9, 8, 16, progress=True)
    log.rewind(0)
    for step in (1, 2, 3):
        log.write(row(step, shared=float(step > 1)))
    assert capsys.readouterr().out.count("shared-memory") == 1 and [f["step"] for f in log.findings] == [2]
    again = Log(tmp_path, "x", 9, 8, 16, progress=True)
    again.rewind(2)
    again.write(row(3, shared=1.0))
    assert "shared-memory" not in capsys.readouterr().out
    assert (tmp_path / "findings.jsonl").read_text().count("\n") == 1
    early = Log(tmp_path, "x", 9, 8, 16, progress=False)
    early.rewind(1)
    assert early.findings == [] and (tmp_path / "findings.jsonl").read_text() == ""
    early.write(row(2, shared=1.0))
    assert capsys.readouterr().out == "" and [f["kind"] for f in early.findings] == ["shared-memory"]


def test_ranks_but_the_first_write_no_finding(tmp_path):
    log = Log(tmp_path, "x", 9, 8, 16, progress=False, writes=False)
    log.rewind(0)
    log.write(row(1, shared=1.0))
    assert not list(tmp_path.iterdir())


def test_tensorboard_that_is_not_there_is_one_line_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboard") as error:
        train(method(), run(tmp_path, tensorboard=True), "x")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
