from __future__ import annotations

from pathlib import Path

import pytest

from ume_models.errors import UmeError
from ume_models.processing import read_items


def test_reads_objects_and_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "\xc3\xa9"}')
    assert read_items(path) == [{"text": "a"}, {"text": "é"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{bad", "line 3: not valid JSON"),
        (b'["text"]', "line 3: expected a JSON object .* got list"),
        (b'{"text": "\xff"}', "line 3: not UTF-8"),
        (b"[" * 100_000, "line 3: not valid JSON"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(UmeError, match=message) as error:
        read_items(path)
    assert str(path) in str(error.value)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UmeError, match="cannot be read: No such file"):
        read_items(tmp_path / "absent.jsonl")
