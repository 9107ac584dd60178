# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Scoreboard: at our scale few of the papers' claims are decided, most are too close to call or were not run
#
# **Claim.** Every number, figure and claim of three papers stands beside what was measured here, with an interval, or
# beside the words "not run here" and a command. A claim *holds* if the 95 % interval over seeds of what it says is clear
# of zero on the claimed side, *fails* if it is clear on the other, and is a *tie* otherwise.
#
# **Papers.** All tables and figures of PPC, vMF and Sim. **Before this:** the records of notebooks 50 to 58 and 80 to 86;
# this notebook trains nothing. **Cost:** half a minute.
#
# **Deviations.** Networks, images and budgets here are small fractions of the papers': ImageNet's absolute numbers stand
# beside ours to compare *methods*, not levels, and one small network stands beside every backbone. kNN is at the best
# recorded k of the test images. Which record decides a claim was settled before those of notebooks 80 to 86 were made,
# but after those of 50 to 58 had been read; the other records stand beside it. By chance alone one claim in twenty
# without an effect would seem decided, and nothing corrects for that. PPC is without its supplementary material.

# %% tags=["parameters"] nbmake={"mock": {"results": "results"}}
results: str = "results"  # folder of the records
check: bool = True  # assert that everything the papers print is shown

# %%
import math
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import HTML, Markdown, display

from prototypes_lib import course, figures, scoreboard
from prototypes_lib.scoreboard import page, panels

figures.use_style()

# %% [markdown]
# ## What is read
# Two things and nothing else: `data/paper_tables.csv` and the records, each of which is checked field by field first
# (`notebooks/results/README.md`). A record of a benchmark or test has no numbers of the papers and is only listed.

# %%
ROWS, RECORDS = scoreboard.printed(), scoreboard.load(Path(results))
DECISIONS = [scoreboard.judge(claim, RECORDS, ROWS) for claim in scoreboard.CLAIMS]
for name, record in RECORDS.items():
    seeds = sorted({run["seed"] for run in record.runs if run["seed"] is not None})
    scored = sum(len(run.get("scores", [])) for run in record.runs)
    used = sum(found.record == name for decision in DECISIONS for found in decision.evidence)
    print(f"{name:46s} {len(record.runs):2d} runs, seeds {seeds}, {scored:4d} scores, evidence on {used} claims")

# %% [markdown]
# ## Every number
# A hollow mark is a printed value (a cross: training failed), a filled diamond the mean here with its 95 % interval over
# seeds. The distance between hollow and filled is that of the scales; what can be compared is the order of methods.


# %%
def draw(paper, columns, height):
    """All tables of a paper; returns how many numbers were drawn, and how many stand beside one of ours."""
    mine = {name: rows for (of, name), rows in scoreboard.tables(ROWS).items() if of == paper}
    lines = math.ceil(len(mine) / columns)
    fig, axes = plt.subplots(lines, columns, figsize=(10.5, height * lines), layout="constrained", squeeze=False)
    counts = [panels.panel(axis, rows, RECORDS) for axis, rows in zip(axes.flat, mine.values(), strict=False)]
    for axis in axes.flat[len(mine) :]:
        axis.set_axis_off()
    panels.legend(fig, [row for rows in mine.values() for row in rows])
    fig.supxlabel(f"{paper}: percent, points; numbers of prototypes on logarithmic axes or above", fontsize=8)
    drawn, here = (sum(column) for column in zip(*counts, strict=True))
    alt = f"{paper}: {drawn} printed values in {len(mine)} panels; {here} have a filled mark with an interval beside them."
    figures.show(fig, alt=alt)
    return drawn, here


# %%
drawn = [draw("PPC", 2, 2.1)]

# %%
drawn.append(draw("vMF", 3, 2.0))

# %%
drawn.append(draw("Sim", 3, 2.0))
if check:
    assert sum(n for n, _ in drawn) == len(ROWS), f"{sum(n for n, _ in drawn)} of {len(ROWS)} printed numbers are drawn"

# %% [markdown]
# The same as tables, which unfold: a row a printed number, with the number of the command that would make it at the
# paper's scale (PATH: ImageNet with `train/` and `val/`; RUN: the folder that the training prints).

# %%
text = page.numbers(ROWS, RECORDS)
display(HTML(text))
if check:
    shown = text.split("<tbody>", 1)[1].count("<tr><td>") if text else 0
    assert shown == len(ROWS), f"{shown} of {len(ROWS)} printed numbers have a row"
reasons = Counter(scoreboard.command(row).split(": ")[0] for row in ROWS)
none = {reason: n for reason, n in reasons.items() if reason.startswith("no ")}
display(Markdown(
    f"**Reading.** {sum(n for _, n in drawn)} of {len(ROWS)} printed numbers have a measured one beside them. "
    f"{len(ROWS) - sum(none.values())} have a command; " + ", ".join(f"{n} have {r}" for r, n in none.items()) + "."
))  # fmt: skip

# %% [markdown]
# ## Every figure

# %%
display(HTML(page.pictures(RECORDS)))

# %% [markdown]
# ## Every claim
# Left: what each record says of a claim (blue disk: holds, gray dash: tie, vermillion cross: fails; the ringed record
# decides, as the one made for the question). Right: how far the deciding record's runs lie on the claimed side, with the
# 95 % interval over seeds, and as hollow diamonds the differences that the paper prints. What is said of M is decided by
# record 56, whose time-lapse settings were chosen so that prototypes collapse at all; ordinary settings stand beside it.


# %%
def draw_claims(paper):
    mine = [found for found in DECISIONS if found.claim.paper == paper]
    columns = [name for name in RECORDS if any(e.record == name for found in DECISIONS for e in found.evidence)]
    fig, axes = plt.subplots(1, 2, figsize=(10.5, 0.21 * len(mine) + 0.8), width_ratios=(1, 1.5), sharey=True)
    panels.verdicts(*axes, mine, columns)
    axes[0].set_title(f"{paper}: what each record says")
    axes[1].set_title("Deciding record, and the paper's differences")
    figures.show(fig, alt=f"{page.tally(mine)} of {paper}, as marks by record and as intervals of points around zero.")


for paper in ("PPC", "vMF", "Sim"):
    draw_claims(paper)

# %%
display(HTML(page.claims(DECISIONS)))
said = {kind: [found.claim for found in DECISIONS if found.kind == kind] for kind in ("holds", "fails")}
contested = [found.claim.text for found in DECISIONS if found.contested]
lines = [f"**Reading.** {page.tally(DECISIONS)}."]
lines += [f"* *{kind}*: " + "; ".join(f"{claim.text} ({claim.paper})" for claim in said[kind]) + "." for kind in said]
lines += ["* *decided otherwise by another record*: " + ("; ".join(contested) or "none") + "."]
display(Markdown("\n".join(lines)))
if check:
    decided = sum(map(len, said.values()))
    assert decided < len(DECISIONS) / 2, f"{decided} of {len(DECISIONS)} claims are decided: the title says few"

# %% [markdown]
# A tie is no refutation: the papers' gains are often tenths of a point, and three seeds of small runs have intervals of
# whole points. A claim that fails here fails for these networks and budgets.
#
# ## Beyond the papers
# Scores and kNN in the records that stand beside no printed number: other methods and data, long tails by group.

# %%
display(HTML(page.others(scoreboard.beyond(RECORDS, ROWS))))

# %%
course.finish()
