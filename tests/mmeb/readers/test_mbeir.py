"""M-BEIR: files in its published layout, written by hand, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ume_models.errors import DataError
from ume_models.mmeb.dataset import ReadOptions, TaskData
from ume_models.mmeb.mbeir import MBEIR
from ume_models.mmeb.readers import read_task

HEADER = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3"
TASKS = {task.name: task for task in MBEIR}


def query(number: int, text: Any, path: Any = None) -> dict[str, Any]:
    return {
        "qid": f"8:{number}", "query_txt": text, "query_img_path": path,
        "query_modality": "image,text" if path else "text", "query_src_content": None,
        "pos_cand_list": ["8:11"], "neg_cand_list": [],
    }  # fmt: skip


def candidate(did: str, text: Any, path: Any = None) -> dict[str, Any]:
    return {"did": did, "txt": text, "img_path": path,
            "modality": "image" if path else "text", "src_content": None}  # fmt: skip


def write(
    root: Path,
    name: str = "cirr_task7",
    *,
    queries: Sequence[Mapping[str, Any]] = (query(1, "in blue", "mbeir_images/q.jpg"),),
    pool: Sequence[Mapping[str, Any]] = (candidate("8:11", None, "mbeir_images/c.jpg"),),
    qrels: Sequence[str] = ("8:1 0 8:11 1 7",),
    instructions: Sequence[str] = ("image,text\timage\tCIRR\t8\tFind it.\tFind another.\t",),
    pool_name: str = "",
) -> Path:
    files = {
        f"query/test/mbeir_{name}_test.jsonl": [json.dumps(row) for row in queries],
        f"cand_pool/local/mbeir_{pool_name or name}_cand_pool.jsonl": [
            json.dumps(row) for row in pool
        ],
        f"qrels/test/mbeir_{name}_test_qrels.txt": qrels,
        "instructions/query_instructions.tsv": [HEADER, *instructions],
    }
    for path, lines in files.items():
        target = root / "M-BEIR" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return root


def read(root: Path, name: str = "cirr_task7", **options: Any) -> TaskData:
    return read_task(TASKS[name], root, ReadOptions(**options))


def test_the_tasks_are_those_of_the_benchmark() -> None:
    assert len(TASKS) == 16
    assert {task.ranking for task in MBEIR} == {"global"}
    ten = {name for name, task in TASKS.items() if task.metric == "hit@10"}
    assert ten == {"fashion200k_task0", "fashion200k_task3", "fashioniq_task7"}
    assert {task.metric for task in MBEIR} == {"hit@5", "hit@10"}
    assert [task.name for task in MBEIR if task.group == "IT2I"] == [
        "fashioniq_task7",
        "cirr_task7",
    ]


def test_composed_queries_and_pictures(tmp_path: Path) -> None:
    write(
        tmp_path,
        queries=[
            query(1, "is in blue", "mbeir_images/a.jpg"),
            query(2, ' "more of them!"\r', "mbeir_images/b.jpg"),
            query(3, "", None),
        ],
        pool=[
            candidate("8:12", "a dog", None),
            candidate("8:11", None, "mbeir_images/c.jpg"),
            candidate("8:10", '"is it?"', "mbeir_images/d.jpg"),
        ],
        qrels=["8:2 0 8:10 1 7", "8:1 0 8:11 1 7", "8:1 0 8:12 0 7", "8:1 0 8:10 1 7",
               "8:1 0 8:10 1 7", "8:3 0 8:12 1 7"],
    )  # fmt: skip
    data = read(tmp_path)
    folder = tmp_path / "M-BEIR"
    assert [q.item.text for q in data.queries] == [
        "Find it. is in blue.",
        'Find it.  "more of them!',  # quotes are taken off the ends of the whole
        "Find it.",
    ]
    assert [q.item.images for q in data.queries] == [
        (folder / "mbeir_images/a.jpg",), (folder / "mbeir_images/b.jpg",), ()
    ]  # fmt: skip
    assert [q.item.id for q in data.queries] == ["8:1", "8:2", "8:3"]
    assert [q.relevant for q in data.queries] == [("8:11", "8:10"), ("8:10",), ("8:12",)]
    assert all(q.grades is None and q.candidates == () for q in data.queries)
    # in the order of the collection
    assert list(data.candidates.names) == ["8:12", "8:11", "8:10"]
    found = [data.candidates.item(position) for position in range(3)]
    assert [item.text for item in found] == ["A dog.", "", "Is it?"]
    assert found[1].images == (folder / "mbeir_images/c.jpg",)
    assert [item.id for item in found] == ["8:12", "8:11", "8:10"]
    assert len(data.files) == 4 and all(path.is_file() for path in data.files)


def test_the_instruction_belongs_to_data_set_and_modalities(tmp_path: Path) -> None:
    write(
        tmp_path,
        "oven_task8",
        queries=[{**query(1, "who?", None), "qid": "5:1"}],
        qrels=["5:1 0 8:11 1 8"],
        instructions=[
            "image,text\ttext\tOVEN\t5\tNot this.",
            "image,text\timage,text\tINFOSEEK\t6\tNor this.",
            "image,text\timage,text\tOVEN\t5\t\tThis one.",
        ],
    )
    assert read(tmp_path, "oven_task8").queries[0].item.text == "This one. who?"


def test_answers_of_other_collections_do_not_count_unless_there_are_no_others(
    tmp_path: Path,
) -> None:
    write(
        tmp_path,
        queries=[query(1, "a"), query(2, "b")],
        pool=[candidate("8:10", "x"), candidate("8:11", "y")],
        qrels=["8:1 0 6:9 1 7", "8:1 0 8:11 1 7", "8:2 0 6:9 1 7"],
        instructions=["image,text\timage\tCIRR\t8\tFind it"],
    )
    data = read(tmp_path)
    assert [one.relevant for one in data.queries] == [("8:11",), ("6:9",)]
    assert data.queries[0].labels == ("8:11",)
    # the instruction is a sentence before the text is joined to it
    assert data.queries[0].item.text == "Find it. a."


def test_mscoco_has_a_collection_of_its_own_for_testing(tmp_path: Path) -> None:
    instruction = "text\timage\tMSCOCO\t9\tFind it."
    row = {**query(1, "a dog"), "qid": "9:1"}
    for pool, name in ((["8:1"], "mscoco_task0"), (["8:2", "8:3"], "mscoco_task0_test")):
        write(
            tmp_path, "mscoco_task0", queries=[row], qrels=["9:1 0 8:2 1 0"], pool_name=name,
            pool=[candidate(did, "a") for did in pool], instructions=[instruction],
        )  # fmt: skip
    assert list(read(tmp_path, "mscoco_task0").candidates.names) == ["8:2", "8:3"]


def test_the_root_may_be_the_folder_of_the_benchmark(tmp_path: Path) -> None:
    write(tmp_path)
    inside = read(tmp_path / "M-BEIR")
    assert inside.queries == read(tmp_path).queries


def test_a_limit_keeps_all_candidates(tmp_path: Path) -> None:
    write(
        tmp_path,
        queries=[query(1, "a"), query(2, "b"), query(3, "c")],
        pool=[candidate(f"8:{n}", "x") for n in range(11, 16)],
        qrels=[f"8:{n} 0 8:11 1 7" for n in (1, 2, 3)],
    )
    data = read(tmp_path, limit=2)
    assert [q.item.id for q in data.queries] == ["8:1", "8:2"]
    assert len(data.candidates) == 5


def test_repeated_candidates_clash_only_with_other_contents(tmp_path: Path) -> None:
    write(tmp_path, pool=[candidate("8:11", "a"), candidate("8:11", "a"), candidate("8:12", "b"),
                          candidate("8:12", "c")])  # fmt: skip
    candidates = read(tmp_path).candidates
    assert (list(candidates.names), list(candidates.clashes)) == (["8:11", "8:12"], ["8:12"])
    assert candidates.item(1).text == "B."


@pytest.mark.parametrize(
    "lost",
    [
        "query/test/mbeir_cirr_task7_test.jsonl",
        "cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl",
        "qrels/test/mbeir_cirr_task7_test_qrels.txt",
        "instructions/query_instructions.tsv",
    ],
)
def test_missing_files_are_named(lost: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "M-BEIR" / lost).unlink()
    with pytest.raises(DataError, match=rf"^cirr_task7: there is no .*{Path(lost).name}.*download"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"queries": [{"query_txt": "a"}]}, "test.jsonl, line 1: column 'qid' is empty.*again"),
        ({"pool": [{"txt": "a"}]}, "cand_pool.jsonl, line 1: column 'did' is empty.*again"),
        ({"queries": [{**query(1, "a"), "query_modality": "image,text"}]},
         "line 1: column 'query_img_path' is empty"),
        # Rows that do not say it have the modality of the task.
        ({"queries": [{"qid": "8:1", "query_txt": "a"}]},
         "line 1: column 'query_img_path' is empty"),
        ({"queries": [query(1, None)]}, "line 1: column 'query_txt' is empty"),
        ({"queries": [query(1, "a", 5)]}, "line 1: column 'query_img_path' holds int.*again"),
        ({"queries": [query(1, "a", "\0")]}, "line 1: column 'query_img_path' holds a NUL"),
        ({"queries": [query(1, ["a"])]}, "line 1: column 'query_txt' holds list"),
        ({"queries": [query(1, "\ud800")]}, "line 1: column 'query_txt' holds half"),
        ({"queries": [{**query(1, "a"), "qid": ["8:1"]}]}, "line 1: column 'qid' must hold"),
        ({"pool": [candidate("8:11", ["a"])]}, "pool.jsonl, line 1: column 'txt' holds list"),
        ({"pool": [candidate("8:11", None, 3)]}, "line 1: column 'img_path' holds int"),
        ({"pool": [{**candidate("8:11", "a"), "modality": "image"}]},
         "pool.jsonl, line 1: column 'img_path' is empty"),
        ({"qrels": ["8:1 0 8:11 -1 7"]}, "qrels.txt, line 1 does not have the columns"),
        ({"qrels": ["8:1 0 8:11 100000 7"]}, "qrels.txt, line 1 does not have the columns"),
        ({"qrels": ["8:1 0 8:11 1 7", "8:1 8:11"]}, "qrels.txt, line 2 does not have the columns"),
        ({"qrels": ["8:1 0 8:11 yes 7"]}, "qrels.txt, line 1 does not have the columns"),
        ({"instructions": ["image,text\ttext\tCIRR\t8\tNo."]}, "no instruction for data set 8"),
    ],
)  # fmt: skip
def test_other_layouts_are_named(broken: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, **broken)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_lines_that_are_not_json_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "M-BEIR/query/test/mbeir_cirr_task7_test.jsonl"
    for content, message in ((b'{"qid"\n', "line 1 is not JSON"),
                             (b"[" * 100_000, "line 1 is not JSON"),
                             (b"[1]\n", "not a JSON object"),
                             (b'{"qid": "\xff"}\n', "not UTF-8")):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(tmp_path)
