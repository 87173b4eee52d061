"""Two runs side by side, in the three forms of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeAlias

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from ume_models.mmeb.agreement import CosineDistribution
from ume_models.mmeb.compare import Comparison, TaskComparison
from ume_models.mmeb.report import markdown, terminal
from ume_models.mmeb.report.facts import setting_name, setting_value
from ume_models.mmeb.report.html import render_page
from ume_models.mmeb.report.numbers import (
    correlation,
    has_width,
    plural,
    points,
    probability,
    signed,
    signed_interval,
    similarity,
)
from ume_models.mmeb.report.outline import group_title, grouped, reason
from ume_models.mmeb.report.remarks import comparison_remarks

_Listing: TypeAlias = tuple[str, list[str], list[list[str]]]  # title, head and rows

SIGNIFICANT = 0.05  # of p-values corrected for the number of tasks
# What is told of each task, here and in the page: heads of the columns behind its name.
_SCORES = ("A", "B", "B − A", "95 %", "p")
_RANKS = ("same best", "same 10", "order")
_COSINES = ("min", "1 %", "median", "mean")
_SMALLEST = ("min cos q", "min cos c")  # of queries and of candidates, where there is little room
EXPLANATION = (
    "Differences are B − A in points of 100, with 95 % bootstrap intervals over paired queries; p "
    "is of a paired sign-flip test, corrected for the number of tasks (Holm). Same best: queries "
    "with the same first result. Same 10: shared part of the first ten. Order: Kendall's τ of what "
    "both rankings hold. ▲ and ▼: significantly better and worse. A dash stands for an interval "
    "where every query has the same difference: resampling has no spread there."
)


@dataclass(frozen=True)
class Rows:
    """Tasks of a group.

    Attributes:
        title: of the group, in words.
        modality: of its tasks.
        a, b: plain means of the tasks' scores in the two runs.
        tasks: the tasks.
    """

    title: str
    modality: str
    a: float
    b: float
    tasks: Sequence[TaskComparison]


def verdict(task: TaskComparison) -> str:
    """ "better" or "worse" where B differs from A significantly, else empty."""
    if task.p_adjusted >= SIGNIFICANT or task.score.delta == 0:
        return ""
    return "better" if task.score.delta > 0 else "worse"


def marked_delta(task: TaskComparison) -> str:
    """B − A in points, with a mark that does not need colour where it is significant."""
    mark = {"better": "▲ ", "worse": "▼ "}.get(verdict(task), "")
    return f"{mark}{signed(task.score.delta)}"


def outcome(comparison: Comparison) -> str:
    """One sentence: in how many tasks B is better, worse, or scores the same."""
    tasks = comparison.tasks
    if not tasks:
        return "The runs have no task in common."
    verdicts = [verdict(task) for task in tasks]
    equal = sum(task.better == task.worse == 0 for task in tasks)
    same = all(task.ranks.top_1 == 1 and task.ranks.overlap_10 == 1 for task in tasks)
    if equal == len(tasks):
        known = [task.ranks.kendall_tau for task in tasks if task.ranks.kendall_tau is not None]
        ranks = ", and the rankings are the same" if same and all(t == 1 for t in known) else ""
        return f"Every query of {plural(len(tasks), 'task')} has the same value in both{ranks}."
    return (
        f"Of {plural(len(tasks), 'task')}, B is significantly better in {verdicts.count('better')} "
        f"and worse in {verdicts.count('worse')}; in {equal} every query has the same value."
    )


def comparison_table(comparison: Comparison) -> RenderableType:
    """The comparison for the terminal: tasks, embeddings, settings that differ, the means."""
    groups = _groups(comparison)
    pieces: list[RenderableType] = []
    if groups:
        scores, agreement = terminal.plain_table(), terminal.plain_table("Agreement")
        for table, names in ((scores, _SCORES), (agreement, (*_RANKS, *_SMALLEST))):
            table.add_column("task", overflow="fold")
            for name in names:
                table.add_column(name, justify="right", no_wrap=True)
        for group in groups:
            means = (points(group.a), points(group.b), signed(group.b - group.a))
            scores.add_row(escape(group.title), *means, style="bold")
            for task in group.tasks:
                name = f"  {escape(task.task)}"
                style = {"better": "green", "worse": "red"}.get(verdict(task), "")
                scores.add_row(name, *_score_cells(task), style=style)
                smallest = (task.query_cosine, task.candidate_cosine)
                cosines = [similarity(found.minimum if found else None) for found in smallest]
                agreement.add_row(escape(task.task), *_rank_cells(task), *cosines)
        pieces += [scores, Text(), agreement, Text(), _explained(), Text()]
    for title, head, rows in _lists(comparison):
        table = terminal.plain_table(title)
        for name in head:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        pieces += [table, Text()]
    pieces.append(Text(f"A  {comparison.a}\nB  {comparison.b}\n"))
    if comparison.overall is not None:
        pieces.append(Text(_overall_line(comparison), style="bold"))
    pieces.append(Text(outcome(comparison)))
    pieces += [Text(f"! {line}", style="yellow") for line in comparison_remarks(comparison)]
    return Lines(*pieces)


def comparison_markdown(comparison: Comparison) -> str:
    """The comparison as GitHub-flavoured Markdown."""
    escaped, groups = markdown.escaped, _groups(comparison)
    lines = [
        f"# {escaped(_short(comparison)[0])} (A) and {escaped(_short(comparison)[1])} (B)",
        "",
        f"A is {escaped(comparison.a)}, B is {escaped(comparison.b)}. {escaped(EXPLANATION)}",
        "",
    ]
    if comparison.overall is not None:
        lines += [f"**{escaped(_overall_line(comparison))}** {escaped(outcome(comparison))}", ""]
    lines += markdown.bullets(comparison_remarks(comparison))
    if groups:
        rows: list[list[str]] = []
        for group in groups:
            delta = signed(group.b - group.a)
            means = [escaped(group.title), points(group.a), points(group.b), delta]
            rows.append([*(f"**{cell}**" for cell in means), *[""] * 5])
            rows += [
                [escaped(cell) for cell in (task.task, *_score_cells(task), *_rank_cells(task))]
                for task in group.tasks
            ]
        lines += [*markdown.table(["task", *_SCORES, *_RANKS], rows, left=1), ""]
    if _has_embeddings(comparison):
        head = [
            "task",
            *(f"{side} {name}" for side in ("queries", "candidates") for name in _COSINES),
        ]
        rows = [
            [
                escaped(task.task),
                *_cosine_cells(task.query_cosine),
                *_cosine_cells(task.candidate_cosine),
            ]
            for group in groups
            for task in group.tasks
        ]
        lines += ["## Cosines between the embeddings of the same items", ""]
        lines += [*markdown.table(head, rows, left=1), ""]
    for title, names, entries in _lists(comparison):
        cells = [list(map(escaped, entry)) for entry in entries]
        lines += [f"## {title}", "", *markdown.table(names, cells, left=len(names)), ""]
    return "\n".join(lines)


def comparison_page(comparison: Comparison) -> str:
    """The comparison as one HTML page without any reference to another file or address."""
    reach = scale(comparison)
    a, b = _short(comparison)
    return render_page(
        "comparison_body.html",
        {
            "comparison": comparison,
            "groups": _groups(comparison),
            "differing": _differing(comparison),
            "left_out": _left_out(comparison),
            "notes": comparison_remarks(comparison),
            "outcome": outcome(comparison),
            "explanation": EXPLANATION,
            "reach": reach,
            "verdict": verdict,
            "marked_delta": marked_delta,
            "cosines": _COSINES,
            "with_embeddings": _has_embeddings(comparison),
            "cosine_cells": _cosine_cells,
            "names": (a, b),
        },
        title=f"{a} and {b}",
        eyebrow="Comparison of two runs",
        heading=f"{a} and {b}",
        lead=outcome(comparison),
    )


def scale(comparison: Comparison) -> float:
    """Half the width of the axis of differences: the largest bound, rounded up."""
    bounds = [abs(end) for task in comparison.tasks for end in task.score.interval]
    largest = max([*bounds, *(abs(task.score.delta) for task in comparison.tasks)], default=0.0)
    largest = max(largest, 0.005)
    power = 10.0 ** math.floor(math.log10(largest))
    return next(
        step * power
        for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
        if step * power >= largest * (1 - 1e-9)
    )


def _groups(comparison: Comparison) -> list[Rows]:
    return [
        Rows(
            title=group_title(group),
            modality=tasks[0].modality,
            a=fmean(task.score.a for task in tasks),
            b=fmean(task.score.b for task in tasks),
            tasks=tasks,
        )
        for group, tasks in grouped(comparison.tasks)
    ]


def _explained() -> Text:
    smallest = (
        "Min cos: smallest cosine between the runs' embeddings of a query (q) or candidate (c)."
    )
    return Text(f"{EXPLANATION} {smallest}", style="dim")


def _score_cells(task: TaskComparison) -> list[str]:
    score = task.score
    return [
        points(score.a),
        points(score.b),
        marked_delta(task),
        signed_interval(score.interval),
        probability(task.p_adjusted),
    ]


def _rank_cells(task: TaskComparison) -> list[str]:
    ranks = task.ranks
    return [points(ranks.top_1), points(ranks.overlap_10), correlation(ranks.kendall_tau)]


def _cosine_cells(found: CosineDistribution | None) -> list[str]:
    if found is None:
        return [similarity(None)] * len(_COSINES)
    return [similarity(v) for v in (found.minimum, found.p1, found.median, found.mean)]


def _has_embeddings(comparison: Comparison) -> bool:
    return any(task.query_cosine or task.candidate_cosine for task in comparison.tasks)


def _lists(comparison: Comparison) -> list[_Listing]:
    """What is told as a list, where there is any."""
    return [entry for entry in (_differing(comparison), _left_out(comparison)) if entry[2]]


def _differing(comparison: Comparison) -> _Listing:
    rows = [
        [setting_name(one.name), *(setting_value(one.name, value) for value in (one.a, one.b))]
        for one in comparison.settings
    ]
    return "Settings that differ", ["setting", "A", "B"], rows


def _left_out(comparison: Comparison) -> _Listing:
    rows = [[missing.task, reason(missing)] for missing in comparison.not_compared]
    return "Not compared, in no number", ["task", "reason"], rows


def _overall_line(comparison: Comparison) -> str:
    overall = comparison.overall
    if overall is None:
        return ""
    bounds = f" ({signed_interval(overall.interval)})" if has_width(overall.interval) else ""
    return (
        f"All {plural(len(comparison.tasks), 'task')}: {points(overall.a)} and "
        f"{points(overall.b)}, B − A {signed(overall.delta)}{bounds}, "
        f"p {probability(overall.p_value)}."
    )


def _short(comparison: Comparison) -> tuple[str, str]:
    """Last parts of the two folders; the whole where these are equal."""
    a, b = Path(comparison.a).name, Path(comparison.b).name
    return (a, b) if a and b and a != b else (comparison.a, comparison.b)
