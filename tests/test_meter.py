"""`collapse.Meter`: what it measures against naive references, in whose loops it works, and what it costs."""

import copy
import gc
import json
import math
import pickle
import time
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prototypes_lib.collapse import Meter, measures, unique_prototypes
from prototypes_lib.collapse.measures import (
    Movement,
    measures_of_codes,
    measures_of_prototypes,
    measures_of_student,
    measures_of_targets,
    void_share,
    weights_of,
)
from prototypes_lib.heads import Prototypes

K, P, N = 48, 8, 40


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _scores(seed: int = 0, n: int = N, k: int = K) -> torch.Tensor:
    return 4 * torch.randn(n, k, generator=_g(seed))


def _codes(seed: int = 0, n: int = N, p: int = P) -> torch.Tensor:
    return F.normalize(1 + torch.randn(n, p, generator=_g(seed)), dim=-1)


def _w() -> torch.Tensor:
    return torch.randn(K, P, generator=_g(1))


def _net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def _quiet(**options) -> Meter:
    return Meter(**{"every": 1, "say": None, "m_every": 1} | options)


def _entropy(p) -> float:
    return float(-sum(x * math.log(x) for x in np.asarray(p, dtype=np.float64) if x > 0))


# What a row holds


@pytest.mark.parametrize("block", [2**22, 100])  # the latter: two rows at a time
def test_targets_are_measured_as_a_loop_over_rows_would(block, monkeypatch):
    monkeypatch.setattr(measures, "_BLOCK", block)
    p = torch.softmax(_scores().double(), -1)
    row, mean = measures_of_targets(p)
    assert row["teacher_entropy"] == pytest.approx(np.mean([_entropy(x) for x in p]), rel=1e-12)
    assert row["marginal_entropy"] == pytest.approx(_entropy(p.mean(0)), rel=1e-12)
    assert row["k"] == K and torch.allclose(mean, p.mean(0))
    of_scores, _ = measures_of_targets(_scores().double(), log_scores=True)
    assert of_scores.pop("score_max") == pytest.approx(float(_scores().abs().max()))
    assert of_scores == pytest.approx(row)


def test_targets_of_several_views_are_all_their_rows():
    scores = _scores()
    assert measures_of_targets(scores.reshape(2, N // 2, K), log_scores=True)[0] == pytest.approx(
        measures_of_targets(scores, log_scores=True)[0]
    )


def test_a_prototype_out_of_reach_has_no_share_and_no_score():
    scores = _scores()
    scores[:, 3] = -math.inf
    row, mean = measures_of_targets(scores, log_scores=True)
    assert mean[3] == 0 and math.isfinite(row["teacher_entropy"]) and math.isfinite(row["score_max"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_shows_in_the_row(bad):
    scores = _scores()
    scores[0, 0] = bad
    assert not math.isfinite(measures_of_targets(scores, log_scores=True)[0]["score_max"])


def test_prototypes_are_measured_by_length_and_counted_by_direction():
    w = torch.cat([torch.eye(4), 3 * torch.eye(4)[:2], torch.zeros(1, 4)])
    row = measures_of_prototypes(w)
    levels = np.quantile(w.norm(dim=-1).numpy(), [0.05, 0.5, 0.95])
    assert [row[f"kappa_{q}"] for q in ("05", "50", "95")] == pytest.approx(levels.tolist())
    assert row["M"] == 4 and "M" not in measures_of_prototypes(w[6:]), "one has no direction and is not counted"
    assert measures_of_prototypes(w[:6])["M"] == 4 and "M" not in measures_of_prototypes(w[:6], count=False)
    assert measures_of_prototypes(w[:6], eps=2.0)["M"] == 1


def test_codes_have_the_rank_of_their_second_moment_and_sim_eq_8():
    z = _codes().double()
    shares = np.linalg.eigvalsh((z.T @ z).numpy())
    row = measures_of_codes(z, eps=0.3)
    assert row["effective_rank"] == pytest.approx(math.exp(_entropy(shares / shares.sum())), rel=1e-9)
    rate = 0.5 * np.linalg.slogdet(np.eye(P) + P / (N * 0.3**2) * (z.T @ z).numpy())[1]
    assert row["coding_rate"] == pytest.approx(rate, rel=1e-9) and row["code_dim"] == P
    assert measures_of_codes(torch.ones(5, P))["effective_rank"] == pytest.approx(1)
    broken = measures_of_codes(torch.full((5, P), math.nan))
    assert math.isnan(broken["effective_rank"]) and math.isnan(broken["coding_rate"])


def test_the_void_share_is_that_of_prototypes_opposite_to_the_mean_code():
    codes = _codes()
    mean = F.normalize(codes.mean(0), dim=0)
    w = torch.cat([-2 * mean.expand(3, P), mean[None], _w()[:8]])
    assert void_share(w, codes) == pytest.approx(3 / 12)
    assert void_share(w, torch.cat([codes, -codes])) is None, "no direction away from these"


def test_gradients_and_weights_are_those_of_one_long_vector():
    net = _net()
    assert "grad_norm" not in measures_of_student(net)
    net(torch.randn(4, 5, generator=_g())).square().sum().backward()
    row = measures_of_student(net)
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert row["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-6)
    assert row["weight_max"] == pytest.approx(float(weights.abs().max()))


def test_a_norm_is_finite_as_long_as_it_can_be():
    net = nn.Linear(4, 4, bias=False)
    net.weight.grad = torch.full((4, 4), 1e19)
    assert measures_of_student(net)["grad_norm"] == pytest.approx(4e19, rel=1e-6)


def test_movement_and_lag_are_relative_lengths():
    student, teacher, movement = _net(0), _net(1), Movement()
    flat = lambda net: torch.cat([p.detach().flatten() for p in net.parameters()]).clone()
    assert movement(teacher, student).keys() == {"teacher_lag", "shared_memory"}
    before = flat(teacher)
    with torch.no_grad():
        teacher[0].weight.add_(0.3)
    row = movement(teacher, student)
    assert row["teacher_moved"] == pytest.approx(float((flat(teacher) - before).norm() / flat(teacher).norm()))
    lag = float((flat(teacher) - flat(student)).norm() / flat(student).norm())
    assert row["teacher_lag"] == pytest.approx(lag) and row["shared_memory"] == 0
    assert movement(teacher, student)["teacher_moved"] == 0
    assert movement(teacher).keys() == {"teacher_moved"}


def test_movement_of_large_parameters_is_estimated_on_a_sample(monkeypatch):
    monkeypatch.setattr(measures, "_SAMPLE", 500)
    teacher = nn.Linear(64, 512, bias=False)
    movement = Movement()
    movement(teacher)
    assert sum(x.numel() for x in movement._before) <= 500
    with torch.no_grad():
        teacher.weight.mul_(1.1).add_(0.01 * torch.randn(512, 64, generator=_g()))
    assert movement(teacher)["teacher_moved"] == pytest.approx(0.14, abs=0.03)
    with torch.no_grad():
        teacher.weight[:, 5] += 1.0  # a step of 64 would look at one column alone
    assert movement(teacher)["teacher_moved"] > 0.1


def test_shared_memory_is_what_is_held_twice_and_trained():
    student = _net()
    teacher = copy.deepcopy(student).requires_grad_(False)
    shared = lambda *by_design: Movement()(teacher, student, by_design)["shared_memory"]
    assert shared() == 0
    teacher[2] = student[2]
    assert shared() == 1
    assert shared(*student[2].parameters()) == 0, "prototypes that are meant to be shared"
    teacher[2] = copy.deepcopy(student[2])
    teacher[0].weight.data = student[0].weight.data
    assert shared() == 1, "two parameters on one storage"
    student[0].requires_grad_(False)
    assert shared() == 0, "frozen in both: no harm"
    teacher = student.requires_grad_(False)
    assert shared() == 1, "everything"


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_prototypes_are_read_from_tensors_and_from_every_kind_of_last_layer():
    v = _w()
    g = torch.linspace(0.5, 2, K)[:, None]
    expected = g * F.normalize(v, dim=-1)

    linear = nn.Linear(P, K, bias=False)
    old = nn.utils.weight_norm(nn.Linear(P, K, bias=False))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(P, K, bias=False))
    ours = Prototypes(K, P, free_norms=True)
    with torch.no_grad():
        linear.weight.copy_(expected)
        old.weight_v.copy_(v), old.weight_g.copy_(g)
        new.parametrizations.weight.original0.copy_(g), new.parametrizations.weight.original1.copy_(v)
        ours.weight_v.copy_(v), ours.weight_g.copy_(g)
    for layer in (expected, nn.Parameter(expected), linear, old, new, ours):
        w = weights_of(layer)
        assert torch.allclose(w, expected, atol=1e-6) and not w.requires_grad, type(layer)
    assert not torch.allclose(old.weight, expected), "which is why its .weight is not asked: it is of the last forward"


@pytest.mark.parametrize("wrong", [nn.GELU(), torch.zeros(3), nn.Conv2d(3, 8, 2), torch.zeros(0, 4)])
def test_what_holds_no_prototypes_is_named(wrong):
    with pytest.raises(ValueError, match=r"holds no prototypes: pass a \(k, p\) tensor") as error:
        weights_of(wrong)
    assert "\n" not in str(error.value)


def test_a_row_has_all_keys_as_floats_and_survives_json():
    student = _net()
    teacher = copy.deepcopy(student)
    student(torch.ones(2, 5)).sum().backward()
    meter = _quiet()
    for _ in range(2):
        meter.update(
            torch.tensor(3.5, requires_grad=True),
            log_scores=_scores(),
            prototypes=_w(),
            student_prototypes=_w()[:, :].flip(0),
            codes=_codes(),
            student=student,
            teacher=teacher,
            image=3.25,
        )
    row = meter.rows[-1]
    expected = (
        "step loss image k teacher_entropy marginal_entropy score_max running_marginal_entropy kl code_dim "
        "effective_rank coding_rate n_targets n_codes kappa_05 kappa_50 kappa_95 M void M_student weight_max "
        "grad_norm teacher_moved teacher_lag shared_memory"
    )
    assert set(row) == set(expected.split())
    assert all(type(value) is float for value in row.values())
    assert json.loads(json.dumps(meter.rows)) == meter.rows
    assert row["kl"] == pytest.approx(3.25 - row["teacher_entropy"]), "of the image term, where it is given"
    assert row["M"] == row["M_student"] == unique_prototypes(_w()).count


def test_kl_is_the_loss_minus_the_entropy_where_the_loss_is_all():
    meter = _quiet()
    meter.update(4.0, log_scores=_scores())
    assert meter.rows[0]["kl"] == pytest.approx(4.0 - meter.rows[0]["teacher_entropy"])


def test_the_running_marginal_is_an_average_from_row_to_row():
    meter, mean = _quiet(momentum=0.8), None
    for seed in range(4):
        p = torch.softmax(_scores(seed), -1)
        meter.update(1.0, p)
        mean = p.mean(0) if mean is None else 0.8 * mean + 0.2 * p.mean(0)
        assert meter.rows[-1]["running_marginal_entropy"] == pytest.approx(_entropy(mean), rel=1e-5)


# When it measures, and in whose loops


def test_rows_come_at_the_first_step_and_every_so_many():
    meter = Meter(every=20, say=None)
    for _ in range(61):
        meter.update(3.0, log_scores=_scores())
    assert [row["step"] for row in meter.rows] == [1, 20, 40, 60]
    other = Meter(every=2, say=None)
    for step in (100, 150, 200):
        other.update(3.0, log_scores=_scores(), step=step)
    assert [row["step"] for row in other.rows] == [100, 150]


def test_a_loss_that_jumps_or_ends_brings_a_row_of_its_own_and_only_one():
    meter = Meter(every=1000, say=None)
    for loss in (3.0, 3.1, 2.9, 4.9, 4.8, 4.9, math.nan, math.nan, 2.0, math.inf):
        meter.update(torch.tensor(loss), log_scores=_scores())
    assert [row["step"] for row in meter.rows] == [1, 4, 7, 10]


def test_growing_weights_are_looked_at_ten_times_as_often():
    net, meter = _net(), Meter(every=20, say=None)
    for step in range(1, 101):
        with torch.no_grad():
            if 40 < step <= 80:
                net[0].weight.mul_(1.1)
        meter.update(3.0, student=net)
    steps = [int(row["step"]) for row in meter.rows]
    assert steps[:4] == [1, 20, 40, 60]
    assert steps[4:15] == [*range(62, 82, 2), 82] and steps[15:] == [100]


def test_m_is_counted_as_often_as_asked():
    meter = _quiet(every=2, m_every=6)
    for _ in range(18):
        meter.update(3.0, prototypes=_w())
    assert [row["step"] for row in meter.rows if "M" in row] == [1, 8, 14]
    assert all("kappa_50" in row for row in meter.rows)


def test_by_default_counting_m_takes_a_twentieth_of_the_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def two_seconds(w, eps, count=True):
        clock[0] += 2.0 * count
        return {"k": float(len(w))} | ({"M": 1.0} if count else {})

    monkeypatch.setattr("prototypes_lib.collapse.meter.measures_of_prototypes", two_seconds)
    meter = Meter(every=1, say=None)
    for _ in range(100):
        clock[0] += 1.0  # a step of the loop
        meter.update(3.0, prototypes=_w())
    counted = sum("M" in row for row in meter.rows)
    assert 2 <= counted <= 4, "2 s each, in 100 s"


def test_functions_are_called_only_where_a_row_is_due():
    calls = []

    def scores():
        calls.append(1)
        return _scores()

    meter = Meter(every=10, say=None)
    for _ in range(20):
        meter.update(3.0, log_scores=scores, codes=_codes)
    assert len(calls) == 3 and "effective_rank" in meter.rows[-1]


def test_nothing_of_the_step_is_kept_alive_and_no_gradient_changes():
    meter, net = _quiet(), _net()
    x = torch.randn(6, 5, generator=_g())
    out = net(x)
    loss = out.logsumexp(-1).mean()
    loss.backward(retain_graph=True)
    before = [p.grad.clone() for p in net.parameters()]
    meter.update(loss, log_scores=out, codes=out, prototypes=_w()[:3, :3], student=net, teacher=net)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, net.parameters(), strict=True))
    held = [weakref.ref(t) for t in (out, loss)]
    del out, loss
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert not meter._running.requires_grad and not any(t.requires_grad for t in meter._movement._before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision_is_measured_in_float32_at_least_also_under_autocast(dtype):
    scores, codes, w = (x.to(dtype) for x in (_scores(), _codes(), _w()))
    net = _net().to(dtype)
    exact, meter = _quiet(), _quiet()
    exact.update(3.0, log_scores=scores.double(), codes=codes.double(), prototypes=w.double(), student=net.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        meter.update(
            torch.tensor(3.0, dtype=dtype), log_scores=scores, codes=codes, prototypes=w, student=net.to(dtype)
        )
    for key, value in exact.rows[0].items():
        assert meter.rows[0][key] == pytest.approx(value, rel=1e-4), key


def test_targets_in_half_precision_still_sum_to_one():
    p = torch.softmax(_scores(k=4096), -1)
    for dtype in (torch.bfloat16, torch.float16):
        row, _ = measures_of_targets(p.to(dtype))
        assert row["teacher_entropy"] == pytest.approx(measures_of_targets(p)[0]["teacher_entropy"], rel=0.01)


def test_a_loop_without_prototypes_and_one_without_a_teacher_are_measured_by_what_they_have():
    student = _net()
    simdino, swav = _quiet(), _quiet()
    simdino.update(-1.5, codes=_codes(), student=student, teacher=copy.deepcopy(student))
    assert {"k", "M", "kl", "void"}.isdisjoint(simdino.rows[0]) and "teacher_lag" in simdino.rows[0]
    assert "effective rank" in str(simdino) and "ln K" not in str(simdino)
    swav.update(3.0, torch.softmax(_scores(), -1), prototypes=_w(), student=student)
    assert {"teacher_lag", "shared_memory", "score_max"}.isdisjoint(swav.rows[0]) and "M" in swav.rows[0]


# What it says


def test_a_finding_is_said_once_returned_once_and_kept():
    said = []
    meter = Meter(every=10, say=said.append)
    new = [f for _ in range(200) for f in meter.update(math.log(K), log_scores=torch.zeros(N, K))]
    assert [f.kind for f in new] == [f.kind for f in meter.findings] == ["uniform"]
    assert said == [str(new[0])] and said[0].startswith(f"step {new[0].step}: uniform: ")
    assert meter.verdict().startswith("step 200: uniform"), "the state now, at the newest row"


def test_a_finding_that_passed_is_remembered_but_no_longer_the_verdict():
    meter = _quiet(every=20)
    for step in range(300):
        meter.update(3.0, log_scores=torch.zeros(N, K) if step < 150 else _scores(step))
    assert [f.kind for f in meter.findings] == ["uniform"] and meter.verdict() == "Nothing wrong to be seen."


def test_print_says_the_newest_row_in_a_line_and_each_finding_in_one(capsys):
    meter = Meter(every=20)
    assert str(meter) == "Nothing is measured yet."
    for _ in range(100):
        meter.update(math.log(K), log_scores=torch.zeros(N, K), prototypes=torch.ones(K, P), codes=_codes())
    lines = str(meter).splitlines()
    assert lines[0].startswith("step 100  loss 3.871 (ln K 3.871)  teacher entropy 3.871  KL 0.000")
    assert f"M 1/{K}" in lines[0] and f"/{P}" in lines[0]
    assert [text.split(": ")[1] for text in lines[1:]] == ["uniform", "partial"]
    assert len(capsys.readouterr().out.splitlines()) == 2, "each said when it appeared"


# Mistakes


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "nothing to measure: pass targets or log_scores"),
        ({"targets": torch.ones(4, K)}, "a row of the targets sums to 48, not 1"),
        ({"targets": _scores()}, "probabilities are not negative; pass scores as log_scores"),
        ({"targets": torch.softmax(_scores(), 0)}, "the last dimension must be the prototypes"),
        ({"targets": torch.ones(1, 1), "log_scores": _scores()}, "not both"),
        ({"targets": torch.ones(0, K)}, "nothing to measure"),
        ({"log_scores": _scores(), "prototypes": torch.ones(K + 1, P)}, "targets over 48 prototypes, but 49"),
        ({"prototypes": _w(), "codes": torch.ones(4, P + 1)}, "codes of 9 dimensions, but prototypes of 8"),
        ({"codes": torch.ones(0, P)}, "no codes"),
    ],
)
def test_bad_input_gets_one_clear_line(given, message):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        _quiet().update(3.0, **given)
    assert message in str(error.value)


@pytest.mark.parametrize("options", [{"every": 0}, {"m_every": 0}, {"momentum": 1.0}, {"eps": 0.0}])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match="need steps of at least 1"):
        Meter(**options)


# Cost


def test_a_step_without_a_row_costs_microseconds():
    meter, net = Meter(every=10**9, say=None), _net()
    loss, given = torch.tensor(3.0, requires_grad=True), {"log_scores": _scores(), "student": net, "teacher": net}
    meter.update(loss, **given)
    start = time.process_time()
    for _ in range(2000):
        meter.update(loss, **given)
    assert (time.process_time() - start) / 2000 < 100e-6  # 3 without type checks, on the machine it was written on
    assert len(meter.rows) == 1


def test_a_row_at_k_4096_costs_tens_of_milliseconds():
    scores, w, codes = _scores(n=128, k=4096), torch.randn(4096, 256, generator=_g()), _codes(n=128, p=256)
    meter = Meter(every=1, say=None, m_every=10**9)
    meter.update(3.0, log_scores=scores, prototypes=w, codes=codes)
    start = time.process_time()
    for _ in range(3):
        meter.update(3.0, log_scores=scores, prototypes=w, codes=codes)
    assert (time.process_time() - start) / 3 < 0.2  # 0.015 there


def test_views_may_come_as_a_list_and_the_last_layer_in_a_wrapper():
    head, meters = torch.nn.Linear(P, 12), [Meter(every=1, say=None) for _ in range(2)]
    views = torch.randn(2, N, 12).unbind()
    meters[0].update(1.0, log_scores=views, prototypes=torch.nn.DataParallel(head), codes=lambda: [_codes(), _codes()])
    meters[1].update(1.0, log_scores=torch.cat(views), prototypes=head, codes=torch.cat([_codes(), _codes()]))
    assert meters[0].rows == meters[1].rows


def test_a_running_marginal_recovers_from_targets_that_were_no_numbers():
    meter = Meter(every=1, say=None)
    meter.update(1.0, torch.full((4, 3), math.nan))
    meter.update(1.0, torch.full((4, 3), 1 / 3))
    assert meter.rows[-1]["running_marginal_entropy"] == pytest.approx(math.log(3))


def test_a_copied_meter_counts_again_at_once():
    meter = Meter(every=1, say=None)
    meter.update(1.0, prototypes=torch.randn(8, 4))
    meter._m_due = math.inf  # the clock of another machine
    again = pickle.loads(pickle.dumps(meter))
    again.update(1.0, prototypes=torch.randn(8, 4))
    assert "M" in again.rows[-1] and again.rows[0] == meter.rows[0]
