"""Embeddings that other programs stored: the scores of `ume eval`, or an error that says why."""

from __future__ import annotations

import io
import json
import os
import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ume_models.errors import DataError, StoreError
from ume_models.mmeb import EvalOptions, ReadOptions, benchmark, evaluate, select_tasks
from ume_models.mmeb.embeddings import task_embeddings
from ume_models.mmeb.progress import Progress
from ume_models.mmeb.readers import read_task
from ume_models.mmeb.results import RunFolder
from ume_models.mmeb.stored import StoredTask, read_stored
from ume_models.mmeb.stored_run import score_folder
from ume_models.mmeb.tasks import Task

# Own lists, the whole collection, and pages with grades.
FEW = ("ImageNet-1K", "MSR-VTT", "ViDoRe_esg_reports_human_labeled_v2", "ViDoSeek-page")
LOCAL, GLOBAL = "ImageNet-1K", "MSR-VTT"


def tasks(*names: str) -> list[Task]:
    return select_tasks(benchmark("MMEB-v2"), names=names)


@pytest.fixture(scope="module")
def evaluated(model, miniature, tmp_path_factory):
    """What `ume eval` found for a few tasks."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    evaluate(model, tasks(*FEW), miniature, folder)
    return folder


def write_arrays(folder: Path, name: str, found: tuple[Any, Any, Any]) -> None:
    queries, candidates, names = found
    own = folder / name
    own.mkdir(parents=True)
    np.save(own / "queries.npy", np.asarray(queries))
    np.save(own / "candidates.npy", np.asarray(candidates))
    (own / "candidates.json").write_text(json.dumps(list(names)))


def write_official(
    folder: Path, name: str, found: tuple[Any, Any, Any], info: list[dict[str, Any]] | None = None
) -> None:
    """As the official evaluation does: ``pickle.dump`` of an array, and of a row for each name."""
    queries, candidates, names = found
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}_qry", "wb") as handle:
        pickle.dump(np.asarray(queries), handle)
    with open(folder / f"{name}_tgt", "wb") as handle:
        pickle.dump(dict(zip(names, np.asarray(candidates), strict=True)), handle)
    if info is not None:
        lines = "".join(json.dumps(line) + "\n" for line in info)
        (folder / f"{name}_info.jsonl").write_text(lines)


def official_info(root: Path, name: str) -> list[dict[str, Any]]:
    data = read_task(*tasks(name), root, ReadOptions())
    return [
        {
            "cand_names": list(query.candidates or data.candidates.names),
            "label_name": query.labels[0] if len(query.labels) == 1 and not query.grades
            else list(query.labels),
            "rel_scores": None if query.grades is None else list(query.grades),
        }
        for query in data.queries
    ]  # fmt: skip


def same_scores(output: Path, evaluated: Path, names: tuple[str, ...] = FEW) -> None:
    found, expected = RunFolder(output), RunFolder(evaluated)
    assert {*found.scores()} == {*names}
    for name in names:
        mine, theirs = found.rankings(name), expected.rankings(name)
        assert [one.prediction for one in mine] == [one.prediction for one in theirs]
        assert [one.scores for one in mine] == [one.scores for one in theirs]
        assert found.score(name) == expected.score(name)


def test_scores_are_those_of_ume_eval(evaluated, miniature, tmp_path):
    for name in FEW:
        write_arrays(tmp_path / "in", name, task_embeddings(evaluated, name))
    summary = score_folder(tmp_path / "in", tasks(*FEW), tmp_path / "out", data=miniature)
    same_scores(tmp_path / "out", evaluated)
    assert summary.tasks == [RunFolder(evaluated).score(task.name) for task in tasks(*FEW)]
    assert summary.overall.tasks == len(FEW)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary.to_json()
    # again, and with one file the newer
    score_folder(tmp_path / "in", tasks(*FEW), tmp_path / "out", data=miniature)
    os.utime(tmp_path / "in" / GLOBAL / "queries.npy", ns=(1, 1))
    with pytest.raises(StoreError, match="fingerprint"):
        score_folder(tmp_path / "in", tasks(*FEW), tmp_path / "out", data=miniature)


def test_tasks_add_up(evaluated, miniature, tmp_path):
    for name in (LOCAL, GLOBAL):
        write_arrays(tmp_path / "in", name, task_embeddings(evaluated, name))
    score_folder(tmp_path / "in", tasks(LOCAL), tmp_path / "out", data=miniature)
    both = score_folder(tmp_path / "in", tasks(GLOBAL), tmp_path / "out", data=miniature)
    assert {score.task for score in both.tasks} == {LOCAL, GLOBAL}
    assert both.overall.of == 2


def test_a_first_attempt_that_fails_does_not_stand_in_the_way(evaluated, miniature, tmp_path):
    """Embeddings as docs/evaluate.md writes them, the names wrong at first."""
    [task], data = tasks(LOCAL), read_task(*tasks(LOCAL), miniature, ReadOptions())
    queries, candidates, _ = task_embeddings(evaluated, LOCAL)
    assert [item.id for item in data.candidates] == list(data.candidates.names)
    write_arrays(tmp_path / "in", LOCAL, (queries, candidates, data.candidates.names[::-1]))
    (tmp_path / "in" / LOCAL / "candidates.json").write_text("[]")
    with pytest.raises(DataError, match="0 names"):
        score_folder(tmp_path / "in", [task], tmp_path / "out", data=miniature)
    (tmp_path / "in" / LOCAL / "candidates.json").write_text(json.dumps(data.candidates.names))
    found = score_folder(tmp_path / "in", [task], tmp_path / "out", data=miniature)
    assert found.tasks[0].scores == RunFolder(evaluated).score(LOCAL).scores


def test_scores_of_official_files_need_no_tables(evaluated, miniature, tmp_path):
    for name in FEW:
        found = task_embeddings(evaluated, name)
        write_official(tmp_path / "in", name, found, official_info(miniature, name))
    score_folder(tmp_path / "in", tasks(*FEW), tmp_path / "out")
    found, expected = RunFolder(tmp_path / "out"), RunFolder(evaluated)
    for name in FEW:
        assert found.score(name) == expected.score(name)
        assert [one.prediction for one in found.rankings(name)] == [
            one.prediction for one in expected.rankings(name)
        ]
    # with tables, their answers count, whatever lies beside the embeddings
    (tmp_path / "in" / f"{GLOBAL}_info.jsonl").write_text("{}\n")
    score_folder(tmp_path / "in", tasks(*FEW), tmp_path / "tables", data=miniature)
    same_scores(tmp_path / "tables", evaluated)


def test_a_mixed_folder_lists_what_it_lacks(evaluated, miniature, tmp_path):
    write_arrays(tmp_path / "in", LOCAL, task_embeddings(evaluated, LOCAL))
    write_official(tmp_path / "in", GLOBAL, task_embeddings(evaluated, GLOBAL))
    chosen = tasks(LOCAL, GLOBAL, FEW[2])
    summary = score_folder(tmp_path / "in", chosen, tmp_path / "out", data=miniature)
    assert [score.task for score in summary.tasks] == [LOCAL, GLOBAL]
    [missing] = summary.missing
    assert missing.task == FEW[2] and "no embeddings of this task" in missing.reason
    with pytest.raises(DataError, match=r"none of the 1 tasks.*queries\.npy"):
        score_folder(tmp_path / "in", tasks(FEW[2]), tmp_path / "other", data=miniature)
    # arrays have no answers of their own
    with pytest.raises(DataError, match=f"{LOCAL}: answers are needed.*--data"):
        score_folder(tmp_path / "in", tasks(LOCAL), tmp_path / "none")
    summary = score_folder(
        tmp_path / "in", tasks(LOCAL), tmp_path / "none", options=EvalOptions(on_error="skip")
    )
    assert not summary.tasks and "--data" in summary.missing[0].reason


def test_half_precision_is_scored(evaluated, miniature, tmp_path):
    queries, candidates, names = task_embeddings(evaluated, LOCAL)
    half = (queries.half(), candidates.half(), names)
    write_arrays(tmp_path / "in", LOCAL, half)
    write_official(tmp_path / "official", LOCAL, half, official_info(miniature, LOCAL))
    for source, data in (("in", miniature), ("official", None)):
        score_folder(tmp_path / source, tasks(LOCAL), tmp_path / f"{source} out", data=data)
        folder = RunFolder(tmp_path / f"{source} out")
        for row, ranking in enumerate(folder.rankings(LOCAL)):
            exact = candidates.half().double() @ queries[row].half().double()
            best = [float(exact[names.index(name)]) for name in ranking.prediction]
            assert ranking.scores == pytest.approx(best, abs=1e-5)
            assert best == pytest.approx(sorted(best, reverse=True), abs=1e-5)
    stored = read_stored(tmp_path / "in", tasks(LOCAL)[0])
    assert stored.queries.dtype == torch.float32 and not stored.not_unit_length()


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_rows_that_are_not_of_unit_length_are_noted(evaluated, miniature, tmp_path):
    queries, candidates, names = task_embeddings(evaluated, LOCAL)
    write_arrays(tmp_path / "in", LOCAL, (queries * 3, candidates, names))
    write_arrays(tmp_path / "in", GLOBAL, task_embeddings(evaluated, GLOBAL))
    told = Notes()
    score_folder(
        tmp_path / "in", tasks(LOCAL, GLOBAL), tmp_path / "out", data=miniature, progress=told
    )
    [note] = told.notes
    total = len(queries) + len(candidates)
    assert note.startswith(f"{LOCAL}: {len(queries)} of {total} embeddings are not of unit length")
    assert "(1 to 3)" in note and "normalise" in note


def score_one(folder: Path, output: Path, name: str, data: Path | None = None) -> Any:
    return score_folder(folder, tasks(name), output, data=data)


def fresh(folder: Path) -> Path:
    """A new output folder: changed embeddings are another evaluation."""
    return folder / f"out{len([*folder.iterdir()])}"


def test_embeddings_in_the_output_folder_are_never_removed(evaluated, miniature, tmp_path):
    out = tmp_path / "out"
    inside = out / "embeddings"
    write_arrays(inside, LOCAL, task_embeddings(evaluated, LOCAL))
    link = tmp_path / "link"
    link.symlink_to(inside)
    for source, target in (
        (inside, out), (inside, inside), (link, out), (out, out / "x" / ".."), (link, inside),
    ):  # fmt: skip
        for overwrite in (False, True):
            with pytest.raises(DataError, match=r"lies in the output folder .*-o"):
                score_folder(
                    source, tasks(LOCAL), target, data=miniature, overwrite=overwrite
                )  # fmt: skip
    assert {path.name for path in out.rglob("*")} == {
        "embeddings", LOCAL, "queries.npy", "candidates.npy", "candidates.json"
    }  # fmt: skip
    # results may lie among the embeddings: they do not count as such
    for overwrite in (False, False, True):
        score_folder(
            inside, tasks(LOCAL), inside / "scores", data=miniature, overwrite=overwrite
        )  # fmt: skip
    same_scores(inside / "scores", evaluated, (LOCAL,))


def test_a_score_whose_embeddings_fit_no_more_is_dropped(evaluated, miniature, tmp_path):
    queries, candidates, names = task_embeddings(evaluated, LOCAL)
    write_official(
        tmp_path / "in", LOCAL, (queries, candidates, names), official_info(miniature, LOCAL)
    )
    score_one(tmp_path / "in", tmp_path / "out", LOCAL)
    assert RunFolder(tmp_path / "out").finished(LOCAL)
    skip = EvalOptions(on_error="skip")
    root = tmp_path / "no tables"
    root.mkdir()
    summary = score_folder(
        tmp_path / "in", tasks(LOCAL), tmp_path / "out", data=root, options=skip
    )  # fmt: skip
    assert summary.overall is None and summary.missing[0].task == LOCAL
    assert not RunFolder(tmp_path / "out").scores()


# Small made-up tasks ----------------------------------------------------------------------------

ROWS = np.eye(3, dtype=np.float32)
NAMES = ["a", "b", "c"]
Change = Callable[[Path], object]


@pytest.fixture
def made_up(tmp_path) -> Path:
    """A local and a global task of three queries, in the official layout."""
    for name in (LOCAL, GLOBAL):
        info = [
            {"label_name": label, "cand_names": NAMES, "rel_scores": None} for label in "abc"
        ]  # fmt: skip
        write_official(tmp_path / "in", name, (ROWS, ROWS, NAMES), info)
    return tmp_path / "in"


def test_the_made_up_tasks_are_solved(made_up, tmp_path):
    summary = score_folder(made_up, tasks(LOCAL, GLOBAL), tmp_path / "out")
    assert [score.score for score in summary.tasks] == [1, 1]


def test_names_with_modes_are_those_of_plume(made_up, tmp_path):
    modes = {"qry": "gen_qry", "tgt": "disc_tgt", "info.jsonl": "gen_disc_info.jsonl"}
    for name in (LOCAL, GLOBAL):
        for plain, with_mode in modes.items():
            (made_up / f"{name}_{plain}").rename(made_up / f"{name}_{with_mode}")
    summary = score_folder(made_up, tasks(LOCAL, GLOBAL), tmp_path / "out")
    assert [score.score for score in summary.tasks] == [1, 1]
    (made_up / f"{LOCAL}_gen_tgt").write_bytes((made_up / f"{LOCAL}_disc_tgt").read_bytes())
    with pytest.raises(DataError, match=f"{LOCAL}_gen_tgt and {LOCAL}_disc_tgt: keep the files"):
        score_folder(made_up, tasks(LOCAL), tmp_path / "two")
    for side in ("gen_tgt", "disc_tgt"):
        (made_up / f"{LOCAL}_{side}").unlink()
    with pytest.raises(DataError, match=f"{LOCAL}_tgt cannot be read"):
        score_folder(made_up, tasks(LOCAL), tmp_path / "none")


def test_a_grade_of_zero_is_no_answer(made_up, tmp_path):
    lines = [
        {"label_name": ["b", "a"], "cand_names": NAMES, "rel_scores": [0, 1]},
        {"label_name": ["b"], "cand_names": NAMES, "rel_scores": [2]},
        {"label_name": ["c"], "cand_names": NAMES, "rel_scores": [1]},
    ]
    path = made_up / f"{GLOBAL}_info.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score_folder(made_up, tasks(GLOBAL), tmp_path / "out")
    assert RunFolder(tmp_path / "out").rankings(GLOBAL)[0].relevant == ("a",)
    path.write_text(path.read_text().replace("[2]", "[0]"))
    with pytest.raises(DataError, match="line 2: all rel_scores are 0"):
        score_folder(made_up, tasks(GLOBAL), tmp_path / "none")


def with_line(change: Mapping[str, Any] | str) -> Change:
    """The second line of the answers changed, or replaced; a blank line before it."""

    def apply(path: Path) -> None:
        first, second, third = path.read_text().splitlines()
        if isinstance(change, str):
            second = change
        else:
            fields = {**json.loads(second), **change}
            second = json.dumps({name: v for name, v in fields.items() if v != "drop"})
        path.write_text("\n".join([first, "", second, third]) + "\n")

    return apply


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (GLOBAL, {"label_name": "x"}, "label_name has 'x', which is not among the stored"),
        (GLOBAL, {"label_name": ["b", "x"]}, "'x', which is not among"),
        (GLOBAL, {"label_name": None}, "None, which is no name"),
        (GLOBAL, {"label_name": "drop"}, "None, which is no name"),
        (GLOBAL, {"label_name": []}, "label_name must be a list of names, and not an empty one"),
        (GLOBAL, {"label_name": [["b"]]}, "no name"),
        (GLOBAL, {"label_name": True}, "True, which is no name"),
        (GLOBAL, {"label_name": 1.5}, "no name"),
        (LOCAL, {"cand_names": []}, "cand_names must be a list of names, and not an empty one"),
        (LOCAL, {"cand_names": "drop"}, "cand_names must be a list"),
        (LOCAL, {"cand_names": None}, "cand_names must be a list"),
        (LOCAL, {"cand_names": "abc"}, "cand_names must be a list"),
        (LOCAL, {"cand_names": ["b", "y"]}, "cand_names has 'y', which is not among"),
        (LOCAL, {"cand_names": ["a", "c"]}, "none of label_name is in cand_names, 'b' for one"),
        (GLOBAL, {"label_name": ["b"], "rel_scores": [float("inf")]}, "grades are 0 … 100"),
        (GLOBAL, {"label_name": ["b"], "rel_scores": [float("nan")]}, "grades are 0 … 100"),
        (GLOBAL, {"label_name": ["b"], "rel_scores": [5000]}, "5000; grades are 0 … 100"),
        (GLOBAL, {"label_name": ["b"], "rel_scores": [-1]}, "grades are 0"),
        (GLOBAL, {"label_name": ["b"], "rel_scores": ["1"]}, "grades are 0"),
        (GLOBAL, {"label_name": ["b"], "rel_scores": [1, 2]}, "a list of 1 numbers"),
        (GLOBAL, {"label_name": ["b"], "rel_scores": 1}, "a list of 1 numbers"),
        (GLOBAL, {"label_name": ["b", "b"], "rel_scores": [1, 2]}, "a name twice"),
        (GLOBAL, "{", "Expecting"),
        (GLOBAL, "[]", "not a JSON object"),
        (GLOBAL, "[" * 100_000, "recursion"),
        (GLOBAL, '{"label_name": %s}' % ("1" * 5000), "digits"),
    ],
)  # fmt: skip
def test_answers_that_would_count_as_wrong_are_named(made_up, tmp_path, name, change, told):
    with_line(change)(made_up / f"{name}_info.jsonl")
    with pytest.raises(DataError, match=rf"{name}: .*{name}_info\.jsonl, line 3: ") as caught:
        score_one(made_up, tmp_path / "out", name)
    assert told in str(caught.value)
    assert "write the file again" in str(caught.value)
    assert not RunFolder(tmp_path / "out").finished(name)


def test_repeated_labels_and_numbers_are_names(made_up, tmp_path):
    """Without grades tables may repeat a label; names may be numbers on either side."""
    found = (ROWS, ROWS, [7, 8, "9"])
    info = [{"label_name": label} for label in (["7", 7], 8, ["9", "9", "7"])]
    write_official(made_up, GLOBAL, found, info)
    [score] = score_one(made_up, tmp_path / "out", GLOBAL).tasks
    assert score.score == 1
    assert score.scores["recall@5"] == 1
    info = [{"label_name": ["7", "8"], "rel_scores": [1, 2.5]}] * 3
    write_official(made_up, GLOBAL, found, info)
    score_one(made_up, tmp_path / "graded", GLOBAL)
    ranking = RunFolder(tmp_path / "graded").rankings(GLOBAL)[0]
    assert (ranking.relevant, ranking.grades) == (("7", "8"), (1.0, 2.5))
    write_official(made_up, GLOBAL, (ROWS, ROWS, [7, "7", "9"]), info)
    with pytest.raises(DataError, match="two candidates have the name '7'"):
        score_one(made_up, tmp_path / "twice", GLOBAL)


def test_answers_for_another_number_of_queries_are_refused(made_up, tmp_path):
    path = made_up / f"{GLOBAL}_info.jsonl"
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match=f"{GLOBAL}: 3 stored queries, 6 with answers"):
        score_one(made_up, tmp_path / "out", GLOBAL)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"info\.jsonl cannot be read"):
        read_stored(made_up, tasks(GLOBAL)[0])
    path.unlink()
    with pytest.raises(DataError, match=f"{GLOBAL}: answers are needed"):
        score_one(made_up, tmp_path / "none", GLOBAL)


# Pickles ----------------------------------------------------------------------------------------


class Calls:
    """Pickled, a call of a function with arguments, then a state for what it returned."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


RECONSTRUCT = np.empty(0).__reduce__()[0]
FROM_BUFFER = np.empty(0).__reduce_ex__(5)[0]


def held(shape: Any, kind: Any, data: Any) -> Calls:
    return Calls(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, shape, kind, False, data))


F4 = np.dtype("f4")
BAD_PICKLES = {
    "a command": Calls(os.system, "touch HACKED"),
    "a builtin": Calls(eval, "1"),
    "a loader of files": Calls(np.load, "x"),
    "an unknown dtype": Calls(np.dtype, "zzz"),
    "a dtype of fields": Calls(np.dtype, [("a", "f4")]),
    "a shape of text": Calls(np.ndarray, "a"),
    "objects": np.array([{}, None], dtype=object),
    "too little": held((4, 4), F4, b"\0" * 8),
    "a negative size": held((-2, 1), F4, b"\0" * 8),
    "a huge size": held((2**62, 2**62), F4, b"\0" * 8),
    "text for values": held((2, 1), F4, "\0" * 8),
    "a list of values": held((2, 1), F4, [1.0, 2.0]),
    "a short state": Calls(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1,)),
    "no state": Calls(RECONSTRUCT, np.ndarray, (0,), b"b"),
    "a state of a dtype": Calls(np.dtype, "f4", False, True, state=(3, "x", None)),
    "a list": [[1.0, 2.0]],
    "a tensor": torch.eye(3),
    "a number": np.float32(3),
    "whole numbers": np.eye(3, dtype=np.int64),
    "one row": np.ones(3, dtype=np.float32),
    "no rows": np.ones((0, 3), dtype=np.float32),
    "no columns": np.ones((3, 0), dtype=np.float32),
    "other columns": np.ones((3, 4), dtype=np.float32),
    "complex numbers": np.eye(3, dtype=np.complex64),
}


@pytest.mark.parametrize("what", BAD_PICKLES)
def test_bad_pickles_of_queries_are_refused(made_up, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    (made_up / f"{GLOBAL}_qry").write_bytes(pickle.dumps(BAD_PICKLES[what], protocol=4))
    with pytest.raises(DataError, match=GLOBAL):
        score_one(made_up, tmp_path / "out", GLOBAL)
    assert not (tmp_path / "HACKED").exists()


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", b"hello", b"\x80\x04.", b"(" * 100_000 + b".", b"cos\nsystem\n(S'ls'\ntR.",
     b"cnumpy.f2py.__main__\ndtype\n.", b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.tofile\x93."],
    ids=["empty", "cut", "text", "nothing", "deep", "old", "module", "method"],
)  # fmt: skip
def test_bytes_that_are_no_pickle_are_refused(made_up, data):
    for side in ("qry", "tgt"):
        kept = (made_up / f"{GLOBAL}_{side}").read_bytes()
        (made_up / f"{GLOBAL}_{side}").write_bytes(data)
        with pytest.raises(DataError, match=f"{GLOBAL}_{side} cannot be read"):
            read_stored(made_up, tasks(GLOBAL)[0])
        (made_up / f"{GLOBAL}_{side}").write_bytes(kept)


def test_a_cut_pickle_is_refused(made_up):
    path = made_up / f"{GLOBAL}_tgt"
    data = path.read_bytes()
    for stop in range(0, len(data), 7):
        path.write_bytes(data[:stop])
        with pytest.raises(DataError, match=f"{GLOBAL}_tgt"):
            read_stored(made_up, tasks(GLOBAL)[0])


def test_a_pickle_cannot_change_the_reader(made_up):
    """State for a function that it names would stay for the next file."""
    for function in (np.dtype, np.ndarray, RECONSTRUCT, FROM_BUFFER):
        name = pickle.dumps(function, protocol=4)[:-1]
        state = pickle.dumps((None, {"dtype": 1, "__init__": None}), protocol=4)[2:-1]
        (made_up / f"{GLOBAL}_qry").write_bytes(name + state + b"b.")
        with pytest.raises(DataError, match="cannot be read"):
            read_stored(made_up, tasks(GLOBAL)[0])
    write_official(made_up, GLOBAL, (ROWS, ROWS, NAMES))
    assert read_stored(made_up, tasks(GLOBAL)[0]).queries.equal(torch.eye(3))


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f4"])
@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_what_numpy_pickles_is_read(tmp_path, protocol, kind, module):
    rows = np.arange(12).reshape(3, 4).astype(kind)
    names = [np.str_("ä"), np.int64(7), "c"]
    for side, value in (
        ("qry", np.asfortranarray(rows)),
        ("tgt", dict(zip(names, rows[:, ::-1], strict=True))),
    ):
        (tmp_path / f"{GLOBAL}_{side}").write_bytes(renamed(value, protocol, module))
    stored = read_stored(tmp_path, tasks(GLOBAL)[0])
    assert isinstance(stored, StoredTask)
    assert stored.names == ["ä", "7", "c"]
    assert stored.queries.tolist() == rows.tolist()
    assert stored.candidates.tolist() == rows[:, ::-1].tolist()
    assert stored.answers is None


def renamed(value: Any, protocol: int, module: str) -> bytes:
    """A pickle as numpy 1 ("numpy.core") or numpy 2 ("numpy._core") writes it."""

    class Writer(pickle._Pickler):
        def save_global(self, obj, name=None):
            own = obj.__module__
            if own.startswith(("numpy.core", "numpy._core")):
                named = module + own[own.rindex(".") :]
                self.write(b"c" + f"{named}\n{obj.__name__}\n".encode())
                self.memoize(obj)
            else:
                super().save_global(obj, name)

    functions = {type(RECONSTRUCT): Writer.save_global, type(FROM_BUFFER): Writer.save_global}
    Writer.dispatch = {**pickle._Pickler.dispatch, **functions}
    handle = io.BytesIO()
    Writer(handle, protocol).dump(value)
    return handle.getvalue()


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ({"a": ROWS[0], "b": ROWS[1, :2]}, r"'b' has 2 columns, that of 'a' 3"),
        ({"a": ROWS[0], "b": ROWS}, "'b' is not a row of floats"),
        ({"a": [1.0, 2.0, 3.0]}, "'a' is not a row"),
        ({"a": np.float32(1)}, "'a' is not a row"),
        ({"a": None}, "'a' is not a row"),
        ({"a": {"b": ROWS[0]}}, "'a' is not a row"),
        ({}, "must hold a mapping"),
        (ROWS, "must hold a mapping"),
        ({"a": ROWS[0, :2]}, "queries have 3 columns, candidates 2"),
        ({"a": ROWS[0], "b": ROWS[1] * np.nan}, "row 1 of candidates holds NaN"),
        ({"a": ROWS[0] * np.float64(1e300)}, "row 0 of candidates holds NaN, infinity or more"),
    ],
)
def test_bad_candidates_are_refused(made_up, tmp_path, targets, told):
    (made_up / f"{GLOBAL}_tgt").write_bytes(pickle.dumps(targets))
    with pytest.raises(DataError, match=f"{GLOBAL}.*{told}"):
        score_one(made_up, tmp_path / "out", GLOBAL)


def test_products_that_overflow_are_refused(made_up, tmp_path):
    for name in (LOCAL, GLOBAL):
        for sign in (1, -1):
            rows = ROWS * np.float32(1e30)
            write_official(made_up, name, (rows, sign * rows, NAMES))
            info = made_up / f"{name}_info.jsonl"
            assert info.is_file()
            with pytest.raises(DataError, match=f"{name}: .*overflows float32.*normalise"):
                score_one(made_up, tmp_path / f"{name}{sign}", name)


# Arrays -----------------------------------------------------------------------------------------


@pytest.fixture
def arrays(evaluated, tmp_path) -> Path:
    """The embeddings of a task, as arrays."""
    for name in (LOCAL, GLOBAL):
        write_arrays(tmp_path / "in", name, task_embeddings(evaluated, name))
    return tmp_path / "in"


def saved(value: Any) -> bytes:
    handle = io.BytesIO()
    np.save(handle, value, allow_pickle=True)
    return handle.getvalue()


def several() -> bytes:
    handle = io.BytesIO()
    np.savez(handle, a=ROWS, b=ROWS)
    return handle.getvalue()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "cannot be read"),
        (b"\x93NUMPY", "cannot be read"),
        (b"PK\x03\x04nonsense", "cannot be read"),
        (b"text", "cannot be read"),
        (saved(ROWS)[:-1], "cannot be read"),
        (saved(ROWS).replace(b"(3, 3)", b"(3, 4)"), "cannot be read"),
        (saved(ROWS).replace(b"(3, 3), }", b"(3, 3), ("), "cannot be read"),
        (saved(ROWS).replace(b"'<f4'", b"'zzz'"), "cannot be read"),
        (saved(np.array([Calls(os.system, "touch HACKED")], dtype=object)), "cannot be read"),
        (several(), "several arrays"),
        (saved(np.eye(3, dtype=np.int32)), "must be float"),
        (saved(np.array("x")), "must be float"),
        (saved(ROWS[0]), "must be float"),
        (saved(ROWS[:0]), "must be float"),
    ],
)
@pytest.mark.parametrize("side", ["queries", "candidates"])
def test_bad_arrays_are_refused(arrays, miniature, tmp_path, monkeypatch, side, data, told):
    monkeypatch.chdir(tmp_path)
    (arrays / GLOBAL / f"{side}.npy").write_bytes(data)
    with pytest.raises(DataError, match=rf"{GLOBAL}.*({told})"):
        score_one(arrays, tmp_path / "out", GLOBAL, miniature)
    assert not (tmp_path / "HACKED").exists()


def test_arrays_that_do_not_fit_are_refused(arrays, evaluated, miniature, tmp_path):
    queries, candidates, names = task_embeddings(evaluated, GLOBAL)
    own = arrays / GLOBAL

    def refused(told: str, **changed: Any) -> None:
        given = {"queries": queries, "candidates": candidates, **changed}
        for side, value in given.items():
            np.save(own / f"{side}.npy", value)
        with pytest.raises(DataError, match=rf"{GLOBAL}.*{told}"):
            score_one(arrays, fresh(tmp_path), GLOBAL, miniature)

    count = len(queries)
    refused(f"{count - 1} stored queries, {count} with answers", queries=queries[1:])
    refused("columns", queries=queries[:, :-1])
    refused(f"{len(names)} names for {len(names) - 1} candidates", candidates=candidates[1:])
    broken = queries.clone()
    broken[2, 3] = float("nan")
    refused("row 2 of queries holds NaN", queries=broken)
    refused("overflows float32", queries=queries * 1e30, candidates=candidates * 1e30)
    for name in ("queries.npy", "candidates.npy", "candidates.json"):
        kept = (own / name).read_bytes()
        (own / name).unlink()
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            score_one(arrays, fresh(tmp_path), GLOBAL, miniature)
        (own / name).write_bytes(kept)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", r"candidates\.json cannot be read"),
        ("", r"candidates\.json cannot be read"),
        ("[" * 100_000, r"candidates\.json cannot be read"),
        ("{}", "JSON list of names"),
        ("[null]", "JSON list of names"),
        ("[true]", "JSON list of names"),
        ("[[]]", "JSON list of names"),
        ("[]", "0 names for"),
    ],
)
def test_bad_lists_of_names_are_refused(arrays, miniature, tmp_path, text, told):
    (arrays / GLOBAL / "candidates.json").write_text(text)
    with pytest.raises(DataError, match=rf"{GLOBAL}: .*{told}"):
        score_one(arrays, tmp_path / "out", GLOBAL, miniature)


def test_names_that_are_not_those_of_the_tables_are_refused(
    arrays, evaluated, miniature, tmp_path
):  # fmt: skip
    _, candidates, names = task_embeddings(evaluated, GLOBAL)

    def refused(told: str, rows: torch.Tensor, changed: list[str]) -> None:
        np.save(arrays / GLOBAL / "candidates.npy", rows)
        (arrays / GLOBAL / "candidates.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=rf"{GLOBAL}.*{told}"):
            score_one(arrays, fresh(tmp_path), GLOBAL, miniature)

    refused("1 candidates of the tables have no stored embedding", candidates[1:], names[1:])
    more = torch.cat([candidates, candidates[:1]])
    refused("1 stored candidates are not in the tables, such as 'x'", more, [*names, "x"])
    refused(f"two candidates have the name '{names[3]}'", more, [*names, names[3]])
    # a local task may bring more than its lists name
    _, candidates, names = task_embeddings(evaluated, LOCAL)
    np.save(arrays / LOCAL / "candidates.npy", torch.cat([candidates, candidates[:1]]))
    (arrays / LOCAL / "candidates.json").write_text(json.dumps([*names, "x"]))
    score = score_one(arrays, tmp_path / "local", LOCAL, miniature).tasks[0]
    assert score.scores == RunFolder(evaluated).score(LOCAL).scores


def test_one_repeated_name_of_many_is_named_at_once(tmp_path):
    names = [*map(str, range(50_000)), "49999"]
    write_arrays(tmp_path, GLOBAL, (ROWS, np.ones((len(names), 3), np.float32), names))
    started = time.process_time()
    with pytest.raises(DataError, match="two candidates have the name '49999'"):
        read_stored(tmp_path, tasks(GLOBAL)[0])
    assert time.process_time() - started < 2
