"""Pieces of a page that is one HTML file, holds its pictures and asks the network for nothing. All text is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable

from pcl_ext.report.charts import DPI

Cell = str | tuple[str, str]  # a text, or a text and its CSS class

CSS = """
:root { color: #1f2933; background: #f5f7fa; font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
body { max-width: 62rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
p { margin: .3rem 0 .8rem; max-width: 48rem; }
.quiet { color: #616e7c; font-size: .9rem; }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 8px; padding: 1.2rem 1.4rem; margin-top: 1.2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin-top: 1.2rem; }
.card { background: #fff; border: 1px solid #e4e7eb; border-radius: 8px; padding: .9rem 1.1rem; }
.card b { display: block; font-size: 1.6rem; line-height: 1.3; }
.good b { color: #1d7a46; } .bad b { color: #b4232c; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .32rem .9rem .32rem 0; border-bottom: 1px solid #e4e7eb; vertical-align: top; }
th { font-weight: 600; color: #52606d; } tr:last-child td { border-bottom: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: pre; }
th.n { white-space: pre-line; }
.key { white-space: nowrap; color: #52606d; width: 1%; padding-right: 2rem; }
.text { overflow-wrap: anywhere; }
details { margin-top: .6rem; } details table { width: auto; margin-top: .4rem; } summary { cursor: pointer; }
.up { color: #1d7a46; } .down { color: #b4232c; } .tie { color: #616e7c; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """The whole page: its heading and what follows; style: CSS beside the usual."""
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{safe(title)}</title><style>{CSS}{style}</style>'
    )
    body = "\n".join([f"<h1>{safe(title)}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{safe(title)}</h2>{''.join(parts)}</section>"


def details(title: str, body: str) -> str:
    """What is shown on a click."""
    return f"<details><summary>{safe(title)}</summary>{body}</details>"


def note(text: str) -> str:
    return f'<p class="quiet">{safe(text)}</p>'


def table(head: Iterable[Cell], rows: Iterable[Iterable[Cell]]) -> str:
    """head may be empty."""
    return f"<table>{_row('th', head)}{''.join(_row('td', row) for row in rows)}</table>"


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    return table((), ([(key, "key"), (value, "text")] for key, value in rows))


def numbers(texts: Iterable[str]) -> list[Cell]:
    """Cells of a table whose text stands to the right, a line break in it kept."""
    return [(text, "n") for text in texts]


def _row(tag: str, cells: Iterable[Cell]) -> str:
    texts = []
    for cell in cells:
        text, kind = (cell, "") if isinstance(cell, str) else cell
        opened = f'{tag} class="{kind}"' if kind else tag
        texts.append(f"<{opened}>{safe(text)}</{tag}>")
    return f"<tr>{''.join(texts)}</tr>" if texts else ""


def image(png: bytes, text: str) -> str:
    """A picture that `charts.png` made; text: what it shows, for who cannot see it."""
    data = base64.b64encode(png).decode()
    width = int.from_bytes(png[16:20], "big") * 100 // DPI  # from the PNG's own header; letters of one size
    return f'<img alt="{safe(text)}" width="{width}" src="data:image/png;base64,{data}">'


def safe(text: object) -> str:
    return html.escape(str(text))
