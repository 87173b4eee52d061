"""Two runs side by side: scores with significance, agreement of rankings and of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ume_models.errors import StoreError
from ume_models.mmeb.agreement import (
    CosineDistribution,
    RankAgreement,
    paired_cosines,
    rank_agreement,
)
from ume_models.mmeb.intervals import (
    Interval,
    holm,
    percentile_interval,
    resampled_means,
    sign_flip_means,
    two_sided_p,
)
from ume_models.mmeb.metrics import Ranking
from ume_models.mmeb.results import RunFolder, TaskScore
from ume_models.mmeb.summary import Missing
from ume_models.store import require_one_profile

# Folder of a run and name of a task to queries [Q, D] in the order of its rankings, candidates
# [C, D] and the candidates' names; None where the run keeps no embeddings.
Embeddings: TypeAlias = Callable[[Path, str], "tuple[Any, Any, Sequence[str]] | None"]


@dataclass(frozen=True)
class Delta:
    """The scores of two runs and how sure their difference is.

    Attributes:
        a: score of the first run on the queries that both have.
        b: score of the second.
        delta: b − a.
        interval: bootstrap interval of the difference (95 %), queries resampled in pairs.
        p_value: paired sign-flip test, two-sided: how often chance alone differs as much.
    """

    a: float
    b: float
    delta: float
    interval: Interval
    p_value: float


@dataclass(frozen=True)
class TaskComparison:
    """One task of two runs.

    Attributes:
        task: its name.
        modality: "image", "video" or "visdoc".
        group: such as "I-CLS".
        metric: the measure that is its score.
        queries: how many the two have in common; everything here is about these.
        score: the two scores.
        p_adjusted: its p-value corrected for the number of tasks (Holm).
        better: queries on which the second run has the larger value.
        worse: queries on which it has the smaller one.
        ranks: how alike the rankings are.
        query_cosine: how alike the embeddings of queries are; None where a run has none.
        candidate_cosine: the same for the candidates that both have.
        same_data: whether both runs read the same prompts, media, names and answers, by the
            digests beside their scores. Where a run has none, as of stored embeddings, False if
            the queries have other answers, else None.
    """

    task: str
    modality: str
    group: str
    metric: str
    queries: int
    score: Delta
    p_adjusted: float
    better: int
    worse: int
    ranks: RankAgreement
    query_cosine: CosineDistribution | None
    candidate_cosine: CosineDistribution | None
    same_data: bool | None


@dataclass(frozen=True)
class Setting:
    """A setting in which two runs differ.

    Attributes:
        name: of the setting.
        a: value in the first run; None where it has none.
        b: value in the second.
    """

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        a: folder of the first.
        b: folder of the second.
        settings: those in which they differ, by name.
        tasks: the tasks that both have, in alphabetical order.
        not_compared: tasks of one run only, those that a run lists as missing, and those that
            cannot be compared, with the reason.
        overall: unweighted mean over ``tasks``; None if there are none.
    """

    a: str
    b: str
    settings: Sequence[Setting]
    tasks: Sequence[TaskComparison]
    not_compared: Sequence[Missing]
    overall: Delta | None

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON has it; intervals are pairs."""
        return asdict(self)


def compare(a: RunFolder, b: RunFolder, embeddings: Embeddings | None = None) -> Comparison:
    """Compare what two runs found, query by query.

    Runs of two families may be compared, those of two profiles of one may not.

    Args:
        a: the run that is compared with.
        b: the run whose gains and losses are told.
        embeddings: what finds the embeddings of a run; None to leave them out.

    Raises:
        StoreError: a file of one of the runs is missing or damaged, or they are of two profiles.
    """
    settings_a, settings_b = a.settings(), b.settings()
    require_one_profile(
        (str(a.path), settings_a),
        (str(b.path), settings_b),
        "evaluate one of them again with the --profile of the other",
    )
    scores_a, scores_b = a.scores(), b.scores()
    missing = [(run.path, run.missing()) for run in (a, b)]
    not_compared: list[Missing] = []
    compared: list[_Compared] = []
    for task in sorted({*scores_a, *scores_b}):
        reasons = [f"{path} lists it as missing: {no[task]}" for path, no in missing if task in no]
        if reasons:  # whatever score lies there, the run does not stand by it
            not_compared.append(Missing(task, "; ".join(reasons)))
            continue
        if task not in scores_a or task not in scores_b:
            folder = a.path if task in scores_a else b.path
            not_compared.append(Missing(task, f"only {folder} has it"))
            continue
        found = _compare_task(a, b, scores_a[task], scores_b[task], embeddings)
        if isinstance(found, Missing):
            not_compared.append(found)
        else:
            compared.append(found)
    adjusted = holm([one.task.score.p_value for one in compared])
    return Comparison(
        a=str(a.path),
        b=str(b.path),
        settings=_different(settings_a, settings_b),
        tasks=[replace(one.task, p_adjusted=p) for one, p in zip(compared, adjusted, strict=True)],
        not_compared=not_compared,
        overall=_overall(compared),
    )


@dataclass(frozen=True)
class _Compared:
    """A task with what chance makes of its difference: resampled [R], with random signs [F]."""

    task: TaskComparison
    resampled: npt.NDArray[np.float64]
    by_chance: npt.NDArray[np.float64]


def _compare_task(
    a: RunFolder,
    b: RunFolder,
    score_a: TaskScore,
    score_b: TaskScore,
    embeddings: Embeddings | None,
) -> _Compared | Missing:
    task = score_a.task
    if score_a.metric != score_b.metric:
        return Missing(
            task, f"scored by {score_a.metric} in one run, {score_b.metric} in the other"
        )
    found_a, all_a = a.rankings_and_values(task)
    found_b, all_b = b.rankings_and_values(task)
    rows_a, rows_b = _shared([r.id for r in found_a], [r.id for r in found_b])
    if not rows_a:
        return Missing(task, "the runs have no query in common")
    values_a, values_b = all_a[rows_a], all_b[rows_b]
    differences = values_b - values_a
    resampled = resampled_means(differences, task)
    by_chance = sign_flip_means(differences, task)
    same_data = _same_data(
        (a.made_from(task), b.made_from(task)),
        [(found_a[one], found_b[other]) for one, other in zip(rows_a, rows_b, strict=True)],
    )
    queries, candidates = _cosines(a, b, task, (found_a, found_b), (rows_a, rows_b), embeddings)
    comparison = TaskComparison(
        task=task,
        modality=score_a.modality,
        group=score_a.group,
        metric=score_a.metric,
        queries=len(rows_a),
        score=_delta(float(values_a.mean()), float(values_b.mean()), resampled, by_chance),
        p_adjusted=1.0,  # known when all tasks are
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
        ranks=rank_agreement(
            [found_a[row].prediction for row in rows_a], [found_b[row].prediction for row in rows_b]
        ),
        query_cosine=queries,
        candidate_cosine=candidates,
        same_data=same_data,
    )
    return _Compared(comparison, resampled, by_chance)


def _same_data(made_from: tuple[str, str], pairs: Sequence[tuple[Ranking, Ranking]]) -> bool | None:
    if all(made_from):
        return made_from[0] == made_from[1]
    return None if all(_answers(one) == _answers(other) for one, other in pairs) else False


def _answers(ranking: Ranking) -> dict[str, float]:
    grades = ranking.grades or [1.0] * len(ranking.relevant)
    return dict(zip(ranking.relevant, grades, strict=True))


def _delta(
    a: float, b: float, resampled: npt.NDArray[np.float64], by_chance: npt.NDArray[np.float64]
) -> Delta:
    return Delta(a, b, b - a, percentile_interval(resampled), two_sided_p(b - a, by_chance))


def _overall(compared: Sequence[_Compared]) -> Delta | None:
    if not compared:
        return None
    return _delta(
        float(np.mean([one.task.score.a for one in compared])),
        float(np.mean([one.task.score.b for one in compared])),
        np.mean([one.resampled for one in compared], axis=0),
        np.mean([one.by_chance for one in compared], axis=0),
    )


def _cosines(
    a: RunFolder,
    b: RunFolder,
    task: str,
    rankings: tuple[Sequence[Ranking], Sequence[Ranking]],
    rows: tuple[Sequence[int], Sequence[int]],
    embeddings: Embeddings | None,
) -> tuple[CosineDistribution | None, CosineDistribution | None]:
    """Of queries and of candidates."""
    if embeddings is None:
        return None, None
    held_a, held_b = embeddings(a.path, task), embeddings(b.path, task)
    if held_a is None or held_b is None:
        return None, None
    for run, held, found in zip((a, b), (held_a, held_b), rankings, strict=True):
        if len(held[0]) != len(found) or len(held[1]) != len(held[2]):
            raise StoreError(
                f"{run.path}: {task} has {len(held[0])} embeddings for {len(found)} queries and "
                f"{len(held[1])} for {len(held[2])} candidates; run `ume eval` again"
            )
    return (
        paired_cosines(held_a[0], held_b[0], *rows),
        paired_cosines(held_a[1], held_b[1], *_shared(held_a[2], held_b[2])),
    )


def _shared(a: Sequence[str], b: Sequence[str]) -> tuple[list[int], list[int]]:
    """Positions in both of the names that both have, in the order of ``a``."""
    position = {name: row for row, name in enumerate(b)}
    pairs = [(row, position[name]) for row, name in enumerate(a) if name in position]
    return [row for row, _ in pairs], [row for _, row in pairs]


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Setting]:
    return [
        Setting(name, a.get(name), b.get(name))
        for name in sorted({*a, *b})
        if a.get(name) != b.get(name)
    ]
