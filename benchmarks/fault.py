"""What a planted fault is; faults.py, faults_evaluation.py and faults_doctor.py list them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """name: what is wrong. file: inside prototypes_lib. tests: those to run first, by the file's name if none."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()

    @property
    def first(self) -> tuple[str, ...]:
        stem = self.file.rsplit("/", 1)[-1].removesuffix(".py")
        return tuple(f"tests/test_{name}.py" for name in self.tests or (stem,))


def planted_in(file: str, *faults: tuple[str, str, str], tests: tuple[str, ...] = ()) -> list[Fault]:
    return [Fault(name, file, old, new, tests) for name, old, new in faults]
