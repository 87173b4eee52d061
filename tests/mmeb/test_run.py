"""Whole evaluations of the miniature: equal scores, the same bytes, and clear ends."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ume_models.errors import DataError, StoreError
from ume_models.mmeb import EvalOptions, ReadOptions, benchmark, evaluate, select_tasks
from ume_models.mmeb.embeddings import task_embeddings
from ume_models.mmeb.progress import Progress
from ume_models.mmeb.results import RunFolder
from ume_models.mmeb.summary import Summary
from ume_models.mmeb.team import LoneTeam

FEW = ("ImageNet-1K", "MSR-VTT", "ViDoSeek-page", "ViDoSeek-doc")
# How long it took, and when files were read: all that may differ between two runs.
OF_THE_RUN = ("timing.json", "media.json", "tables.json")
PROCESSES = Path(__file__).with_name("processes.py")


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file of an evaluation's folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in OF_THE_RUN
    }


def tasks(*names: str):
    return select_tasks(benchmark("MMEB-v2"), names=names or None)


def run(model, root, output, *names: str, **changes) -> Summary:
    chosen = changes.pop("tasks", None) or tasks(*names)
    return evaluate(model, chosen, root, output, **changes)


class Recorder(Progress):
    def __init__(self):
        self.totals, self.done, self.scores, self.embedded_after = None, None, [], []

    def planned(self, totals, done):
        self.totals, self.done = totals, done

    def embedded(self, done, remaining):
        self.embedded_after.append((done, remaining))

    def scored(self, score):
        self.scores.append(score.task)


@pytest.fixture(scope="module")
def few(model, miniature, tmp_path_factory):
    """A finished evaluation of a few tasks."""
    folder = tmp_path_factory.mktemp("few") / "run"
    run(model, miniature, folder, *FEW)
    return folder


@pytest.mark.parametrize("labels", ["fixed", "legacy"])
def test_both_engines_have_the_same_scores(model, reference_model, miniature, tmp_path, labels):
    # All tasks but one: 700 class names say nothing that 50 do not. The other labels concern pages.
    chosen = [task for task in benchmark("MMEB-v2") if task.name not in ("K700", "UCF101")]
    if labels == "legacy":
        chosen = [task for task in chosen if task.legacy_source is not None]
    asked = [*{task.group: task for task in chosen}.values()]  # one of each group: it is slow
    found = [
        run(engine, miniature, tmp_path / name, tasks=tasks, reading=ReadOptions(labels=labels))
        for name, engine, tasks in (("fast", model, chosen), ("slow", reference_model, asked))
    ]
    fast, reference = ({score.task: score for score in summary.tasks} for summary in found)
    assert [*fast] == [task.name for task in chosen]
    assert [*reference] == [task.name for task in asked]
    assert reference.items() <= fast.items()
    if labels == "fixed":
        assert found[0].overall.value > 0.7  # the bundled checkpoint knows these pictures
        assert {score.metric for score in fast.values()} == {"hit@1", "ndcg_linear@5"}
        assert any(score.scores["ndcg_linear@5"] != score.scores["ndcg_exponential@5"]
                   for score in fast.values())  # fmt: skip


def test_label_versions_differ_where_the_labels_were_wrong(model, miniature, few, tmp_path):
    legacy = run(
        model, miniature, tmp_path, *FEW[2:], reading=ReadOptions(labels="legacy")
    )  # fmt: skip
    fixed = RunFolder(few).scores()
    scores = {score.task: score.score for score in legacy.tasks}
    assert scores["ViDoSeek-page"] < fixed["ViDoSeek-page"].score
    assert scores["ViDoSeek-doc"] == fixed["ViDoSeek-doc"].score


def test_embeddings_are_those_of_the_model_and_shared_ones_are_computed_once(model, miniature, few):
    data = {name: read(miniature, name) for name in FEW}
    for name in ("ImageNet-1K", "ViDoSeek-page"):
        queries, candidates, names = task_embeddings(few, name)
        assert names == list(data[name].candidates.names)
        items = [query.item for query in data[name].queries]
        assert torch.allclose(queries, model.encode(items), atol=1e-5)
        items = [data[name].candidates.item(position) for position in range(len(names))]
        assert torch.allclose(candidates, model.encode(items), atol=1e-5)
    stored = [json.loads(path.read_text())["keys"] for path in few.glob("embeddings/*/keys.json")]
    keys = [key for part in stored for key in part]
    assert len(keys) == len(set(keys))
    pages = {*listed(few, "ViDoSeek-page")} & {*listed(few, "ViDoSeek-doc")}
    assert len(pages) > 5  # the same collection, in two repositories


def listed(folder: Path, task: str) -> list[str]:
    rows = json.loads((folder / "tasks" / task / "items.json").read_text())
    return [key for _, key in rows["candidates"]]


def read(root: Path, name: str):
    from ume_models.mmeb.readers import read_task

    return read_task(tasks(name)[0], root, ReadOptions())


def test_rankings_are_those_of_the_embeddings(few, miniature):
    folder = RunFolder(few)
    for name in FEW:
        queries, candidates, names = task_embeddings(few, name)
        data = read(miniature, name)
        for row, ranking in enumerate(folder.rankings(name)):
            scores = candidates @ queries[row]
            allowed = data.queries[row].candidates or names
            order = sorted(
                (names.index(own) for own in dict.fromkeys(allowed)),
                key=lambda column: (-round(float(scores[column]), 6), column),
            )
            assert ranking.prediction[0] == names[order[0]]
            assert {*ranking.prediction} == {*allowed}


def test_a_finished_evaluation_has_nothing_to_do(model, miniature, few):
    before, told = contents(few), Recorder()
    run(model, miniature, few, *FEW, progress=told)
    assert told.done == told.totals and not told.embedded_after
    assert {*told.scores} == {*FEW}
    assert contents(few) == before


def test_tasks_may_come_one_after_the_other(model, miniature, few, tmp_path):
    for name in FEW:
        summary = run(model, miniature, tmp_path, name)
    assert [score.task for score in summary.tasks] == [task.name for task in tasks(*FEW)]
    one, many = RunFolder(tmp_path).scores(), RunFolder(few).scores()
    assert {name: score.score for name, score in one.items()} == {
        name: score.score for name, score in many.items()
    }
    again = Recorder()
    run(model, miniature, tmp_path, *FEW, progress=again)  # all of it is there
    assert not again.embedded_after


def test_the_estimate_rests_on_what_was_measured(model, miniature, tmp_path):
    told = Recorder()
    run(
        model, miniature, tmp_path, "ImageNet-1K", "MSR-VTT",
        options=EvalOptions(shard_sizes={"text": 5, "image": 3, "video": 4}), progress=told,
    )  # fmt: skip
    first, last = told.embedded_after[0][1], told.embedded_after[-1][1]
    assert first.seconds is not None and first.unmeasured
    assert last.seconds == 0 and not last.unmeasured
    assert told.embedded_after[-1][0] == told.totals


def test_other_settings_are_refused_and_named(model, miniature, few, monkeypatch):
    with pytest.raises(StoreError, match=r"limit: None there, 3 now(?s:.*)--overwrite"):
        run(model, miniature, few, *FEW, reading=ReadOptions(limit=3))
    with pytest.raises(StoreError, match="top: 100 there, 20 now"):
        run(model, miniature, few, *FEW, options=EvalOptions(top=20))
    with pytest.raises(StoreError, match="context: 'disc' there, 'none' now"):
        run(model, miniature, few, *FEW, options=EvalOptions(options={"context": "none"}))
    with pytest.raises(TypeError, match="contxt"):
        run(model, miniature, few, *FEW, options=EvalOptions(options={"contxt": "none"}))
    monkeypatch.setattr(type(model), "fingerprint", "another")
    with pytest.raises(StoreError, match="fingerprint"):
        run(model, miniature, few, *FEW)


def test_two_runs_on_one_folder_are_refused(model, miniature, few):
    from ume_models.store import lock_folder, unlock_folder

    lock = lock_folder(few)
    with pytest.raises(StoreError, match="another process is writing"):
        run(model, miniature, few, *FEW)
    unlock_folder(few, lock)


def test_missing_tables_are_named_before_anything_is_embedded(model, miniature, tmp_path):
    root = copy_of(miniature, tmp_path / "data", without="ImageNet-1K")
    with pytest.raises(DataError, match=r"1 of 2 tasks cannot be read(?s:.*)ImageNet-1K"):
        run(model, root, tmp_path / "out", "ImageNet-1K", "OK-VQA")
    assert not (tmp_path / "out" / "embeddings").exists()
    summary = run(
        model, root, tmp_path / "out", "ImageNet-1K", "OK-VQA",
        options=EvalOptions(on_error="skip"),
    )  # fmt: skip
    assert [score.task for score in summary.tasks] == ["OK-VQA"]
    [missing] = summary.missing
    assert missing.task == "ImageNet-1K" and missing.reason
    assert summary.overall.tasks == 1 and summary.overall.of == 2


def copy_of(root: Path, target: Path, without: str = "") -> Path:
    """The data root with links for files, so that single files can be replaced."""
    for path in root.rglob("*"):
        place = target / path.relative_to(root)
        if path.is_file() and not (without and without in path.relative_to(root).as_posix()):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    return target


def test_missing_and_unreadable_media_are_named_and_cost_only_their_tasks(
    model, miniature, tmp_path
):
    root, out = copy_of(miniature, tmp_path / "data"), tmp_path / "out"
    picture = read(root, "ImageNet-1K").queries[2].item.images[0]
    picture.unlink()
    with pytest.raises(DataError, match=f"ImageNet-1K: .*{picture.name}"):
        run(model, root, out, "ImageNet-1K", "MSR-VTT")
    picture.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"ImageNet-1K, query 2: .*what is done is kept"):
        run(model, root, out, "ImageNet-1K", "MSR-VTT")
    skip = EvalOptions(on_error="skip")
    summary = run(model, root, out, "ImageNet-1K", "MSR-VTT", options=skip)
    assert [score.task for score in summary.tasks] == ["MSR-VTT"]
    assert picture.name in summary.missing[0].reason
    # repaired, the task comes back, and only what is new is embedded
    Image.new("RGB", (40, 40), "red").save(picture, format="JPEG")
    told = Recorder()
    summary = run(model, root, out, "ImageNet-1K", "MSR-VTT", options=skip, progress=told)
    assert {score.task for score in summary.tasks} == {"ImageNet-1K", "MSR-VTT"}
    # its shard once more, and the picture as it is now
    assert 1 < sum(told.totals.values()) - sum(told.done.values()) <= 7


def test_a_full_disk_is_named_and_what_is_done_is_kept(model, miniature, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = EvalOptions(shard_sizes={"text": 5, "image": 3, "video": 4})
    import ume_models.store as store

    real, written = store.write_atomically, []

    def full(path, data):
        if path.suffix == ".safetensors":
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            written.append(path)
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_atomically", full)
        with pytest.raises(OSError, match=r"No space left on device.*shard-"):
            run(model, miniature, out, "ImageNet-1K", options=options)
    told = Recorder()
    run(model, miniature, out, "ImageNet-1K", options=options, progress=told)
    assert sum(told.done.values()) >= 6


def test_a_call_that_cannot_read_its_data_takes_nothing_away(model, miniature, tmp_path):
    out = tmp_path / "out"
    run(model, miniature, out, "ImageNet-1K", "MSR-VTT")
    before = contents(out)
    for root, names in (
        (miniature / "image-tasks", ("ImageNet-1K",)),  # one level too deep
        (miniature / "image-tasks", ("ImageNet-1K", "MSR-VTT")),
        (tmp_path / "nothing", ("ImageNet-1K", "MSR-VTT", "CIRR")),
    ):
        for overwrite in (False, True):
            with pytest.raises((DataError, StoreError)):
                run(model, root, out, *names, overwrite=overwrite)
            assert contents(out) == before


def test_what_was_scored_is_not_ranked_again(model, miniature, tmp_path, monkeypatch):
    import ume_models.mmeb.scoring as scoring

    root, out, ranked = copy_of(miniature, tmp_path / "data"), tmp_path / "out", []
    real = scoring.rank_task

    def rank(task, *arguments, **options):
        ranked.append(task.name)
        return real(task, *arguments, **options)

    monkeypatch.setattr(scoring, "rank_task", rank)
    first = run(model, root, out, "ImageNet-1K", "MSR-VTT")
    before = contents(out)
    told = Recorder()
    again = run(model, root, out, "ImageNet-1K", "MSR-VTT", progress=told)
    assert ranked == ["ImageNet-1K", "MSR-VTT"] == told.scores
    assert (again, contents(out)) == (first, before)
    # a damaged score is no score, and one of another picture is another task's
    (out / "tasks" / "MSR-VTT" / "predictions.jsonl").write_text("")
    run(model, root, out, "ImageNet-1K", "MSR-VTT")
    assert contents(out) == before
    Image.new("RGB", (40, 40)).save(read(root, "ImageNet-1K").queries[0].item.images[0], "JPEG")
    run(model, root, out, "ImageNet-1K", "MSR-VTT")
    assert ranked[2:] == ["MSR-VTT", "ImageNet-1K"]


def test_scores_of_tables_that_changed_are_in_no_mean(model, miniature, tmp_path):
    root, out = copy_of(miniature, tmp_path / "data"), tmp_path / "out"
    run(model, root, out, "ImageNet-1K", "MSR-VTT")
    summary = run(model, root, out, "MSR-VTT")
    assert {score.task for score in summary.tasks} == {"ImageNet-1K", "MSR-VTT"}
    [table] = read(root, "ImageNet-1K").files
    os.utime(table, ns=(1, 1))
    summary = run(model, root, out, "MSR-VTT")
    assert [score.task for score in summary.tasks] == ["MSR-VTT"]
    assert f"{table} has changed since" in summary.missing[0].reason
    summary = run(model, root, out, "ImageNet-1K")
    assert {score.task for score in summary.tasks} == {"ImageNet-1K", "MSR-VTT"}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: EvalOptions(top=3), "top must be at least 10"),
        (lambda: EvalOptions(on_error="ignore"), "on_error must be one of 'stop', 'skip'"),
        (lambda: EvalOptions(shard_sizes={"text": 1}), "shard_sizes needs a number"),
        (lambda: ReadOptions(labels="foo"), "labels must be one of 'fixed', 'legacy'"),
        (lambda: ReadOptions(instructions="PLUME"), "instructions must be one of"),
        (lambda: ReadOptions(limit=-1), "limit must be at least 1"),
    ],
)
def test_options_that_are_none_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        wrong()


def test_tasks_of_no_benchmark_are_refused(model, miniature, tmp_path):
    [cirr], [nights] = tasks("CIRR"), select_tasks(benchmark("MMEB-v1"), names=["NIGHTS"])
    for wrong, told in (
        ([cirr, nights], "MMEB-v1 and MMEB-v2: evaluate one"),
        ([cirr, cirr], "CIRR is given twice"),
        ([dataclasses.replace(cirr, name="Mine")], "'Mine' is no task of MMEB-v2"),
    ):
        with pytest.raises(ValueError, match=told):
            run(model, miniature, tmp_path / "out", tasks=wrong)
    # a task of the table with another measure is another one's score
    other = dataclasses.replace(cirr, metric="recall@5")
    first = run(model, miniature, tmp_path / "out", "CIRR").tasks[0]
    second = run(model, miniature, tmp_path / "out", tasks=[other]).tasks[0]
    assert (second.metric, second.score) == ("recall@5", first.scores["recall@5"])


def test_shards_that_show_late_are_waited_for_and_never_forgotten(
    model, miniature, tmp_path, monkeypatch
):
    """A network file system may say for a while that a new file is not there."""
    import ume_models.mmeb.run as run_module
    from ume_models.store import EmbeddingStore

    real, asked = EmbeddingStore.has, []

    def late(self, shard):
        asked.append(shard)
        return len(asked) > 60 and real(self, shard)

    monkeypatch.setattr(run_module, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(EmbeddingStore, "has", late)
    two = LoneTeam()
    two.size = 2
    summary = run(model, miniature, tmp_path / "late", "MSR-VTT", team=two)
    assert [score.task for score in summary.tasks] == ["MSR-VTT"] and len(asked) > 60
    monkeypatch.setattr(run_module, "_SECONDS_UNTIL_SEEN", 0.0)
    monkeypatch.setattr(EmbeddingStore, "has", lambda self, shard: False)
    with pytest.raises(StoreError, match=r"finished shards cannot be seen, such as 0 of .*share"):
        run(model, miniature, tmp_path / "never", "MSR-VTT")


def test_too_little_room_is_told_before_anything_is_embedded(
    model, miniature, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    disk = SimpleNamespace(total=10**12, free=0)
    monkeypatch.setattr("ume_models.disk_space.shutil.disk_usage", lambda folder: disk)
    with pytest.raises(StoreError, match=r"out would get at least .* 0\.0 kB free: make") as no:
        run(model, miniature, out, "ImageNet-1K", "MSR-VTT")
    assert not list(out.rglob("*.safetensors"))
    disk.free = 10**12
    run(model, miniature, out, "ImageNet-1K", "MSR-VTT")
    written = [*out.rglob("*.safetensors"), *out.rglob("predictions.jsonl")]
    size = sum(path.stat().st_size for path in written)
    told = float(re.search(r"least ([\d.]+) kB", str(no.value))[1]) * 1e3
    assert 0.3 * size < told <= size  # little beside it, and nothing refused that would fit
    disk.free = 0
    run(model, miniature, out, "ImageNet-1K", "MSR-VTT")  # everything is there


def test_frames_of_no_video_are_named(model, miniature, tmp_path):
    root = copy_of(miniature, tmp_path / "data")
    frames = read(root, "MSR-VTT").candidates.item(3).video
    for frame in frames:
        frame.unlink()
    for other in frames[0].parent.iterdir():
        other.unlink()
    with pytest.raises(DataError, match=frames[0].parent.name):
        run(model, root, tmp_path / "out", "MSR-VTT")


@pytest.fixture(scope="module")
def uninterrupted(miniature, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert process("kill", miniature, folder, 0, 0) == {"killed": 0, "code": 0}
    return folder


def process(command: str, root: Path, output: Path, *arguments: int) -> dict:
    """What ``processes.py`` printed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONPATH": str(PROCESSES.parents[2]),
    }
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, PROCESSES, command, root, output, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_killed_ten_times_the_bytes_are_the_same(miniature, uninterrupted, tmp_path):
    seed = int.from_bytes(os.urandom(4), "big")
    found = process("kill", miniature, tmp_path / "run", seed, 10)
    assert found == {"killed": 10, "code": 0}, f"seed {seed}"
    assert contents(tmp_path / "run") == contents(uninterrupted), f"seed {seed}"


@pytest.mark.parametrize("size", [2, 3])
def test_processes_together_write_what_one_writes(miniature, uninterrupted, tmp_path, size):
    found = process("team", miniature, tmp_path / "run", size)
    assert found["codes"] == [0] * size, found["told"]
    assert contents(tmp_path / "run") == contents(uninterrupted)


def test_a_dead_process_ends_the_run_and_is_named(miniature, uninterrupted, tmp_path):
    victim = 2
    found = process("team", miniature, tmp_path / "run", 3, victim)
    assert found["codes"][0] == -signal.SIGKILL
    # One that had done its part before has nothing to complain of; the leader waits for all.
    assert {*found["codes"][1:]} <= {0, 1} and found["codes"][1] == 1
    assert len(found["told"]) == found["codes"].count(1)
    victim_name = f"process {found['pids'][victim]}) "
    for told in found["told"]:
        assert told.startswith(f"TeamError: rank {victim} (") and victim_name in told
        assert "start the same command again" in told
    finished = {*(tmp_path / "run").glob("embeddings/*/shard-*.safetensors")}
    assert finished
    kept = {path: path.stat().st_mtime_ns for path in finished}
    assert process("kill", miniature, tmp_path / "run", 0, 0)["code"] == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == kept
    assert contents(tmp_path / "run") == contents(uninterrupted)


def test_an_empty_text_has_the_prompt_of_a_text(model):
    from ume_models.mmeb.embed import _as_embedded
    from ume_models.processing.items import Item

    empty = _as_embedded(Item(id="x"))
    [plan] = model.processor.plan([empty])
    assert plan.header == "text" and plan.error is None
    assert _as_embedded(Item(text="a")) == Item(text="a")
