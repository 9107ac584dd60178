"""The scoreboard: what three papers print and claim beside what the records in notebooks/results hold.

It reads data/paper_tables.csv and the records, and nothing else: `load` checks every record (`Score` is what a run's
evaluation adds to one), `measured` finds what stands beside a printed number, `judge` decides a claim by intervals over
seeds, `page` and `panels` show it all. Notebook 90 draws it.
"""

from prototypes_lib.scoreboard.claims import Claim, Decision, Evidence, Test, decide, judge
from prototypes_lib.scoreboard.measured import Measured, beyond, measured
from prototypes_lib.scoreboard.paper import PICTURES, Printed, command, printed, tables
from prototypes_lib.scoreboard.schema import Record, Score, load, read, validate
from prototypes_lib.scoreboard.three_papers import CLAIMS

__all__ = [
    "CLAIMS",
    "PICTURES",
    "Claim",
    "Decision",
    "Evidence",
    "Measured",
    "Printed",
    "Record",
    "Score",
    "Test",
    "beyond",
    "command",
    "decide",
    "judge",
    "load",
    "measured",
    "printed",
    "read",
    "tables",
    "validate",
]
