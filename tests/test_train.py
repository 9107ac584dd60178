"""A run is a function of its settings: reproducible, resumable bit for bit, and clear about what it cannot do."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prototypes_lib import checkpoints, data
from prototypes_lib import train as training
from prototypes_lib.interrupts import Interrupted
from prototypes_lib.methods import METHODS, Views, Warmup
from prototypes_lib.optimizers import make_optimizer
from prototypes_lib.regularizers import koleo
from prototypes_lib.schedules import cosine
from prototypes_lib.train import Run, build, config, train
from prototypes_lib.trainer import Trainer


def method(name="dino-vmf-kp"):
    base = METHODS[name]
    return base.but(n_prototypes=16 if base.n_prototypes else 0, views=Views(2, 1), teacher_temp=Warmup(0.04, 0.07, 1))


def run(tmp_path, **changes) -> Run:
    small = {
        "limit": 96, "batch_size": 16, "epochs": 1.0, "warmup_epochs": 0.4, "hidden": 16, "bottleneck": 8,
        "monitor_steps": 2, "checkpoint_epochs": 0.5, "out": str(tmp_path), "progress": False, "drop_path": 0.2,
        "freeze_last_layer": 0.3,
    }  # fmt: skip
    return Run.small(**(small | changes))


def state(result):
    step = checkpoints.steps(result.folder)[-1]
    place = result.folder / "checkpoints" / f"step-{step:08d}"
    return {name: (place / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


@pytest.mark.parametrize(
    "name", ["dino-vmf-kp", *(pytest.param(x, marks=pytest.mark.slow) for x in ("ibot", "simdino"))]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, name):
    whole = train(method(name), run(tmp_path / "a", head_batch_norm=True), name)
    for stop in (2, 5):  # not on a checkpoint of its own schedule
        train(method(name), run(tmp_path / "b", head_batch_norm=True), name, stop_after=stop)
    parts = train(method(name), run(tmp_path / "b", head_batch_norm=True), name)
    assert state(whole) == state(parts)
    drop = lambda rows: [{k: v for k, v in row.items() if k not in ("seconds", "data_wait")} for row in rows]
    assert drop(whole.metrics) == drop(parts.metrics)


def test_what_an_unfinished_step_wrote_is_not_saved(tmp_path, monkeypatch):
    """The signal comes when the step's forward has moved the centers, and two steps after the last checkpoint."""
    whole = train(method(), run(tmp_path / "a", checkpoint_epochs=1.0), "x")
    agree = Trainer._agree
    with monkeypatch.context() as patch:

        def interrupted(self, *args):
            if self.done == 2:
                raise Interrupted("SIGTERM")
            return agree(self, *args)

        patch.setattr(Trainer, "_agree", interrupted)
        with pytest.raises(Interrupted, match="after step 2"):
            train(method(), run(tmp_path / "b", checkpoint_epochs=1.0), "x")
    assert state(train(method(), run(tmp_path / "b", checkpoint_epochs=1.0), "x")) == state(whole)


def test_metrics_written_after_the_last_checkpoint_are_forgotten_on_resume(tmp_path):
    partial = train(method(), run(tmp_path), "x", stop_after=3)
    path = partial.folder / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 4, "loss": 1e9}) + "\n")
    whole = train(method(), run(tmp_path), "x")
    assert [row["step"] for row in whole.metrics] == [2, 4, 6] and all(row["loss"] < 1e6 for row in whole.metrics)


def test_a_finished_run_is_read_and_another_setting_gets_another_folder(tmp_path):
    first = train(method(), run(tmp_path), "x")
    stamp = (first.folder / "result.json").stat().st_mtime_ns
    again = train(method(), run(tmp_path), "x")
    assert again == first and (first.folder / "result.json").stat().st_mtime_ns == stamp
    assert train(method(), run(tmp_path, seed=1), "x").folder != first.folder


def test_the_hash_ignores_machine_and_place_but_no_setting(tmp_path):
    images = data.load("cifar10-5k", "train", limit=96, progress=False)
    of = lambda m, r: config(m, r, "x", images)["hash"]
    base = of(method(), run(tmp_path))
    assert base == of(method(), run(tmp_path / "elsewhere", device="cpu", progress=True))
    assert base != of(method(), run(tmp_path, lr=1e-3))
    assert base != of(method().but(student_temp=0.2), run(tmp_path))


def test_a_run_folder_tells_the_whole_story(tmp_path):
    result = train(method(), run(tmp_path), "x")
    names = {p.name for p in result.folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "metrics.csv", "checkpoints", "result.json"}
    last = result.last
    assert {"loss", "teacher_entropy", "kl", "marginal_entropy", "M", "lr", "seconds"} <= set(last)
    assert abs(last["image"] - last["kl"] - last["teacher_entropy"]) < 1e-5
    assert torch.__version__.startswith(result.summary["environment"]["torch"])
    started = json.loads((result.folder / "config.json").read_text())
    assert (
        started["environment"]["commit"] and started["run"]["seed"] == 0 and started["method"]["score"] == "scores.vmf"
    )
    header = (result.folder / "metrics.csv").read_text().splitlines()[0]
    assert header.startswith("step,loss")
    assert len(checkpoints.steps(result.folder)) == 2
    assert str(tmp_path) not in (result.folder / "result.json").read_text()


@pytest.mark.slow
def test_progress_shows_loss_ln_k_entropy_m_speed_and_time_left(tmp_path, capsys):
    train(method(), run(tmp_path, progress=True), "x")
    text = capsys.readouterr().out
    for word in ("step 6/6", "ln K 2.773", "teacher entropy", "M ", "images/s", "left"):
        assert word in text


@pytest.mark.slow
def test_prototypes_stand_still_while_frozen_and_move_after(tmp_path):
    frozen = train(method(), run(tmp_path, freeze_last_layer=1.0), "x")
    start = build(method(), run(tmp_path)).student.prototypes.w
    assert torch.equal(checkpoints.load_prototypes(frozen.folder, "student"), start)
    free = train(method(), run(tmp_path, freeze_last_layer=0.0), "x")
    assert not torch.equal(checkpoints.load_prototypes(free.folder, "student"), start)


def trainer(settings, composed=None):
    learner = build(composed or method(), settings)
    images = data.load("cifar10-5k", "train", limit=96, progress=False)
    optimizer = make_optimizer(learner.student, settings)
    return Trainer(learner, learner, optimizer, settings, images, Path(settings.out), torch.device("cpu"), {"step": 0})


def test_default_schedules_are_dinos_to_the_last_bit(tmp_path):
    settings = run(tmp_path, epochs=3.0)
    made, base = trainer(settings), method()
    assert np.array_equal(made.lr, cosine(5e-4 * 16 / 256, 1e-6, 18, warmup_steps=2))
    assert np.array_equal(made.weight_decay, cosine(0.04, 0.4, 18))
    assert np.array_equal(made.momentum, cosine(base.ema, base.ema_end, 18))


def test_msns_schedules_are_laid_out_over_a_longer_run_and_cut_off(tmp_path):
    msn = {"lr": 1e-3, "lr_scaling": "none", "warmup_lr": 2e-4, "schedule_stretch": 1.25, "momentum_schedule": "linear"}
    made = trainer(run(tmp_path, epochs=20.0, warmup_epochs=2.0, **msn), method().but(ema=0.996, ema_end=1.0))
    steps, warmup, step = 120, 12, np.arange(120)
    wave = 0.5 * (1 + np.cos(np.pi * (step - warmup) / (150 - warmup)))
    expected = np.where(step < warmup, 2e-4 + 8e-4 * step / (warmup - 1), 1e-6 + (1e-3 - 1e-6) * wave)
    assert np.allclose(made.lr, expected, rtol=1e-12, atol=0) and made.lr[0] == 2e-4 and made.lr.max() == 1e-3
    assert np.allclose(made.weight_decay, 0.4 - 0.36 * 0.5 * (1 + np.cos(np.pi * step / 150)), rtol=1e-12)
    assert np.allclose(np.diff(made.momentum), 0.004 / 150) and made.momentum[0] == 0.996
    assert len(made.momentum) == steps and abs(made.momentum[-1] + 0.004 / 150 - 0.9992) < 1e-12


@pytest.mark.parametrize(("by", "counted"), [("gradient", 0), ("lr", 2)])
def test_prototypes_frozen_by_their_learning_rate_go_on_gathering_moments(tmp_path, by, counted):
    made = trainer(run(tmp_path, freeze_last_layer=0.5, freeze_by=by, warmup_epochs=0.0))
    prototypes = made.learner.student.prototypes
    start = prototypes.w.detach().clone()
    for step in (0, 1):
        made.step(step)
    assert torch.equal(prototypes.w, start)
    assert len(made.optimizer.state[prototypes.weight_v]) == (0 if by == "gradient" else 3)
    if by == "lr":
        moments = made.optimizer.state[prototypes.weight_v]
        assert moments["step"] == counted and moments["exp_avg"].abs().max() > 0
    made.step(3)
    assert not torch.equal(prototypes.w, start)


@pytest.mark.slow
def test_a_resumed_run_with_larc_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    settings = {"optimizer": "larc", "lr": 0.3, "weight_decay": 1e-6, "weight_decay_end": 1e-6, "clip_grad": 0.0}
    whole = train(method(), run(tmp_path / "a", **settings), "x")
    train(method(), run(tmp_path / "b", **settings), "x", stop_after=4)
    assert state(whole) == state(train(method(), run(tmp_path / "b", **settings), "x"))


def test_views_and_masks_are_a_function_of_seed_and_step(tmp_path):
    settings, ibot = run(tmp_path), method("ibot")
    a, b, other = trainer(settings, ibot), trainer(settings, ibot), trainer(settings.but(seed=5), ibot)
    a.batches.batch(0)
    (va, ma), (vb, mb), (vo, _) = (x.batches.batch(3) for x in (a, b, other))
    assert all(torch.equal(x, y) for x, y in zip(va, vb, strict=True)) and torch.equal(ma, mb)
    assert not torch.equal(va[0], vo[0])


def test_a_probe_of_precision_leaves_no_trace(tmp_path):
    fixed, auto = run(tmp_path, precision="fp32"), run(tmp_path, precision="auto")
    states = []
    for settings in (fixed, auto):
        made = trainer(settings)
        assert made.precision in ("fp32", "bf16")
        states.append(made.learner.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


@pytest.mark.slow
def test_bf16_trains(tmp_path):
    result = train(method(), run(tmp_path, precision="bf16"), "x")
    assert result.summary["precision"] == "bf16" and result.last["loss"] > 0


@pytest.mark.slow
def test_jobs_in_processes_give_what_they_give_alone(tmp_path):
    jobs = [(f"seed{s}", method(), run(tmp_path / "a", seed=s)) for s in (0, 1)]
    together = training.train_all(jobs, workers=2)
    torch.set_num_threads(1)
    alone = [train(m, r.but(out=str(tmp_path / "b")), n) for n, m, r in jobs]
    assert [state(r) for r in together] == [state(r) for r in alone]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 200}, "200"),
        ({"image_size": 30}, "multiple"),
        ({"local_size": 12}, "multiple"),
        ({"backbone": "resnet50"}, "resnet50"),
        ({"data": "no-such-set"}, "no-such-set"),
        ({"warmup_epochs": 3.0}, "warmup_epochs"),
        ({"device": "cuda"}, "GPU"),
        ({"device": "gpu"}, "gpu"),
        ({"epochs": 0.0}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"drop_path": 1.5}, "drop_path"),
        ({"backbone_options": {"foo": 1}}, "foo"),
        ({"precision": "fp16"}, "precision"),
        ({"optimizer": "sgd"}, "adamw, lars or larc"),
        ({"lr_scaling": "square"}, "lr_scaling"),
        ({"momentum_schedule": "step"}, "momentum_schedule"),
        ({"clip": "layer"}, "clip='layer'"),
        ({"freeze_by": "hand"}, "gradient or lr"),
        ({"schedule_stretch": 0.8}, "schedule_stretch"),
        ({"lr_batch_size": 0}, "lr_batch_size"),
        ({"warmup_lr": -0.1}, "warmup_lr"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"patch_embed_lr": -0.2}, "patch_embed_lr"),
        ({"prototype_weight_decay": -1.0}, "prototype_weight_decay"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes, says):
    if says == "GPU" and torch.cuda.is_available():
        changes, says = {"device": "cuda", "epochs": -1.0}, "epochs"
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        train(method(), run(tmp_path, **changes), "x")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_composition_that_fails_on_the_first_batch_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="parts=100"):
        train(method().plus(0.1, partial(koleo, parts=100), on="prototypes"), run(tmp_path), "x")
    assert not list(tmp_path.iterdir())


def test_a_divergence_is_named_and_never_saved(tmp_path):
    wild = run(tmp_path, lr=1e30, warmup_epochs=0.0, clip_grad=0.0, monitor_steps=1000, checkpoint_epochs=0.2)
    for _ in range(2):  # the second time from the checkpoint that is left, if any
        with pytest.raises(FloatingPointError, match="infinite or nan"):
            train(method(), wild, "x")
    for folder in tmp_path.iterdir():
        for step in checkpoints.steps(folder):
            tensors = load_file(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
            assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.slow
def test_a_cut_off_line_of_metrics_does_not_block_resume(tmp_path):
    partial_run = train(method(), run(tmp_path), "x", stop_after=3)
    path = partial_run.folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert len(train(method(), run(tmp_path), "x").metrics) == 3


def test_stopping_after_no_step_trains_nothing(tmp_path):
    assert train(method(), run(tmp_path), "x", stop_after=0).metrics == ()


def test_an_unknown_method_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dino-vmf-kp"):
        train("dinov9", run(tmp_path))


def test_an_infinite_loss_stops_the_run_and_says_where(tmp_path):
    with pytest.raises(FloatingPointError, match="step"):
        train(method(), run(tmp_path, lr=1e30, warmup_epochs=0.0, monitor_steps=1, clip_grad=0.0), "x")
