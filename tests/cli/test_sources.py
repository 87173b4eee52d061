"""Items and queries that are no files of JSON Lines: pipes, folders, one on the command line."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ume_models.cli import app
from ume_models.store import EmbeddingStore

Ume = Callable[..., Any]
WriteItems = Callable[..., Path]
# An escape sequence, one of the eighth bit, and text turned around, as JSON has them.
HOSTILE = {"id": "x\u001b[31mRED", "text": "\u001b]52;c;aGk=\u0007 \u009b2J \u202ehi [b]"}
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def stored(folder: Path) -> dict[str, bytes]:
    """Everything but where media are looked for."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["media_folders"]
    return {**files, "manifest.json": json.dumps(manifest).encode()}


def test_a_pipe_is_embedded_like_a_file(ume: Ume, write_items: WriteItems, tmp_path: Path) -> None:
    items = write_items(*({"text": f"text {n}"} for n in range(5)))
    size = ("--shard-size", 2)
    assert ume("embed", items, "-o", tmp_path / "file", *size).exit_code == 0
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(items.read_bytes()))
    writer.start()
    assert ume("embed", fifo, "-o", tmp_path / "pipe", *size).exit_code == 0
    writer.join()
    for name in ("-", "/dev/stdin"):
        command = ["embed", name, "-o", str(tmp_path / "stdin"), *map(str, size)]
        result = CliRunner().invoke(app, command, input=items.read_text())
        assert result.exit_code == 0, result.output
    assert stored(tmp_path / "file") == stored(tmp_path / "pipe") == stored(tmp_path / "stdin")
    bad = CliRunner().invoke(app, ["embed", "-", "-o", str(tmp_path / "bad")], input="{}\n?\n")
    assert bad.exit_code == 1
    assert len(bad.stderr.splitlines()) == 1 and "line 1" in bad.stderr
    assert not (tmp_path / "bad").exists()


def test_a_folder_of_pictures_and_texts(
    ume: Ume, write_items: WriteItems, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "torn.png").unlink()
    notes = pictures / "notes" / "b.md"
    notes.parent.mkdir()
    notes.write_text("a note", encoding="utf-8-sig")
    for name in ("page.pdf", "clip.mp4", ".hidden.png", "notes/list.csv", "gone\x1b[1m"):
        (pictures / name).write_bytes(b"?")
    (pictures / "latin.txt").write_bytes(b"\xe9")
    out = pictures / "index"
    for _ in range(2):  # the second time, the index is in the folder
        result = ume("embed", pictures, "-o", out)
        assert result.exit_code == 0, result.output
        for name in ("page.pdf", "clip.mp4", "notes/list.csv", "latin.txt", "gone\\u001b[1m"):
            assert name in result.stderr
        assert "manifest.json" not in result.stderr and "hidden" not in result.stderr
    assert "nothing to do" in result.stderr
    same = [
        {"id": f"{name}.png", "image": f"media/{name}.png"} for name in ("blue", "green", "red")
    ]
    lines = [*same, {"id": "notes/b.md", "text": "a note"}]
    assert ume("embed", write_items(*lines), "-o", tmp_path / "file").exit_code == 0
    [mine], [theirs] = (list(EmbeddingStore.open(f).shards()) for f in (out, tmp_path / "file"))
    assert [record.id for record in mine.records] == [record.id for record in theirs.records]
    assert mine.embeddings.equal(theirs.embeddings)
    assert EmbeddingStore.open(out).locate("red.png").samefile(pictures / "red.png")


def test_a_bad_file_of_a_folder_is_named(ume: Ume, pictures: Path, tmp_path: Path) -> None:
    stopped = ume("embed", pictures, "-o", tmp_path / "a")
    assert stopped.exit_code == 1 and f"{pictures}, torn.png: " in stopped.stderr
    skipped = ume("embed", pictures, "-o", tmp_path / "b", "--on-error", "skip")
    assert skipped.exit_code == 3 and "torn.png" in skipped.stderr
    (tmp_path / "empty").mkdir()
    assert ume("embed", "", "-o", tmp_path / "c").exit_code == 1  # not the current folder
    nothing = ume("embed", tmp_path / "empty", "-o", tmp_path / "c")
    assert nothing.exit_code == 1 and "no items" in nothing.stderr


@pytest.mark.parametrize(
    ("name", "remedy"), [("a.pdf", "page"), ("a.MP4", "frames"), ("a.png", "folder")]
)
def test_other_files_are_refused_with_a_remedy(
    ume: Ume, tmp_path: Path, name: str, remedy: str
) -> None:
    (tmp_path / name).write_bytes(b"\x89")
    result = ume("embed", tmp_path / name, "-o", tmp_path / "out")
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert remedy in line and "JSON in UTF-8" not in line


def test_one_query_is_answered_like_that_of_a_file(
    ume: Ume,
    write_items: WriteItems,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [{"text": f"text {n}"} for n in range(4)]
    lines += [{"image": f"media/{name}.png", "id": name} for name in ("red", "blue")]
    assert ume("embed", write_items(*lines), "-o", "index").exit_code == 0
    search = ("search", "--index", "index", "--json", "-")
    for arguments, query in (
        (["text 2"], {"text": "text 2"}),
        (["--image", "media/blue.png"], {"image": "media/blue.png"}),
        (["text 2", "--image", "media/red.png"], {"text": "text 2", "image": "media/red.png"}),
    ):
        single = ume(*search, *arguments)
        assert single.exit_code == 0, single.output
        several = ume(*search, "--queries", write_items(query, name="q.jsonl"))
        [one], [other] = json.loads(single.stdout), json.loads(several.stdout)
        assert one["results"] == other["results"]
    assert json.loads(ume(*search, "text 2").stdout)[0]["results"][0]["id"] == "3"
    for wrong in ([], ["x", "--queries", "q.jsonl"], ["--image", ""]):
        assert ume(*search, *wrong).exit_code == 2


def test_the_bundled_model_is_told_to_be_small(
    ume: Ume, write_items: WriteItems, tmp_path: Path
) -> None:
    items, page = write_items({"text": "a"}), tmp_path / "page.html"
    made = ume("embed", items, "-o", tmp_path / "a")
    found = ume("search", "--index", tmp_path / "a", "a", "--html", page)
    for told in (made.stderr, found.stderr, page.read_text()):
        assert told.count("small demonstration model") == 1
        assert "--model" in told
    other = ume("embed", items, "-o", tmp_path / "b", "--model", "mine")
    assert "small" not in other.stderr
    ume("search", "--index", tmp_path / "b", "a", "--html", page)
    assert "small demonstration" not in page.read_text()


def test_control_sequences_of_a_corpus_reach_no_terminal(
    ume: Ume, write_items: WriteItems, tmp_path: Path
) -> None:
    items, broken = write_items(HOSTILE), {**HOSTILE, "id": "y\u001b[2J", "image": "\u001b[1m.png"}
    outputs = [ume("embed", items, "-o", tmp_path / "a")]
    search = ("search", "--index", tmp_path / "a", "--queries", items)
    outputs += [ume(*search), ume(*search, "--json", "-")]
    bad = write_items(broken, HOSTILE, name="bad\u001b[3m.jsonl")
    outputs += [ume("embed", bad, "-o", tmp_path / "b")]
    outputs += [ume("embed", bad, "-o", tmp_path / "b", "--on-error", "skip")]
    assert [result.exit_code for result in outputs] == [0, 0, 0, 1, 3]
    for result in outputs:
        assert not CONTROL.search(result.stdout) and not CONTROL.search(result.stderr)
    assert "x\\u001b[31mRED" in outputs[1].stdout and "[b]" in outputs[1].stdout
    [answer] = json.loads(outputs[2].stdout)
    assert {name: answer["results"][0][name] for name in HOSTILE} == HOSTILE
