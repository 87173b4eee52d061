"""Results on disk, intervals of means, and the means of a run."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ume_models.errors import DataError, StoreError
from ume_models.mmeb import results as results_module
from ume_models.mmeb.intervals import mean_interval, resampled_means
from ume_models.mmeb.metrics import Ranking, query_values
from ume_models.mmeb.results import RunFolder, TaskScore, score_task
from ume_models.mmeb.score_file import ScoreFile
from ume_models.mmeb.summary import Missing, Summary, summarise
from ume_models.mmeb.tasks import Modality, Source, Task

SOURCE = Source("someone/tables", None, "test")


def task(
    name: str, group: str = "I-CLS", modality: Modality = "image", metric: str = "hit@1"
) -> Task:
    return Task(name, "MMEB-v2", modality, group, "image_cls", "local", metric, SOURCE, ())


def classified(right: Sequence[bool]) -> list[Ranking]:
    """One query each, whose answer "yes" comes first or second."""
    orders = [("yes", "no") if first else ("no", "yes") for first in right]
    return [
        Ranking(str(number), order, (0.75, 0.5), ("yes",)) for number, order in enumerate(orders)
    ]


GRADED = [
    Ranking("q0", ("17", "3"), (0.1, 0.05), ("17", "3", "8"), (3.0, 2.0, 1.0), (17, 3, 8)),
    Ranking("q1", ("8", "17"), (0.3, 0.3), ("3",), (1.0,), (3,)),
    Ranking("q2", (), (), ("a\u2028b\n\x85", "日本", "half a pair: \ud83d"), None, ()),
]
PAGES = task("pages", "ViDoRe", "visdoc", "ndcg_linear@5")


def test_a_score_by_hand() -> None:
    rankings = [*classified([True, True, False]), Ranking("t", ("no", "yes"), (1, 1), ("yes",))]
    score = score_task(task("animals"), rankings, 2)
    assert (score.score, score.scores["hit@1"], score.scores["hit@5"]) == (0.5, 0.5, 1.0)
    assert score.scores["mrr@10"] == 0.75
    assert (score.queries, score.candidates, score.ties, score.legacy) == (4, 2, 1, False)
    assert (score.task, score.modality, score.group) == ("animals", "image", "I-CLS")
    assert score.interval.low <= 0.5 <= score.interval.high


def test_metrics_of_other_depths_are_scored() -> None:
    score = score_task(task("deep", metric="recall@50"), classified([True, False]), 2)
    assert score.score == score.scores["recall@50"] == 1.0
    assert "recall@10" in score.scores


def test_the_official_pairing_is_kept_with_the_score(tmp_path: Path) -> None:
    right, legacy = (score_task(PAGES, GRADED, 9, legacy=flag) for flag in (False, True))
    # 17 has grade 3 in the tables and 2 by the order of a set, 3 has 2 and 1
    ideal = 3 + 2 / np.log2(3) + 1 / 2
    assert right.score == pytest.approx((3 + 2 / np.log2(3)) / ideal / 3)
    assert legacy.score == pytest.approx((2 + 1 / np.log2(3)) / ideal / 3)
    folder = RunFolder(tmp_path)
    folder.write(legacy, GRADED)
    assert folder.values("pages").mean() == pytest.approx(legacy.score)
    assert folder.score("pages") == legacy


def test_what_cannot_be_scored_is_named() -> None:
    with pytest.raises(DataError, match="animals: no query"):
        score_task(task("animals"), [], 2)
    with pytest.raises(DataError, match="animals: two queries have the id '0'"):
        score_task(task("animals"), classified([True]) * 2, 2)


def test_results_survive_the_disk(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    score = score_task(PAGES, GRADED, 9)
    folder.write(score, GRADED)
    assert folder.finished("pages")
    assert not folder.finished("others")
    assert folder.scores() == {"pages": score}
    found, values = folder.rankings_and_values("pages")
    assert [replace(query, scores=()) for query in found] == [
        replace(query, scores=()) for query in GRADED
    ]
    for mine, theirs in zip(GRADED, found, strict=True):
        assert theirs.scores == tuple(map(float, np.float32(mine.scores)))
    np.testing.assert_array_equal(values, query_values(GRADED, "ndcg_linear@5"))
    assert folder.rankings("pages") == found
    # what was read gives the same bytes again
    before = {path: path.read_bytes() for path in folder.path.rglob("*.json*")}
    assert {path.name for path in before} == {"scores.json", "predictions.jsonl"}
    folder.write(folder.score("pages"), found)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_the_lines_have_the_official_names(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write(score_task(PAGES, GRADED, 9), GRADED)
    path = tmp_path / "tasks" / "pages" / "predictions.jsonl"
    first = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    best = 3 + 2 / np.log2(3) + 1 / 2
    assert first.pop("value") == pytest.approx((best - 1 / 2) / best)
    assert first == {
        "id": "q0",
        "prediction": ["17", "3"],
        "scores": [0.1, 0.05],
        "label": [17, 3, 8],
        "rel_scores": [3.0, 2.0, 1.0],
    }


def test_scores_are_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the two files, a task is not done, also when it was done before."""
    folder = RunFolder(tmp_path)
    old, new = classified([True, False]), classified([True, True])
    real = results_module.write_atomically

    def full_disk(path: Path, data: bytes) -> None:
        if path.name == "scores.json":
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(results_module, "write_atomically", full_disk)
    with pytest.raises(OSError, match="No space"):
        folder.write(score_task(task("animals"), old, 2), old)
    assert not folder.finished("animals")
    assert folder.scores() == {}
    monkeypatch.undo()
    folder.write(score_task(task("animals"), old, 2), old)
    monkeypatch.setattr(results_module, "write_atomically", full_disk)
    with pytest.raises(OSError, match="No space"):
        folder.write(score_task(task("animals"), new, 2), new)
    assert not folder.finished("animals")
    with pytest.raises(StoreError, match=r"predictions\.jsonl is not what the scores"):
        folder.values("animals")


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "other"}', "\xff", ""])
def test_damaged_scores_are_named(tmp_path: Path, damage: str) -> None:
    folder, rankings = RunFolder(tmp_path), classified([True])
    folder.write(score_task(task("animals"), rankings, 2), rankings)
    path = tmp_path / "tasks" / "animals" / "scores.json"
    path.write_bytes(damage.encode("latin-1"))
    with pytest.raises(StoreError, match=r"animals.scores\.json is .*ume eval"):
        folder.scores()
    assert not folder.finished("animals")


@pytest.mark.parametrize(
    "field", ["score", "interval", "predictions_sha256", "made_from", "sha256"]
)
def test_missing_fields_are_named(tmp_path: Path, field: str) -> None:
    folder, rankings = RunFolder(tmp_path), classified([True])
    folder.write(score_task(task("animals"), rankings, 2), rankings)
    path = tmp_path / "tasks" / "animals" / "scores.json"
    content = json.loads(path.read_bytes())
    del content[field]
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=f"scores.json is damaged .*{field}"):
        folder.score("animals")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"score": 0.5', '"score": 0.123'),
        ('"score": 0.5', '"score": NaN'),
        ('"queries": 2', '"queries": 3'),
        ('"made_from": "tables"', '"made_from": "others"'),
        ('"legacy": false', '"legacy": false,\n "colour": "blue"'),
    ],
)
def test_an_edited_score_is_noticed(tmp_path: Path, before: str, after: str) -> None:
    folder, rankings = RunFolder(tmp_path), classified([True, False])
    folder.write(score_task(task("animals"), rankings, 2), rankings, made_from="tables")
    path = tmp_path / "tasks" / "animals" / "scores.json"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    assert not folder.finished("animals")
    with pytest.raises(StoreError, match=r"scores\.json is damaged: .*checksum.*ume eval"):
        folder.scores()
    # other spaces are no other score
    path.write_text(json.dumps(json.loads(text)))
    assert folder.finished("animals")


def test_a_copy_of_another_task_is_noticed(tmp_path: Path) -> None:
    folder, rankings = RunFolder(tmp_path), classified([True, False])
    folder.write(score_task(task("animals"), rankings, 2), rankings)
    shutil.copytree(tmp_path / "tasks" / "animals", tmp_path / "tasks" / "plants")
    assert folder.finished("animals") and not folder.finished("plants")
    with pytest.raises(StoreError, match=r"plants.scores\.json is the score of animals; delete"):
        folder.scores()


def test_a_score_tells_what_it_was_made_from(tmp_path: Path) -> None:
    folder, rankings = RunFolder(tmp_path), classified([True, False])
    score = score_task(task("animals"), rankings, 2)
    folder.write(score, rankings)
    assert folder.made_from("animals") == ""
    folder.write(score, rankings, made_from="a1b2")
    assert folder.made_from("animals") == "a1b2"
    assert folder.score("animals") == score
    with pytest.raises(StoreError, match="missing"):
        folder.made_from("plants")


def test_discarded_results_are_gone_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rankings = RunFolder(tmp_path), classified([True, False])
    for name in ("animals", "plants"):
        folder.write(score_task(task(name), rankings, 2), rankings)
    listing = tmp_path / "tasks" / "animals" / "items.json"
    listing.write_text("{}")
    real, removed = Path.unlink, []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name)
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    folder.discard("animals")
    assert removed == ["scores.json", "predictions.jsonl"]  # stopped between them: not done
    assert [*listing.parent.iterdir()] == [listing]
    assert [*folder.scores()] == ["plants"]
    folder.discard("animals")
    folder.discard("never there")
    with pytest.raises(ValueError, match="folder"):
        folder.discard("..")


def test_the_tasks_that_a_summary_lists_as_missing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.missing() == {}
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary().to_json()))
    assert folder.missing() == {"scenes": "no tables", "moments": "was not run"}
    for damage in ("{", "{}", '{"missing": [1]}', '{"missing": null}', "[" * 100_000):
        path.write_text(damage)
        with pytest.raises(StoreError, match=r"summary\.json .*ume eval"):
            folder.missing()


def signed(folder: RunFolder, name: str, lines: Sequence[str]) -> None:
    """Replace the predictions of a task, checksums included."""
    path = folder.path / "tasks" / name
    data = "".join(line + "\n" for line in lines).encode()
    found = ScoreFile.read(path / "scores.json")
    (path / "predictions.jsonl").write_bytes(data)
    found = replace(found, predictions_sha256=hashlib.sha256(data).hexdigest())
    (path / "scores.json").write_bytes(found.to_bytes())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"id": None}, "KeyError.*id"),
        ({"id": 3}, "id.*has a int"),
        ({"value": "0.5"}, "value.*has a str"),
        ({"value": True}, "value.*has a bool"),
        ({"value": float("nan")}, "not finite"),
        ({"prediction": "yes"}, "prediction.*has a str"),
        ({"scores": [0.75, [0.5]]}, "scores.*has a list"),
        ({"scores": [0.75]}, "1 scores for 2"),
        ({"rel_scores": [10**400]}, "OverflowError"),
        ({"label": [None]}, "label.*has a NoneType"),
    ],
)
def test_predictions_with_a_right_checksum_are_looked_at(
    tmp_path: Path, change: dict[str, object], told: str
) -> None:
    folder, rankings = RunFolder(tmp_path), classified([True, False])
    folder.write(score_task(task("animals"), rankings, 2), rankings)
    lines = (tmp_path / "tasks" / "animals" / "predictions.jsonl").read_text().splitlines()
    fields = {**json.loads(lines[1]), **change}
    if change == {"id": None}:
        del fields["id"]
    signed(folder, "animals", [lines[0], json.dumps(fields)])
    for read in (folder.values, folder.rankings):
        with pytest.raises(StoreError, match=f"line 2 is not a prediction .*{told}"):
            read("animals")
    signed(folder, "animals", lines[:1])
    assert not folder.finished("animals")
    with pytest.raises(StoreError, match="1 lines for 2 queries"):
        folder.values("animals")
    signed(folder, "animals", [lines[0], "[" * 100_000])
    with pytest.raises(StoreError, match="line 2 is not a prediction"):
        folder.values("animals")


def test_one_repeated_id_of_many_is_named_at_once() -> None:
    rankings = [Ranking(str(n), ("a",), (), ("a",)) for n in range(50_000)]
    rankings.append(rankings[-1])
    started = time.process_time()
    with pytest.raises(DataError, match="two queries have the id '49999'"):
        score_task(task("animals"), rankings, 1)
    assert time.process_time() - started < 2  # counted for each name, it took half a minute


def test_one_flipped_bit_of_the_predictions_is_noticed(tmp_path: Path) -> None:
    folder, rankings = RunFolder(tmp_path), classified([True, False])
    folder.write(score_task(task("animals"), rankings, 2), rankings)
    path = tmp_path / "tasks" / "animals" / "predictions.jsonl"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(bytes(data))
    assert not folder.finished("animals")
    path.unlink()
    with pytest.raises(StoreError, match=r"predictions\.jsonl is missing"):
        folder.rankings("animals")


def test_what_must_not_be_written(tmp_path: Path) -> None:
    folder, rankings = RunFolder(tmp_path), classified([True, False])
    score = score_task(task("animals"), rankings, 2)
    with pytest.raises(ValueError, match="a score of 2, 1 rankings"):
        folder.write(score, rankings[:1])
    with pytest.raises(ValueError, match="folder"):
        folder.write(replace(score, task="../animals"), rankings)
    broken = [replace(query, scores=(float("nan"), 0.0)) for query in rankings]
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write(score, broken)
    assert not list(tmp_path.rglob("*.json*"))


def test_settings_of_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(StoreError, match=r"run\.json is missing"):
        folder.settings()
    manifest = {"format": "ume-eval", "model": "m", "settings": {"dtype": "float32"}, "tasks": []}
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    assert folder.settings() == {"model": "m", "dtype": "float32"}
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(StoreError, match="no settings"):
        folder.settings()


def test_intervals_are_scipys_percentile_bootstrap() -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy's bootstrap is not here")
    values = np.random.default_rng(3).beta(2, 5, size=400)
    mine = mean_interval(values, "task")
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    error = values.std() / np.sqrt(400)
    # two bootstraps of 1000 samples differ by about a tenth of the standard error at the ends
    assert tuple(mine) == pytest.approx((theirs.low, theirs.high), abs=error / 3)
    assert mine == mean_interval(values, "task")
    assert mine != mean_interval(values, "another task")


def test_intervals_cover_what_they_should() -> None:
    """Of 200 samples of 60 coin tosses, some 95 % have the true mean in their interval."""
    tosses = (np.random.default_rng(0).random((200, 60)) < 0.3).astype(np.float64)
    intervals = [mean_interval(toss, str(number)) for number, toss in enumerate(tosses)]
    covered = np.mean([low <= 0.3 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.99


def test_drawing_in_parts_covers_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ume_models.mmeb.intervals._CELLS", 250)
    means = resampled_means(np.arange(100.0), "parts", resamples=11)
    assert means.shape == (11,)
    assert np.all((means > 20) & (means < 80))
    assert len(set(means)) > 5
    with pytest.raises(ValueError, match="at least one value"):
        resampled_means(np.array([]), "nothing")


TASKS = [
    task("animals"),
    task("plants"),
    task("scenes"),
    task("actions", "V-CLS", "video"),
    task("moments", "V-MRET", "video"),
]
RIGHT = {
    "animals": [True, True, True, False],
    "plants": [True, False],
    "actions": [False, False, True, False, False],
}


def summary() -> Summary:
    rankings = {name: classified(right) for name, right in RIGHT.items()}
    scores = {t.name: score_task(t, rankings[t.name], 2) for t in TASKS if t.name in rankings}
    values = {name: query_values(found, "hit@1") for name, found in rankings.items()}
    return summarise(TASKS, scores, values, {"scenes": "no tables"}, {"dtype": "float32"})


def test_means_leave_out_what_did_not_run() -> None:
    found = summary()
    assert [score.task for score in found.tasks] == ["animals", "plants", "actions"]
    assert found.missing == [Missing("scenes", "no tables"), Missing("moments", "was not run")]
    assert list(found.groups) == ["I-CLS", "V-CLS"]
    images, videos = found.modalities["image"], found.modalities["video"]
    assert (images.value, images.tasks, images.of) == ((0.75 + 0.5) / 2, 2, 3)
    assert (videos.value, videos.tasks, videos.of) == (pytest.approx(0.2), 1, 2)
    assert found.overall is not None
    assert found.overall.value == pytest.approx((0.75 + 0.5 + 0.2) / 3)
    assert (found.overall.tasks, found.overall.of) == (3, 5)


def test_intervals_of_means_resample_within_tasks() -> None:
    """Against the normal approximation: variances of the tasks' means add up, each by itself."""
    generator = np.random.default_rng(2)
    right = {
        "animals": generator.random(300) < 0.9,
        "plants": generator.random(100) < 0.2,
        "actions": generator.random(200) < 0.5,
    }
    rankings = {name: classified(list(hits)) for name, hits in right.items()}
    scores = {t.name: score_task(t, rankings[t.name], 2) for t in TASKS if t.name in rankings}
    values = {name: hits.astype(np.float64) for name, hits in right.items()}
    found = summarise(TASKS, scores, values)
    error = np.sqrt(sum(hits.var() / len(hits) for hits in right.values())) / 3
    mean = np.mean([hits.mean() for hits in right.values()])
    assert found.overall is not None
    expected = (mean - 1.96 * error, mean + 1.96 * error)
    assert tuple(found.overall.interval) == pytest.approx(expected, abs=error / 4)
    # one task: its group's interval is its own
    assert found.groups["V-CLS"].interval == found.tasks[2].interval


def test_a_summary_survives_json() -> None:
    found = summary()
    again = Summary.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    with pytest.raises(StoreError, match="not the summary"):
        Summary.from_json({"tasks": []})


def test_a_run_without_any_result_has_no_means() -> None:
    found = summarise(TASKS, {}, {})
    assert found.overall is None
    assert not found.groups
    assert len(found.missing) == 5
    assert Summary.from_json(found.to_json()) == found


def test_values_that_are_not_those_of_the_score_are_refused() -> None:
    score = score_task(TASKS[0], classified([True, False]), 2)
    with pytest.raises(ValueError, match="animals: 2 values"):
        summarise(TASKS, {"animals": score}, {"animals": np.ones(3)})


def test_further_keys_of_a_newer_version_are_ignored() -> None:
    score = score_task(TASKS[0], classified([True]), 2)
    assert TaskScore.from_json({**score.to_json(), "colour": "blue"}) == score
