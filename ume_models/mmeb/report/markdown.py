"""Results as Markdown, for notes, pull requests and pages that take nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ume_models.mmeb.report.facts import model_name, setting_facts
from ume_models.mmeb.report.numbers import NO_INTERVAL, count, interval, points, ran
from ume_models.mmeb.report.outline import Group, Part, outline, reason
from ume_models.mmeb.report.remarks import summary_remarks
from ume_models.mmeb.summary import Mean, Summary

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#])")


def summary_markdown(summary: Summary) -> str:
    """Means, tasks, what is missing, settings and remarks as GitHub-flavoured Markdown."""
    parts = outline(summary)
    name = str(summary.settings.get("benchmark", ""))
    asked = len(summary.tasks) + len(summary.missing)
    lines = [
        f"# {escaped(model_name(summary.settings))}: {escaped(name or 'evaluation')}",
        "",
        f"{ran(len(summary.tasks), asked)} tasks ran. Scores are points of 100, ranges are 95 % "
        "bootstrap intervals over queries, means are unweighted over the tasks that ran. "
        f"{NO_INTERVAL}",
        "",
        *bullets(summary_remarks(summary)),
        *table(["", "score", "95 %", "tasks"], _means(summary, parts), left=1),
        "",
        "## Tasks",
        "",
        *table(
            ["task", "group", "metric", "score", "95 %", "queries", "candidates", "ties"],
            [
                [
                    escaped(score.task),
                    escaped(score.group),
                    escaped(score.metric),
                    points(score.score),
                    interval(score.interval),
                    count(score.queries),
                    count(score.candidates),
                    count(score.ties),
                ]
                for part in parts
                for group in part.groups
                for score in group.scores
            ],
            left=3,
        ),
        "",
    ]
    if summary.missing:
        rows = [[escaped(missing.task), escaped(reason(missing))] for missing in summary.missing]
        lines += ["## Not run, in no mean", "", *table(["task", "reason"], rows, left=2), ""]
    facts = [[escaped(name), escaped(value)] for name, value in setting_facts(summary.settings)]
    lines += ["## Settings", "", *table(["setting", "value"], facts, left=2), ""]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """A text that Markdown shows as it is, on one line and in one cell of a table."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> list[str]:
    """Lines of a table whose cells are Markdown already.

    Args:
        head: names of the columns.
        rows: as many cells each.
        left: how many columns are aligned to the left; the others hold numbers.
    """
    rules = ["---" if column < left else "--:" for column in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in [head, rules, *rows]]


def bullets(remarks: Sequence[str]) -> list[str]:
    """Lines of a list with an empty one after it; nothing for no remarks."""
    return [*(f"- {escaped(remark)}" for remark in remarks), ""] if remarks else []


def _means(summary: Summary, parts: Sequence[Part]) -> list[list[str]]:
    rows = []
    for part in parts:
        rows.append([f"**{cell}**" for cell in _mean(escaped(part.title), part.mean, part.of)])
        rows += [_mean(_group_name(group), group.mean, group.of) for group in part.groups]
    asked = len(summary.tasks) + len(summary.missing)
    rows.append([f"**{cell}**" for cell in _mean("All tasks", summary.overall, asked)])
    return rows


def _group_name(group: Group) -> str:
    code = f" ({escaped(group.code)})" if group.code != group.title else ""
    return f"{escaped(group.title)}{code}"


def _mean(name: str, mean: Mean | None, of: int) -> list[str]:
    return [
        name,
        points(mean.value if mean else None),
        interval(mean.interval if mean else None),
        ran(mean.tasks if mean else 0, of),
    ]
