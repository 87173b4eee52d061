"""What a reader must know before putting a number beside another one."""

from __future__ import annotations

from collections.abc import Iterator

from ume_models.mmeb.compare import Comparison
from ume_models.mmeb.report.facts import setting_name, setting_value
from ume_models.mmeb.report.numbers import count, plural, some
from ume_models.mmeb.report.outline import group_title, tasks_of
from ume_models.mmeb.summary import Summary

# Settings that decide what is read for a task, so that its data differ wherever they do.
_READING = {"labels", "instructions", "limit", "frames", "momentseeker_leak", "benchmark"}
_DECISIVE = {*_READING, "legacy_ndcg"}


def summary_remarks(summary: Summary) -> list[str]:
    """Why numbers of a run are not comparable with others, the weightiest reason first."""
    return [*_coverage(summary), *_reading(summary), *_ranking(summary)]


def _coverage(summary: Summary) -> Iterator[str]:
    table = tasks_of(summary.settings)
    asked = len(summary.tasks) + len(summary.missing)
    name = summary.settings.get("benchmark")
    if summary.missing:
        yield (
            f"{plural(len(summary.missing), 'task')} of {asked} did not run. Every mean is over "
            "the tasks that did, so it is not the mean of a complete run."
        )
    if len(table) > asked:
        yield f"{asked} of the {len(table)} tasks of {name} were asked for: means are over these."


def _reading(summary: Summary) -> Iterator[str]:
    settings, table = summary.settings, tasks_of(summary.settings)
    ran = [table[score.task] for score in summary.tasks if score.task in table]
    relabelled = [task.name for task in ran if task.legacy_source is not None]
    if relabelled and settings.get("labels") == "legacy":
        yield (
            f"{some(relabelled)}: scored with the labels published first, many of which are wrong. "
            "Not comparable with scores on the corrected labels."
        )
    elif relabelled and settings.get("labels") == "fixed":
        yield (
            f"{some(relabelled)}: scored with the corrected labels of November 2025. Scores on the "
            "labels published first are far lower."
        )
    limit = settings.get("limit")
    # A task with fewer queries is complete in spite of it.
    if limit is not None and any(score.queries >= limit for score in summary.tasks):
        yield (
            f"Only the first {count(int(limit))} queries of each task were used: "
            "scores are estimates of a complete run's, and no sample of it at random."
        )
    if settings.get("momentseeker_leak") and "MomentSeeker" in {task.name for task in ran}:
        yield (
            "MomentSeeker: where a query's picture is missing, a frame of the right answer stands "
            "in for it, as in the evaluation of PLUME. Its score is too high."
        )
    unlike = [
        group_title(task.group)
        for task in ran
        if settings.get("instructions") == "plume" and task.plume_instructions is not None
    ]
    if unlike:
        groups = some([*dict.fromkeys(unlike)])
        yield f"{groups}: instructions as in the evaluation of PLUME, unlike those of VLM2Vec."


def _ranking(summary: Summary) -> Iterator[str]:
    if any(score.legacy for score in summary.tasks):
        yield (
            "Grades were paired with labels as the official metric does, in the order of a Python "
            "set: where labels are texts, only PYTHONHASHSEED fixes that order."
        )
    tied = [score for score in summary.tasks if score.ties]
    if tied:
        worst = max(tied, key=lambda score: score.ties / score.queries)
        yield (
            f"Equal scores decide {plural(sum(score.ties for score in tied), 'query')} of "
            f"{plural(len(tied), 'task')} (most in {worst.task}: {count(worst.ties)} of "
            f"{count(worst.queries)}). An evaluation that orders them differently differs there."
        )


def comparison_remarks(comparison: Comparison) -> list[str]:
    """Why two runs are not alike enough for their difference to be a model's or an engine's."""
    remarks = []
    differ = [setting for setting in comparison.settings if setting.name in _DECISIVE]
    if differ:
        told = "; ".join(
            f"{setting_name(one.name)} {setting_value(one.name, one.a)} and "
            f"{setting_value(one.name, one.b)}"
            for one in differ
        )
        remarks.append(f"The runs were not evaluated alike: {told}. Differences mix with that.")
    other = [task.task for task in comparison.tasks if task.same_data is False]
    if other and not any(setting.name in _READING for setting in differ):
        remarks.append(
            f"{some(other)}: prompts, media, names or answers are not the same in both runs. "
            "Differences mix with that."
        )
    if comparison.not_compared:
        remarks.append(
            f"{plural(len(comparison.not_compared), 'task')} could not be compared and "
            f"{'is' if len(comparison.not_compared) == 1 else 'are'} in no number here."
        )
    return remarks
