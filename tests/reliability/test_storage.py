"""What is written is whole or not there, what is damaged is never loaded, what fails costs nothing older."""

import json
import os
import shutil

import mutants
import pytest
import torch
from mutants import FILES, HASH, NO_PROCESS, network, place, run_folder
from safetensors.torch import load_file, save_file

from prototypes_lib import checkpoints
from prototypes_lib.files import storage


@pytest.fixture
def run(tmp_path):
    run_folder(tmp_path / "run")
    return tmp_path / "run"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_damaged_checkpoints_are_found_out_and_the_newest_good_one_is_loaded(tmp_path):
    survived, tried, wrong = mutants.damaged_checkpoints(tmp_path, 54)
    assert wrong == [] and survived == tried == 54


@pytest.mark.slow
def test_failing_disks_cost_neither_checkpoints_nor_the_network(tmp_path):
    survived, tried, wrong = mutants.disk_faults(tmp_path, 24)
    assert wrong == [] and survived == tried == 24


@pytest.mark.slow
def test_five_hundred_damaged_checkpoints_and_a_hundred_failing_disks(tmp_path):
    assert mutants.damaged_checkpoints(tmp_path / "a", 500, seed=1) == (500, 500, [])
    assert mutants.disk_faults(tmp_path / "b", 100, seed=1) == (100, 100, [])


def test_a_folder_verifies_and_says_what_is_wrong(tmp_path):
    at = tmp_path / "x"
    storage.write_folder(at, {"a.safetensors": {"w": torch.ones(3)}}, {"b.json": {"c": 1}}, label="mine")
    assert storage.verify(at) is None and storage.label_of(at / "a.safetensors") == "mine"
    assert storage.verify(at, ["a.safetensors", "z"]) == "z is not in manifest.json"
    assert storage.verify(tmp_path / "none") == "the folder is missing"
    flip(at / "a.safetensors")
    assert storage.verify(at) == "the content of a.safetensors has changed (sha256)"
    (at / "b.json").write_text("")
    (at / "a.safetensors").unlink()
    assert storage.verify(at) == "a.safetensors is missing"
    shutil.rmtree(at)
    at.mkdir()
    assert storage.verify(at) == "manifest.json is missing"


def test_the_same_content_is_the_same_bytes(tmp_path):
    for name in "ab":
        storage.write_folder(tmp_path / name, {"t.safetensors": {"w": torch.ones(3)}}, {"j.json": {}}, label="x")
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert one == other and len(one) == 3


def test_everything_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename

    def spied(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(source, target, **options):
        events.append("renamed")
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", spied)
    monkeypatch.setattr(os, "rename", renamed)
    at = tmp_path / "x"
    storage.write_folder(at, {"t.safetensors": {"w": torch.ones(3)}}, {"j.json": {}})
    inodes = {p.name: p.stat().st_ino for p in at.iterdir()}
    manifest = inodes.pop("manifest.json")
    assert set(events[:2]) == set(inodes.values())
    assert events[2:] == [manifest, at.stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_replacing_a_folder_never_leaves_it_without_a_findable_one(tmp_path, monkeypatch):
    at, seen = tmp_path / "x", []
    storage.write_folder(at, {}, {"j.json": 1})
    rename = os.rename

    def watched(source, target, **options):
        rename(source, target, **options)
        seen.append({p.name.split(".")[-1] for p in tmp_path.iterdir() if storage.verify(p) is None})

    monkeypatch.setattr(os, "rename", watched)
    storage.write_folder(at, {}, {"j.json": 2})
    assert seen == [{"old", "new"}, {"old", "x"}] and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("pid", [NO_PROCESS, "ours"])
def test_what_a_dead_process_left_is_put_in_order(run, pid):
    """Also where the process that goes on has got the dead one's number."""
    pid = os.getpid() if pid == "ours" else pid
    folder = run / "checkpoints"
    place(run, 300).rename(folder / f".step-00000300.{pid}.old")  # it died between the two renames
    shutil.copytree(place(run, 200), folder / f".step-00000400.{pid}.new")
    shutil.copytree(place(run, 200), folder / f".step-00000200.{pid}.old")  # it died before the last deletion
    assert checkpoints.newest(run, HASH) == 300
    assert sorted(p.name for p in folder.iterdir()) == [f"step-00000{n}00" for n in (1, 2, 3)]


def test_what_is_no_leftover_or_of_a_living_process_stays(tmp_path):
    names = [f".x.{os.getppid()}.new", f".x.{os.getppid()}.old", f".y.{NO_PROCESS}", ".z.new", "a.1.new"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / f".mine.{NO_PROCESS}.new").write_text("x")
    storage.tidy(tmp_path, "x")
    assert (tmp_path / f".mine.{NO_PROCESS}.new").exists()
    storage.tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    storage.tidy(tmp_path / "none")


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    storage.write_folder(tmp_path / "x", {}, {"j.json": 1})
    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        storage.write_folder(tmp_path / "x", {}, {"j.json": 2})
    with pytest.raises(KeyboardInterrupt):
        storage.write_text(tmp_path / "t.txt", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and storage.verify(tmp_path / "x") is None


def test_a_full_disk_while_a_text_is_written_says_so(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    storage.write_text(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"a\.json could not be written: No space left on device; free space") as error:
        storage.write_text(path, "new")
    assert error.value.errno == 28 and path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_all_damaged_is_an_error_and_not_a_silent_new_start(run, capsys):
    for step in checkpoints.steps(run):
        flip(place(run, step) / "model.safetensors")
    for call in (lambda: checkpoints.newest(run), lambda: checkpoints.load_backbone(run)):
        with pytest.raises(ValueError, match="none of 3 checkpoints can be used"):
            call()
    assert capsys.readouterr().err.count("is damaged and left out: the content of model.safetensors") == 6
    shutil.rmtree(run / "checkpoints")
    assert checkpoints.newest(run) is None


def test_another_runs_checkpoint_is_refused(run):
    model, optimizer = network()
    assert checkpoints.newest(run, HASH) == 300
    with pytest.raises(ValueError, match="belongs to another run"):
        checkpoints.load(run, 300, model, optimizer, expect_hash="another")
    with pytest.raises(ValueError, match="belongs to another run"):
        checkpoints.newest(run, "another")


def test_a_checkpoint_of_other_shapes_changes_nothing(run):
    def other(*layers):
        torch.manual_seed(3)
        model = torch.nn.Sequential(*layers)
        return model, torch.optim.AdamW(model.parameters())

    def momentum(model):
        return torch.optim.SGD([*model.parameters()][:2])

    for model, optimizer, word in (
        (*other(torch.nn.Linear(5, 4)), "differ in 5 tensors"),
        (*other(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3)), "the network has"),
        (*other(torch.nn.Linear(5, 4).double(), torch.nn.BatchNorm1d(4)), "float64"),
        ((same := network()[0]), momentum(same), "fits no parameter"),
    ):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=word) as error:
            checkpoints.load(run, 300, model, optimizer)
        assert "\n" not in str(error.value) and not optimizer.state
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_pruning_keeps_two_good_ones_however_many_are_damaged(run):
    model, optimizer = network()
    for step in (200, 300):
        flip(place(run, step) / "model.safetensors")
    checkpoints.save(run, model, optimizer, {"step": 400, "hash": HASH})
    assert checkpoints.steps(run) == [100, 200, 300, 400]
    checkpoints.save(run, model, optimizer, {"step": 500, "hash": HASH})
    assert checkpoints.steps(run) == [400, 500]
    with pytest.raises(ValueError, match="at least 2"):
        checkpoints.save(run, model, optimizer, {"step": 600, "hash": HASH}, keep=1)


def test_a_checkpoint_of_version_0_1_0_is_taken_where_it_is_whole(run):
    at = place(run, 300)
    for name in ("model.safetensors", "optimizer.safetensors"):
        save_file({k: v.clone() for k, v in load_file(at / name).items()}, at / name)
    for name in ("manifest.json", "config.json"):
        (at / name).unlink()
    state = json.loads((at / "state.json").read_text())
    (at / "state.json").write_text(json.dumps({k: v for k, v in state.items() if k != "format"}))
    assert checkpoints.newest(run, HASH) == 300 and checkpoints.load(run, 300, *network())["precision"] == "fp32"
    data = (at / "model.safetensors").read_bytes()
    (at / "model.safetensors").write_bytes(data[:-1])
    assert checkpoints.newest(run, HASH) == 200


def test_readers_take_the_config_that_was_saved_with_the_tensors(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"run": {"seed": "wrong"}}))
    assert checkpoints._newest(run)[0] == config
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        checkpoints.load_prototypes(run)


def test_readers_touch_nothing(run):
    """A run may go on on another machine meanwhile, whose processes look dead from here."""
    shutil.copytree(place(run, 200), run / "checkpoints" / f".step-00000400.{NO_PROCESS}.new")
    place(run, 300).rename(run / "checkpoints" / f".step-00000300.{NO_PROCESS}.old")
    flip(place(run, 200) / "state.json")
    before = sorted(p.name for p in run.rglob("*"))
    assert torch.equal(checkpoints._newest(run)[1]["0.weight"], load_file(place(run, 100) / FILES[0])["0.weight"])
    assert sorted(p.name for p in run.rglob("*")) == before


def test_a_damaged_export_is_refused(tmp_path):
    at = tmp_path / "export"
    files = {"backbone.safetensors": {"w": torch.ones(3)}, "head.safetensors": {"w": torch.ones(3)}}
    storage.write_folder(at, files, {"about.json": {"run": {}}})
    flip(at / "head.safetensors")
    for call in (checkpoints.load_prototypes, checkpoints.load_backbone):
        with pytest.raises(ValueError, match="damaged export: the content of head"):
            call(at)
