"""A run is a function of its settings: reproducible, resumable bit for bit, and clear about what it cannot do."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from prototypes_lib import checkpoints, data
from prototypes_lib import train as training
from prototypes_lib.methods import METHODS, Views, Warmup
from prototypes_lib.regularizers import koleo
from prototypes_lib.train import Run, build, config, make_optimizer, train


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


@pytest.mark.parametrize("name", ["dino-vmf-kp", "ibot", "simdino"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, name):
    whole = train(method(name), run(tmp_path / "a", head_batch_norm=True), name)
    for stop in (2, 5):  # not on a checkpoint of its own schedule
        train(method(name), run(tmp_path / "b", head_batch_norm=True), name, stop_after=stop)
    parts = train(method(name), run(tmp_path / "b", head_batch_norm=True), name)
    assert state(whole) == state(parts)
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert drop(whole.metrics) == drop(parts.metrics)


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


def test_progress_shows_loss_ln_k_entropy_m_speed_and_time_left(tmp_path, capsys):
    train(method(), run(tmp_path, progress=True), "x")
    text = capsys.readouterr().out
    for word in ("step 6/6", "ln K 2.773", "teacher entropy", "M ", "images/s", "left"):
        assert word in text


def test_prototypes_stand_still_while_frozen_and_move_after(tmp_path):
    frozen = train(method(), run(tmp_path, freeze_last_layer=1.0), "x")
    start = build(method(), run(tmp_path)).student.prototypes.w
    assert torch.equal(checkpoints.load_prototypes(frozen.folder, "student"), start)
    free = train(method(), run(tmp_path, freeze_last_layer=0.0), "x")
    assert not torch.equal(checkpoints.load_prototypes(free.folder, "student"), start)


def test_optimizer_groups_are_dinos():
    settings = Run.small(prototype_lr_factor=7.0)
    learner = build(method(), settings)
    groups = {}
    names = {p: n for n, p in learner.student.named_parameters()}
    for group in make_optimizer(learner, settings).param_groups:
        for p in group["params"]:
            groups[names[p]] = (group["lr_factor"], group["decays"])
    assert groups["backbone.vit.cls_token"] == (1.0, 1.0) and groups["backbone.vit.pos_embed"] == (1.0, 1.0)
    assert groups["backbone.vit.norm.weight"] == (1.0, 0.0) and groups["projector.mlp.0.bias"] == (1.0, 0.0)
    assert groups["prototypes.weight_g"] == (7.0, 1.0) and groups["prototypes.weight_v"] == (7.0, 1.0)


def test_gradients_are_clipped_tensor_by_tensor(tmp_path):
    settings = run(tmp_path, clip_grad=0.5)
    learner = build(method(), settings)
    images = data.load("cifar10-5k", "train", limit=96, progress=False)
    trainer = training._Trainer(learner, make_optimizer(learner, settings), settings, images, torch.device("cpu"), None)
    parameters = [p for p in learner.student.parameters() if p.requires_grad]
    for i, p in enumerate(parameters):
        p.grad = torch.full_like(p, 10.0 if i % 2 else 1e-6)
    trainer._clip()
    for i, p in enumerate(parameters):
        expected = 0.5 if i % 2 else 1e-6 * p.numel() ** 0.5
        assert abs(float(p.grad.norm()) - min(expected, 0.5)) < 1e-4


def test_views_and_masks_are_a_function_of_seed_and_step(tmp_path):
    images = data.load("cifar10-5k", "train", limit=96, progress=False)
    settings = run(tmp_path)
    make = lambda s: training._Trainer(
        build(method("ibot"), s), make_optimizer(build(method("ibot"), s), s), s, images, torch.device("cpu"), None
    )
    a, b, other = make(settings), make(settings), make(settings.but(seed=5))
    a.batch(0)
    (va, ma), (vb, mb), (vo, _) = a.batch(3), b.batch(3), other.batch(3)
    assert all(torch.equal(x, y) for x, y in zip(va, vb, strict=True)) and torch.equal(ma, mb)
    assert not torch.equal(va[0], vo[0])


def test_a_probe_of_precision_leaves_no_trace(tmp_path):
    images = data.load("cifar10-5k", "train", limit=96, progress=False)
    fixed, auto = run(tmp_path, precision="fp32"), run(tmp_path, precision="auto")
    states = []
    for settings in (fixed, auto):
        learner = build(method(), settings)
        trainer = training._Trainer(
            learner, make_optimizer(learner, settings), settings, images, torch.device("cpu"), None
        )
        assert trainer.precision in ("fp32", "bf16")
        states.append(learner.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


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
