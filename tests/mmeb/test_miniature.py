"""The miniature: all tasks in their published layouts, readable, the same every time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ume_models
from ume_models.mmeb import evaluate
from ume_models.mmeb.benchmarks import benchmark
from ume_models.mmeb.check import check
from ume_models.mmeb.dataset import ReadOptions, TaskData
from ume_models.mmeb.mbeir import MBEIR, MODALITIES, task_number
from ume_models.mmeb.metrics import Ranking, metric_values
from ume_models.mmeb.miniature import write_miniature
from ume_models.mmeb.readers import READERS, read_task
from ume_models.mmeb.tasks import Task
from ume_models.processing.items import Item

TASKS = [*benchmark("MMEB-v2"), *benchmark("MMEB-v1"), *benchmark("M-BEIR")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature with tables that need no library."""
    root = tmp_path_factory.mktemp("miniature") / "jsonl"
    write_miniature(root, tables="jsonl")
    return root


@pytest.fixture(scope="module")
def parquet_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature as it is by default."""
    pytest.importorskip("pyarrow", reason="parquet tables need pyarrow")
    root = tmp_path_factory.mktemp("miniature") / "parquet"
    write_miniature(root)
    return root


def named(name: str, kind: str = "MMEB-v2") -> Task:
    return next(task for task in benchmark(kind) if task.name == name)


def items(data: TaskData) -> list[Item]:
    candidates = [data.candidates.item(position) for position in range(len(data.candidates))]
    return [*(query.item for query in data.queries), *candidates]


def contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("form", ["root", "parquet_root"])
def test_every_task_can_be_read_and_answered(form: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(form)
    assert len(TASKS) == 78 + 36 + 16
    for task in TASKS:
        data = read_task(task, root, ReadOptions())
        assert 6 <= len(data.queries) <= 20, task.name
        names = set(data.candidates.names)
        assert not data.candidates.clashes, task.name
        for query in data.queries:
            ranked = set(query.candidates) if task.ranking == "local" else names
            assert query.relevant and set(query.relevant) <= ranked <= names, task.name
            assert len(query.relevant) < len(ranked), task.name
        for item in items(data):
            for source in (*item.images, *(item.video or ())):
                assert isinstance(source, bytes) or Path(str(source)).is_file(), (task.name, source)


def test_all_readers_are_used() -> None:
    assert {task.reader for task in TASKS} == set(READERS)


def test_both_forms_of_tables_hold_the_same(root: Path, parquet_root: Path) -> None:
    """Down to the pictures, wherever they lie."""

    def seen(item: Item) -> tuple[Any, ...]:
        media = (*item.images, *(item.video or ()))
        read = [source if isinstance(source, bytes) else Path(str(source)).read_bytes()
                for source in media]  # fmt: skip
        return item.id, item.text, item.video is None, [hashlib.sha256(it).digest() for it in read]

    for task in TASKS:
        one, other = (read_task(task, place, ReadOptions()) for place in (root, parquet_root))
        assert [seen(item) for item in items(one)] == [seen(item) for item in items(other)]
        for a, b in zip(one.queries, other.queries, strict=True):
            assert (a.relevant, a.grades, a.candidates, a.labels) == (
                b.relevant, b.grades, b.candidates, b.labels
            ), task.name  # fmt: skip


def test_the_same_arguments_give_the_same_bytes(parquet_root: Path, tmp_path: Path) -> None:
    write_miniature(tmp_path)
    again = contents(tmp_path)
    assert contents(parquet_root) == again
    assert sum((tmp_path / name).stat().st_size for name in again) < 10e6


def test_another_seed_gives_other_tasks(root: Path, tmp_path: Path) -> None:
    write_miniature(tmp_path, tables="jsonl", seed=1)
    changed = 0
    for name in ("CIRR", "MSR-VTT", "ViDoRe_docvqa"):
        one, other = (read_task(named(name), place, ReadOptions()) for place in (root, tmp_path))
        changed += [q.item.text for q in one.queries] != [q.item.text for q in other.queries]
        changed += list(one.candidates.names) != list(other.candidates.names)
    assert changed >= 3


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(FileExistsError, match="not empty"):
        write_miniature(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_both_versions_of_labels_differ(root: Path) -> None:
    for name in ("ViDoSeek-page", "MMLongBench-page"):
        fixed, legacy = (
            read_task(named(name), root, ReadOptions(labels=labels))
            for labels in ("fixed", "legacy")
        )
        assert [q.item.text for q in fixed.queries] == [q.item.text for q in legacy.queries]
        differ = [a.relevant != b.relevant
                  for a, b in zip(fixed.queries, legacy.queries, strict=True)]  # fmt: skip
        assert 0 < sum(differ) < len(differ)


def test_some_answers_are_graded_and_the_pairing_of_grades_matters(root: Path) -> None:
    data = read_task(named("ViDoRe_esg_reports_v2_multilingual"), root, ReadOptions())
    grades = {grade for query in data.queries for grade in query.grades or ()}
    assert grades == {1.0, 2.0}
    rankings = [
        Ranking(q.item.id, tuple(data.candidates.names), (), q.relevant, q.grades, q.labels)
        for q in data.queries
    ]
    right, legacy = (
        metric_values(rankings, ks=(5,), legacy=legacy)["ndcg_linear@5"] for legacy in (False, True)
    )
    assert (right != legacy).any()


def modality(item: Item) -> str:
    """As M-BEIR names it."""
    return ",".join(name for name, there in (("image", item.images), ("text", item.text)) if there)


@pytest.mark.parametrize("task", MBEIR, ids=lambda task: task.name)
def test_tasks_of_mbeir_are_whole_and_of_their_modalities(task: Task, root: Path) -> None:
    assert check([task], root, workers=1) == []
    asked, found, _ = MODALITIES[task_number(task.name)]
    data = read_task(task, root, ReadOptions())
    candidates = items(data)[len(data.queries) :]
    assert {modality(item) for item in candidates} == {found}
    # Instructions are texts, so whether queries have more is seen in their table.
    read = "image,text" if "image" in asked else "text"
    assert {modality(query.item) for query in data.queries} == {read}
    lines = data.files[0].read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        there = (("image", row["query_img_path"]), ("text", row["query_txt"]))
        assert ",".join(name for name, value in there if value) == asked
        assert row["query_modality"] == asked
    # Otherwise any order of the candidates has the best score.
    assert len(candidates) > int(task.metric.removeprefix("hit@"))


def test_oven_and_infoseek_name_documents_of_each_other(root: Path) -> None:
    for number in (6, 8):
        oven, infoseek = (
            read_task(named(f"{name}_task{number}", "M-BEIR"), root, ReadOptions())
            for name in ("oven", "infoseek")
        )
        for data, other in ((oven, infoseek), (infoseek, oven)):
            judged: dict[str, list[str]] = {}
            for line in data.files[2].read_text(encoding="utf-8").splitlines():
                judged.setdefault(line.split()[0], []).append(line.split()[2])
            for query in data.queries:
                foreign = [did for did in judged[query.item.id] if did not in query.relevant]
                assert foreign and set(foreign) <= {*other.candidates.names}
                assert not set(foreign) & {*data.candidates.names}


def test_both_engines_have_the_same_scores_of_mbeir(
    model: Any, reference_model: Any, root: Path, tmp_path: Path
) -> None:
    # One task of each pair of modalities: others ask for other things in the same way.
    tasks = {task_number(task.name): task for task in reversed(MBEIR)}
    assert tasks.keys() == MODALITIES.keys()
    fast, reference = (
        evaluate(engine, [*tasks.values()], root, tmp_path / name, reading=ReadOptions(limit=4))
        for name, engine in (("fast", model), ("reference", reference_model))
    )
    assert {score.task for score in fast.tasks} == {task.name for task in tasks.values()}
    assert fast.tasks == reference.tasks
    assert all(score.score >= 0.75 for score in fast.tasks)  # chance is mostly 0.2


def test_pictures_are_of_many_kinds(root: Path) -> None:
    modes, formats, sizes = set(), set(), set()
    for path in (root / "image-tasks").rglob("*.png"):
        with Image.open(path) as image:
            modes.add(image.mode)
            formats.add(image.format)
            sizes.add(image.size)
    assert modes == {"RGB", "L", "P", "RGBA"}
    assert formats == {"PNG", "JPEG"}  # one is not what its name says, as some on the web
    assert any(width % 28 and height % 28 for width, height in sizes)
    assert len(sizes) >= 6


def test_tasks_share_pictures(root: Path) -> None:
    """By path and by content: candidates are embedded once across tasks."""
    paths, digests = set(), set()
    total = 0
    for name in ("OK-VQA", "A-OKVQA", "HatefulMemes", "VOC2007"):
        for item in items(read_task(named(name), root, ReadOptions())):
            for source in item.images:
                total += 1
                paths.add(source)
                digests.add(Path(str(source)).read_bytes())
    assert len(digests) < len(paths) < total


def test_the_bundled_checkpoint_does_clearly_better_than_chance(root: Path) -> None:
    """One task of each third; their chance is about 0.1."""
    model = ume_models.load(empty="reference")
    for name in ("MSCOCO_i2t", "YouCook2", "ViDoRe_docvqa"):
        data = read_task(named(name), root, ReadOptions())
        embedded = model.encode(items(data))
        queries, candidates = embedded[: len(data.queries)], embedded[len(data.queries) :]
        best = (queries @ candidates.T).argmax(axis=1)
        names = data.candidates.names
        right = [names[int(at)] in q.relevant for at, q in zip(best, data.queries, strict=True)]
        assert sum(right) >= 0.6 * len(right), name
