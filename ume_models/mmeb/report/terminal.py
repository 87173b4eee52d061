"""Results as tables of the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ume_models.mmeb.report.facts import model_name, setting_facts
from ume_models.mmeb.report.numbers import (
    NO_INTERVAL,
    count,
    has_width,
    interval,
    points,
    ran,
)
from ume_models.mmeb.report.outline import Group, Part, outline, reason
from ume_models.mmeb.report.remarks import summary_remarks
from ume_models.mmeb.summary import Summary

_BAR = 20


def summary_table(summary: Summary) -> RenderableType:
    """Every task, what is missing, settings, means of groups and modalities, remarks.

    The means come last: that is what a terminal still shows. Fits into 80 columns.
    """
    parts = outline(summary)
    pieces: list[RenderableType] = []
    if summary.tasks:
        pieces += [_tasks(parts), Text()]
        if not all(has_width(score.interval) for score in summary.tasks):
            pieces += [Text(NO_INTERVAL, style="dim"), Text()]
    if summary.missing:
        pieces += [_missing(summary), Text()]
    pieces += [_settings(summary), Text(), _means(summary, parts)]
    remarks = [Text(f"! {remark}", style="yellow") for remark in summary_remarks(summary)]
    return Lines(*pieces, *([Text()] if remarks else []), *remarks)


def plain_table(title: str = "") -> Table:
    """A table as the report has them: a line below the head and none elsewhere."""
    return Table(
        title=escape(title) or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        header_style="dim",
    )


def _means(summary: Summary, parts: list[Part]) -> Table:
    name = summary.settings.get("benchmark", "")
    table = plain_table(f"{name}  {model_name(summary.settings)}".strip())
    table.add_column("")
    table.add_column("score", justify="right")
    table.add_column("95 %", justify="right", style="dim")
    table.add_column("tasks", justify="right")
    table.add_column("", no_wrap=True)
    for part in parts:
        _mean_row(table, part, "bold")
        for group in part.groups:
            _mean_row(table, group, "")
    table.add_section()
    overall = summary.overall
    table.add_row(
        "All tasks",
        points(overall.value if overall else None),
        interval(overall.interval if overall else None),
        ran(len(summary.tasks), len(summary.tasks) + len(summary.missing)),
        _bar(overall.value if overall else 0.0),
        style="bold",
    )
    return table


def _mean_row(table: Table, row: Part | Group, style: str) -> None:
    indent = "" if isinstance(row, Part) else "  "
    mean = row.mean
    table.add_row(
        f"{indent}{escape(row.title)}",
        points(mean.value if mean else None),
        interval(mean.interval if mean else None),
        ran(mean.tasks if mean else 0, row.of),
        _bar(mean.value if mean else 0.0),
        style=style,
    )


def _bar(value: float) -> str:
    """A bar of eighths of characters; twenty characters are 100."""
    eighths = round(max(0.0, min(1.0, value)) * _BAR * 8)
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def _tasks(parts: list[Part]) -> Table:
    table = plain_table()
    table.add_column("task", overflow="fold")
    for name in ("score", "95 %", "queries", "candidates", "ties"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in (group for part in parts for group in part.groups if group.scores):
        metrics = {score.metric for score in group.scores}
        # Nearly always one: told once, it leaves room for the names of tasks.
        shared = metrics.pop() if len(metrics) == 1 else ""
        table.add_row(f"[bold]{escape(group.title)}[/]" + (shared and f" [dim]{escape(shared)}[/]"))
        for score in group.scores:
            own = "" if shared else f" [dim]{escape(score.metric)}[/]"
            table.add_row(
                f"  {escape(score.task)}{own}",
                points(score.score),
                f"[dim]{interval(score.interval)}[/]",
                count(score.queries),
                count(score.candidates),
                count(score.ties) if score.ties else "",
            )
    return table


def _missing(summary: Summary) -> Table:
    table = plain_table("Not run, in no mean")
    table.add_column("task", overflow="fold", ratio=2)
    table.add_column("reason", overflow="fold", ratio=5)
    for missing in summary.missing:
        table.add_row(escape(missing.task), escape(reason(missing)))
    return table


def _settings(summary: Summary) -> Text:
    facts = "; ".join(f"{name} {value}" for name, value in setting_facts(summary.settings))
    return Text(facts, style="dim")
