"""The faults that benchmarks/mutations.py plants still fit the library, and the command tells a fault from none."""

from dataclasses import replace

import mutations
import pytest
from fault import Fault
from faults import FAULTS


def test_every_fault_still_applies_and_is_another_program():
    assert mutations.stale() == []
    for fault in FAULTS:
        right = (mutations.ROOT / "prototypes_lib" / fault.file).read_text()
        wrong = right.replace(fault.old, fault.new)
        assert wrong != right
        compile(wrong, fault.file, "exec")


def test_there_are_enough_faults_in_all_parts_and_their_tests_exist():
    assert len(FAULTS) >= 30 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert {fault.file for fault in FAULTS} >= {
        "objectives.py", "assignment.py", "regularizers.py", "methods.py", "learner.py", "heads.py", "vmf.py",
        "collapse/unique.py", "schedules.py", "optimizers.py", "train.py", "checkpoints.py", "masks.py", "views.py",
        "evaluate/knn.py", "sweeps.py",
    }  # fmt: skip
    for test in {test for fault in FAULTS for test in (*fault.first, *mutations.SECOND)}:
        assert (mutations.ROOT / test).is_file(), test


def test_a_fault_that_went_stale_is_named():
    gone = replace(FAULTS[0], old="no such line")
    (said,) = mutations.stale([gone])
    assert gone.name in said and "0 times" in said
    with pytest.raises(SystemExit, match="no fault has these words"):
        mutations.main(["--only", "no such words"])


@pytest.mark.slow
def test_a_fault_is_caught_by_a_test_of_its_file_and_a_change_of_nothing_survives(tmp_path, monkeypatch):
    monkeypatch.setattr(mutations, "SECOND", ("tests/test_verdict.py",))
    mutations.copy(tmp_path)
    wrong = next(fault for fault in FAULTS if fault.file == "schedules.py")
    assert mutations.plant(wrong, tmp_path)[0].startswith("tests/test_schedules.py::")
    harmless = Fault("nothing", "schedules.py", '"""One value a step', '"""A value a step')
    assert mutations.plant(harmless, tmp_path)[0] == mutations.SURVIVED
