"""The report as one HTML page that needs nothing else: the verdict in words first, then numbers and figures."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from prototypes_lib import figures
from prototypes_lib.doctor import data_panels, panels, words
from prototypes_lib.doctor.data import DataExamination
from prototypes_lib.doctor.examination import PPC, VMF, Examination, quantiles
from prototypes_lib.doctor.panels import Panel
from prototypes_lib.doctor.report import FORMAT, FORMAT_VERSION, Report

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --paper: #fff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a3abb5; --line: #3a4149; --paper: #16191d; --card: #1f2329; } }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1rem; font-weight: 600; margin: 0; color: var(--soft); overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 2rem 0 .2rem; }
p { margin: .3rem 0; }
.verdict { margin: 1rem 0 1.5rem; padding: 1.1rem 1.4rem; background: var(--card); border-left: 6px solid;
  border-radius: 4px; }
.verdict p { font-size: 1.35rem; line-height: 1.4; margin: 0 0 .6rem; }
.verdict ul { margin: 0; padding-left: 1.2rem; }
.verdict li { margin: .25rem 0; }
.full, .partial { border-color: #D55E00; } .some { border-color: #E69F00; } .none { border-color: #009E73; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 0; }
img { width: 100%; height: auto; background: #fff; border-radius: 6px; padding: 8px; box-sizing: border-box; }
table { border-collapse: collapse; margin: .8rem 0; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; font-size: .9rem; color: var(--soft); }
td.n { text-align: right; white-space: nowrap; } th.n { text-align: right; }
code { overflow-wrap: anywhere; font-size: .85rem; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }
"""


def page(report: Report, content: dict[str, Any]) -> str:
    """The whole page; content: of `Report.to_json`."""
    first, subject, said = report.sets[0], report.subject, content["verdict"]
    with plt.ioff(), plt.style.context(Path(figures.__file__).with_name("course.mplstyle")):
        parts = [_section(seen, again=i > 0) for i, seen in enumerate(report.sets)]
        if report.data is not None:
            parts.insert(1, _of_data(first, report.data, report))
    remarks = "".join(f"<li>{escape(text)}</li>" for text in said["remarks"])
    name = subject.path.resolve().name
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{FORMAT} {FORMAT_VERSION}">
<title>{escape(name)}: {first.unique.count:,} of {first.k:,} prototypes are unique</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>Prototype doctor: {escape(name)}</h1>
<div class="verdict {said["kind"]}">
<p>{escape(said["text"])}</p>
<ul>{remarks}</ul>
</div>
</header>
<main>
{_summary(report.sets)}
<h2>Beside the papers</h2>
{_papers(report)}
{"".join(parts)}
</main>
{_footer(content)}
</body>
</html>
"""


def _summary(sets: Sequence[Examination]) -> str:
    heads = ("", "K", f"M at 1 − cos < {sets[0].eps:g}", "in other orders", f"M at cos > {1 - VMF:g} (vMF)",
             "components", "largest group", "effective rank")  # fmt: skip
    if sets[0].eps != PPC:
        heads = (*heads[:2], f"M at 1 − cos < {PPC} (PPC)", *heads[2:])
    rows = []
    for seen in sets:
        own = [f"{seen.unique.count:,} ({100 * seen.unique.share:.3g} %)"]
        if seen.eps != PPC:
            own.insert(0, f"{seen.at(PPC)[0]:,}")
        low, high = seen.order_range
        rows.append((_name(seen), f"{seen.k:,}", *own, f"{low:,} to {high:,}", f"{seen.at(VMF)[0]:,}",
                     f"{seen.components:,}", f"{seen.largest:,}", f"{seen.effective_rank:.1f}"))  # fmt: skip
    return _table(heads, rows, numbers=range(1, len(heads)))


def _papers(report: Report) -> str:
    if not report.rows:
        return "<p>No row of the papers is of this model; theirs are ImageNet's, by method, backbone and K.</p>"
    rows = [
        (f"{row.paper}, {row.table}", row.model, f"{row.metric} (1 − cos < {row.eps:g})", f"{row.value:,.0f}",
         f"{row.measured:,}", f"{100 * (row.measured / row.value - 1):+.1f} %")
        for row in report.rows
    ]  # fmt: skip
    return _table(("table", "model", "number", "printed", "here", "difference"), rows, numbers=range(3, 6))


def _section(seen: Examination, again: bool) -> str:
    found = seen.found
    at = quantiles(seen.lengths)
    notes = "".join(f"<p>{escape(note)}</p>" for note in found.notes)
    told = f"<p>{escape(words.verdict(seen))}</p>" if again else ""
    figures_ = "".join(_figure(panel) for panel in panels.without_data(seen))
    return f"""<h2>{escape(_name(seen).capitalize())}: the prototypes alone</h2>
{told}<p class="soft">{escape(found.layout)}; <code>{escape(found.tensor)}</code>, {escape(found.dtype)}, {seen.k:,} ×
{found.w.shape[1]}; compared by {escape(found.score)}. Lengths {at["0"]:.3g} to {at["1"]:.3g}; coding rate
{seen.coding_rate:.1f} nats.</p>{notes}
{figures_}
"""


def _of_data(seen: Examination, data: DataExamination, report: Report) -> str:
    figures_ = "".join(_figure(panel) for panel in data_panels.with_data(seen, data, report.images))
    return f"""<h2>{escape(_name(seen).capitalize())}: beside the data</h2>
<p class="soft">{data.n:,} images of {escape(data.name)} at {data.side} px; score {escape(data.score)} at temperature
{data.tau:g}, without centering. Their codes have an effective rank of {data.code_rank:.1f} of
{seen.found.w.shape[1]}.</p>
{figures_}
"""


def _name(seen: Examination) -> str:
    return f"{seen.found.network}, {seen.found.of}"


def _figure(panel: Panel) -> str:
    heading, fig, alt, reading = panel
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=160)
    plt.close(fig)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"""<h3>{escape(heading)}</h3>
<figure><img src="data:image/png;base64,{data}" alt="{escape(alt)}">
<figcaption>{escape(reading)}</figcaption></figure>
"""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' * (i in right)}>{escape(x)}</{tag}>" for i, x in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', heads)}</tr></thead><tbody>{body}</tbody></table>"


def _footer(content: dict[str, Any]) -> str:
    file, where = content["file"], content["environment"]
    told = (
        f"{file['name']}, {file['bytes']:,} bytes, sha256 {file['sha256']}",
        f"prototypes_lib {content['prototypes_lib']}, commit {content['commit']}, torch {where['torch']}, "
        f"{where['hardware']}; {content['orders']} random orders, seed {content['seed']}",
        content["command"],
    )
    return f'<footer class="soft">{"".join(f"<p><code>{escape(x)}</code></p>" for x in told if x)}</footer>'
