"""Other people's checkpoints and archives: read, or refused in one line; never obeyed."""

import io
import os
import pickle
import tarfile
import zipfile

import malice
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from prototypes_lib.files import archives
from prototypes_lib.files.foreign import read_pickle


@pytest.mark.slow
def test_hostile_pickles_are_refused_and_do_nothing(tmp_path):
    refused, tried, wrong = malice.refused_pickles(tmp_path)
    assert wrong == [] and refused == tried >= 150


def test_the_hostile_pickles_would_work_on_the_full_unpickler(tmp_path):
    """Without this the test above could pass on harmless files."""
    worked = 0
    for name, path in malice.pickles(tmp_path):
        if "protocol" in name or name in ("getattr chain, bare", "GLOBAL posix system, bare", "INST, bare"):
            with path.open("rb") as file:
                pickle.load(file)
            worked += (tmp_path / malice.CANARY).exists()
            (tmp_path / malice.CANARY).unlink(missing_ok=True)
    assert worked == 15


def test_the_name_that_a_file_asks_for_is_in_the_message(tmp_path):
    for protocol in (0, 2, 4):
        path = tmp_path / "x.pth"
        path.write_bytes(pickle.dumps({"model": malice.Call(os.system, "true")}, protocol))
        with pytest.raises(ValueError, match=r"x\.pth is refused: it asks for posix\.system|nt\.system"):
            read_pickle(path)


def test_real_checkpoints_are_read_in_both_formats(tmp_path):
    w = torch.arange(12.0).reshape(3, 4)
    found = {name: read_pickle(path) for name, path in malice.friendly(tmp_path).items()}
    for kind in ("zip", "old"):
        weights, full, arrays = (found[f"{name}-{kind}"] for name in ("weights", "full", "arrays"))
        assert list(weights) == ["w", "half", "view", "count"] and weights["half"].dtype == torch.float16
        assert torch.equal(weights["w"], w) and torch.equal(weights["view"], w[1]) and int(weights["count"]) == 3
        assert full["args"] == {"lr": 0.1, "out": "runs", "betas": (0.9, 0.999), "extra": {"a": [1, None]}}
        assert (full["epoch"], full["n"], full["on"]) == (1.5, 7, True) and full["on"] is True
        assert torch.equal(full["student"]["w"], w)
        for name in ("a", "f"):
            assert np.array_equal(arrays[name], np.arange(6.0).reshape(2, 3)) and arrays[name].flags.writeable
        moments = found[f"optimizer-{kind}"]["state"][0]
        assert torch.equal(moments["m"], w) and not moments["m"].requires_grad


def test_what_appears_twice_in_a_checkpoint_is_shared_and_loops_end(tmp_path):
    inner = {"w": torch.zeros(2)}
    thing = {"a": inner, "b": inner, "list": [inner]}
    thing["self"] = thing
    torch.save(thing, tmp_path / "x.pth")
    read = read_pickle(tmp_path / "x.pth")
    assert read["a"] is read["b"] is read["list"][0] and read["self"] is read


def test_numpy_arrays_come_back_in_their_byte_order_and_type(tmp_path):
    made = {kind: np.array([[1, 0], [3, 1]]).astype(kind) for kind in (">f4", "<i2", "?", "<c16", "u1", "<f2")}
    torch.save(made, tmp_path / "x.pth")
    for kind, array in read_pickle(tmp_path / "x.pth").items():
        assert array.dtype == np.dtype(kind) and np.array_equal(array, made[kind])


def test_safetensors_are_read_and_missing_files_named(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "x.safetensors")
    assert torch.equal(read_pickle(tmp_path / "x.safetensors")["w"], torch.ones(3))
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="not there"):
            read_pickle(path)


@pytest.mark.slow
def test_hostile_archives_are_refused_or_contained(tmp_path):
    contained, tried, wrong = malice.contained_archives(tmp_path)
    assert wrong == [] and contained == tried >= 80


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip"])
def test_an_ordinary_archive_is_unpacked_whole(tmp_path, suffix):
    contents = {"set/a.txt": b"a", "set/deep/b.bin": np.random.default_rng(0).bytes(400_000), "empty": b""}
    path = tmp_path / f"x{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.mkdir("set")
            for name, content in contents.items():
                file.writestr(name, content)
    else:
        with tarfile.open(path, "w:" + suffix[5:]) as file:
            folder = tarfile.TarInfo("set")
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            file.addfile(folder)
            for name, content in contents.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    to = archives.extract(path, tmp_path / "to" / "here")
    assert {str(p.relative_to(to)): p.read_bytes() for p in to.rglob("*") if p.is_file()} == contents
    assert [p.name for p in to.parent.iterdir()] == ["here"]
    with pytest.raises(ValueError, match="exists"):
        archives.extract(path, to)
    with pytest.raises(ValueError, match="more than"):
        archives.extract(path, tmp_path / "small", most=200_000)
    assert not (tmp_path / "small").exists()


def test_a_full_disk_while_unpacking_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a", b"a")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(OSError, match=r"to could not be written: No space left on device; free space"):
        archives.extract(tmp_path / "x.zip", tmp_path / "to")
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


def test_torchvisions_own_extraction_is_guarded_for_zip_and_given_back(tmp_path):
    from torchvision.datasets.utils import extract_archive

    before = zipfile.ZipFile.extractall
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr("../escaped", b"x")
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as file:
        file.writestr("a/b.txt", b"x")
    with archives.guarded():
        with pytest.raises(ValueError, match="leaves the folder"):
            extract_archive(str(tmp_path / "bad.zip"), str(tmp_path / "to"))
        extract_archive(str(tmp_path / "good.zip"), str(tmp_path / "to"))
    assert zipfile.ZipFile.extractall is before and (tmp_path / "to" / "a" / "b.txt").read_bytes() == b"x"
    assert not (tmp_path / "escaped").exists() and [p.name for p in (tmp_path / "to").iterdir()] == ["a"]


def test_a_python_without_filters_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    (tmp_path / "x.tar").write_bytes(b"x")
    with pytest.raises(RuntimeError, match=r"3\.11\.4"):
        archives.extract(tmp_path / "x.tar", tmp_path / "to")
    with pytest.raises(RuntimeError, match=r"3\.11\.4"), archives.guarded():
        pass
