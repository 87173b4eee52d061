"""The page that ``ume demo`` writes."""

from __future__ import annotations

from collections.abc import Sequence

from ume_models.commands.demo_tasks import DemoTask
from ume_models.processing import Item
from ume_models.retrieval import RankingQuality, SearchResult
from ume_models.retrieval.gallery import Card, Found, Gallery, QueryBlock, Section
from ume_models.retrieval.metrics import best_rank

_QUERIES_SHOWN = 8
_RESULTS_SHOWN = 5


def demo_gallery(
    tasks: Sequence[DemoTask],
    rankings: Sequence[SearchResult],
    qualities: Sequence[RankingQuality],
    remarks: Sequence[str],
    model: str,
) -> Gallery:
    """Some queries of every task with their best results, the right answers marked.

    Args:
        tasks: what was asked.
        rankings: complete rankings, one per task.
        qualities: measures, one per task.
        remarks: lines about the run as a whole.
        model: what embedded the items, in words.
    """
    return Gallery(
        title="ume demo",
        lead=f"Held-out queries and the best results of {model}. The right answer is marked.",
        remarks=remarks,
        sections=[
            _section(task, ranking, quality)
            for task, ranking, quality in zip(tasks, rankings, qualities, strict=True)
        ],
    )


def _section(task: DemoTask, ranking: SearchResult, quality: RankingQuality) -> Section:
    shown = min(_QUERIES_SHOWN, len(task.queries))
    return Section(
        title=f"{task.kind} ({task.name})",
        facts=[
            ("queries", f"{quality.queries}" + (f", {shown} shown" * (shown < quality.queries))),
            ("candidates", str(quality.candidates)),
            ("hit@1", f"{quality.hit_at_1:.2f}"),
            ("hit@5", f"{quality.hit_at_5:.2f}"),
            ("MRR", f"{quality.mrr:.2f}"),
            ("hit@1 by chance", f"{quality.chance:.3f}"),
        ],
        blocks=[_block(task, ranking, position) for position in range(shown)],
    )


def _block(task: DemoTask, ranking: SearchResult, position: int) -> QueryBlock:
    relevant = task.relevant[position]
    ids = ranking.ids[position]
    rows = ranking.rows[position, :_RESULTS_SHOWN].tolist()
    scores = ranking.scores[position, :_RESULTS_SHOWN].tolist()
    found = [
        Found(_card(task.candidates[row]), score, task.candidates[row].id in relevant)
        for row, score in zip(rows, scores, strict=True)
    ]
    first = best_rank(ids, relevant)
    note = (
        "right answer not among the candidates" if first is None else f"right answer: rank {first}"
    )
    return QueryBlock(_card(task.queries[position]), found, note, first == 1)


def _card(item: Item) -> Card:
    return Card(item.id, item.text, item.images, item.video or ())
