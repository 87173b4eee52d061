"""Tables of every kind hold the same rows; large ones give up single cells."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ume_models.errors import DataError
from ume_models.mmeb.tables import open_table, picture

ROWS = [{"id": n, "text": f"line \u2028 {n}", "image": {"bytes": b"%d" % n * 50, "path": None},
         "answers": [f"a{n}", "b"]} for n in range(100)]  # fmt: skip


def parquet(path: Path, rows: list[dict], group: int = 17) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def arrow(path: Path, rows: list[dict]) -> Path:
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def lines(path: Path, rows: list[dict]) -> Path:
    texts = [json.dumps({k: v for k, v in row.items() if k != "image"}, ensure_ascii=False)
             for row in rows]  # fmt: skip
    path.write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    return path


def array(path: Path, rows: list[dict]) -> Path:
    texts = [{k: v for k, v in row.items() if k != "image"} for row in rows]
    path.write_text(json.dumps(texts, indent=1), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("write", "suffix"),
    [(parquet, "parquet"), (arrow, "arrow"), (lines, "jsonl"), (array, "json")],
)
def test_every_kind_has_the_same_rows(
    tmp_path: Path, write: Callable[[Path, list[dict]], Path], suffix: str
) -> None:
    files = [write(tmp_path / f"{n}.{suffix}", ROWS[50 * n : 50 * n + 50]) for n in range(2)]
    table = open_table(files)
    assert len(table) == 100 and [*table.files] == files
    expected = [{"answers": row["answers"], "id": row["id"], "text": row["text"]} for row in ROWS]
    assert list(table.rows("answers", "id", "text")) == expected
    assert [table.cell(row, "text") for row in (99, 0, 50)] == [
        ROWS[n]["text"] for n in (99, 0, 50)
    ]
    with pytest.raises(IndexError):
        table.cell(100, "text")
    with pytest.raises(DataError, match=r"has no column 'query' \(it has 'id'"):
        table.rows("id", "query")


@pytest.mark.parametrize("cache", [1, 300, 2**20])
def test_cells_in_any_order_with_little_memory(tmp_path: Path, cache: int) -> None:
    pytest.importorskip("pyarrow")
    from ume_models.mmeb.arrow_tables import ParquetTable

    files = [parquet(tmp_path / f"{n}.parquet", ROWS[50 * n : 50 * n + 50], 40) for n in range(2)]
    table = ParquetTable(files, cache_bytes=cache)
    order = [*range(100), *random.Random(0).sample(range(100), 100), *range(99, -1, -1)]
    assert all(table.cell(row, "image") == ROWS[row]["image"] for row in order)
    assert table._cached <= max(cache, max(part.nbytes for part in table._cache.values()))
    assert len(table._firsts) == sum(map(len, table._cache.values()))


def test_consecutive_cells_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    table = open_table([parquet(tmp_path / "a.parquet", ROWS, 50)])
    opened: list[Path] = []
    original = pq.ParquetFile
    monkeypatch.setattr(
        pq, "ParquetFile", lambda path, **k: opened.append(path) or original(path, **k)
    )
    for row in range(100):
        table.cell(row, "image")
    assert len(opened) == 2  # once for each row group


def test_cached_cells_are_found_without_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    table: Any = open_table([parquet(tmp_path / "a.parquet", ROWS, 10)])
    for row in range(100):
        table.cell(row, "text")
    runs = len(table._cache)

    class Unsearched(type(table._cache)):  # type: ignore[misc]
        def items(self) -> Any:
            raise AssertionError("all runs were looked at")

        __iter__ = items

    table._cache = Unsearched(table._cache.copy())
    assert [table.cell(row, "text") for row in range(100)] == [row["text"] for row in ROWS]
    assert len(table._cache) == runs == 10 and len(table._firsts) == 100


def test_cells_from_several_threads(tmp_path: Path) -> None:
    table = open_table([parquet(tmp_path / "a.parquet", ROWS)])
    order = random.Random(1).sample(range(100), 100)
    with ThreadPoolExecutor(4) as pool:
        cells = list(pool.map(lambda row: table.cell(row, "image"), order))
    assert cells == [ROWS[row]["image"] for row in order]


def test_columns_that_only_some_files_have(tmp_path: Path) -> None:
    one = parquet(tmp_path / "a.parquet", [{"id": 1}])
    two = parquet(tmp_path / "b.parquet", [{"id": 2, "text": "x"}])
    table = open_table([one, two])
    assert list(table.rows("id", "text")) == [{"id": 1, "text": None}, {"id": 2, "text": "x"}]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('video,answer,a0\r\n007,2,"one\ntwo, three"\r\n12,0,\r\n', encoding="utf-8")
    names = tmp_path / "names.csv"
    names.write_text("id\n1_1\n11\n")
    assert [row["id"] for row in open_table([names]).rows("id")] == ["1_1", "11"]
    rows: list[dict[str, Any]] = list(open_table([path]).rows("answer", "a0", "video"))
    assert rows == [
        {"answer": 2, "a0": "one\ntwo, three", "video": 7},
        {"answer": 0, "a0": "", "video": 12},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl, line 2, is not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl is not JSON"),
        ("a.jsonl", b'{"a":' * 100_000, "a.jsonl, line 1, is not JSON"),
        ("a.jsonl", b"3\n", "row 1 is not an object"),
        ("a.json", b"[1", "a.json is not JSON"),
        ("a.jsonl", b"\xff\xfe{", "a.jsonl cannot be read"),
        ("a.csv", b'a,b\n"x', "a.csv, line 1, is not CSV"),
        ("a.parquet", b"PAR1 cut off", "a.parquet cannot be read"),
        ("a.arrow", b"nothing", "a.arrow cannot be read"),
        ("a.txt", b"", "a.txt is not a parquet, arrow"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith((".parquet", ".arrow")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_table([tmp_path / name])


def test_a_file_that_is_cut_off_later_is_named_too(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ROWS)
    table = open_table([path])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        table.cell(3, "image")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        list(table.rows("id"))


def test_without_pyarrow_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow.*pip install pyarrow"):
        open_table([tmp_path / "a.parquet"])


def test_pictures_in_cells(tmp_path: Path) -> None:
    assert picture({"bytes": b"x", "path": "a.png"}, tmp_path) == b"x"
    assert picture({"bytes": None, "path": "a.png"}, tmp_path) == tmp_path / "a.png"
    assert picture("b/a.png", tmp_path) == tmp_path / "b/a.png"
    assert picture(b"x", tmp_path) == b"x"
    assert picture(None, tmp_path) is picture({"bytes": None, "path": None}, tmp_path) is None
