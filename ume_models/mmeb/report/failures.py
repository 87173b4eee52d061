"""The queries of a task that went wrong: what was asked, what was found, what was right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from ume_models.errors import ItemError, UmeError
from ume_models.mmeb.dataset import Candidates, TaskData
from ume_models.mmeb.metrics import Ranking, query_values
from ume_models.mmeb.report.numbers import count, plural, points
from ume_models.mmeb.results import TaskScore
from ume_models.processing.items import Item, MediaSource
from ume_models.processing.media import decode_rgb
from ume_models.retrieval.gallery import Card, Found, QueryBlock, Section

_PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>")
_FRAMES = 4
_SIDE = 256
_ANSWERS = 3


@dataclass(frozen=True)
class Answer:
    """A right answer that is not among the results shown.

    Attributes:
        card: the candidate.
        place: where it stands, such as "rank 37" or "not among the first 100".
        score: its inner product with the query; None where it was not kept.
    """

    card: Card
    place: str
    score: float | None = None


@dataclass(frozen=True)
class Failure(QueryBlock):
    """A query that went wrong, with the right answers that its results do not show.

    Attributes:
        answers: the best placed of them.
        more: how many further ones there are.
    """

    answers: Sequence[Answer] = ()
    more: int = 0


def failure_section(
    data: TaskData,
    score: TaskScore,
    rankings: Sequence[Ranking],
    *,
    cases: int = 5,
    shown: int = 5,
) -> Section:
    """The worst queries of a task, as a section of a gallery.

    Worst are the queries with the lowest value of the task's metric; among equals those whose best
    right answer has the score furthest below the first result's (or below the last one kept, where
    no right answer was kept). Pictures that lie inside of tables are shrunk at once, those in
    files of their own when the page is made. What cannot be read is told in its place. The
    instruction that all texts of a task begin with is left out where more follows.

    Args:
        data: the task, for what queries and candidates look like.
        score: its score.
        rankings: the results of its queries; they are found in ``data`` by their ids.
        cases: how many queries.
        shown: how many results of each.

    Returns:
        A section whose blocks are :class:`Failure`; without blocks where every query is right.
    """
    values = query_values(rankings, score.metric, legacy=score.legacy)
    wrong = [position for position, value in enumerate(values) if value < 1]
    known = {query.item.id: query.item for query in data.queries}
    worst = sorted(wrong, key=lambda at: (values[at], -_margin(rankings[at]), at))[:cases]
    wordings = [words for words in (data.task.instructions, data.task.plume_instructions) if words]
    of_queries, of_targets = zip(*((words.query, words.target) for words in wordings), strict=True)
    cards = _Cards(data.candidates, [rankings[at] for at in worst], shown, of_targets)
    misled = sum(not {*ranking.prediction[:1]} & {*ranking.relevant} for ranking in rankings)
    return Section(
        title=score.task,
        blocks=[
            _failure(rankings[at], _query(known, rankings[at].id, of_queries), cards, shown)
            for at in worst
        ],
        facts=[
            (score.metric, points(score.score)),
            ("best result wrong", f"{count(misled)} of {plural(len(rankings), 'query')}"),
        ],
    )


def _right(ranking: Ranking) -> list[str]:
    """The right answers that were kept, best first."""
    relevant = set(ranking.relevant)
    return [name for name in ranking.prediction if name in relevant]


def _margin(ranking: Ranking) -> float:
    """By how much the first result's score exceeds the best right answer's; at least that much."""
    if not ranking.scores:
        return 0.0
    right = _right(ranking)
    place = ranking.prediction.index(right[0]) if right else -1
    return ranking.scores[0] - ranking.scores[place]


def _query(known: Mapping[str, Item], id: str, instructions: Sequence[str]) -> Card:
    if id not in known:
        return Card(id, "(this query is not among the data)")
    return _card(known[id], instructions)


def _failure(ranking: Ranking, query: Card, cards: _Cards, shown: int) -> Failure:
    relevant, kept = set(ranking.relevant), len(ranking.prediction)
    # Scores may be unknown, as in predictions of the official evaluation.
    scores = dict(zip(ranking.prediction, ranking.scores or [math.nan] * kept, strict=True))
    answers = cards.hidden_answers(ranking)
    return Failure(
        query=query,
        found=[
            Found(cards[name], scores[name], name in relevant)
            for name in ranking.prediction[:shown]
        ],
        note=_note(ranking),
        answered=bool(ranking.prediction) and ranking.prediction[0] in relevant,
        answers=[
            Answer(cards[name], _place(ranking, name), scores.get(name))
            for name in answers[:_ANSWERS]
        ],
        more=max(0, len(answers) - _ANSWERS),
    )


def _note(ranking: Ranking) -> str:
    right, kept = _right(ranking), len(ranking.prediction)
    if not right:
        return f"No right answer among the first {kept}."
    rank = ranking.prediction.index(right[0]) + 1
    if rank == 1:
        return f"The best result is right; {plural(len(ranking.relevant), 'right answer')} in all."
    behind = f", {_margin(ranking):.3f} below the best result" if ranking.scores else ""
    return f"The first right answer has rank {rank}{behind}."


def _place(ranking: Ranking, name: str) -> str:
    if name in ranking.prediction:
        return f"rank {ranking.prediction.index(name) + 1}"
    return f"not among the first {len(ranking.prediction)}"


class _Cards:
    """Cards of the candidates that a few rankings show, each read once and in the tables' order."""

    def __init__(
        self,
        candidates: Candidates,
        rankings: Sequence[Ranking],
        shown: int,
        instructions: Sequence[str],
    ) -> None:
        self._shown = shown
        wanted: set[str] = set()
        for ranking in rankings:
            wanted.update(ranking.prediction[:shown], self.hidden_answers(ranking)[:_ANSWERS])
        # Consecutive positions are cheap to read, and there may be a hundred thousand names.
        self._cards = {
            name: _read(candidates, position, name, instructions)
            for position, name in enumerate(candidates.names)
            if name in wanted
        }

    def hidden_answers(self, ranking: Ranking) -> list[str]:
        """Right answers that are not among the results shown: ranked ones first."""
        visible = set(ranking.prediction[: self._shown])
        every = dict.fromkeys([*_right(ranking), *ranking.relevant])
        return [name for name in every if name not in visible]

    def __getitem__(self, name: str) -> Card:
        return self._cards.get(name) or Card(name, "(this name is not among the candidates)")


def _read(
    candidates: Candidates, position: int, name: str, instructions: Sequence[str]
) -> Card:
    try:
        return replace(_card(candidates.item(position), instructions), id=name)
    except (UmeError, OSError) as error:  # a picture that is gone costs a card, not the report
        return Card(name, f"(cannot be read: {error})")


def _card(item: Item, instructions: Sequence[str]) -> Card:
    text = " ".join(part for part in (item.instruction, item.text) if part)
    for placeholder in _PLACEHOLDERS:
        text = text.replace(placeholder, "")
    text = text.strip()
    for instruction in instructions:  # the same in every card, it would push out what differs
        text = text.removeprefix(instruction.strip()).strip() or text
    video = item.video or ()
    # Eight frames side by side in a card would be too small to see anything.
    step = max(1, len(video) / _FRAMES)
    frames = [video[int(step * at)] for at in range(min(_FRAMES, len(video)))]
    return Card(item.id, text, tuple(_small(item.images)), tuple(_small(frames)))


def _small(sources: Iterable[MediaSource]) -> Iterable[MediaSource]:
    """Pictures in memory shrunk: a report holds thousands of them until it is written."""
    for source in sources:
        if not isinstance(source, (bytes, Image.Image)):
            yield source
            continue
        try:
            picture = decode_rgb(source).copy()
        except ItemError:
            yield source  # the page says what is wrong with it
        else:
            picture.thumbnail((_SIDE, _SIDE))
            yield picture
