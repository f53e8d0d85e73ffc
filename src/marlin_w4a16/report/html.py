"""A report as HTML: a fragment for notebooks, a page for files. No scripts, nothing is loaded."""

from html import escape
from typing import TYPE_CHECKING

from marlin_w4a16.passes.outcome import Row
from marlin_w4a16.report.table import how, packed_bytes, product, shape, size_if_any, word

if TYPE_CHECKING:
    from marlin_w4a16.report.data import Report

_STYLE = """
.mw4 { --ink: #1c2128; --soft: #5b6470; --line: #e2e6ea; --back: #ffffff; --tint: #f6f7f9;
  --replaced: #17693a; --owned: #0b5f7d; --left: #8a5300; --excluded: #5b6470;
  color: var(--ink); background: var(--back); font: 14px/1.45 system-ui, sans-serif; padding: 20px 24px; }
@media (prefers-color-scheme: dark) { .mw4 { --ink: #e3e7ec; --soft: #9aa4b0; --line: #30363f; --back: #14181d;
  --tint: #1c2128; --replaced: #62d08c; --owned: #62c3e6; --left: #f0b455; --excluded: #9aa4b0; } }
.mw4 h1 { font-size: 20px; font-weight: 600; margin: 0 0 4px; color: inherit; }
.mw4 h2 { font-size: 15px; font-weight: 600; margin: 24px 0 8px; color: inherit; }
.mw4 p { margin: 0 0 12px; }
.mw4 .soft { color: var(--soft); font-size: 12px; }
.mw4 dl { display: flex; flex-wrap: wrap; gap: 8px; margin: 16px 0; }
.mw4 dl div { background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; }
.mw4 dt { color: var(--soft); font-size: 12px; font-weight: 400; }
.mw4 dd { margin: 0; font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; }
.mw4 .wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
.mw4 table { border-collapse: collapse; width: 100%; margin: 0; color: inherit; background: none; font-size: 13px; }
.mw4 th, .mw4 td { text-align: left; vertical-align: top; padding: 7px 12px; border: 0; white-space: nowrap; }
.mw4 th { color: var(--soft); font-weight: 600; background: var(--tint); }
.mw4 tbody tr { background: none; border-top: 1px solid var(--line); }
.mw4 .number { text-align: right; font-variant-numeric: tabular-nums; }
.mw4 .why { white-space: normal; min-width: 18em; overflow-wrap: anywhere; }
.mw4 code { font: 12px/1.45 ui-monospace, monospace; color: inherit; background: none; padding: 0; }
.mw4 .chip { border: 1px solid; border-radius: 99px; padding: 1px 9px; font-size: 12px; font-weight: 600; }
.mw4 .replaced { color: var(--replaced); } .mw4 .owned { color: var(--owned); }
.mw4 .left { color: var(--left); border-style: dashed; }
.mw4 .excluded { color: var(--excluded); border-style: dotted; }
.mw4 li { margin-bottom: 8px; overflow-wrap: anywhere; }
"""
_COLUMNS = ("Weight", "Shape", "Format", "Product", "Bytes", "Packed", "Outcome", "How or why")
_NUMBERS = ("Shape", "Bytes", "Packed")
_NUMBER = ' class="number"'


def fragment(report: "Report") -> str:
    """A report as one element that brings its own style, for light and dark screens."""
    used = ", ".join(f"{name} {version}" for name, version in report.versions().items() if version)
    parts = [
        f"<style>{_STYLE}</style>",
        f"<h1>FP4 weights</h1><p>{escape(report.summary() if report.rows else report.total_line())}</p>",
        _figures(report) if report.rows else "",
        _table(report.rows) if report.rows else "",
        _breaks(report) if report.breaks else "",
        f'<p class="soft">{escape(used)}</p>',
    ]
    return f'<div class="mw4">{"".join(parts)}</div>'


def page(report: "Report") -> str:
    """A report as a whole HTML document."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>FP4 weights</title><style>body { margin: 0 }</style>'
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{fragment(report)}</body></html>\n'


def _figures(report: "Report") -> str:
    figures = {**report.figures(), "graphs": str(report.graphs)}
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in figures.items())}</dl>"


def _table(rows: tuple[Row, ...]) -> str:
    head = "".join(f"<th{_NUMBER if name in _NUMBERS else ''}>{name}</th>" for name in _COLUMNS)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(row: Row) -> str:
    numbers = (shape(row), size_if_any(row.nbytes), size_if_any(packed_bytes(row)))
    sizes, nbytes, packed = (f"<td{_NUMBER}>{number}</td>" for number in numbers)
    return (
        f"<td><code>{escape(row.path)}</code></td>{sizes}<td>{escape(row.format or '-')}</td>"
        f"<td>{escape(product(row))}</td>{nbytes}{packed}"
        f'<td><span class="chip {word(row)}">{word(row)}</span></td><td class="why">{escape(how(row))}</td>'
    )


def _breaks(report: "Report") -> str:
    causes = (
        f"<li>{escape(one.reason)}" + (f"<br><code>{escape(one.where)}</code>" if one.where else "") + "</li>"
        for one in report.breaks
    )
    return f"<h2>Graph breaks</h2><ol>{''.join(causes)}</ol>"
