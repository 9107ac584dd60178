"""The command that runs every corpus of this folder: what it counts, what it refuses, what it writes."""

import json

import pytest
import soak


def test_a_small_part_of_it_runs_and_writes_a_record(tmp_path, capsys):
    soak.main(["--small", "--only", "damaged checkpoints", "--out", str(tmp_path)])
    assert "damaged checkpoints, prototypes_lib: 18 of 18" in capsys.readouterr().out
    record = json.loads((tmp_path / "soak_part.json").read_text())
    assert record["command"].startswith("python benchmarks/soak.py --small --only 'damaged checkpoints'")
    (run,) = record["runs"]
    (row,) = run["table"]
    assert (row["what"], row["by"], row["survived"], row["tried"]) == ("damaged checkpoints", soak.US, 18, 18)
    assert run["seed"] == 0 and run["seconds"] > 0 <= row["seconds"] and run["environment"]["torch"] and run["hash"]


def test_what_was_not_survived_is_counted_shown_and_the_exit_status(tmp_path, capsys, monkeypatch):
    told = [("a", None), ("b", "it broke"), ("c", "so did this")]
    corpora = {"toys": lambda *_: {soak.US: iter(told), "a peer": iter(told[:1])}}
    monkeypatch.setattr(soak, "CORPORA", corpora)
    with pytest.raises(SystemExit) as ended:
        soak.main(["--out", str(tmp_path)])
    assert ended.value.code == 1 and "FAULT b: it broke" in capsys.readouterr().out
    (ours, peers) = json.loads((tmp_path / "soak.json").read_text())["runs"][0]["table"]
    assert (ours["survived"], ours["tried"], ours["faults"]) == (1, 3, ["b: it broke", "c: so did this"])
    assert (peers["by"], peers["survived"], peers["tried"]) == ("a peer", 1, 1)


def test_words_that_no_corpus_has_are_refused_before_any_work(tmp_path):
    with pytest.raises(SystemExit, match="no corpus has these words"):
        soak.main(["--only", "dragons", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_notebooks_with_faults_do_not_end_with_success(tmp_path):
    from soak_notebooks import FAULTS, told

    few = tuple(fault for fault in FAULTS if fault.name in ("sys.exit(0)", "an unknown parameter"))
    assert len(few) == 2 and [wrong for _, wrong in told(tmp_path, soak.US, few) if wrong] == []
