"""The embedding store: what is on disk, what is refused, and what survives."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ume_models.errors import ErrorKind, StoreError
from ume_models.store import (
    LOCK_FILE,
    EmbeddingStore,
    Manifest,
    Record,
    Shard,
    Skipped,
    lock_folder,
    unlock_folder,
)

MANIFEST = Manifest(
    package_version="1.2.3",
    model="/models/plume",
    fingerprint="abc",
    hidden_size=4,
    encoding={"mode": "gen", "latent_steps": 8, "images": {"mean": [0.5, 0.25]}},
    items_digest="d" * 64,
    num_items=7,
    shard_size=3,
    media_folders=("../data", "/data"),
)

needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="no advisory locks")


def shard_of(store: EmbeddingStore, number: int, skip: frozenset[int] = frozenset()) -> Shard:
    """A shard whose numbers follow from the row alone."""
    rows = [row for row in store.item_range(number) if row not in skip]
    size = store.manifest.hidden_size
    return Shard(
        rows=torch.tensor(rows, dtype=torch.int64),
        embeddings=torch.tensor([[row + c / 8 for c in range(size)] for row in rows]).reshape(
            len(rows), size
        ),
        records=[Record(f"id{row}", f"text {row} é", (f"{row}.png",), ()) for row in rows],
        skipped=[Skipped(r, f"id{r}", "is broken") for r in store.item_range(number) if r in skip],
    )


def fill(directory: Path, manifest: Manifest = MANIFEST) -> None:
    with EmbeddingStore.begin(directory, manifest) as store:
        for number in store.pending():
            store.write(number, shard_of(store, number))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_files_hold_what_the_format_says(tmp_path: Path) -> None:
    fill(tmp_path)
    assert sorted(contents(tmp_path)) == [
        "manifest.json",
        "shard-00000-of-00003.json",
        "shard-00000-of-00003.safetensors",
        "shard-00001-of-00003.json",
        "shard-00001-of-00003.safetensors",
        "shard-00002-of-00003.json",
        "shard-00002-of-00003.safetensors",
    ]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format"] == "ume-embeddings"
    assert manifest["format_version"] == 1
    assert manifest["encoding"]["images"]["mean"] == [0.5, 0.25]
    tensors = load_file(tmp_path / "shard-00002-of-00003.safetensors")
    assert tensors["rows"].tolist() == [6]
    assert tensors["embeddings"].tolist() == [[6.0, 6.125, 6.25, 6.375]]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    with EmbeddingStore.begin(tmp_path, MANIFEST) as store:
        for number in (2, 0, 1):
            store.write(number, shard_of(store, number, skip=frozenset({3, 4, 5, 6})))
    store = EmbeddingStore.open(tmp_path)
    assert store.manifest == replace(MANIFEST, media_folders=["../data", "/data"])
    shards = list(store.shards())
    assert [shard.rows.tolist() for shard in shards] == [[0, 1, 2], [], []]
    assert [tuple(shard.embeddings.shape) for shard in shards] == [(3, 4), (0, 4), (0, 4)]
    assert shards[0].records[1] == Record("id1", "text 1 é", ("1.png",), ())
    assert [entry.row for entry in store.skipped()] == [3, 4, 5, 6]
    assert store.skipped()[0] == Skipped(3, "id3", "is broken")


@given(
    items=st.integers(1, 40),
    size=st.integers(1, 50),
    order=st.randoms(use_true_random=False),
    texts=st.lists(st.text(max_size=8), min_size=40, max_size=40),
)
def test_shards_cover_every_item_once_and_records_survive(
    tmp_path_factory: pytest.TempPathFactory, items: int, size: int, order: object, texts: list[str]
) -> None:
    directory = tmp_path_factory.mktemp("store")
    manifest = replace(MANIFEST, num_items=items, shard_size=size)
    with EmbeddingStore.begin(directory, manifest) as store:
        numbers = store.pending()
        order.shuffle(numbers)  # type: ignore[attr-defined]
        for number in numbers:
            shard = shard_of(store, number)
            records = [Record(str(row), texts[row]) for row in shard.rows.tolist()]
            store.write(number, replace(shard, records=records))
    read = list(EmbeddingStore.open(directory).shards())
    assert [row for shard in read for row in shard.rows.tolist()] == list(range(items))
    assert [record.text for shard in read for record in shard.records] == texts[:items]


def test_a_store_is_continued_with_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "whole")
    part = tmp_path / "part"
    with EmbeddingStore.begin(part, MANIFEST) as store:
        store.write(1, shard_of(store, 1))
    before = (part / "shard-00001-of-00003.safetensors").stat().st_mtime_ns
    with EmbeddingStore.begin(part, MANIFEST) as store:
        assert store.pending() == [0, 2]
        for number in store.pending():
            store.write(number, shard_of(store, number))
    assert contents(part) == contents(tmp_path / "whole")
    assert (part / "shard-00001-of-00003.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "xyz"}, "fingerprint: 'abc' in the store, 'xyz' now"),
        ({"encoding": {**MANIFEST.encoding, "latent_steps": 4}}, "latent_steps: 8 in the store"),
        ({"shard_size": 2}, "shard_size: 3 in the store, 2 now"),
        ({"encoding": {**MANIFEST.encoding, "images": {"a": 1}}}, "images.a: None in the store"),
        ({"items_digest": "e"}, "the items file has changed"),
        ({"package_version": "2"}, "package_version"),
        ({"encoding": {**MANIFEST.encoding, "profile": "x"}}, "--profile before-profiles goes on"),
    ],
)
def test_other_settings_are_refused_and_named(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    fill(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(StoreError) as caught:
        EmbeddingStore.begin(tmp_path, replace(MANIFEST, **change))
    assert named in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert "-o" in str(caught.value)
    assert caught.value.kind is ErrorKind.OTHER_SETTINGS
    assert contents(tmp_path) == before


def test_moving_the_model_or_the_media_is_not_another_setting(tmp_path: Path) -> None:
    fill(tmp_path)
    moved = replace(MANIFEST, model="/elsewhere", media_folders=("x",))
    with EmbeddingStore.begin(tmp_path, moved) as store:
        assert store.pending() == []


def test_overwrite_replaces_shards_and_touches_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "shard-list.json").write_text("mine too")
    other = replace(MANIFEST, shard_size=7)
    with EmbeddingStore.begin(tmp_path, other, overwrite=True) as store:
        assert store.pending() == [0]
    assert sorted(contents(tmp_path)) == ["manifest.json", "notes.txt", "shard-list.json"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def corrupt_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def other_shape(path: Path) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**tensors, "embeddings": tensors["embeddings"][:, :2].contiguous()}, path, metadata)


def other_rows(path: Path) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**tensors, "rows": tensors["rows"] + 1}, path, metadata)


def drop_digest(path: Path) -> None:
    save_file(load_file(path), path)


def other_listing(path: Path) -> None:
    listing = path.with_suffix(".json")
    listing.write_bytes(listing.read_bytes().replace(b"text 3", b"text 9"))


def no_listing(path: Path) -> None:
    path.with_suffix(".json").unlink()


def tensor_bytes(path: Path, name: str) -> tuple[int, int]:
    """Begin and end of a tensor in its file, by the published layout of the format."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + size])[name]["data_offsets"]
    return 8 + size + begin, 8 + size + end


@pytest.mark.parametrize("place", ["first", "last"])
def test_one_flipped_bit_is_found_and_the_shard_made_again(tmp_path: Path, place: str) -> None:
    fill(tmp_path)
    good = contents(tmp_path)
    path = tmp_path / "shard-00001-of-00003.safetensors"
    begin, end = tensor_bytes(path, "embeddings")
    data = bytearray(path.read_bytes())
    data[begin if place == "first" else end - 1] ^= 1
    path.write_bytes(data)
    store = EmbeddingStore.open(tmp_path)
    store.read(0)
    again = r"shard-00001-of-00003\.safetensors .*the same command again"
    with pytest.raises(StoreError, match=again):
        store.read(1)
    with EmbeddingStore.begin(tmp_path, MANIFEST) as store:
        assert store.pending() == [1]
        store.write(1, shard_of(store, 1))
    assert contents(tmp_path) == good


def test_exchanged_rows_are_found(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "shard-00000-of-00003.safetensors"
    begin, end = tensor_bytes(path, "rows")
    data = bytearray(path.read_bytes())
    rows = bytes(data[begin:end])
    data[begin:end] = rows[8:16] + rows[:8] + rows[16:]  # the same rows, so the range still fits
    path.write_bytes(data)
    with pytest.raises(StoreError, match="shard-00000-of-00003"):
        EmbeddingStore.open(tmp_path).read(0)
    with EmbeddingStore.begin(tmp_path, MANIFEST) as store:
        assert store.pending() == [0]


def test_the_listing_has_the_digests_of_the_tensors(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "shard-00000-of-00003.safetensors"
    listed = json.loads(path.with_suffix(".json").read_text())["tensors_sha256"]
    assert sorted(listed) == ["embeddings", "rows"]
    for name, digest in listed.items():
        begin, end = tensor_bytes(path, name)
        assert digest == hashlib.sha256(path.read_bytes()[begin:end]).hexdigest()


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        corrupt_header,
        other_shape,
        other_rows,
        drop_digest,
        other_listing,
        no_listing,
        Path.unlink,
    ],
)
def test_a_damaged_shard_is_found_and_made_again(tmp_path: Path, damage: object) -> None:
    fill(tmp_path)
    good = contents(tmp_path)
    damage(tmp_path / "shard-00001-of-00003.safetensors")  # type: ignore[operator]
    with pytest.raises(StoreError, match="1 of 3 shards"):
        EmbeddingStore.open(tmp_path)
    with EmbeddingStore.begin(tmp_path, MANIFEST) as store:
        assert store.pending() == [1]
        store.write(1, shard_of(store, 1))
    assert contents(tmp_path) == good


def test_leftovers_of_an_interrupted_write_are_removed(tmp_path: Path) -> None:
    fill(tmp_path)
    good = contents(tmp_path)
    for name in ("shard-00001-of-00003.safetensors", "manifest.json"):
        (tmp_path / f".{name}.0123456789abcdef.partial").write_bytes(b"half")
    half = contents(tmp_path)
    EmbeddingStore.attach(tmp_path)  # beside others, whose writes go on
    assert contents(tmp_path) == half
    with EmbeddingStore.begin(tmp_path, MANIFEST):
        pass
    assert contents(tmp_path) == good


def test_a_failed_write_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with EmbeddingStore.begin(tmp_path, MANIFEST) as store:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left") as caught:
                store.write(0, shard_of(store, 0))
        assert caught.value.filename == str(tmp_path / "shard-00000-of-00003.json")
        assert store.pending() == [0, 1, 2]
    assert sorted(contents(tmp_path)) == ["manifest.json"]


def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with EmbeddingStore.begin(tmp_path, MANIFEST) as store:
        shard = shard_of(store, 1)
        shard.embeddings[2, 1] = float("nan")
        with pytest.raises(StoreError, match="'id5' is not finite"):
            store.write(1, shard)
        assert store.pending() == [0, 1, 2]


def test_a_shard_with_missing_rows_is_refused(tmp_path: Path) -> None:
    with EmbeddingStore.begin(tmp_path, MANIFEST) as store:
        shard = shard_of(store, 0)
        with pytest.raises(StoreError, match="every item"):
            store.write(0, replace(shard, rows=shard.rows[:2]))
        with pytest.raises(StoreError, match="must be float32"):
            store.write(0, replace(shard, embeddings=shard.embeddings.double()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ('{"a":' * 10**5, "not valid JSON"),
        ('{"a":' * 60 + "1" + "}" * 60, "levels deep"),
        ('{"format": "ume-embeddings", "format_version": 99}', "format version 99"),
        ('{"format": "ume-embeddings", "format_version": 1}', "'package_version' is missing"),
    ],
)
def test_a_strange_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=message):
        EmbeddingStore.open(tmp_path)
    with pytest.raises(StoreError, match=message):
        EmbeddingStore.begin(tmp_path, MANIFEST)


@pytest.mark.parametrize("name", ["num_items", "shard_size"])
@pytest.mark.parametrize("value", [10**18, 10**30])
def test_a_number_in_a_manifest_is_no_work(tmp_path: Path, name: str, value: int) -> None:
    fill(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**content, name: value}))
    with pytest.raises(StoreError, match="not finished"):
        EmbeddingStore.open(tmp_path)
    assert EmbeddingStore.attach(tmp_path).skipped() == []


def test_places_that_are_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not an embedding store"):
        EmbeddingStore.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        EmbeddingStore.begin(tmp_path / "file", MANIFEST)
    (tmp_path / "shard-00000-of-00001.json").write_text("{}")
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        EmbeddingStore.begin(tmp_path, MANIFEST)


@needs_locks
def test_only_one_process_writes(tmp_path: Path) -> None:
    code = (
        "import fcntl, sys\n"
        "lock = open(sys.argv[1], 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / LOCK_FILE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match="another process"):
            EmbeddingStore.begin(tmp_path, MANIFEST)
        other.kill()
    assert (tmp_path / LOCK_FILE).exists()  # what the killed one left is no obstacle
    fill(tmp_path)
    assert EmbeddingStore.open(tmp_path).pending() == []
    assert not (tmp_path / LOCK_FILE).exists()


@needs_locks
def test_who_holds_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("process 4000000000 on host elsewhere, which has died\n")
    lock = lock_folder(tmp_path)
    holder = rf"another process .*\(process {os.getpid()} on host {os.uname().nodename}\)"
    with pytest.raises(StoreError, match=holder):
        lock_folder(tmp_path)
    unlock_folder(tmp_path, lock)
    unlock_folder(tmp_path, lock_folder(tmp_path))
    assert not list(tmp_path.iterdir())


@needs_locks
def test_a_lock_on_a_file_that_was_just_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    real = fcntl.flock

    def removed_first(lock: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        (tmp_path / LOCK_FILE).unlink()
        real(lock, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    first = lock_folder(tmp_path)
    with pytest.raises(StoreError, match="another process"):
        lock_folder(tmp_path)
    (tmp_path / LOCK_FILE).unlink()  # by a user
    second = lock_folder(tmp_path)
    unlock_folder(tmp_path, first)
    with pytest.raises(StoreError, match="another process"):
        lock_folder(tmp_path)
    unlock_folder(tmp_path, second)


@needs_locks
def test_without_locks_the_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def none(lock: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="No locks available"):
        fill(tmp_path)
    assert not (tmp_path / LOCK_FILE).exists()


@needs_locks
def test_a_finished_store_that_cannot_be_written_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    real = os.open

    def read_only(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match=r"Read-only.*\.ume-lock"):
        EmbeddingStore.begin(tmp_path, MANIFEST)  # the folder can be written, the lock cannot
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with EmbeddingStore.begin(tmp_path, MANIFEST) as store:
        assert store.pending() == []


def test_media_are_found_where_store_and_media_moved_together(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"x")
    fill(tmp_path / "store")
    store = EmbeddingStore.open(tmp_path / "store")
    assert store.locate("a.png").samefile(tmp_path / "data" / "a.png")
    assert not store.locate("missing.png").exists()
