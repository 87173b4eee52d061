"""ume embed: what it writes, what it refuses, and how it says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ume_models.errors import OptionError
from ume_models.processing import Item
from ume_models.store import EmbeddingStore

Ume = Callable[..., Any]
WriteItems = Callable[..., Path]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_embeddings_ids_and_records_are_stored(
    ume: Ume, write_items: WriteItems, pictures: Path, tmp_path: Path, fake_model: ModuleType
) -> None:
    items = write_items(
        {"text": "first"},
        "",
        {"image": "media/red.png", "instruction": "look", "id": "r"},
        {"images": ["media/red.png", "media/blue.png"], "text": "two"},
        {"video": ["media/red.png", "media/green.png"], "id": 7},
    )
    result = ume("embed", items, "-o", tmp_path / "out", "--shard-size", 2, "--multi-image", "all")
    assert result.exit_code == 0, result.stderr
    store = EmbeddingStore.open(tmp_path / "out")
    shards = list(store.shards())
    records = [record for shard in shards for record in shard.records]
    assert [record.id for record in records] == ["1", "r", "4", "7"]
    assert records[2].images == ("media/red.png", "media/blue.png")
    assert records[3].video == ("media/red.png", "media/green.png")
    expected = [
        Item("first"),
        Item("", (pictures / "red.png",), None, "look"),
        Item("two", (pictures / "red.png", pictures / "blue.png")),
        Item("", (), (pictures / "red.png", pictures / "green.png")),
    ]
    found = torch.cat([shard.embeddings for shard in shards])
    assert torch.equal(found, torch.stack([fake_model.vector(item) for item in expected]))
    assert store.locate("media/red.png").samefile(pictures / "red.png")
    assert store.manifest.encoding["multi_image"] == "all"
    assert store.manifest.encoding["mode"] == "gen"
    assert "4 embeddings of 8 numbers in 2 shards" in result.stdout


def test_output_has_no_control_codes_without_a_terminal(
    ume: Ume, write_items: WriteItems, tmp_path: Path
) -> None:
    result = ume("embed", write_items({"text": "a"}), "-o", tmp_path / "out")
    assert "\x1b" not in result.output
    assert "\r" not in result.output
    assert "1 of 1 items" in result.stderr


def test_running_again_does_nothing_and_says_so(
    ume: Ume,
    write_items: WriteItems,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items = write_items({"text": "a"}, {"text": "b"})
    assert ume("embed", items, "-o", tmp_path / "out").exit_code == 0
    before = contents(tmp_path / "out")
    monkeypatch.setattr("ume_models.encode.encode_detailed", None)  # not even called
    result = ume("embed", items, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "2 of 2 items are done, nothing to do" in result.stderr
    assert "2 embeddings of 8 numbers in 1 shard:" in result.stdout
    assert contents(tmp_path / "out") == before


def test_other_settings_need_another_folder_or_overwrite(
    ume: Ume, write_items: WriteItems, tmp_path: Path
) -> None:
    items = write_items({"text": "a"})
    assert ume("embed", items, "-o", tmp_path / "out").exit_code == 0
    result = ume("embed", items, "-o", tmp_path / "out", "--latent-steps", 3)
    assert result.exit_code == 1
    assert "latent_steps: 8 in the store, 3 now" in result.stderr
    assert "--overwrite" in result.stderr
    items.write_text('{"text": "another"}\n')
    result = ume("embed", items, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "the items file has changed" in result.stderr
    result = ume("embed", items, "-o", tmp_path / "out", "--overwrite")
    assert result.exit_code == 0
    [shard] = EmbeddingStore.open(tmp_path / "out").shards()
    assert shard.records[0].text == "another"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "line 2: not valid JSON"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ({"txt": "a"}, "line 2: unknown field 'txt'; did you mean 'text'"),
        ({"image": "a.png", "images": ["b.png"]}, "line 2: has both 'image' and 'images'"),
        ({"video": []}, "line 2: 'video' is an empty list"),
        ({"text": ""}, "line 2: is empty"),
        ({"text": 3}, "line 2: 'text' must be a string"),
        ({"text": "again", "id": "first"}, "lines 1 and 2 have the same id 'first'"),
        ({"text": "again", "id": True}, "line 2: 'id' must be a string or an integer"),
        ({"image": "media/none.png"}, "line 2 (id '2'): image 'media/none.png' does not exist"),
        ({"image": "media/torn.png"}, "line 2 (id '2'): image 'media/torn.png' is truncated"),
    ],
)
def test_a_bad_item_stops_and_names_its_line(
    ume: Ume,
    write_items: WriteItems,
    pictures: Path,
    tmp_path: Path,
    line: object,
    message: str,
) -> None:
    items = write_items({"text": "a", "id": "first"}, line)
    result = ume("embed", items, "-o", tmp_path / "out")
    assert result.exit_code == 1
    message = message.replace("'media/", f"'{tmp_path}/media/")
    assert message in result.stderr
    assert str(items) in result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_bad_items_are_skipped_on_request_and_recorded(
    ume: Ume, write_items: WriteItems, pictures: Path, tmp_path: Path
) -> None:
    lines = [
        {"text": "good", "id": "g"},
        "{bad",
        {"image": "media/torn.png", "id": "torn"},
        {"image": "media/red.png"},
        {"txt": "?", "id": "unknown"},
    ]
    items = write_items(*lines)
    options = ("--on-error", "skip", "--shard-size", 2)
    result = ume("embed", items, "-o", tmp_path / "out", *options)
    assert result.exit_code == 3
    assert "3 items were skipped" in result.stderr
    assert "torn: " in result.stderr
    assert "is truncated" in result.stderr
    store = EmbeddingStore.open(tmp_path / "out")
    assert [record.id for shard in store.shards() for record in shard.records] == ["g", "4"]
    skipped = {entry.id: (entry.row, entry.reason) for entry in store.skipped()}
    assert {name: row for name, (row, _) in skipped.items()} == {"2": 1, "torn": 2, "unknown": 4}
    assert "not valid JSON" in skipped["2"][1]
    # A second run finds everything done and still says that items are missing.
    again = ume("embed", items, "-o", tmp_path / "out", *options)
    assert again.exit_code == 3
    assert "3 items were skipped (later runs leave them out too" in again.stderr
    assert "--overwrite" in again.stderr


def test_every_item_skipped_is_not_a_crash(
    ume: Ume, write_items: WriteItems, tmp_path: Path
) -> None:
    items = write_items({"image": "none.png"}, "?")
    out = tmp_path / "out"
    assert ume("embed", items, "-o", out, "--on-error", "skip").exit_code == 3
    result = ume("search", "--index", out, "--queries", write_items({"text": "q"}, name="q.jsonl"))
    assert result.exit_code == 1
    assert "holds no embeddings" in result.stderr


def test_finished_shards_survive_a_bad_item(
    ume: Ume, write_items: WriteItems, pictures: Path, tmp_path: Path
) -> None:
    lines = [{"text": "a"}, {"text": "b"}, {"image": "media/torn.png"}]
    result = ume("embed", write_items(*lines), "-o", tmp_path / "out", "--shard-size", 1)
    assert result.exit_code == 1
    assert len(list(tmp_path.glob("out/*.safetensors"))) == 2
    (pictures / "red.png").replace(pictures / "torn.png")
    result = ume("embed", write_items(*lines), "-o", tmp_path / "out", "--shard-size", 1)
    assert result.exit_code == 0
    assert "2 of 3 items are done" in result.stderr


def test_an_embedding_that_is_not_finite_is_refused(
    ume: Ume, write_items: WriteItems, tmp_path: Path
) -> None:
    items = write_items({"text": "a"}, {"text": "make it NaN", "id": "n"})
    result = ume("embed", items, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "'n' is not finite" in result.stderr
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_too_little_room_is_told_before_anything_is_embedded(
    ume: Ume, write_items: WriteItems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SimpleNamespace(total=10**9, free=0)
    monkeypatch.setattr("ume_models.disk_space.shutil.disk_usage", lambda folder: disk)
    items, out = write_items({"text": "a"}), tmp_path / "out"
    result = ume("embed", items, "-o", out)
    assert result.exit_code == 1
    assert "0.0 kB free: make room, or choose another folder with -o" in result.stderr
    assert not list(out.glob("*.safetensors"))
    disk.free = 10**9
    assert ume("embed", items, "-o", out).exit_code == 0
    disk.free = 0
    assert ume("embed", items, "-o", out).exit_code == 0  # nothing to write


def test_missing_and_empty_files(ume: Ume, write_items: WriteItems, tmp_path: Path) -> None:
    result = ume("embed", tmp_path / "no.jsonl", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert f"{tmp_path / 'no.jsonl'}: No such file or directory" in result.stderr
    result = ume("embed", write_items("", " "), "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "has no items" in result.stderr
    bad = tmp_path / "latin.jsonl"
    bad.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    result = ume("embed", bad, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "line 2: not valid JSON in UTF-8" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_and_windows_lines_are_fine(ume: Ume, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert ume("embed", items, "-o", tmp_path / "out").exit_code == 0
    [shard] = EmbeddingStore.open(tmp_path / "out").shards()
    assert [record.id for record in shard.records] == ["1", "3"]


@pytest.mark.parametrize(
    "error",
    [
        OptionError("dtype must be one of a, b"),
        MemoryError("dtype must be one of a, b"),
        RuntimeError("CUDA out of memory: dtype must be one of a, b\nallocator: …"),
    ],
)
def test_what_loading_refuses_is_one_line(
    ume: Ume,
    write_items: WriteItems,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ume_models.load", refuse)
    items = write_items({"text": "a"})
    for command in (("embed", items, "-o", tmp_path / "out"), ("demo", "--queries", 1)):
        result = ume(*command)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        [line] = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert "dtype must be one of a, b" in line


def test_a_defect_keeps_its_traceback(
    ume: Ume, write_items: WriteItems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("ume_models.encode.encode_detailed", broken)
    result = ume("embed", write_items({"text": "a"}), "-o", tmp_path / "out")
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_named(
    ume: Ume, write_items: WriteItems, tmp_path: Path, device: str
) -> None:
    result = ume("embed", write_items({"text": "a"}), "-o", tmp_path / "o", "--device", device)
    assert result.exit_code == 1
    assert repr(device) in result.stderr


def test_ctrl_c_tells_how_to_go_on(
    ume: Ume, write_items: WriteItems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    items = write_items({"text": "a"})
    with monkeypatch.context() as patched:
        patched.setattr("ume_models.encode.encode_detailed", interrupted)
        result = ume("embed", items, "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert "run the same command again" in result.stderr
    assert ume("embed", items, "-o", tmp_path / "out").exit_code == 0


def test_debug_shows_the_failure_itself(
    ume: Ume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UME_DEBUG", "1")
    result = ume("embed", tmp_path / "no.jsonl", "-o", tmp_path / "out")
    assert isinstance(result.exception, FileNotFoundError)


@pytest.mark.parametrize(
    "arguments",
    [
        ["embed"],
        ["embed", "items.jsonl"],
        ["embed", "items.jsonl", "-o", "out", "--mode", "other"],
        ["embed", "items.jsonl", "-o", "out", "--shard-size", "0"],
        ["unknown"],
        ["search", "--index", "x"],
    ],
)
def test_wrong_usage_ends_with_2(ume: Ume, arguments: list[str]) -> None:
    result = ume(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_options_of_another_family_are_an_error_of_one_line(
    ume: Ume, write_items: WriteItems, tmp_path: Path
) -> None:
    chosen = ("--family", "vlm2vec", "--latent-steps", 3)
    result = ume("embed", write_items({"text": "a"}), "-o", tmp_path / "out", *chosen)
    assert result.exit_code == 1
    assert "latent_steps" in result.stderr
    assert "Traceback" not in result.output


def test_the_manifest_is_plain_json(ume: Ume, write_items: WriteItems, tmp_path: Path) -> None:
    ume("embed", write_items({"text": "a"}), "-o", tmp_path / "out", "--context", "none")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["model"] == "bundled"
    assert manifest["encoding"]["context"] == "none"
    assert manifest["encoding"]["embedder"] == "plume"
    assert manifest["encoding"]["profile"] == "official"
    assert manifest["num_items"] == 1
