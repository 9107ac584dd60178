"""What a planted fault is; faults.py, faults_evaluation.py and faults_doctor.py list them."""

from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Fault:
    """name: what is wrong. file: inside prototypes_lib. tests: those to run first, by the file's name if none.

    "knn" is tests/test_knn.py, "reliability/nans" tests/reliability/test_nans.py.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()

    @property
    def first(self) -> tuple[str, ...]:
        paths = map(PurePosixPath, self.tests or (PurePosixPath(self.file).stem,))
        return tuple(f"tests/{path.with_name(f'test_{path.name}.py')}" for path in paths)


def planted_in(file: str, *faults: tuple[str, str, str], tests: tuple[str, ...] = ()) -> list[Fault]:
    return [Fault(name, file, old, new, tests) for name, old, new in faults]
