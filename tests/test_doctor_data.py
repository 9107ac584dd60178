"""The doctor with data: planted use, redundancy and void set through the command line, and references in numpy."""

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from official_files import make
from PIL import Image

from prototypes_lib import checkpoints, collapse, doctor, scores
from prototypes_lib.cli import run_command
from prototypes_lib.doctor import data as beside
from prototypes_lib.doctor import subject, words
from prototypes_lib.evaluate.features import extract
from prototypes_lib.methods import METHODS
from prototypes_lib.train import Run, train


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No figures: tests/test_doctor_page.py looks at these."""
    monkeypatch.setattr("prototypes_lib.doctor.page.page", lambda report, content: "")


def call(*argv) -> int:
    return run_command(list(map(str, argv)))


def report(folder) -> dict:
    return json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)


def pictures(folder, n: int, seed: int = 0):
    """A flat folder of n images of random colors, and one file that is none."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for i in range(n):
        pixels = np.full((32, 32, 3), draw.integers(0, 256, 3), np.uint8)
        pixels[: i % 30] = draw.integers(0, 256, 3)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A DINO file whose prototypes are copies of some images' codes, and of the direction away from all of them."""
    place = tmp_path_factory.mktemp("planted")
    data = pictures(place / "images", 40)
    blank = make("dino", place, torch.eye(24)[:16])  # the networks follow from the seed and the number of prototypes
    opened = doctor.opened(blank)
    coder = doctor.coder(opened, opened.sets[0])
    images = doctor.images_of(str(data), 32, progress=False)
    with torch.no_grad():
        codes = coder.projector(extract(coder.backbone, images, size=32).x)
    mean = F.normalize(codes.mean(0), dim=0)
    centered = F.normalize(codes - codes @ mean[:, None] * mean, dim=1)  # far apart where codes are close together
    chosen = [0]
    for i in range(1, 40):
        if float((centered[chosen] @ centered[i]).max()) < 0.7 and len(chosen) < 4:
            chosen.append(i)
    assert len(chosen) == 4
    copies = (5, 1, 3, 1)
    w = torch.cat([*(centered[i].expand(r, -1) for i, r in zip(chosen, copies, strict=True)), -mean.expand(6, -1)])
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(1))
    path = make("dino", place / "made", 2 * w[order])
    void = torch.nonzero(order >= 10)[:, 0].tolist()
    best = (codes @ centered[chosen].T).argmax(1)
    return {"path": path, "data": data, "codes": codes, "void": void, "copies": copies, "best": best, "chosen": chosen,
            "w": 2 * w[order]}  # fmt: skip


def test_planted_void_set_redundancy_and_use_come_back_through_the_command_line(planted, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--data", planted["data"], "--size", 32, "--network", "teacher", "--no-progress", "--out", out)
    assert call("doctor", planted["path"], *options) == 0
    content = report(out)
    one, data = content["sets"][0], content["data"]
    assert (one["k"], one["m"], data["n"], data["side"], data["name"]) == (16, 5, 40, 32, "images")
    assert data["void"]["count"] == 6 and data["void"]["indices"] == planted["void"] and data["void"]["images"] == 0
    assert data["used_unique"] == len(planted["best"].unique()) <= data["used"]  # copies share, by rounding
    held = {}
    for m, count in zip(planted["best"].tolist(), [1] * 40, strict=True):
        held[m] = held.get(m, 0) + count
    share = dict(zip(data["redundancy"]["factor"], data["redundancy"]["share"], strict=True))
    for r in (5, 3):  # the only groups of that size
        assert share[r] == pytest.approx(100 * held.get(planted["copies"].index(r), 0) / 40)
    assert share[6] == 0 and sum(share.values()) == pytest.approx(100)
    assert sum(data["held"]) == 40 and sum(data["p"]) == pytest.approx(1, abs=1e-4)
    said = capsys.readouterr().out
    assert "The void set has 6 prototypes (37.5 %)" in said and "0 images are assigned to them" in said
    assert data["knn"] is None and data["score"] == "dot" and data["tau"] == 0.1


def test_marginals_are_those_of_collapse_on_all_scores_at_once(planted):
    codes, w = planted["codes"], planted["w"]
    unique = collapse.unique_prototypes(w)
    for score in (functools.partial(scores.dot, tau=0.1), functools.partial(scores.vmf, tau=0.05)):
        whole = collapse.marginal(score(codes, w), unique)
        for block in (1, 50, 10**6):
            p, alone_p, assigned, alone = beside.assign(codes, w, score, unique, block)
            torch.testing.assert_close(p, whole.p, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(alone_p, whole.unique_p, atol=1e-6, rtol=1e-5)
            assert assigned.tolist() == score(codes, w).argmax(1).tolist()
            assert alone.tolist() == score(codes, w[unique.representatives]).argmax(1).tolist()


def test_grids_show_the_nearest_images_of_most_and_least_used_prototypes_and_of_copies(planted, tmp_path):
    out = tmp_path / "out"
    options = ("--data", planted["data"], "--size", 32, "--no-progress", "--out", out)
    assert call("doctor", planted["path"], *options) == 0
    content = report(out)
    grids, one = content["data"]["grids"], content["sets"][0]
    assert list(grids) == ["most used", "copies side by side"]  # five groups are all in the first
    part = one["assignment"]
    assert len({part[row["prototype"]] for row in grids["most used"]}) == 5
    held = content["data"]["held"]
    for row in grids["most used"]:  # the copy that most images are assigned to stands for its group
        members = [i for i in range(16) if part[i] == part[row["prototype"]]]
        assert held[row["prototype"]] == max(held[i] for i in members)
        assert int(row["label"].split(" ")[0]) == sum(held[i] for i in members)
    x = F.normalize(planted["w"], dim=1)
    for row in [row for rows in grids.values() for row in rows]:
        cosine = planted["codes"] @ x[row["prototype"]]
        best = cosine.topk(10)
        torch.testing.assert_close(torch.tensor(row["cosine"]), best.values, atol=1e-4, rtol=0)
        assert row["files"] == [f"{i:03d}.png" for i in row["images"]] and len(row["images"]) == 10
    counts = [int(row["label"].split(" ")[0]) for row in grids["most used"]]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0
    rows = grids["copies side by side"]
    groups = [part[row["prototype"]] for row in rows]
    assert len(rows) == 6 and [groups.count(g) for g in dict.fromkeys(groups)] == [3, 3]


def test_a_limit_takes_images_spread_over_a_flat_folder_and_folders_of_classes_have_labels(tmp_path):
    flat = pictures(tmp_path / "flat", 21)
    images = doctor.images_of(str(flat), 16, limit=5, progress=False)
    assert images.files == tuple(f"{i:03d}.png" for i in (0, 5, 10, 15, 20)) and images.pixels.shape == (5, 16, 16, 3)
    assert set(images.labels.tolist()) == {-1}
    for name in ("cat", "dog"):
        pictures(tmp_path / "classes" / name, 4)
    assert doctor.images_of(str(tmp_path / "classes"), 16, progress=False).classes == ("cat", "dog")
    for name in ("cat", "dog"):
        pictures(tmp_path / "only-val" / "val" / name, 3)
    assert len(doctor.images_of(str(tmp_path / "only-val"), 16, progress=False)) == 6
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no images"):
        doctor.images_of(str(tmp_path / "empty"), 16)


def test_a_damaged_image_is_named_and_left_out(tmp_path, capsys):
    flat = pictures(tmp_path / "flat", 6)
    (flat / "003.png").write_bytes(b"broken")
    images = doctor.images_of(str(flat), 16, progress=False)
    assert len(images) == 5 and "003.png" not in images.files
    assert "003.png" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    small = Run.small(limit=256, batch_size=64, epochs=1.0, warmup_epochs=0.0, hidden=16, progress=False)
    method = METHODS["dino-vmf"].but(n_prototypes=24)
    return train(method, small.but(out=tmp_path_factory.mktemp("runs")), name="tiny").folder


@pytest.mark.slow
def test_a_run_is_examined_with_its_own_score_temperature_and_size(run, tmp_path):
    assert call("doctor", run, "--data", "cifar10-5k", "--limit", 300, "--no-progress", "--out", tmp_path / "o") == 0
    content = report(tmp_path / "o")
    config = json.loads((run / "config.json").read_text())
    tau = config["method"]["teacher_temp"]["end"]
    data, one = content["data"], content["sets"][0]
    assert (data["score"], data["tau"], one["tau"], data["side"], data["n"]) == ("vmf", tau, tau, 32, 300)
    assert one["kappa"]["0.5"] == pytest.approx(one["length"]["quantiles"]["0.5"] / tau, rel=1e-5)
    assert content["method"] == "tiny" and content["papers"] == [] and len(data["knn"]["accuracy"]) == 10
    network = checkpoints.load_network(run)
    images = doctor.images_of("cifar10-5k", 32, limit=300, progress=False)
    with torch.no_grad():
        codes = network.projector(extract(network.backbone, images, size=32).x)
        told = scores.vmf(codes, network.prototypes.w, tau)
    assert data["held"] == torch.bincount(told.argmax(1), minlength=24).tolist()
    np.testing.assert_allclose(data["p"], told.softmax(1).mean(0).numpy(), atol=1e-5)
    second = torch.linalg.eigvalsh(codes.T @ codes / 300).clamp_min(0)
    assert data["code_rank"] == pytest.approx(float(torch.special.entr(second / second.sum()).sum().exp()), rel=1e-3)


@pytest.mark.slow
def test_an_export_says_the_same_as_its_run(run, tmp_path):
    checkpoints.export(run, tmp_path / "export")
    found = []
    for path in (run, tmp_path / "export"):
        out = tmp_path / f"of-{path.name}"
        options = ("--network", "teacher", "--data", "cifar10-5k", "--limit", 100, "--no-progress", "--out", out)
        assert call("doctor", path, *options) == 0
        found.append(report(out))
    assert found[0]["data"] == found[1]["data"]
    assert found[0]["sets"][0]["assignment"] == found[1]["sets"][0]["assignment"]
    assert [len(x["file"]["sha256"]) for x in found] == [64, 64]
    assert found[0]["sets"][0]["other"]["network"] == "student" and found[1]["sets"][0]["other"] is None


def test_codes_without_a_mean_have_no_void_set_and_it_is_said(planted):
    opened = doctor.opened(planted["path"])
    seen = doctor.examine(opened.sets[0], progress=False)

    class Mirrored(torch.nn.Module):
        def forward(self, x):
            y = F.normalize(torch.randn(len(x) // 2, 24, generator=torch.Generator().manual_seed(0)), dim=1)
            return torch.cat([y, -y])

    coder = subject.Codes(doctor.coder(opened, opened.sets[0]).backbone, Mirrored())
    images = doctor.images_of(str(planted["data"]), 32, progress=False)
    score = functools.partial(scores.dot, tau=0.1)
    data = doctor.with_data(seen, images, coder, score, side=32, progress=False)
    assert data.void is None and any("nothing lies opposite" in text for text in words.remarks(seen, data))


def test_codes_that_are_not_finite_are_one_line(planted):
    opened = doctor.opened(planted["path"])
    seen = doctor.examine(opened.sets[0], progress=False)

    class Broken(torch.nn.Module):
        def forward(self, x):
            return torch.full((len(x), 24), float("nan"))

    coder = subject.Codes(doctor.coder(opened, opened.sets[0]).backbone, Broken())
    images = doctor.images_of(str(planted["data"]), 32, progress=False)
    with pytest.raises(ValueError, match="codes of 40 images are not finite"):
        doctor.with_data(seen, images, coder, scores.dot, side=32, progress=False)


def test_heads_alone_cannot_make_codes_and_it_is_one_line_before_any_counting(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prototypes_lib.doctor.examination.neighbors", None)
    path = make("webssl", tmp_path, torch.randn(12, 8, generator=torch.Generator().manual_seed(0)))
    assert call("doctor", path, "--data", "cifar10-5k", "--no-progress") == 2
    said = capsys.readouterr().err
    assert str(path) in said and len(said.strip().splitlines()) == 1
