"""Plans: what is embedded once, what is gone on with, what other selections reuse."""

from __future__ import annotations

import json

import pytest
import torch

from ume_models.errors import ErrorKind, StoreError
from ume_models.mmeb.embeddings import EmbeddingLookup
from ume_models.mmeb.plan import make_plan, open_store
from ume_models.store import Manifest, Record, Shard, Skipped

SIZES = {"text": 3, "image": 2, "video": 2}


def manifest(**changes) -> Manifest:
    fields = {
        "package_version": "1",
        "model": "",
        "fingerprint": "f",
        "hidden_size": 4,
        "encoding": {"dtype": "float32"},
        "items_digest": "",
        "num_items": 0,
        "shard_size": 0,
    }
    return Manifest(**{**fields, **changes})


def keys(kind: str, numbers) -> list[str]:
    return [f"{kind}-{number:032x}" for number in numbers]


def row(key: str) -> torch.Tensor:
    return torch.full((4,), float(int(key.partition("-")[2], 16)))


def write(held, shard: int, skip: tuple[str, ...] = ()) -> None:
    wanted = held.shard_keys(shard)
    kept = [key for key in wanted if key not in skip]
    first = held.store.item_range(shard).start
    held.store.write(
        shard,
        Shard(
            rows=torch.tensor([first + wanted.index(key) for key in kept], dtype=torch.int64),
            embeddings=torch.stack([row(key) for key in kept]),
            records=[Record(key) for key in kept],
            skipped=[Skipped(first + wanted.index(k), k, "broken") for k in wanted if k in skip],
        ),
    )


def do(plan, count: int | None = None) -> None:
    for part in plan.work[:count]:
        write(plan.stores[part.store], part.shard)


def test_shards_follow_the_order_in_which_tasks_need_them(tmp_path):
    text, image = keys("text", range(7)), keys("image", range(3))
    plan = make_plan(tmp_path, [*text[:3], *image, *text[3:]], manifest(), SIZES)
    order = [(part.kind, part.shard, part.items) for part in plan.work]
    assert order == [
        ("text", 0, 3), ("image", 0, 2), ("image", 1, 1), ("text", 1, 3), ("text", 2, 1),
    ]  # fmt: skip
    assert [*plan.finished.values()] == [set(), set()]
    plan.close()


@pytest.mark.parametrize("done", range(5))
def test_an_interrupted_plan_goes_on_with_the_same_shards(tmp_path, done):
    wanted = [*keys("text", range(7)), *keys("image", range(3))]
    first = make_plan(tmp_path, wanted, manifest(), SIZES)
    do(first, done)
    first.close()
    again = make_plan(tmp_path, wanted, manifest(), SIZES)
    assert again.work == first.work[done:]
    again.close()


def test_a_damaged_shard_is_made_anew(tmp_path):
    wanted = keys("text", range(7))
    plan = make_plan(tmp_path, wanted, manifest(), SIZES)
    do(plan)
    plan.close()
    path = next(tmp_path.glob("*/shard-00001-*.safetensors"))
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    again = make_plan(tmp_path, wanted, manifest(), SIZES)
    assert [part.shard for part in again.work] == [1]
    again.close()


def test_another_selection_uses_what_is_finished_and_embeds_the_rest(tmp_path):
    first = make_plan(tmp_path, keys("text", range(7)), manifest(), SIZES)
    do(first, 2)  # 0 … 5
    first.close()
    wanted = keys("text", [9, 1, 5, 6, 8])
    second = make_plan(tmp_path, wanted, manifest(), SIZES)
    [part] = second.work
    assert second.stores[part.store].keys == keys("text", [9, 6, 8])
    do(second)
    lookup = EmbeddingLookup(second.stores)
    for name, shards in second.finished.items():
        for shard in shards:
            lookup.add(name, shard)
    lookup.add(part.store, part.shard)
    rows, skipped = lookup.find([*wanted, wanted[1]])
    assert torch.equal(rows, torch.stack([row(key) for key in [*wanted, wanted[1]]]))
    assert not skipped
    second.close()
    # and the same selection once more finds everything
    third = make_plan(tmp_path, wanted, manifest(), SIZES)
    assert third.work == []
    third.close()


def test_a_smaller_selection_then_the_whole(tmp_path):
    part = make_plan(tmp_path, keys("text", [4, 5]), manifest(), SIZES)
    part.close()  # nothing was embedded
    whole = make_plan(tmp_path, keys("text", range(7)), manifest(), SIZES)
    held = {key for work in whole.work for key in whole.stores[work.store].shard_keys(work.shard)}
    assert held == {*keys("text", range(7))}
    assert sum(work.items for work in whole.work) == 7
    whole.close()


def test_other_settings_and_a_second_process_are_refused(tmp_path):
    plan = make_plan(tmp_path, keys("text", [1]), manifest(), SIZES)
    with pytest.raises(StoreError) as held:
        make_plan(tmp_path, keys("text", [1]), manifest(), SIZES)
    assert held.value.kind is ErrorKind.HELD
    plan.close()
    # The evaluation's own settings were compared before: here the folder is at fault.
    with pytest.raises(StoreError, match="dtype") as damaged:
        make_plan(tmp_path, keys("text", [1]), manifest(encoding={"dtype": "bfloat16"}), SIZES)
    assert damaged.value.kind is ErrorKind.DAMAGED
    assert "--overwrite" not in str(damaged.value)


def test_what_a_kill_can_leave_behind(tmp_path):
    wanted = keys("text", range(4))
    plan = make_plan(tmp_path, wanted, manifest(), SIZES)
    do(plan)
    plan.close()
    [name] = plan.stores
    (tmp_path / name / "manifest.json").unlink()  # stopped between the keys and the manifest
    for path in (tmp_path / name).glob("shard-*"):
        path.unlink()
    (tmp_path / "text-unfinished").mkdir()  # stopped before the keys
    again = make_plan(tmp_path, wanted, manifest(), SIZES)
    assert again.work == plan.work
    again.close()
    content = json.loads((tmp_path / name / "keys.json").read_text())
    assert content["keys"] == wanted
    with pytest.raises(StoreError, match=r"keys\.json"):
        open_store(tmp_path, "text-unfinished")


def test_skipped_items_are_told_with_their_reason(tmp_path):
    wanted = keys("text", range(3))
    plan = make_plan(tmp_path, wanted, manifest(), SIZES)
    [part] = plan.work
    write(plan.stores[part.store], part.shard, skip=(wanted[1],))
    lookup = EmbeddingLookup(plan.stores)
    assert not lookup.has(wanted[1])
    lookup.add(part.store, part.shard)
    assert lookup.has(wanted[1])
    rows, skipped = lookup.find(wanted)
    assert skipped == {wanted[1]: "broken"}
    assert rows.isnan().all(dim=1).tolist() == [False, True, False]
    assert torch.equal(rows[2], row(wanted[2]))
    with pytest.raises(KeyError):
        lookup.find(keys("text", [99]))
    plan.close()


def test_found_rows_do_not_keep_their_shards_in_memory(tmp_path):
    wanted = keys("text", range(7))
    plan = make_plan(tmp_path, wanted, manifest(), SIZES)
    do(plan)
    lookup = EmbeddingLookup(plan.stores)
    for part in plan.work:
        lookup.add(part.store, part.shard)
    rows, _ = lookup.find([wanted[6], wanted[0]])
    assert rows.untyped_storage().nbytes() == rows.numel() * 4
    plan.close()


def test_what_a_detour_embedded_is_not_embedded_again(tmp_path):
    whole = make_plan(tmp_path, keys("text", range(7)), manifest(), SIZES)
    whole.close()  # stopped before anything was embedded
    detour = make_plan(tmp_path, keys("text", [3, 4, 5]), manifest(), SIZES)
    do(detour)
    detour.close()
    again = make_plan(tmp_path, keys("text", range(7)), manifest(), SIZES)
    planned = [key for p in again.work for key in again.stores[p.store].shard_keys(p.shard)]
    assert planned == keys("text", [0, 1, 2, 6])
    do(again)
    lookup = EmbeddingLookup(again.stores)
    for part in again.work:
        lookup.add(part.store, part.shard)
    for name, shards in again.finished.items():
        for shard in shards:
            lookup.add(name, shard)
    rows, _ = lookup.find(keys("text", range(7)))
    assert torch.equal(rows, torch.stack([row(key) for key in keys("text", range(7))]))
    again.close()
    last = make_plan(tmp_path, keys("text", range(7)), manifest(), SIZES)
    assert last.work == []
    last.close()
