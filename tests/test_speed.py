"""The timing of benchmarks/speed.py is right, and its rows without peers answer alike; nothing here is timed."""

import json
import time
from dataclasses import replace

import pytest
import rows_evaluation
import rows_prototypes
import rows_regularizers
import speed
import timing
import torch
from timing import OURS, Goal, Measured, Ratio, Row, agree, measure, peak_bytes, quartiles


def row(ours=lambda: 1, peer=lambda: 1, check=lambda answers: None, **more):
    return Row("a row", "Says nothing.", {}, ours, {"peer": peer}, check, **more)


@pytest.mark.slow
def test_sides_take_turns_forwards_and_backwards():
    calls = []
    measured = measure(
        row(lambda: calls.append("o"), lambda: calls.append("p"), memory=None, once=True), repeats=4, least=0.0
    )
    assert "".join(calls) == "op" + "op" + "po" + "op" + "po"  # answers, four turns
    assert set(measured.ratios) == {"peer"}


def test_the_ratio_is_the_median_of_the_turns_with_its_quartiles(monkeypatch):
    seconds = iter([9.0, 9.0, 1.0, 2.0, 8.0, 3.0, 3.0, 4.0])  # of ours and the peer, in the order of calls
    monkeypatch.setattr(timing, "timed", lambda function, device="cpu", times=1: (next(seconds), function()))
    ratio = measure(row(memory=None, once=True), repeats=3).ratios["peer"]
    # turns: ours 1, peer 2; peer 8, ours 3; ours 3, peer 4
    assert (ratio.low, ratio.median, ratio.high) == quartiles([1 / 2, 3 / 8, 3 / 4])
    assert ratio.median == 0.5 and ratio.first == 1.0


@pytest.mark.slow
def test_short_calls_are_repeated_and_the_time_is_of_one(monkeypatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls = []
    assert timing.timed(lambda: calls.append(0) or "answer", times=3) == (2.0, "answer")
    assert len(calls) == 3


@pytest.mark.slow
def test_a_wrong_answer_makes_a_row_void_before_anything_is_timed():
    calls = []

    def check(answers):
        assert answers[OURS] == answers["peer"], "other answers"

    void = measure(row(lambda: calls.append(0) or 1, lambda: 2, check), repeats=50)
    assert void.void.startswith("other answers") and not void.ratios and len(calls) == 1
    assert speed.described("key", void, "small")["outcome"].startswith("void: other answers")


def test_an_answer_that_differs_from_ours_is_named():
    right = [torch.ones(3), torch.arange(3.0)]
    agree("sum", {OURS: right, "peer": [x + 1e-7 for x in right]}, 1e-6)
    with pytest.raises(AssertionError, match=r"sum: prototypes_lib and peer differ by 5\.0e-01"):
        agree("sum", {OURS: right, "peer": [right[0], right[1] * 2]}, 1e-6)


@pytest.mark.slow
def test_memory_is_what_was_alive_at_once():
    x = torch.zeros(1000, 250)  # a megabyte
    chain = lambda: x.add(1).mul(2).exp()
    assert peak_bytes(chain) == 2 * 10**6
    assert peak_bytes(lambda: [x + i for i in range(5)]) == 5 * 10**6
    assert peak_bytes(lambda: (x.view(-1).mT if x.ndim == 3 else x.T, x.add_(0), x[::2])) == 0
    y = x.clone().requires_grad_()
    assert 2 * 10**6 <= peak_bytes(lambda: torch.autograd.grad((y * y.detach()).exp().sum(), y)) <= 4 * 10**6


@pytest.mark.slow
def test_memory_of_processes_is_asked_for_each_side():
    found = measure(row(memory="process"), repeats=2, least=0.0, rss={OURS: 30, "peer": 60}.__getitem__)
    assert found.ratios["peer"].memory == 0.5


def test_a_goal_that_is_missed_is_told_with_its_cause():
    goals = (Goal("peer", 0.5, 0.1), Goal("not installed", 0.1))
    found = Measured(row(goals=goals, limit="the laws of nature"), {"peer": Ratio(0.7, 0.6, 0.8, 0.05)})
    told = speed.described("key", found, "cpu")
    assert told["outcome"] == "short of: time 0.70 > 0.5 of peer" and told["why"] == "the laws of nature"
    found = replace(found, ratios={"peer": Ratio(0.4, 0.3, 0.6, 0.05)})
    assert speed.described("key", found, "cpu")["outcome"] == "met"


@pytest.mark.parametrize("key", [*rows_prototypes.ROWS, *rows_regularizers.ROWS, *rows_evaluation.ROWS])
def test_all_sides_of_a_small_row_answer_alike(key):
    small = speed.ROWS[key]("small", "cpu")
    small.check({name: function() for name, function in small.all.items()})


@pytest.mark.slow
def test_rows_of_an_earlier_record_stay(tmp_path, monkeypatch):
    keys = list(speed.ROWS)[:2]
    monkeypatch.setattr(timing, "product_speed", lambda device: 1e9)
    for key in reversed(keys):
        monkeypatch.setitem(speed.ROWS, key, lambda size, device: row(memory=None))
        speed.main(["--small", "--only", key, "--repeats", "2", "--threads", "1", "--out", str(tmp_path)])
    run = json.loads((tmp_path / "speed_small.json").read_text())["runs"][0]
    assert [entry["row"] for entry in run["table"]] == keys
    assert {"seed", "hash", "seconds", "environment"} <= set(run)


@pytest.mark.slow
def test_a_void_row_fails_the_command(tmp_path, monkeypatch):
    def check(answers):
        raise AssertionError("never alike")

    monkeypatch.setattr(timing, "product_speed", lambda device: 1e9)
    monkeypatch.setitem(speed.ROWS, "sinkhorn", lambda size, device: row(check=check))
    with pytest.raises(SystemExit, match="sinkhorn"):
        speed.main(["--small", "--only", "sinkhorn", "--threads", "1", "--out", str(tmp_path)])
