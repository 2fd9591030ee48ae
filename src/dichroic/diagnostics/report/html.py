"""HTML of the page: the document and its style, sections, tables, escaped text."""

import html
import re
from collections.abc import Sequence
from typing import Any

from dichroic.runtime.tables import duration as duration

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --dim: #5c5c5c; --page: #fff; --card: #f5f5f3;
  --rule: #d5d5d0; --note: #9a4a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --dim: #a8a8a4; --page: #161616;
  --card: #222; --rule: #444; --note: #ffb366; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.4rem;
  border-bottom: 1px solid var(--rule); } h3 { font-size: 1rem; margin: 1.2rem 0 0.3rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0.8rem; }
.card { background: var(--card); border-top: 4px solid var(--rule); border-radius: 4px;
  padding: 0.6rem 0.9rem; break-inside: avoid; } .card h3 { margin-top: 0; }
.card p { margin: 0.2rem 0; } .big { font-size: 1.35rem; font-weight: 650; }
.scroll { overflow-x: auto; } small, figcaption { color: var(--dim); font-size: 0.85rem; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.5rem 0; }
th, td { text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; } td.n { font-variant-numeric: tabular-nums; text-align: right; }
tr.ours { font-weight: 650; } figure { margin: 0.8rem 0; break-inside: avoid; }
.row { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: flex-start; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.warning { border-left: 4px solid var(--note); padding-left: 0.8rem; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } }
"""


def document(title: str, body: str) -> str:
    """The whole page; `title` is plain text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{esc(title)}</h1>\n{body}</body>\n</html>\n"
    )


def section(name: str, content: str) -> str:
    """A section with a heading, and an anchor made of its name."""
    anchor = name.lower().replace(" ", "-")
    return f'<section id="{anchor}">\n<h2>{esc(name)}</h2>\n{content}</section>\n'


def esc(text: Any) -> str:
    """`text` with what HTML would take for markup escaped."""
    return html.escape(str(text))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, first_ours: bool = False) -> str:
    """An HTML table of plain cells; numbers, and text that starts with a digit, to the right."""
    head = "".join(f"<th>{esc(h)}</th>" for h in header)
    lines = []
    for i, row in enumerate(rows):
        cells = [
            f'<td class="n">{esc(c)}</td>'
            if re.match(r"^[-−+]?\d[\d.,]*(e[-+]\d+)?%?( |$)", str(c))
            else f"<td>{esc(c)}</td>"
            for c in row
        ]
        ours = ' class="ours"' if first_ours and i == 0 else ""
        lines.append(f"<tr{ours}>{''.join(cells)}</tr>\n")
    return f'<div class="scroll"><table><tr>{head}</tr>\n{"".join(lines)}</table></div>\n'
