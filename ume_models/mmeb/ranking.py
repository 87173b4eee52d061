"""Embeddings to rankings: every query against its own list, or against all candidates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ume_models.errors import DataError
from ume_models.mmeb.dataset import Query
from ume_models.mmeb.metrics import Ranking
from ume_models.mmeb.tasks import Task
from ume_models.retrieval import ExactIndex, SearchResult, local_search

_QUERIES_AT_ONCE = 4096
# From so many queries on, one matrix product over their common list costs less than a list each.
_SHARE_A_LIST = 8


def rank_task(
    task: Task,
    queries: Sequence[Query],
    query_rows: torch.Tensor,
    names: Sequence[str],
    candidate_rows: torch.Tensor,
    *,
    top: int = 100,
    device: str | torch.device = "cpu",
) -> list[Ranking]:
    """Rank the candidates of a task for each of its queries by inner product.

    Equal scores keep the order of the candidates, so that rankings do not depend on the machine.

    Args:
        task: says whether queries have lists of their own.
        queries: Q queries.
        query_rows: float ``[Q, D]``.
        names: C unique names.
        candidate_rows: float ``[C, D]``.
        top: how many places to keep.
        device: where to compute. Candidates that would fill a GPU stay where they are.

    Raises:
        DataError: the embeddings do not fit, one or a score is not finite, or a list names an
            unknown candidate.
    """
    if len(query_rows) != len(queries):
        raise DataError(f"{task.name}: {len(query_rows)} embeddings for {len(queries)} queries")
    try:
        home = device if _has_room(device, candidate_rows) else candidate_rows.device
        index = ExactIndex(candidate_rows, names, device=home)
        found: list[Ranking] = []
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            part = queries[start : start + _QUERIES_AT_ONCE]
            rows = query_rows[start : start + len(part)].to(device)
            if task.ranking == "local":
                found += _ranked_by_list(part, rows, index, candidate_rows, top)
            else:
                found += _rankings(part, index.search(rows, min(top, len(index))))
    except ValueError as error:
        raise DataError(f"{task.name}: {error}") from error
    return found


def _has_room(device: str | torch.device, candidate_rows: torch.Tensor) -> bool:
    """Whether candidates fit beside a model; where they do not, they are streamed to the queries.

    Half of what is free, which leaves the other half to the search itself.
    """
    if torch.device(device).type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return candidate_rows.numel() * candidate_rows.element_size() <= free // 2


def _ranked_by_list(
    queries: Sequence[Query],
    query_rows: torch.Tensor,
    index: ExactIndex,
    candidate_rows: torch.Tensor,
    top: int,
) -> list[Ranking]:
    """Each query against its own list; lists that many queries share are ranked as one matrix."""
    members: dict[tuple[str, ...], list[int]] = {}
    for number, query in enumerate(queries):
        members.setdefault(query.candidates, []).append(number)
    shared = {
        names: numbers
        for names, numbers in members.items()
        if names and len(numbers) >= _SHARE_A_LIST
    }
    row_of = {name: row for row, name in enumerate(index.ids)} if shared else {}
    found: dict[int, Ranking] = {}
    for names, numbers in shared.items():
        among = _part(index, candidate_rows, names, row_of)
        rows = query_rows[torch.tensor(numbers, device=query_rows.device)]
        result = among.search(rows, min(top, len(among)))
        found.update(zip(numbers, _rankings([queries[n] for n in numbers], result), strict=True))
    alone = [number for number in range(len(queries)) if number not in found]
    if alone:
        lists = [queries[number].candidates for number in alone]
        rows = query_rows[torch.tensor(alone, device=query_rows.device)]
        result = local_search(index, rows, lists, top)
        found.update(zip(alone, _rankings([queries[n] for n in alone], result), strict=True))
    return [found[number] for number in range(len(queries))]


def _part(
    index: ExactIndex,
    candidate_rows: torch.Tensor,
    names: Sequence[str],
    row_of: dict[str, int],
) -> ExactIndex:
    """The candidates of one list, in the order of the whole index: ties keep it."""
    unknown = next((name for name in names if name not in row_of), None)
    if unknown is not None:
        raise ValueError(f"the candidate {unknown!r} is not in the index")
    rows = sorted({row_of[name] for name in names})
    if len(rows) == len(index):
        return index
    chosen = candidate_rows[torch.tensor(rows, device=candidate_rows.device)]
    return ExactIndex(chosen, [index.ids[row] for row in rows], device=index.device)


def _rankings(queries: Sequence[Query], result: SearchResult) -> list[Ranking]:
    overflown = (result.rows >= 0) & ~result.scores.isfinite()
    if bool(overflown.any()):
        query = queries[int(overflown.nonzero()[0, 0])]
        raise ValueError(
            f"a score of query {query.item.id!r} overflows float32: its embedding or those of the "
            "candidates are too large; normalise them"
        )
    scores = result.scores.cpu().tolist()
    return [
        Ranking(
            id=query.item.id,
            prediction=tuple(ids),
            scores=tuple(row[: len(ids)]),
            relevant=query.relevant,
            grades=query.grades,
            labels=query.labels,
        )
        for query, ids, row in zip(queries, result.ids, scores, strict=True)
    ]
