"""Rankings of lists that queries share, against a plain loop over the queries."""

from __future__ import annotations

import time

import pytest
import torch

from ume_models.errors import DataError
from ume_models.mmeb import ranking as ranking_module
from ume_models.mmeb.dataset import Query
from ume_models.mmeb.ranking import rank_task
from ume_models.mmeb.tasks import Ranking, Source, Task
from ume_models.processing.items import Item


def task(ranking: Ranking = "local") -> Task:
    source = Source("someone/tables", None, "test")
    return Task("t", "MMEB-v2", "image", "I-CLS", "image_cls", ranking, "hit@1", source, ())


def ask(lists: list[tuple[str, ...]]) -> list[Query]:
    return [Query(Item(id=f"q{n}"), ("c0",), candidates=own) for n, own in enumerate(lists)]


def mixture() -> tuple[list[Query], torch.Tensor, list[str], torch.Tensor]:
    """Whole collections, parts in another order and with repetitions, lists of one query, none."""
    generator = torch.Generator().manual_seed(5)
    names = [f"c{number}" for number in range(40)]
    lists = [
        *[tuple(names)] * 12,
        *[(*reversed(names[5:30]), "c7", "c7")] * 9,
        *[("c3",)] * 10,
        *[tuple(names[n : n + 6]) for n in range(7)],
        *[()] * 9,
    ]
    order = torch.randperm(len(lists), generator=generator).tolist()
    # small whole numbers: exact sums, and many ties
    rows = torch.randint(-2, 3, (len(lists) + 40, 8), generator=generator).float()
    return ask([lists[n] for n in order]), rows[:-40], names, rows[-40:]


@pytest.mark.parametrize("top", [3, 100])
@pytest.mark.parametrize("at_once", [10, 4096])
def test_rankings_are_those_of_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, top: int, at_once: int
) -> None:
    monkeypatch.setattr(ranking_module, "_QUERIES_AT_ONCE", at_once)
    queries, rows, names, candidates = mixture()
    found = rank_task(task(), queries, rows, names, candidates, top=top)
    assert [one.id for one in found] == [query.item.id for query in queries]
    for query, row, one in zip(queries, rows, found, strict=True):
        scores = {n: float(candidates[names.index(n)] @ row) for n in query.candidates}
        best = sorted(scores, key=lambda name: (-scores[name], names.index(name)))[:top]
        assert one.prediction == tuple(best)
        assert one.scores == tuple(scores[name] for name in best)


def test_candidates_go_to_a_gpu_only_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = torch.zeros(1000, 8)  # 32,000 bytes
    assert ranking_module._has_room("cpu", candidates)
    for free, fits in ((64_000, True), (63_999, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert ranking_module._has_room(torch.device("cuda", 1), candidates) is fits


def test_shared_lists_are_ranked_as_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, _, names, _ = mixture()
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(len(queries), 24, generator=generator)
    candidates = torch.randn(40, 24, generator=generator)
    candidates[20:] = candidates[:20]  # ties with all digits
    together = rank_task(task(), queries, rows, names, candidates)
    monkeypatch.setattr(ranking_module, "_SHARE_A_LIST", 10**9)
    alone = rank_task(task(), queries, rows, names, candidates)
    for one, other in zip(together, alone, strict=True):
        assert one.prediction == other.prediction
        assert one.scores == pytest.approx(other.scores, rel=1e-5, abs=1e-5)


def test_a_list_that_all_share_costs_like_the_whole_collection() -> None:
    """Per list, 400 times 4000 names took seconds."""
    names = [f"c{number}" for number in range(4000)]
    rows = torch.nn.functional.normalize(torch.randn(4400, 16), dim=1)
    queries = ask([tuple(names) for _ in range(400)])
    seconds = {}
    for kind in ("global", "local"):
        started = time.process_time()
        found = rank_task(task(kind), queries, rows[:400], names, rows[400:])
        seconds[kind] = time.process_time() - started
    assert len(found[0].prediction) == 100
    assert seconds["local"] < 5 * seconds["global"] + 0.2


def test_what_cannot_be_ranked_is_named() -> None:
    names, rows = ["c0", "c1"], torch.eye(2)
    for count in (1, 20):  # by itself, and as a shared list
        with pytest.raises(DataError, match="t: the candidate 'x' is not in the index"):
            rank_task(task(), ask([("c0", "x")] * count), torch.ones(count, 2), names, rows)
        queries = ask([("c0", "c1")] * count)
        with pytest.raises(DataError, match=r"'q0' overflows float32: .*normalise"):
            rank_task(task(), queries, torch.full((count, 2), 1e30), names, rows * 1e30)
        with pytest.raises(DataError, match=f"t: 3 embeddings for {count} queries"):
            rank_task(task(), queries, torch.ones(3, 2), names, rows)
    with pytest.raises(DataError, match="c0"):
        rank_task(task(), ask([("c0",)] * 20), torch.ones(20, 2), ["c0", "c0"], rows)
    with pytest.raises(DataError, match="overflows"):
        rank_task(task("global"), ask([()]), torch.full((1, 2), 1e30), names, -rows * 1e30)
