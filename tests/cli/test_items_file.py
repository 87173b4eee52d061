"""The items file: what is read twice must be the same, and no problem is passed over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ume_models.encode
from ume_models.cli.encoding import embed_rows
from ume_models.cli.items_file import ItemsFile
from ume_models.errors import UmeError

WriteItems = Callable[..., Path]
Ume = Callable[..., Any]

LINES = ['{"text": "aa", "id": "1"}', '{"text": "bb", "id": "2"}', '{"text": "cc", "id": "3"}']


def edited(lines: list[str]) -> list[str]:
    return [*lines[:2], lines[2].replace("cc", "dd")]


def inserted(lines: list[str]) -> list[str]:
    return [lines[0], '{"text": "new", "id": "4"}', *lines[1:]]


def cut(lines: list[str]) -> list[str]:
    return lines[:1]


def reversed_lines(lines: list[str]) -> list[str]:
    return lines[::-1]


@pytest.mark.parametrize("change", [edited, inserted, cut, reversed_lines])
def test_a_change_between_two_shards_is_refused(
    tmp_path: Path, write_items: WriteItems, ume: Ume, change: Callable[[list[str]], list[str]]
) -> None:
    original_encoder = ume_models.encode.encode_detailed
    path = write_items(*LINES)
    out = tmp_path / "out"
    changed = False

    def encode_then_change(*arguments: Any, **options: Any) -> Any:
        nonlocal changed
        output = original_encoder(*arguments, **options)
        if not changed:
            write_items(*change(LINES))
            changed = True
        return output

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ume_models.encode.encode_detailed", encode_then_change)
        # Two items are in the first shard; the last line is at fault after any of the changes.
        result = ume("embed", path, "-o", out, "--shard-size", 2)
    assert result.exit_code == 1
    assert f"{path} changed while it was being embedded (line 3)" in result.stderr
    assert "restore it or start again with --overwrite" in result.stderr
    assert (out / "shard-00000-of-00002.safetensors").is_file()
    assert not list(out.glob("shard-00001-*"))
    # Restored, the run goes on.
    write_items(*LINES)
    assert ume("embed", path, "-o", out, "--shard-size", 2).exit_code == 0


def test_every_line_is_read_again_as_it_was(write_items: WriteItems) -> None:
    items = ItemsFile(write_items(LINES[0], "", *LINES[1:]))
    found = items.read(range(3))
    assert [(entry.row, entry.record.id, entry.record.text) for entry in found] == [
        (0, "1", "aa"),
        (1, "2", "bb"),
        (2, "3", "cc"),
    ]


def test_stop_never_skips(write_items: WriteItems, ume: Ume, fake_model: ModuleType) -> None:
    path = write_items(LINES[0], "{bad", {"image": "none.png", "id": "x"})
    items = ItemsFile(path, "skip")
    options: dict[str, Any] = {"batch_tokens": None, "workers": 0}
    model = fake_model.load()
    shard = embed_rows(model, items, range(3), on_error="skip", **options)
    assert [entry.row for entry in shard.skipped] == [1, 2]
    with pytest.raises(UmeError, match=r"line 2.*not valid JSON"):
        embed_rows(model, items, range(2), on_error="stop", **options)
    with pytest.raises(UmeError, match=r"line 3.*none\.png"):
        embed_rows(model, items, [0, 2], on_error="stop", **options)
