"""A report as one HTML file: nothing is loaded from anywhere, and both colour schemes and print are served."""

from __future__ import annotations

import re
from html import escape

from lm_eval_mamba.statistics import Estimate

from .document import Figure, Report, Table, shown
from .theme import CSS

_STYLE = (
    CSS
    + """
:root{color-scheme:light dark;--page:#fff;--soft:#f4f4f4}
@media screen and (prefers-color-scheme:dark){:root{--page:#16181b;--soft:#22252a}}
body{margin:0 auto;max-width:62rem;padding:1.5rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.6rem;line-height:1.2}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid var(--grid)}
figure{margin:1.2rem 0}figure svg{width:100%;max-width:52rem;height:auto;display:block}
.scroll{overflow-x:auto;margin-bottom:1.2rem}.scroll:focus{outline:2px solid var(--c0)}
figcaption,.caption{font-size:.88rem;max-width:52rem;opacity:.85}.caption{margin:1.2rem 0 .3rem}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th{border-bottom:2px solid var(--grid)}td.text,th.text{text-align:left}tbody tr:nth-child(even){background:var(--soft)}
.scroll .wide{min-width:34rem}
@media print{body{max-width:none;padding:0}figure,table{break-inside:avoid}}
"""
)


def page(about: str, report: Report, drawings: dict[str, str]) -> str:
    """The whole file; `drawings` has an SVG element for each figure's name."""
    body = [f"<h1>{escape(report.title)}</h1>", f"<p>{escape(about)}</p>"]
    for section in report.sections:
        body.append(f"<section><h2>{escape(section.title)}</h2>")
        for part in section.parts:
            if isinstance(part, Figure):
                body.append(_figure(part, drawings[part.name]))
            elif isinstance(part, Table):
                body.append(_table(part))
            else:
                strong = re.sub(r"[*][*](.+?)[*][*]", r"<strong>\1</strong>", escape(part))
                body.append(f"<p>{strong}</p>")
        body.append("</section>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _figure(figure: Figure, drawing: str) -> str:
    named = drawing.replace(
        "<svg ", f'<svg role="img" aria-label="{escape(figure.caption, quote=True)}" class="wide" ', 1
    )
    return f'<figure><div class="scroll">{named}</div><figcaption>{escape(figure.caption)}</figcaption></figure>'


def _table(table: Table) -> str:
    caption = f'<p class="caption">{escape(table.caption)}</p>'
    if not table.rows:
        return f"<p>{escape(table.caption)} Nothing has finished.</p>"
    names = list(dict.fromkeys(name for row in table.rows for name in row))
    text = {name for name in names if not any(isinstance(row.get(name), int | float | Estimate) for row in table.rows)}

    def cell(tag: str, name: str, value: str) -> str:
        return f"<{tag}{' class=text' if name in text else ''}>{escape(value)}</{tag}>"

    head = "".join(cell("th", name, name) for name in names)
    rows = ("".join(cell("td", name, shown(row.get(name))) for name in names) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    contents = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'{caption}<div class="scroll" tabindex="0"><table>{contents}</table></div>'
