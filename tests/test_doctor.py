"""The doctor on prototypes alone: planted truth through files, command line and JSON; a reference for each number."""

import json
import math
import re
from dataclasses import replace

import memory
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from official_files import LAYOUTS, NO_PROTOTYPES, make, planted

from prototypes_lib import checkpoints, doctor
from prototypes_lib.cli import run_command
from prototypes_lib.doctor import examination, paper, subject, words
from prototypes_lib.official import Found
from prototypes_lib.regularizers import coding_rate

TRUTH = planted((9, 1, 4, 2, 1, 1, 3, 1, 1, 1), 24, void=12)  # M = 11, K = 36, the void set is the largest group


def call(*argv) -> int:
    return run_command(list(map(str, argv)))


def found(w: torch.Tensor, **changes) -> Found:
    told = {"network": "teacher", "of": "crops", "layout": "DINO, full checkpoint", "score": "dot"}
    told |= {"tensor": "head.last_layer.weight_v", "dtype": "float32"}
    return Found(w, **(told | changes))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No figures: tests/test_doctor_page.py looks at these."""
    monkeypatch.setattr("prototypes_lib.doctor.page.page", lambda report, content: "")


def report(folder) -> dict:
    def refuse(word):
        raise AssertionError(f"{word} in the JSON")

    return json.loads((folder / "report.json").read_text(), parse_constant=refuse)


# --- planted truth, from a file to the JSON -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in NO_PROTOTYPES])
def test_every_layout_gives_the_planted_count_groups_and_largest_group(layout, tmp_path, capsys):
    path = make(layout, tmp_path / "file", TRUTH.w, student=TRUTH.w.flip(0))
    assert call("doctor", path, "--no-progress", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert (
        "11 of 36 prototypes are unique (30.6 %): partial prototype collapse; the largest group of copies has 12"
        in said
    )
    assert "M = 11 unique at 1 - cos < 0.025 (30.6% of K), index order\n    other orders give 11 to 11; 11 conn" in said
    content = report(tmp_path / "out")
    one = content["sets"][0]
    assert (one["k"], one["dim"], one["m"], one["largest"], one["components"]) == (36, 24, 11, 12, 11)
    assert one["order_range"] == [11, 11] and sorted(one["redundancy"]) == sorted(TRUTH.redundancy)
    assert one["copies"] == [{"r": r, "prototypes": n} for r, n in ((1, 6), (2, 1), (3, 1), (4, 1), (9, 1), (12, 1))]
    void = torch.nonzero(TRUTH.void)[:, 0].tolist()
    assert one["largest_of"] == void[0]
    group = [i for i, m in enumerate(one["assignment"]) if one["representatives"][m] == void[0]]
    assert group == void
    assert content["verdict"]["kind"] == "partial" and content["data"] is None and content["papers"] == []
    assert any("may be a void set" in text for text in content["verdict"]["remarks"])


def test_a_file_with_teacher_and_student_tells_both_and_how_they_agree(tmp_path, capsys):
    student = TRUTH.w + 0.001 * torch.randn(TRUTH.w.shape, generator=torch.Generator().manual_seed(1))
    path = make("dino", tmp_path, TRUTH.w, student=student)
    assert call("doctor", path, "--no-progress", "--out", tmp_path / "out") == 0
    sets = report(tmp_path / "out")["sets"]
    assert [(s["network"], s["of"], s["m"]) for s in sets] == [("teacher", "crops", 11), ("student", "crops", 11)]
    other, cosine = sets[0]["other"], F.cosine_similarity(TRUTH.w, student)
    assert (other["network"], other["m"], other["k"]) == ("student", 11, 36) and sets[1]["other"] is None
    assert other["cosine"]["0"] == pytest.approx(float(cosine.min()), abs=1e-5)
    assert "student: M = 11, cosine of matching prototypes 1.0000 (median)" in capsys.readouterr().out


def test_network_and_of_choose_among_the_sets_and_what_is_not_there_is_one_line(tmp_path, capsys):
    path = make("ibot-own-patches", tmp_path, TRUTH.w, patches=TRUTH.w[:20], student=torch.randn(36, 24))
    assert (
        call("doctor", path, "--no-progress", "--of", "patches", "--network", "teacher", "--out", tmp_path / "o") == 0
    )
    content = report(tmp_path / "o")
    assert [(s["network"], s["of"], s["k"]) for s in content["sets"]] == [("teacher", "patches", 20)]
    assert call("doctor", path, "--no-progress", "--network", "student") == 0
    assert "K = 36 prototypes of dimension 24 (student)" in capsys.readouterr().out
    assert call("doctor", path, "--of", "head 3") == 2
    assert capsys.readouterr().err == (
        "error: no prototypes of head 3 are there, only: teacher of crops, teacher of patches, student of crops, "
        "student of patches\n"
    )


def test_swavs_heads_are_all_reported(tmp_path):
    other = planted((2, 5, 1), 24, seed=3)
    path = make("swav-heads", tmp_path, TRUTH.w, patches=other.w)
    assert call("doctor", path, "--no-progress", "--out", tmp_path / "out") == 0
    assert [(s["of"], s["m"]) for s in report(tmp_path / "out")["sets"]] == [("head 0", 11), ("head 1", 3)]


@pytest.mark.parametrize("layout", NO_PROTOTYPES)
def test_files_without_prototypes_are_one_line_and_status_2(layout, tmp_path, capsys):
    path = make(layout, tmp_path / "file", TRUTH.w)
    assert call("doctor", path, "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert layout != "simdino" or "SimDINO has no prototypes; nothing to count" in said.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--eps", "0"), "eps"),
        (("--eps", "3"), "eps=3.0"),
        (("--orders", "0"), "orders"),
        (("--tau", "-1"), "tau"),
        (("--seed", "-1"), "seed"),
        (("--limit", "-1"), "limit"),
        (("--data", "no-such-set"), "no-such-set"),
        (("--data", "./no-such-folder"), "no-such-folder"),
        (("--of", "patches", "--data", "cifar10-5k"), "--of patches"),
    ],
)
def test_a_wrong_request_is_one_line_before_any_counting(options, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(examination, "neighbors", None)  # counting would fail otherwise
    path = make("ibot-own-patches", tmp_path / "file", TRUTH.w, patches=TRUTH.w)
    assert call("doctor", path, *options, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err.strip()
    assert says in said and len(said.splitlines()) == 1 and not (tmp_path / "out").exists()


# --- each number against a reference ------------------------------------------------------------------------------


def test_the_curve_has_both_papers_thresholds_and_the_asked_one_and_equals_single_counts():
    from prototypes_lib.collapse import unique_prototypes

    w = torch.randn(150, 6, generator=torch.Generator().manual_seed(0))
    seen = doctor.examine(found(w), eps=0.07, progress=False)
    eps = [at for at, _, _ in seen.curve]
    assert eps == sorted(eps) and {0.025, 0.1, 0.07} <= set(eps)
    for at, m, largest in seen.curve:
        u = unique_prototypes(w, at)
        assert (m, largest) == (u.count, int(u.redundancy.max()))
    assert seen.unique.count == seen.at(0.07)[0] and seen.unique.eps == 0.07
    assert seen.at(0.025)[0] > seen.at(0.1)[0] > seen.at(0.5)[0]


def test_nearest_is_that_of_all_pairs_and_lengths_those_of_the_rows():
    w = torch.randn(90, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).float()
    seen = doctor.examine(found(w), progress=False)
    x = F.normalize(w.double(), dim=1)
    naive = (1 - (x @ x.T - 3 * torch.eye(90))).amin(1)
    torch.testing.assert_close(seen.nearest.double(), naive, atol=1e-6, rtol=0)
    torch.testing.assert_close(seen.lengths, w.norm(dim=1))


def test_uniform_points_lie_as_the_stated_distribution_says():
    g = torch.Generator().manual_seed(0)
    seen = doctor.examine(found(torch.randn(2000, 12, generator=g)), progress=False)
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        drawn, stated = seen.nearest.quantile(q), seen.uniform.quantile(q)
        assert float(drawn) == pytest.approx(float(stated), rel=0.06)


def test_coding_rate_and_effective_rank_are_those_of_the_directions():
    w = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 4, 1, 1, 1, 1, 1, 0.1])
    seen = doctor.examine(found(w), progress=False)
    x = F.normalize(w, dim=1)
    assert seen.coding_rate == pytest.approx(float(coding_rate(x, examination.RATE_EPS)), rel=1e-5)
    p = np.linalg.svd(x.double().numpy(), compute_uv=False) ** 2
    p /= p.sum()
    assert seen.effective_rank == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-5)
    eye = doctor.examine(found(5 * torch.eye(7)), progress=False)
    assert eye.effective_rank == pytest.approx(7, rel=1e-6)


def test_order_range_and_seed_are_those_of_unique_range():
    from prototypes_lib.collapse import connected_components, unique_range

    angle = torch.linspace(0, 6, 80)
    w = torch.stack([angle.cos(), angle.sin()], 1)
    for seed in (0, 5):
        seen = doctor.examine(found(w), orders=4, seed=seed, progress=False)
        assert seen.order_range == unique_range(w, 0.025, 4, seed) and seen.order_range[0] < seen.order_range[1]
        assert seen.components == connected_components(w) == 1


def test_a_single_prototype_and_equal_ones_are_examined_too():
    one = doctor.examine(found(torch.ones(1, 4)), progress=False)
    assert (one.unique.count, one.nearest, one.largest) == (1, None, 1) and words.kind(one) == "none"
    same = doctor.examine(found(torch.ones(50, 4)), progress=False)
    assert same.unique.count == 1 and same.effective_rank == pytest.approx(1, abs=1e-4)
    assert words.kind(same) == "full" and words.verdict(same).startswith("1 of 50 prototypes is unique (2 %): full")


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_rows_without_direction_are_named(bad):
    w = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    w[7] = bad
    with pytest.raises(ValueError, match=r"1 of 30 teacher prototypes \(head.last_layer.weight_v\) .* is number 7"):
        doctor.examine(found(w), progress=False)


def test_quantiles_and_histograms_are_numpys():
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    told = examination.quantiles(x)
    for q, value in told.items():
        assert value == pytest.approx(float(np.quantile(x.double().numpy(), float(q))), abs=1e-12)
    made = examination.histogram(x, 13)
    assert made["counts"] == np.histogram(x.numpy(), 13)[0].tolist() and sum(made["counts"]) == 1001
    assert sum(examination.histogram(torch.full((5,), 3.0))["counts"]) == 5


# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "kind"), [(1, "full"), (2, "partial"), (49, "partial"), (50, "some"), (94, "some"),
                                         (95, "none"), (100, "none")])  # fmt: skip
def test_the_verdict_goes_by_the_share_of_unique_prototypes(m, kind):
    w = torch.eye(100)
    w[m:] = w[0]
    seen = doctor.examine(found(w), progress=False)
    assert seen.unique.count == m and words.kind(seen) == kind


def test_the_verdict_says_what_a_person_reads():
    w = torch.eye(1024)[:, :200]
    w = torch.cat([w[:200], w[:1].expand(824, 200)])
    seen = doctor.examine(found(w), progress=False)
    assert words.verdict(seen) == (
        "200 of 1,024 prototypes are unique (19.5 %): partial prototype collapse; the largest group of copies has 825 "
        "(80.6 %)."
    )
    told = " ".join(words.remarks(seen))
    assert "All prototypes have one length, 1" in told and "KoLeo on the prototypes" in told
    assert "M does not depend on the order" in told and "The group around prototype 0 may be a void set" in told


def test_kappa_needs_a_temperature_and_its_absence_is_said():
    w = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    unknown = doctor.examine(found(w), progress=False)
    assert any("temperature that makes it vMF's kappa is not in the file" in text for text in words.remarks(unknown))
    known = doctor.examine(found(w), tau=0.05, progress=False)
    assert any(re.search(r"over tau = 0\.05 kappa is [\d.]+ to [\d.]+", text) for text in words.remarks(known))


# --- the papers' rows ---------------------------------------------------------------------------------------------


def seen_as(layout: str, k: int, m: int, largest: int) -> doctor.Examination:
    """An examination with these counts at both thresholds, without the work."""
    small = doctor.examine(found(torch.eye(3), layout=layout), progress=False)
    curve = tuple((eps, m, largest) for eps, _, _ in small.curve)
    return replace(small, curve=curve, lengths=torch.ones(k), nearest=None, uniform=None)


def test_dino_vit_small_has_vmfs_row_and_ibot_ppcs():
    rows = paper.rows(seen_as("DINO, full checkpoint", 65536, 960, 2000), None, 384, 16)
    assert [(r.paper, r.table, r.value, r.measured) for r in rows] == [
        ("vMF", "Table 4", 961.0, 960), ("vMF", "Table 4", 2087.0, 2000),
    ]  # fmt: skip
    assert all(r.eps == 0.1 and r.model == "DINO, ViT-S/16" for r in rows)
    (row,) = paper.rows(seen_as("iBOT", 8192, 870, 3), None, 768, 16)
    assert (row.paper, row.table, row.value, row.measured, row.eps) == ("PPC", "Table 1", 875.0, 870, 0.025)
    (row,) = paper.rows(seen_as("iBOT", 8192, 1, 1), None, 1024, 16)
    assert row.value == 969.0
    assert paper.said([row]) == [
        "PPC, Table 1, iBOT, ViT-L/16: unique prototypes M (1 - cos < 0.025) 969 printed, 1 here"
    ]


def test_a_run_of_ours_has_a_row_by_its_method_and_its_data():
    one = seen_as("run of this library", 65536, 1200, 9)
    rows = paper.rows(one, "dino-vmf", 384, 16, "imagenet")
    assert [(r.paper, r.value) for r in rows] == [("PPC", 1157.0), ("vMF", 1122.0), ("vMF", 1226.0)]
    assert paper.rows(one, "dino-vmf-vits16", 384, 16, "imagenet") == rows
    assert paper.rows(one, "dino-vmf-vits16", 384, 16, "/data/ILSVRC2012/") == rows
    assert paper.rows(one, "dino-vmf-vits16", 384, 16, "/data/tiny-imagenet") == ()
    for other in ("dino-vmf-kp", "dino-vmf-kp-vits16", "mine"):
        assert paper.rows(one, other, 384, 16, "imagenet") == ()
    assert paper.rows(one, "dino-vmf", 384, 16, "cifar10") == ()
    assert [r.value for r in paper.rows(seen_as("run", 8142, 1, 1), "msn", 384, 16, "inaturalist-2018")] == [3363.0]


@pytest.mark.parametrize(
    ("layout", "k", "width", "patch"),
    [("DINO, full checkpoint", 4096, 384, 16), ("DINO, full checkpoint", 65536, 384, 8),
     ("DINO, full checkpoint", 65536, 192, 16), ("SwAV", 3000, 384, 16), ("DINOv2, teacher_checkpoint", 65536, 384, 16),
     ("iBOT", 8192, 384, 16), ("iBOT", 8192, None, None)],
)  # fmt: skip
def test_other_models_have_no_row_and_it_is_said(layout, k, width, patch):
    assert paper.rows(seen_as(layout, k, 5, 5), None, width, patch) == ()
    assert paper.said(()) == ["no row of the papers is of this model"]


# --- what is examined ---------------------------------------------------------------------------------------------


def test_the_teachers_crops_come_first_whatever_the_order_in_the_file():
    w = torch.eye(3)
    sets = tuple(found(w, network=n, of=of) for n in ("student", "teacher") for of in ("patches", "crops"))
    first = subject.chosen(sets, None, None)
    assert [(s.network, s.of) for s in first][:2] == [("teacher", "crops"), ("teacher", "patches")]
    one = subject.chosen(sets, "student", None)[0]
    assert (one.network, one.of) == ("student", "crops")


def test_the_files_digest_is_in_the_report(tmp_path):
    import hashlib

    path = make("msn", tmp_path, TRUTH.w)
    opened = doctor.opened(path)
    assert opened.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and opened.size == path.stat().st_size
    assert opened.method is None and subject.temperature(opened, "teacher") is None
    assert [s.w.shape for s in opened.sets] == [s.w.shape for s in checkpoints.all_prototypes(path)]


@pytest.mark.slow
def test_sixteen_thousand_prototypes_take_little_memory_and_time(tmp_path):
    truth = planted((3000, 800, *range(1, 140)), 128, void=4000)
    path = make("webssl-flat", tmp_path, truth.w)
    code = (
        "import sys, time; from memory import peak; from prototypes_lib.cli import run_command;"
        "import prototypes_lib.doctor.page; before, start = peak(), time.process_time();"
        "code = run_command(sys.argv[1:]);"
        "print('grown', round(peak() - before), 'in', round(time.process_time() - start)); sys.exit(code)"
    )
    done = memory.run(code, "doctor", path, "--of", "crops", "--out", tmp_path / "out", "--no-progress")
    assert f"M = {truth.m} unique" in done.stdout and "largest group of copies: 4000" in done.stdout
    grown, seconds = map(int, re.search(r"grown (\d+) in (\d+)", done.stdout).groups())
    assert grown < 700, f"{grown} MB"  # all pairs would be 1.2 GB in float32
    assert seconds < 120, seconds  # of CPU
    assert sorted(report(tmp_path / "out")["sets"][0]["redundancy"]) == sorted(truth.redundancy)
