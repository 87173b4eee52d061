"""Visual documents: judgements, the order of pages, and pages read one at a time."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ume_models.errors import DataError

QUERY = "Find a document image that matches the given query:"
PAGE = "Understand the content of the provided document image."


def picture(colour: str, form: str = "PNG") -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(held, format=form, quality=30)
    return held.getvalue()


def beir(
    root: Any,
    folder: str,
    *,
    split: str = "test",
    queries: Sequence[tuple[Any, str]] = ((7, "who?"), (3, "why?")),
    judgements: Sequence[tuple[Any, Any, Any]] = ((3, 12, 1), (7, 11, 0), (7, 12, 2), (7, 10, 1)),
    pages: Sequence[Any] = (10, 11, 12),
) -> None:
    rows: Mapping[str, list[dict[str, Any]]] = {
        "queries": [{"query-id": id, "query": text} for id, text in queries],
        "qrels": [{"query-id": q, "corpus-id": c, "score": s} for q, c, s in judgements],
        "corpus": [{"corpus-id": id} for id in pages],
    }
    for config, cells in rows.items():
        root.table(f"visdoc-tasks/{folder}/{config}/{split}.jsonl", cells)


def test_judgements_and_order(root: Any) -> None:
    beir(root, "tatdqa_test_beir")
    root.files("visdoc-tasks/ViDoRe_tatdqa", "10.png", "11.png", "12.png")
    data = root.read("ViDoRe_tatdqa", instructions="vlm2vec")
    first, second = data.queries
    assert (first.item.text, first.item.id) == (f"{QUERY} who?", "7")
    # Grades of zero are no answers; names are strings, labels what the table has.
    assert first.relevant == ("12", "10") and first.labels == (12, 10) and first.grades == (2, 1)
    assert second.relevant == ("12",) and second.item.images == ()
    # Pages as the queries name them, then the rest of the collection.
    assert list(data.candidates.names) == ["12", "10", "11"]
    page = data.candidates.item(0)
    assert (page.text, page.id) == (PAGE, "12")
    assert page.images == (root.path / "visdoc-tasks/ViDoRe_tatdqa/12.png",)
    assert len(data.files) == 3


def test_plume_has_no_instructions_for_vidore(root: Any) -> None:
    beir(root, "tatdqa_test_beir")
    data = root.read("ViDoRe_tatdqa")
    assert data.queries[0].item.text == " who?"
    assert data.candidates.item(0).text == ""
    beir(root, "VisRAG-Ret-Test-ChartQA", split="train")
    data = root.read("VisRAG_ChartQA")
    assert data.queries[0].item.text == f"{QUERY} who?"


def test_both_versions_of_labels(root: Any) -> None:
    beir(root, "ViDoSeek-page-fixed", judgements=((7, 10, 1), (3, 11, 1)))
    beir(root, "ViDoSeek-page", judgements=((7, 11, 1), (3, 10, 1)))
    answers = {
        labels: [query.relevant for query in root.read("ViDoSeek-page", labels=labels).queries]
        for labels in ("fixed", "legacy")
    }
    assert answers == {"fixed": [("10",), ("11",)], "legacy": [("11",), ("10",)]}


def test_repeated_judgements_keep_the_higher_grade(root: Any) -> None:
    beir(
        root,
        "esg_reports_v2",
        judgements=((7, 10, 1), (7, 11, 1), (7, 10, 3), (7, 10, 2), (3, 10, 1)),
    )
    query = root.read("ViDoRe_esg_reports_v2_multilingual").queries[0]
    assert (query.relevant, query.grades) == (("10", "11"), (3.0, 1.0))


def test_repeated_ids(root: Any) -> None:
    beir(root, "tatdqa_test_beir", queries=((7, "a"), (7, "b"), (3, "c")), pages=(10, 11, 12, 10))
    data = root.read("ViDoRe_tatdqa")
    assert [query.item.id for query in data.queries] == ["7", "7#2", "3"]
    assert list(data.candidates.clashes) == ["10"]


def test_a_limit_leaves_the_order_of_pages(root: Any) -> None:
    judgements = ((7, 10, 1), (3, 12, 1))
    beir(root, "tatdqa_test_beir", judgements=judgements)
    data = root.read("ViDoRe_tatdqa", limit=1)
    assert len(data.queries) == 1
    assert list(data.candidates.names) == ["10", "12", "11"]


def test_pages_that_are_nowhere_are_named_when_embedded(root: Any) -> None:
    beir(root, "tatdqa_test_beir")
    missing = root.path / "visdoc-tasks/ViDoRe_tatdqa/12.png"
    assert root.read("ViDoRe_tatdqa").candidates.item(0).images == (missing,)


def test_long_names_of_files_are_shortened(root: Any) -> None:
    name = "a" * 60 + ".v1.jpg"
    short = "a" * 50 + "_" + hashlib.md5(name.encode()).hexdigest()[:8] + ".jpg"
    beir(
        root, "VisRAG-Ret-Test-SlideVQA", split="train", queries=(("q", "?"),),
        judgements=(("q", name, 1),), pages=("b.png", name),
    )  # fmt: skip
    root.files("visdoc-tasks/visdoc-tasks/VisRAG_SlideVQA", short)
    data = root.read("VisRAG_SlideVQA")
    assert list(data.candidates.names) == [name, "b.png"]
    expected = root.path / "visdoc-tasks/visdoc-tasks/VisRAG_SlideVQA" / short
    assert data.candidates.item(0).images == (expected,)


def test_what_has_no_answer_is_named(root: Any) -> None:
    beir(root, "tatdqa_test_beir", judgements=((7, 10, 0), (9, 10, 1)))
    with pytest.raises(DataError, match=r"qrels.*has no answer for 2 names \('7', '3'\)"):
        root.read("ViDoRe_tatdqa")
    beir(root, "tatdqa_test_beir", judgements=((7, 99, 1), (3, 10, 1)))
    with pytest.raises(DataError, match=r"names 1 names \('99'\), which .*corpus.* does not have"):
        root.read("ViDoRe_tatdqa")
    beir(root, "arxivqa_test_subsampled_beir", judgements=((7, 10, None),))
    with pytest.raises(DataError, match="row 0: the score None is not a number"):
        root.read("ViDoRe_arxivqa")
    root.files("visdoc-tasks/ViDoRe_tatdqa", "99.png")  # then it need not be in the table
    assert root.read("ViDoRe_tatdqa").queries[0].relevant == ("99",)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"queries": ((7, "who?"), (3, None))}, "queries.*row 1: column 'query' is empty"),
        ({"queries": ((None, "who?"),)}, "queries.*row 0: column 'query-id' is empty"),
        ({"queries": ((7, "\ud800"),)}, "queries.*row 0: column 'query' holds half a character"),
        ({"pages": (10, None)}, "corpus.*row 1: column 'corpus-id' is empty"),
        ({"pages": ("a\0b",)}, "corpus.*row 0: column 'corpus-id' holds a NUL"),
        ({"judgements": ((7, None, 1),)}, "qrels.*row 0: column 'corpus-id' is empty"),
        ({"judgements": ((7, 10, float("inf")),)}, "qrels.*row 0: the score inf is not a number"),
        ({"judgements": ((7, 10, float("nan")),)}, "qrels.*row 0: the score nan is not a number"),
        ({"judgements": ((7, 10, -1),)}, "qrels.*row 0: the score -1 is not a number from 0 to"),
        ({"judgements": ((7, 10, True),)}, "qrels.*row 0: the score True is not a number from 0"),
        ({"judgements": ((7, 10, 5000),)}, "qrels.*row 0: the score 5000 is not a number from 0"),
    ],
)
def test_cells_that_cannot_be_what_they_stand_for(
    root: Any, cells: dict[str, Any], message: str
) -> None:
    beir(root, "tatdqa_test_beir", **cells)
    with pytest.raises(DataError, match=f"^ViDoRe_tatdqa: .*{message}.*get the table again$"):
        root.read("ViDoRe_tatdqa")


def test_names_too_long_for_the_disk_are_read_from_the_table(root: Any) -> None:
    name = "a" * 300
    beir(root, "tatdqa_test_beir", queries=((7, "?"),), judgements=((7, name, 1),), pages=(name,))
    page = root.path / f"visdoc-tasks/ViDoRe_tatdqa/{name}.png"
    assert root.read("ViDoRe_tatdqa").candidates.item(0).images == (page,)


def test_a_missing_collection_is_named(root: Any) -> None:
    beir(root, "tatdqa_test_beir")
    (root.path / "visdoc-tasks/tatdqa_test_beir/corpus/test.jsonl").unlink()
    with pytest.raises(DataError, match="configuration 'corpus', split 'test'"):
        root.read("ViDoRe_tatdqa")


@pytest.fixture
def stored(root: Any) -> Any:
    """Collections whose pages are in the tables."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    def write(folder: str, split: str, names: Sequence[Any], pages: Sequence[bytes]) -> None:
        beir(root, folder, split=split, queries=(("q", "?"),), judgements=(("q", names[2], 1),))
        corpus = root.path / "visdoc-tasks" / folder / "corpus"
        (corpus / f"{split}.jsonl").unlink()
        cells = [{"bytes": page, "path": None} for page in pages]
        for shard in range(2):  # two files of two row groups each
            part = slice(4 * shard, 4 * shard + 4)
            table = pa.table({"corpus-id": list(names[part]), "image": cells[part]})
            path = corpus / f"{split}-{shard:05d}-of-00002.parquet"
            pq.write_table(table, path, row_group_size=2)

    return write


def test_pages_in_tables_are_read_when_asked_for(
    root: Any, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ume_models.mmeb.arrow_tables import ParquetTable

    pages = [picture(f"#{n}{n}0000") for n in range(8)]
    stored("tatdqa_test_beir", "test", list(range(8)), pages)
    cells: list[int] = []
    original = ParquetTable.cell
    monkeypatch.setattr(
        ParquetTable, "cell", lambda self, row, name: cells.append(row) or original(self, row, name)
    )
    data = root.read("ViDoRe_tatdqa")
    assert list(data.candidates.names) == list("20134567") and not cells
    assert data.candidates.item(0).images == (pages[2],)
    assert data.candidates.item(7).images == (pages[7],)
    assert cells == [2, 7]
    # A page that has been extracted is taken from its file.
    extracted = root.files("visdoc-tasks/ViDoRe_tatdqa", "2.png") / "2.png"
    assert root.read("ViDoRe_tatdqa").candidates.item(0).images == (extracted,)


def test_pages_extracted_from_the_other_version_do_not_count(root: Any, stored: Any) -> None:
    pages = {version: [picture(colour)] * 8 for version, colour in
             (("ViDoSeek-page-fixed", "red"), ("ViDoSeek-page", "blue"))}  # fmt: skip
    for version, cells in pages.items():
        stored(version, "test", list(range(8)), cells)
    root.files("visdoc-tasks/ViDoSeek-page", "2.png")
    for labels, cells in zip(("fixed", "legacy"), pages.values(), strict=True):
        read = root.read("ViDoSeek-page", labels=labels)
        assert read.candidates.item(0).images == (cells[0],)
    # where the table has no pages, the extracted ones must do
    beir(root, "MMLongBench-page-fixed", pages=(10, 11, 12))
    extracted = root.files("visdoc-tasks/MMLongBench-page", "12.png") / "12.png"
    assert root.read("MMLongBench-page").candidates.item(0).images == (extracted,)


def test_pages_named_jpg_are_compressed_anew(root: Any, stored: Any, tmp_path: Path) -> None:
    """The official evaluation writes pages to files of their names with Pillow's defaults."""
    pages = [picture("red", "JPEG"), picture("blue"), picture("green")] * 3
    names = [f"{n}.jpg" for n in range(6)] + ["6.png", "7.jpeg"]
    pages[5] = b"no picture"
    stored("VisRAG-Ret-Test-ChartQA", "train", names, pages[:8])
    data = root.read("VisRAG_ChartQA")
    read = {name: data.candidates.item(place).images[0]
            for place, name in enumerate(data.candidates.names)}  # fmt: skip
    with Image.open(io.BytesIO(pages[0])) as page:
        page.save(tmp_path / "official.jpg")
    assert read["0.jpg"] == (tmp_path / "official.jpg").read_bytes() != pages[0]
    assert read["5.jpg"] == b"no picture"  # embedding says so
    assert read["6.png"] == pages[6]
    assert read["7.jpeg"][:2] == b"\xff\xd8"
