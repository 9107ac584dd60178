"""The full-scale settings say what the released runs did, and start."""

from dataclasses import replace

import pytest

from prototypes_lib.assignment import Center
from prototypes_lib.methods import METHODS
from prototypes_lib.paper_runs import PAPER_RUNS
from prototypes_lib.train import train

FAMILIES = (
    "dino-vits16", "dino-vmf-kp-vitb16", "ibot-vitb16", "ibot-vmf-kd-vits16", "swav-resnet50-bs256", "msn-vits16",
    "pmsn-vits16-inat", "dinov2-vitl16-short", "simdino-vitb16", "simdinov2-vitb16",
)  # fmt: skip


def test_the_papers_sizes_and_data_are_there():
    for kin in ("dino", "dino-vmf", "dino-vmf-kp", "ibot", "ibot-vmf", "ibot-vmf-kd", "ibot-vmf-kp"):
        assert {f"{kin}-vits16", f"{kin}-vitb16"} <= set(PAPER_RUNS)
    assert {f"simdino-vit{size}16" for size in "sbl"} <= set(PAPER_RUNS)
    inat = [name for name, paper in PAPER_RUNS.items() if paper.run.data == "inaturalist-2018"]
    assert {"dino-vmf-vits16-inat", "ibot-vmf-kp-vitb16-inat", "msn-vits16-inat", "pmsn-vits16-inat"} <= set(inat)
    assert all(paper.source for paper in PAPER_RUNS.values())


@pytest.mark.parametrize(
    ("name", "peak", "epochs", "batch"),
    [
        ("dino-vits16", 2e-3, 800, 1024),
        ("dino-vitb16", 3e-3, 400, 1024),
        ("ibot-vits16", 2e-3, 800, 1024),
        ("swav-resnet50", 4.8, 800, 4096),
        ("msn-vits16", 1e-3, 800, 1024),
        ("dinov2-vitl16-short", 4e-3 * 2**0.5, 199.82, 2048),
        ("simdino-vitb16", 1e-3, 100, 512),
        ("simdinov2-vitb16", 4e-3, 100, 1024),
        ("msn-vits16-inat", 1e-3, 300, 1024),
    ],
)
def test_peak_learning_rate_epochs_and_batch_are_the_official_ones(name, peak, epochs, batch):
    run = PAPER_RUNS[name].run
    assert run.peak_lr == pytest.approx(peak) and run.epochs == pytest.approx(epochs, rel=1e-3)
    assert run.batch_size == batch


def test_small_and_base_differ_as_the_released_runs_do():
    small, base = PAPER_RUNS["dino-vits16"], PAPER_RUNS["dino-vitb16"]
    assert small.method.free_norms and not base.method.free_norms
    assert (small.method.teacher_temp.epochs, base.method.teacher_temp.epochs) == (30, 50)  # vMF prints them swapped
    assert (small.run.clip_grad, base.run.clip_grad) == (0.0, 0.3)
    assert (small.run.freeze_last_layer, base.run.freeze_last_layer) == (1.0, 3.0)
    assert PAPER_RUNS["ibot-vitb16"].method.views.global_scale == (0.32, 1.0)
    assert all(PAPER_RUNS[f"dino-vmf-vit{size}16"].method.free_norms for size in "sb")


def test_what_the_repositories_do_beside_their_large_models_is_one_change_away():
    short = PAPER_RUNS["dinov2-vitl16-short"].method
    assert short.targets == (Center,) and short.patch.head == "shared" and short.n_prototypes == 65536
    assert PAPER_RUNS["swav-resnet50"].method.queue is None and PAPER_RUNS["swav-resnet50-bs256"].method.queue
    weight, matching, place = PAPER_RUNS["pmsn-vits16-inat"].method.regularizers[0]
    assert (weight, matching.keywords["exponent"], place) == (5.0, 0.25, "probabilities")
    for name in ("simdino-vitb16", "simdinov2-vitl16"):  # the Gram matrix of each GPU by itself
        assert PAPER_RUNS[name].method.regularizers[0][1].keywords["groups"] == 8
    assert METHODS["simdino"].regularizers[0][1].keywords.get("groups", 1) == 1


def test_positions_stochastic_depth_and_precision_are_the_codes_own():
    official = [name for name in PAPER_RUNS if "resnet" not in name and not name.startswith("simdinov2")]
    assert all(PAPER_RUNS[name].run.backbone_options["interpolation"] == "official" for name in official)
    for name in ("dinov2-vitl16-short", "dinov2-vitl14", "simdinov2-vitb16"):
        assert PAPER_RUNS[name].run.backbone_options["uniform_drop_path"]
    assert {paper.run.precision for paper in PAPER_RUNS.values()} == {"fp32", "bf16"}  # no stopwatch chooses
    assert PAPER_RUNS["dino-vits16"].run.precision == "fp32"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_paper_run_starts_when_it_is_made_small(name, tmp_path):
    paper = PAPER_RUNS[name]
    method = paper.method.but(views=replace(paper.method.views, n_local=1))
    if method.n_prototypes:
        method = method.but(n_prototypes=12)
    small = "resnet_pico" if paper.run.backbone.startswith("resnet") else "vit_pico_patch8"
    run = paper.run.but(
        data="cifar10-5k", limit=64, backbone=small, image_size=32, local_size=16, hidden=16, bottleneck=8,
        batch_size=16, epochs=1.0, warmup_epochs=0.0, out=tmp_path, device="cpu", precision="fp32", monitor_steps=1,
        progress=False,
    )  # fmt: skip
    result = train(method, run, name, stop_after=2)
    assert len(result.metrics) == 2 and result.last["loss"] == result.last["loss"]
