"""TensorBoard, where it is installed, sees each row of metrics.jsonl once, whatever happened to the run."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import method, run, state

from prototypes_lib.event_files import EventFiles
from prototypes_lib.train import train


def events(folder) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder), {"scalars": 0})
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


@pytest.mark.slow
def test_a_run_that_was_interrupted_shows_each_row_once_under_the_same_hash(tmp_path):
    plain = train(method(), run(tmp_path / "plain", monitor_steps=1), "x")
    part = train(method(), run(tmp_path / "shown", monitor_steps=1, tensorboard=True), "x", stop_after=4)
    path = part.folder / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 5, "loss": 1e9}) + "\n")
    shown = train(method(), run(tmp_path / "shown", monitor_steps=1, tensorboard=True), "x")
    assert shown.folder.name == plain.folder.name and state(shown) == state(plain)
    found = events(shown.folder / "tensorboard")
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5, 6]
    assert set(found) == {name.replace(" ", "_") for row in shown.metrics for name in row} - {"step"}
    for (_, value), row in zip(found["loss"], shown.metrics, strict=True):
        assert abs(value - row["loss"]) < 1e-5
    assert not (plain.folder / "tensorboard").exists()


def test_events_come_at_the_times_of_their_rows(tmp_path):
    files = EventFiles(tmp_path)
    files.start([{"step": 1, "loss": 3.0, "seconds": 10.0}, {"step": 2, "loss": 2.0, "seconds": 70.0}])
    files.write({"step": 3, "loss": 1.0, "seconds": 100.0})
    files.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    times = [event.wall_time for event in found.Scalars("loss")]
    assert [round(t - times[0]) for t in times] == [0, 60, 90]
