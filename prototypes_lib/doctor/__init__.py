"""The prototype doctor: how many prototypes a checkpoint really has, and what data make of them.

`subject.opened` finds the prototypes, `examine` looks at them alone, `with_data` beside images; `words` says what it
means, `paper.rows` what the papers print for the same model, and `write` leaves one page and one JSON file.
"""

from prototypes_lib.doctor.data import DataExamination, images_of, with_data
from prototypes_lib.doctor.examination import Examination, compared, examine
from prototypes_lib.doctor.report import Report, check_place, write
from prototypes_lib.doctor.subject import Subject, chosen, coder, opened

__all__ = [
    "DataExamination",
    "Examination",
    "Report",
    "Subject",
    "check_place",
    "chosen",
    "coder",
    "compared",
    "examine",
    "images_of",
    "opened",
    "with_data",
    "write",
]
