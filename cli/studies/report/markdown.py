"""A report as Markdown, with links to its figures."""

from __future__ import annotations

from .document import Figure, Report, Table, shown


def text(about: str, report: Report) -> str:
    """The whole document."""
    lines = [f"# {report.title}", "", about, ""]
    for section in report.sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Figure):
                place = f"figures/{part.name}"
                lines += [f"![{part.name}]({place}.svg)", "", f"*{part.caption}* ([data]({place}.csv))", ""]
            elif isinstance(part, Table):
                lines += [*_table(part), ""]
            else:
                lines += [part, ""]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    if not table.rows:
        return [f"*{table.caption}* Nothing has finished."]
    names = list(dict.fromkeys(name for row in table.rows for name in row))
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    body = ["| " + " | ".join(shown(row.get(name)).replace("|", "\\|") for name in names) + " |" for row in table.rows]
    return [f"*{table.caption}*", "", *head, *body]
