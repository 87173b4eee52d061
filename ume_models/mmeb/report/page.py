"""The page of a run: bars of groups, every task, settings, and what went wrong."""

from __future__ import annotations

from collections.abc import Sequence

from ume_models.mmeb.report.facts import model_name, setting_facts
from ume_models.mmeb.report.html import render_page
from ume_models.mmeb.report.numbers import NO_INTERVAL, plural, ran
from ume_models.mmeb.report.outline import group_title, outline, reason, tasks_of
from ume_models.mmeb.report.remarks import summary_remarks
from ume_models.mmeb.summary import Summary
from ume_models.retrieval.gallery import Section

# Shown beside the score of every task, where the run has them.
_OTHER_MEASURES = (
    "hit@1", "hit@5", "hit@10", "recall@5", "recall@10", "mrr@10", "map@10",
    "ndcg_linear@5", "ndcg_linear@10", "ndcg_exponential@5", "precision@5", "f1@5",
)  # fmt: skip


def summary_page(summary: Summary, failures: Sequence[Section] = (), *, max_side: int = 192) -> str:
    """The page as HTML without any reference to another file or address.

    Args:
        summary: the run.
        failures: sections of queries that went wrong, as ``failures.failure_section`` makes them;
            one per task, shown folded.
        max_side: longer side of pictures in pixels.
    """
    name = str(summary.settings.get("benchmark", ""))
    model = model_name(summary.settings)
    table = tasks_of(summary.settings)
    asked = len(summary.tasks) + len(summary.missing)
    queries = sum(score.queries for score in summary.tasks)
    measured = {measure for score in summary.tasks for measure in score.scores}
    return render_page(
        "summary_body.html",
        {
            "summary": summary,
            "asked": asked,
            "parts": outline(summary),
            "notes": summary_remarks(summary),
            "no_interval": NO_INTERVAL,
            "missing": [
                [
                    missing.task,
                    group_title(table[missing.task].group) if missing.task in table else "",
                    reason(missing),
                ]
                for missing in summary.missing
            ],
            "settings": setting_facts(summary.settings),
            "other_metrics": [measure for measure in _OTHER_MEASURES if measure in measured],
            "failures": failures,
        },
        title=f"{model} on {name}" if name else model,
        eyebrow=f"{name} evaluation".strip(),
        heading=model,
        lead=f"{ran(len(summary.tasks), asked)} tasks, {plural(queries, 'query')}.",
        max_side=max_side,
    )
