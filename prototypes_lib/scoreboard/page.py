"""The scoreboard as HTML that folds: every number of every table, every figure, every claim, and what is beyond."""

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from prototypes_lib.scoreboard.claims import KINDS, Decision
from prototypes_lib.scoreboard.measured import Measured, Records, beginning_with, measured
from prototypes_lib.scoreboard.paper import PICTURES, Printed, command, tables

NOT_RUN = "not run here"


def numbers(rows: Sequence[Printed], records: Records) -> str:
    """A folded table for each table of the papers, one row a printed number: printed, measured here, command."""
    return "\n".join(_table(*key, mine, records) for key, mine in tables(rows).items())


def _table(paper: str, name: str, rows: Sequence[Printed], records: Records) -> str:
    found = [measured(row, records) for row in rows]
    commands = list(dict.fromkeys(command(row) for row in rows))
    here = sum(x is not None for x in found)
    summary = f"{paper}, {name}: {len(rows)} numbers, {f'{here} with a number here' if here else NOT_RUN}"
    body = (
        (
            row.method,
            row.backbone,
            row.dataset,
            row.metric,
            _value(row),
            _said(x),
            str(commands.index(command(row)) + 1),
        )
        for row, x in zip(rows, found, strict=True)
    )
    heads = ("method", "backbone", "data", "metric", "printed", "measured here, at our scale", "at the paper's scale")
    listed = "".join(f"<li><code>{escape(text)}</code></li>" for text in commands)
    return _folded(summary, f"{_html(heads, body)}<ol>{listed}</ol>")


def _value(row: Printed) -> str:
    return "nan (training failed)" if row.value == "nan" else row.value


def _said(found: Measured | None) -> str:
    if found is None:
        return NOT_RUN
    n, left = len(found.seeds), f", {found.left_out} without" if found.left_out else ""
    return f"{found} on {found.dataset}; {found.record}: {found.run}, {n} seed{'s' * (n != 1)}{left}"


def pictures(records: Records) -> str:
    """A table of the papers' figures: what each shows, the notebooks and records that show it here."""
    body = []
    for picture in PICTURES:
        names = [r.name for beginning in picture.records for r in beginning_with(records, beginning)]
        missing = picture.not_run or (picture.records and not names)
        where = f"{NOT_RUN}: {picture.not_run or 'its record is missing'}" if missing else picture.here
        body.append((f"{picture.paper}, {picture.name}", picture.shows, where, ", ".join(names)))
    return _html(("figure", "shows", "here", "records"), body)


def claims(decisions: Sequence[Decision]) -> str:
    """A folded table a paper: each claim, its verdict, the difference printed and the gap measured, other records."""
    parts = []
    for paper in dict.fromkeys(found.claim.paper for found in decisions):
        mine = [found for found in decisions if found.claim.paper == paper]
        body = [
            (
                found.claim.where,
                found.claim.text,
                found.kind + (", other records disagree" if found.contested else ""),
                ", ".join(f"{x:+.1f}" for x in found.printed),
                str(found.evidence[0]) if found.evidence else missing(found),
                "; ".join(f"{x.kind}: {x}" for x in found.evidence[1:]),
            )
            for found in mine
        ]
        heads = ("where", "claim", "verdict", "printed, points", "measured: how far on the claimed side", "beside it")
        parts.append(_folded(f"{paper}: {tally(mine)}", _html(heads, body)))
    return "\n".join(parts)


def missing(found: Decision) -> str:
    """What would decide a claim that nothing recorded decides."""
    if found.claim.command:
        return found.claim.command
    notebooks = dict.fromkeys(test.record.rstrip("_") for test in found.claim.tests)
    return f"needs two seeds at least in a record of notebook {' or '.join(notebooks)}: " + " or ".join(
        f"prototypes run --only {number}" for number in notebooks
    )


def tally(decisions: Sequence[Decision]) -> str:
    """How many claims hold, tie, fail and were not run, in words."""
    count = Counter(found.kind for found in decisions)
    contested = sum(found.contested for found in decisions)
    words = {"holds": "hold", "tie": "tie", "fails": "fail", "not run": "not run"}
    text = ", ".join(f"{count[kind]} {words[kind]}" for kind in KINDS)
    return f"{len(decisions)} claims: {text}" + (f" ({contested} contested by another record)" if contested else "")


def others(found: Sequence[Measured]) -> str:
    """A folded table of scores that have no printed counterpart."""
    body = ((x.record, x.run, x.dataset, x.metric, str(x), str(len(x.seeds))) for x in found)
    return _folded(f"{len(found)} measured numbers without a counterpart in the papers",
                   _html(("record", "run", "data", "metric", "mean [95 %]", "seeds"), body))  # fmt: skip


def _html(heads: Iterable[str], body: Iterable[Sequence[str]]) -> str:
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"


def _folded(summary: str, inside: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"
