"""A run as one HTML page that needs nothing but itself and asks for itself again every few seconds."""

import html

from prototypes_lib.figures import BLACK, BLUE, GREEN, ORANGE
from prototypes_lib.live.panels import Panel, panels, thin
from prototypes_lib.live.run import Watched
from prototypes_lib.live.terminal import duration

_COLORS = (BLUE, ORANGE, GREEN, BLACK)
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 420, 190, 58, 8, 22
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 92rem; padding: 0 1rem; color: #111;
  background: #fff }
h1 { font-size: 1.3rem; margin: 0 } h2 { font-size: 1rem; margin: 0 0 .2rem } p { margin: .2rem 0 }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); margin: 1rem 0 }
figure { margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: .6rem }
figcaption { font-size: .82rem; color: #444 } svg { width: 100%; height: auto; display: block }
.finding { border-left: 5px solid #D55E00; background: #fdf1e9; padding: .6rem .9rem; margin: .6rem 0 }
.well { border-left: 5px solid #009E73; background: #eaf6f1; padding: .6rem .9rem; margin: .6rem 0 }
table { border-collapse: collapse; font-size: .85rem } td, th { padding: .1rem .8rem .1rem 0; text-align: left }
td + td { font-variant-numeric: tabular-nums } .quiet { color: #555; font-size: .9rem }
"""


def page(run: Watched, every: float = 5.0) -> str:
    """The page; it refreshes itself every so many seconds until the run is finished."""
    refresh = "" if run.finished else f'<meta http-equiv="refresh" content="{max(1, round(every))}">'
    step = f"step {run.rows[-1]['step']:.0f}" if run.rows else "no metrics yet"
    state = "finished" if run.finished else "" if run.age is None else f"last row {duration(run.age)} ago"
    title = html.escape(run.name)
    figures = "".join(_figure(panel) for panel in panels(run.rows))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{refresh}
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}, {step}</title>
<style>{_STYLE}</style></head><body>
<h1>{title}</h1><p class="quiet">{html.escape(", ".join(filter(None, (step, state, str(run.folder)))))}</p>
{_words(run)}
<div class="figures">{figures}</div>
{_newest(run)}
</body></html>
"""


def _words(run: Watched) -> str:
    parts = []
    for finding in run.findings:
        parts.append(f'<section class="finding"><h2>{html.escape(finding.kind)}</h2><p>{html.escape(finding.text)}</p>')
        for title, texts in (("Usual causes", finding.causes), ("What to try", finding.remedies)):
            parts.append(f"<p>{title}</p><ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>")
        parts.append("</section>")
    if run.rows and not run.findings:
        parts.append('<p class="well">Nothing wrong to be seen.</p>')
    for step, kind, text in run.earlier:
        parts.append(f'<p class="quiet">Earlier, at step {step}: {html.escape(kind)}: {html.escape(text)}</p>')
    return "".join(parts)


def _figure(panel: Panel) -> str:
    low, high = panel.range()
    first = min(points[0][0] for _, points in panel.curves)
    last = max(points[-1][0] for _, points in panel.curves)
    right, bottom = _WIDTH - 6, _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> str:
        across = (x - first) / max(last - first, 1e-9)
        down = (high - panel.place(y)) / (high - low)
        return f"{_LEFT + across * (right - _LEFT):.1f},{_TOP + down * (bottom - _TOP):.1f}"

    drawn, named = [], []
    if panel.level is not None:
        y = place(first, panel.level[1]).split(",")[1]
        drawn.append(f'<path d="M{_LEFT},{y}H{right}" stroke="#8C8C8C" stroke-dasharray="5 4" fill="none"/>')
    for (name, points), color in zip(panel.curves, _COLORS, strict=False):
        path = " ".join(place(*point) for point in thin(points, 600))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        x, y = place(*points[-1]).split(",")
        drawn.append(f'<circle cx="{x}" cy="{y}" r="2.6" fill="{color}"/>')
        named.append(f'<span style="color:{color}">●</span> {html.escape(name)} {points[-1][1]:.4g}')
    if panel.level is not None:
        named.append(f"┄ {html.escape(panel.level[0])} {panel.level[1]:.4g}")
    axis = f'<path d="M{_LEFT},{_TOP}V{bottom}H{right}" stroke="#444" fill="none"/>'
    words = (
        (_LEFT - 5, _TOP + 9, "end", f"{panel.told(high):.4g}"),
        (_LEFT - 5, bottom, "end", f"{panel.told(low):.4g}"),
    )
    words += ((_LEFT, _HEIGHT - 5, "start", f"step {first:.0f}"), (right, _HEIGHT - 5, "end", f"{last:.0f}"))
    text = "".join(f'<text x="{x}" y="{y}" text-anchor="{a}" font-size="11">{t}</text>' for x, y, a, t in words)
    said = f"{panel.title}: " + ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in panel.curves)
    note = f"<br>{html.escape(panel.reads)}" if panel.reads else ""
    log = " (logarithmic)" if panel.log else ""
    return (
        f'<figure><h2>{html.escape(panel.title)}{log}</h2><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(said)} at step {last:.0f}">{axis}{"".join(drawn)}{text}</svg>'
        f"<figcaption>{' &nbsp; '.join(named)}{note}</figcaption></figure>"
    )


def _newest(run: Watched) -> str:
    if not run.rows:
        return ""
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{v:.6g}</td></tr>" for k, v in run.rows[-1].items())
    return f"<details><summary>The newest row</summary><table>{rows}</table></details>"
