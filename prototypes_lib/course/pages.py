"""What a reader opens: an HTML page of each executed notebook, and one index with its figures."""

import base64
import datetime
import html
import itertools
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbformat import NotebookNode

from prototypes_lib.course import copies
from prototypes_lib.records import environment

if TYPE_CHECKING:
    from prototypes_lib.course.runner import Result

# nbconvert's page without scripts it does not need; MathJax, for formulas, is the one link to the network
_TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block extra_css %}<style>main { max-width: 62rem; margin: 0 auto; }</style>{% endblock %}
{% block body_header %}{{ super() }}{% if nb.metadata.home %}
<nav class="jp-RenderedHTMLCommon"><a href="{{ nb.metadata.home }}">All notebooks</a></nav>{% endif %}{% endblock %}
"""
_QUIET = logging.getLogger(f"{__name__}.nbconvert")  # it warns of the texts that we add after it
_QUIET.setLevel(logging.ERROR)
_NO_ALT = 'alt="No description has been provided for this image"'

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --paper: #fff; --bad: #b3261e;
  --link: #0a58a6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a3abb5; --line: #3a4149; --paper: #16191d; --bad: #ff8a80; --link: #7ab8f5; } }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 0 0 .3rem; }
p { margin: .2rem 0; }
a { color: var(--link); }
.soft { color: var(--soft); font-size: .9rem; }
.bad { color: var(--bad); }
ol { list-style: none; margin: 1.5rem 0; padding: 0; }
li { display: flex; gap: 1.5rem; align-items: center; padding: 1rem 0; border-top: 1px solid var(--line); }
li > div:last-child { flex: 1; min-width: 0; overflow-wrap: anywhere; }
.figure { flex: 0 0 22rem; text-align: center; }
.figure img { max-width: 100%; max-height: 18rem; border-radius: 6px; background: #fff; padding: 4px;
  box-sizing: border-box; }
@media (max-width: 48rem) { li { display: block; } .figure { margin-bottom: .5rem; } }
footer { padding-top: 1rem; border-top: 1px solid var(--line); }
"""


def to_html(ipynb: Path, *, home: str | None = None) -> Path:
    """Writes the notebook as one HTML file beside it, figures embedded; `home` links back to an index."""
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    nb = copies.read(ipynb)
    nb.metadata.title = copies.heading(nb, ipynb.stem)
    nb.metadata.home = home
    exporter = HTMLExporter(
        extra_loaders=[DictLoader({"course.html.j2": _TEMPLATE})],
        template_file="course.html.j2",
        embed_images=True,
        log=_QUIET,
    )
    page, _ = exporter.from_notebook_node(nb, {"metadata": {"name": ipynb.stem, "path": str(ipynb.parent)}})
    alts = itertools.chain((alt for _, _, alt in _images(nb)), itertools.repeat("Figure"))
    page = re.sub(re.escape(_NO_ALT), lambda _: f'alt="{html.escape(next(alts))}"', page)
    path = ipynb.with_suffix(".html")
    copies.write(page, path)
    return path


def _images(nb: NotebookNode) -> Iterator[tuple[str, str, str]]:
    """(media type, base64 data, alternative text) of each figure in the outputs."""
    count = 0
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            for kind in ("image/png", "image/jpeg", "image/svg+xml"):
                if kind in output.get("data", {}):
                    count += 1
                    data = output.data[kind]
                    if kind == "image/svg+xml":
                        data = base64.b64encode(data.encode()).decode()
                    about = output.metadata.get(kind, {}).get("alt") or output.metadata.get("alt")
                    yield kind, data.replace("\n", ""), about or f"Figure {count} of: {copies.heading(nb)}"
                    break


def index(out_dir: Path, results: "Sequence[Result]") -> Path:
    """Writes `index.html`: each notebook's claim, how it ended, its first figure, links to page and notebook.

    Notebooks of earlier runs in `out_dir` are listed too, and said to be so.
    """
    from prototypes_lib.course.runner import duration

    entries = {}
    for path in sorted(out_dir.glob("[0-9][0-9]_*.ipynb")):
        record = copies.read(path).metadata.get(copies.RECORD, {})
        ok = record.get("status") == "ok"
        status = f"{'ran' if ok else 'failed'} in {duration(record.get('wall_s', 0))}, earlier"
        entries[path.name.split(".")[0]] = _entry(path, path.name.split(".")[0], status, "" if ok else "failed")
    for result in results:
        status = f"{'ran' if result.ok else 'failed'} in {duration(result.wall_s)}"
        where = f"{result.cell} ({result.line}): " if result.cell else ""
        problem = "" if result.ok else where + result.reason
        entries[result.source.stem] = _entry(result.output, result.source.stem, status, problem)
    done = sum(result.ok for result in results)
    ending = "every assertion held" if done == len(results) else f"{len(results) - done} failed"
    total = duration(sum(result.wall_s for result in results))
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Prototypes: the executed course</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Prototypes: the executed course</h1>
<p class="soft">{done} of {len(results)} notebooks ran to the end, {ending}; {total} in all.</p>
<ol>
{"".join(entries[name] for name in sorted(entries))}</ol>
</main>
<footer class="soft">{_footer()}</footer>
</body>
</html>
"""
    path = out_dir / "index.html"
    copies.write(page, path)
    return path


def _footer() -> str:
    import torch

    found = environment("cuda" if torch.cuda.is_available() else "cpu")
    today = datetime.datetime.now().astimezone().date().isoformat()
    where = f"{today} · commit {found['commit']} · {found['hardware']}, {found['platform']}"
    return f"""<p>{html.escape(where)}</p>
<p>Formulas are set by MathJax and need a network connection; the notebooks in JupyterLab do not.</p>"""


def _claim(nb: NotebookNode) -> str:
    """The first two sentences of the paragraph that begins with **Claim.**, as HTML; its formulas as plain text."""
    texts = "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    found = re.search(r"^\*\*Claim\.\*\*\s+(.+?)(?=\n\s*\n|\n\*\*|\Z)", texts, re.DOTALL | re.MULTILINE)
    if not found:
        return ""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z$])", " ".join(found[1].split()))
    pieces = re.split(r"\$(.+?)\$", " ".join(sentences[:2]))  # every second one is a formula
    for i, piece in enumerate(pieces):
        plain = piece if i % 2 else re.sub(r"\[(.+?)\]\(.+?\)", r"\1", re.sub(r"[*`]", "", piece))
        pieces[i] = _formula(html.escape(plain)) if i % 2 else html.escape(plain)
    return "".join(pieces)


def _formula(tex: str) -> str:
    """A short formula without MathJax: Greek letters, names of functions, raised and lowered signs."""

    def letter(found: re.Match[str]) -> str:
        try:
            return unicodedata.lookup(f"GREEK SMALL LETTER {found[1].removeprefix('var').upper()}")
        except KeyError:  # \\log, \\ln
            return found[1] + " "

    tex = re.sub(r"\\([A-Za-z]+) ?", letter, tex)
    for sign, tag in (("^", "sup"), ("_", "sub")):
        tex = re.sub(rf"{re.escape(sign)}(?:{{(.*?)}}|(\S))", lambda m, tag=tag: f"<{tag}>{m[1] or m[2]}</{tag}>", tex)
    return tex


def _entry(output: Path | None, name: str, status: str, problem: str) -> str:
    nb = copies.read(output) if output else None
    title = html.escape(copies.heading(nb, name) if nb else name)
    figure = next(_images(nb), None) if nb else None
    image = ""
    if figure:
        image = f'<img src="data:{figure[0]};base64,{figure[1]}" alt="{html.escape(figure[2])}">'
    links = ""
    claim = f"\n<p>{text}</p>" if nb and (text := _claim(nb)) else ""
    if output:
        if output.with_suffix(".html").is_file():
            page = output.with_suffix(".html").name
            title = f'<a href="{page}">{title}</a>'
            image = f'<a href="{page}">{image}</a>' if image else ""
        links = f' · <a href="{output.name}">notebook</a>'
    bad = f'\n<p class="bad">{html.escape(problem)}</p>' if problem else ""
    return f"""<li>
<div class="figure">{image}</div>
<div><h2>{title}</h2>{claim}
<p class="soft">{html.escape(name)} · {html.escape(status)}{links}</p>{bad}</div>
</li>
"""
