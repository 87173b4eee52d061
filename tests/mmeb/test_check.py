"""Checking a data root: a good one has no problems, and every kind of damage is named."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import ume_models
from ume_models.encode import encode
from ume_models.errors import ItemError
from ume_models.mmeb.answers import problems_of_answers
from ume_models.mmeb.benchmarks import benchmark
from ume_models.mmeb.check import Problem, _look, check
from ume_models.mmeb.dataset import Labels, ListedCandidates, Query, ReadOptions, TaskData
from ume_models.mmeb.miniature import write_miniature
from ume_models.mmeb.picture_check import PictureCheck
from ume_models.mmeb.readers import read_task
from ume_models.mmeb.tasks import Task
from ume_models.processing.items import Item

TASKS = {(task.benchmark, task.name): task
         for name in ("M-BEIR", "MMEB-v1", "MMEB-v2") for task in benchmark(name)}  # fmt: skip
CIRR, PAGES = TASKS["MMEB-v2", "CIRR"], TASKS["MMEB-v2", "ViDoRe_docvqa"]
CLIPS, COMPOSED = TASKS["MMEB-v2", "MSR-VTT"], TASKS["M-BEIR", "cirr_task7"]
# What of the miniature these tasks need.
FOLDERS = (
    "image-tasks/CIRR", "image-tasks/MMEB/CIRR", "video-tasks/MSR-VTT", "M-BEIR",
    "video-tasks/frames/video_ret/MSR-VTT", "visdoc-tasks/docvqa_test_subsampled_beir",
    "visdoc-tasks/ViDoRe_docvqa", "visdoc-tasks/visdoc-tasks/ViDoRe_docvqa",
)  # fmt: skip


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("miniature")
    write_miniature(root, tables="jsonl")
    return root


@pytest.fixture
def root(miniature: Path, tmp_path: Path) -> Path:
    """A copy of a few tasks that may be damaged."""
    for folder in FOLDERS:
        if (miniature / folder).exists():
            shutil.copytree(miniature / folder, tmp_path / folder)
    return tmp_path


def only(task: Task, root: Path) -> Problem:
    """The only problem of a task."""
    problems = check([task], root)
    assert len(problems) == 1, [str(problem) for problem in problems]
    assert problems[0].task == task.name
    return problems[0]


def picture(root: Path, number: int = 0) -> Path:
    """A picture that the first task uses."""
    data = read_task(CIRR, root, ReadOptions())
    return Path(str(data.candidates.item(number).images[0]))


@pytest.mark.parametrize("labels", ["fixed", "legacy"])
def test_the_miniature_has_no_problems(labels: Labels, miniature: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = check(list(TASKS.values()), miniature, ReadOptions(labels=labels),
                  progress=lambda done, total: steps.append((done, total)))  # fmt: skip
    assert found == []
    total = steps[0][1]
    assert steps == [(n, total) for n in range(1, total + 1)]
    assert total > 2000


def test_missing_tables_stop_one_task_only(root: Path) -> None:
    shutil.rmtree(root / "image-tasks/CIRR")
    problems = check([CIRR, CLIPS], root)
    assert [problem.task for problem in problems] == ["CIRR"]
    assert problems[0].severity == "error"
    assert "there are no tables" in problems[0].what
    assert str(root / "image-tasks") in problems[0].what


def test_a_table_in_another_layout_is_named(root: Path) -> None:
    file = root / "image-tasks/CIRR/test.jsonl"
    file.write_text('{"query": "a"}\n', encoding="utf-8")
    problem = only(CIRR, root)
    assert str(file) in problem.what and "no column 'qry_inst'" in problem.what


def test_missing_pictures_are_counted_and_the_first_ones_named(root: Path) -> None:
    lost = [picture(root, number) for number in range(5)]
    for path in lost:
        path.unlink()
    problem = only(CIRR, root)
    assert problem.severity == "error"
    assert problem.what.startswith("5 of ") and problem.what.endswith("files are missing")
    # Queries come first and name none of them, so candidates are met in their order.
    assert problem.where == f"{', '.join(map(str, lost[:3]))} and 2 more"
    assert "unpack" in problem.remedy
    assert str(problem).startswith("error: CIRR: 5 of ")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def cut_jpeg(path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((96, 96), 60).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[:-400])


def narrow(path: Path) -> None:
    Image.new("RGB", (1000, 2)).save(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), "it is empty (0 bytes)"),
        (lambda path: path.write_text("<html>not found</html>"), "it is not a picture"),
        (cut, "is truncated"),
        (cut_jpeg, "is truncated"),
        (narrow, "1000x2"),
        (a_folder, "directory"),
    ],
)
def test_damaged_pictures_are_named_with_the_reason(
    damage: Callable[[Path], object], reason: str, root: Path
) -> None:
    path = picture(root, 4)
    damage(path)
    problem = only(CIRR, root)
    assert problem.what.startswith("1 of ") and "cannot be read" in problem.what
    assert problem.where.startswith(f"{path} (")
    assert reason.lower() in problem.where.lower()


def test_pictures_that_end_oddly_but_decode_are_good(root: Path) -> None:
    path = picture(root)
    path.write_bytes(path.read_bytes() + b"\n\n")
    assert check([CIRR], root) == []


def test_damage_in_the_middle_is_found_where_items_are_sampled(root: Path) -> None:
    """All are, in a task as small as this."""
    path = picture(root)
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") + 12
    data[at : at + 40] = bytes(40)
    path.write_bytes(data)
    assert str(path) in only(CIRR, root).where


def test_videos_without_frames_are_named(root: Path) -> None:
    folder = root / "video-tasks/frames/video_ret/MSR-VTT/frames/video7012"
    for frame in folder.iterdir():
        frame.unlink()
    problem = only(CLIPS, root)
    assert problem.what == "the frames of 1 of 10 videos are missing"
    assert problem.where == str(folder)
    assert "ffmpeg" in problem.remedy
    shutil.rmtree(folder)
    assert only(CLIPS, root) == problem


def test_unreadable_frames_are_named(root: Path) -> None:
    frame = root / "video-tasks/frames/video_ret/MSR-VTT/frames/video7012/frame_9.png"
    cut(frame)
    assert only(CLIPS, root).where.startswith(f"{frame} (")


def rows(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def rewrite(file: Path, lines: Sequence[object]) -> None:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8")


def test_labels_that_are_not_candidates_are_named(root: Path) -> None:
    file = root / "M-BEIR/qrels/test/mbeir_cirr_task7_test_qrels.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    query = lines[2].split()[0]
    rewrite(file, [*lines[:2], f"{query} 0 8:404 1 7", *lines[3:]])
    problem = only(COMPOSED, root)
    assert problem.what == "the answers of 1 of 8 queries are not among their candidates"
    assert problem.where == f"{query} ('8:404')"

    file = root / "visdoc-tasks/docvqa_test_subsampled_beir/qrels/test.jsonl"
    rewrite(file, [{"query-id": 0, "corpus-id": 404, "score": 1}, *rows(file)])
    assert "404" in only(PAGES, root).what


def test_queries_without_answers_are_named(root: Path) -> None:
    file = root / "M-BEIR/qrels/test/mbeir_cirr_task7_test_qrels.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    rewrite(file, [line for line in lines if not line.startswith("8:1001 ")])
    problem = only(COMPOSED, root)
    assert (problem.what, problem.where) == ("1 of 8 queries have no answer", "8:1001")


def test_names_with_several_contents_are_a_warning(root: Path) -> None:
    file = root / "M-BEIR/cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl"
    pool = rows(file)
    rewrite(file, [*pool, {**pool[0], "txt": "another"}, pool[1]])
    problem = only(COMPOSED, root)
    assert problem.severity == "warning"
    assert problem.where == str(pool[0]["did"])
    assert "several contents under one name" in problem.what


def test_repetitions_of_momentseeker_are_a_warning(miniature: Path, tmp_path: Path) -> None:
    task = TASKS["MMEB-v2", "MomentSeeker"]
    for folder in ("video-tasks/MomentSeeker", "video-tasks/frames/video_mret/MomentSeeker"):
        shutil.copytree(miniature / folder, tmp_path / folder)
    assert check([task], tmp_path) == []
    [table] = (tmp_path / "video-tasks/MomentSeeker").rglob("*.jsonl")
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, lines[0]]) + "\n")
    problem = only(task, tmp_path)
    assert problem.severity == "warning"
    assert problem.what.startswith(f"1 of {len(lines) + 1} queries repeat another one")


def test_empty_collections_and_no_queries(root: Path) -> None:
    rewrite(root / "M-BEIR/cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl", [])
    assert only(COMPOSED, root).what == "8 of 8 queries have no candidates to be ranked among"
    rewrite(root / "M-BEIR/query/test/mbeir_cirr_task7_test.jsonl", [])
    assert only(COMPOSED, root).what == "there are no queries"


def test_repeated_ids_and_texts_that_cannot_be_embedded(root: Path) -> None:
    file = root / "M-BEIR/query/test/mbeir_cirr_task7_test.jsonl"
    queries = rows(file)
    queries[1]["query_txt"] = "end <|im_end|> here"
    rewrite(file, [*queries, queries[0]])
    repeated, text = check([COMPOSED], root)
    assert repeated.where == str(queries[0]["qid"]) and "have an id" in repeated.what
    assert text.where.startswith(f"query {queries[1]['qid']} (") and "<|im_end|>" in text.where


def test_pictures_inside_of_tables_are_looked_at(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="tables with pictures are parquet files")
    parquet = pytest.importorskip("pyarrow.parquet")
    write_miniature(tmp_path)
    file = next((tmp_path / "visdoc-tasks/arxivqa_test_subsampled_beir/corpus").glob("*.parquet"))
    pages = parquet.read_table(file).to_pylist()
    pages[2]["image"]["bytes"] = pages[2]["image"]["bytes"][:300]
    parquet.write_table(pa.Table.from_pylist(pages), file)
    problem = only(TASKS["MMEB-v2", "ViDoRe_arxivqa"], tmp_path)
    assert problem.where.startswith(f"candidate {pages[2]['corpus-id']}, 0 (")
    assert "truncated" in problem.where


def one_answer_only(grades: tuple[float, ...] | None = None, **changes: object) -> Query:
    query = Query(Item("?", id="1"), ("b",), grades, candidates=("a", "b"))
    return replace(query, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "queries", "problem"),
    [
        (CIRR, [one_answer_only()], ""),
        (CIRR, [one_answer_only(relevant=("c",))], "not among their candidates: 1 ('c'); get"),
        # A candidate of other queries cannot be found by this one.
        (CIRR, [one_answer_only(candidates=("a",))], "not among their candidates: 1 ('b'); get"),
        (CLIPS, [one_answer_only(candidates=())], ""),
        (CLIPS, [one_answer_only(relevant=("d",))], "1 of 1 queries are not among"),
        (CIRR, [one_answer_only(), one_answer_only()], "1 of 2 queries have an id that another"),
        (CIRR, [one_answer_only(relevant=())], "1 of 1 queries have no answer: 1; download"),
        (CIRR, [one_answer_only(candidates=())], "have no candidates to be ranked among: 1; "),
        (CLIPS, [one_answer_only((1.0, 2.0))], "have not as many grades as answers: 1; "),
        (CIRR, [], "there are no queries; download"),
    ],
)
def test_problems_of_answers(task: Task, queries: list[Query], problem: str) -> None:
    candidates = ListedCandidates([(name, Item(name, id=name)) for name in "abc"])
    found = problems_of_answers(TaskData(task, queries, candidates))
    assert len(found) == bool(problem) and all(problem in text for text in found)


def test_one_task_that_cannot_be_read_leaves_the_others(root: Path) -> None:
    """Names that are too long for the disk, and tables nested too deeply."""
    rewrite(root / "image-tasks/CIRR/test.jsonl", ["[" * 100_000])
    moments = root / "video-tasks/QVHighlight/test.jsonl"
    moments.parent.mkdir(parents=True)
    rewrite(moments, [{"query": "q", "video_path": "a" * 300 + ".mp4"}])
    (root / "video-tasks/frames/video_mret/QVHighlight").mkdir(parents=True)
    cut(root / "video-tasks/frames/video_ret/MSR-VTT/frames/video7012/frame_9.png")
    problems = check([CIRR, TASKS["MMEB-v2", "QVHighlight"], CLIPS], root)
    assert [problem.task for problem in problems] == ["CIRR", "QVHighlight", "MSR-VTT"]
    assert "is not JSON" in problems[0].what and "too long" in problems[1].what
    assert "get the table again" in problems[1].what


def test_frames_of_different_sizes_are_named(root: Path) -> None:
    folder = root / "video-tasks/frames/video_ret/MSR-VTT/frames/video7012"
    frame = folder / "frame_9.png"
    with Image.open(frame) as opened:
        size = opened.size
        # Embedding resizes to multiples of 28, so a pixel more changes nothing.
        opened.resize((size[0] + 1, size[1])).save(frame)
    assert check([CLIPS], root) == []
    Image.new("RGB", (size[0] + 56, size[1])).save(frame)
    problem = only(CLIPS, root)
    assert problem.what == "the frames of 1 of 10 videos are of different sizes"
    assert problem.where.startswith(f"{folder} (resized to ") and " and " in problem.where
    candidates = read_task(CLIPS, root, ReadOptions()).candidates
    clip = candidates.item(candidates.names.index("video7012"))
    with pytest.raises(ItemError, match="another size than the first frame"):
        encode(ume_models.load(empty="reference", device="cpu"), [clip])


def test_halves_of_characters_are_named(root: Path) -> None:
    data = read_task(CIRR, root, ReadOptions())
    for text, id in (("a \ud83d", "0"), ("a", "\udc00")):
        wrong = _look(Item(text, id=id), "query", PictureCheck(), False)
        assert [kind for kind, _, _ in wrong] == ["text"]
        assert "half a character" in wrong[0][2]
        wrong[0][1].encode()
    assert _look(data.queries[0].item, "query", PictureCheck(), False)[0][0] == "opened"


def test_the_number_of_threads_does_not_matter(root: Path) -> None:
    picture(root, 1).unlink()
    cut(picture(root, 3))
    one, several = (check([CIRR, CLIPS], root, workers=workers) for workers in (1, 6))
    assert one == several and len(one) == 2
