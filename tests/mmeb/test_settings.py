"""The manifest of an evaluation: what is refused, and what --overwrite may touch."""

from __future__ import annotations

import json

import pytest

from ume_models.errors import StoreError
from ume_models.mmeb import settings
from ume_models.mmeb.dataset import ReadOptions
from ume_models.mmeb.settings import EvalOptions


def manifest(**changes):
    fields = {
        "package_version": "1",
        "model": "m",
        "fingerprint": "f",
        "benchmark": "MMEB-v2",
        "tasks": ["CIRR"],
        "data": "/data",
        "encoding": {"latent_steps": 8, "dtype": "float32"},
        "reading": ReadOptions(),
        "options": EvalOptions(),
        "versions": {},
    }
    return settings.describe(**{**fields, **changes})


def results_in(folder):
    (folder / "tasks" / "CIRR").mkdir(parents=True)
    (folder / "tasks" / "CIRR" / "scores.json").write_text("{}")
    (folder / "embeddings" / "text-1").mkdir(parents=True)
    (folder / "embeddings" / "text-1" / "keys.json").write_text("{}")
    (folder / "summary.json").write_text("{}")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fingerprint": "g"}, "fingerprint: 'f' there, 'g' now"),
        ({"package_version": "2"}, "package_version"),
        ({"encoding": {"latent_steps": 4, "dtype": "float32"}}, "latent_steps: 8 there, 4 now"),
        ({"reading": ReadOptions(labels="legacy")}, "labels: 'fixed' there, 'legacy' now"),
        ({"reading": ReadOptions(instructions="vlm2vec")}, "instructions"),
        ({"reading": ReadOptions(frames=64)}, "frames: None there, 64 now"),
        (
            {"encoding": {"latent_steps": 8, "dtype": "float32", "profile": "official"}},
            "profile: 'before-profiles' there, 'official' now",
        ),
        ({"options": EvalOptions(legacy_ndcg=True)}, "legacy_ndcg"),
        ({"benchmark": "M-BEIR"}, "benchmark"),
    ],
)
def test_what_changes_results_is_refused_and_named(tmp_path, changes, named):
    settings.begin(tmp_path, manifest(), overwrite=False)
    results_in(tmp_path)
    with pytest.raises(StoreError, match=named):
        settings.begin(tmp_path, manifest(**changes), overwrite=False)
    settings.begin(tmp_path, manifest(**changes), overwrite=True)
    assert settings.read_manifest(tmp_path) == json.loads(json.dumps(manifest(**changes)))


def test_what_does_not_is_taken(tmp_path):
    settings.begin(tmp_path, manifest(), overwrite=False)
    later = manifest(
        tasks=["CIRR", "OVEN"], data="/moved", model="n", reading=ReadOptions(download=True)
    )
    settings.begin(tmp_path, later, overwrite=False)
    assert settings.read_manifest(tmp_path)["tasks"] == ["CIRR", "OVEN"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_of_others_are_never_removed(tmp_path, overwrite):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="not the output of `ume eval`"):
        settings.begin(tmp_path, manifest(), overwrite=overwrite)
    assert (tmp_path / "tasks" / "thesis.txt").read_text() == "years of work"


def test_overwriting_removes_results_and_nothing_else(tmp_path):
    settings.begin(tmp_path, manifest(), overwrite=False)
    results_in(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tasks" / "CIRR" / "notes.txt").write_text("mine")
    (tmp_path / "embeddings" / "mine").mkdir()
    (tmp_path / "embeddings" / "mine" / "a.npy").write_text("mine")
    settings.begin(tmp_path, manifest(fingerprint="g"), overwrite=True)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"run.json", "notes.txt", "tasks/CIRR/notes.txt", "embeddings/mine/a.npy"}


def test_a_stopped_removal_leaves_no_store_without_its_keys(tmp_path, monkeypatch):
    settings.begin(tmp_path, manifest(), overwrite=False)
    results_in(tmp_path)
    store = tmp_path / "embeddings" / "text-1"
    for name in ("manifest.json", "shard-00000-of-00001.safetensors", "shard-00000-of-00001.json"):
        (store / name).write_text("{}")
    removed = []
    monkeypatch.setattr(settings.shutil, "rmtree", lambda path: removed.append(path))
    settings.begin(tmp_path, manifest(), overwrite=True)
    assert removed == [store] and [path.name for path in store.iterdir()] == ["keys.json"]


def test_a_removal_that_was_stopped_is_gone_on_with(tmp_path, monkeypatch):
    settings.begin(tmp_path, manifest(), overwrite=False)
    results_in(tmp_path)

    def stop(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(settings.shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            settings.begin(tmp_path, manifest(fingerprint="g"), overwrite=True)
    assert settings.earlier_manifest(tmp_path) is None
    settings.begin(tmp_path, manifest(fingerprint="g"), overwrite=False)
    assert settings.read_manifest(tmp_path)["fingerprint"] == "g"
    assert not (tmp_path / "embeddings").exists() and not (tmp_path / "tasks").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ('{"format": "ume-eval", "format_version": 9}', "format version 9"),
        ('{"format": "ume-eval", "format_version": 1, "settings": 5}', "'settings'"),
        ('{"format": "ume-eval", "format_version": 1, "settings": {}, "tasks": 5}', "'tasks'"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        settings.read_manifest(tmp_path)
    with pytest.raises(StoreError, match=message):
        settings.begin(tmp_path, manifest(), overwrite=False)


def test_a_first_attempt_that_left_nothing_binds_nobody(tmp_path):
    settings.begin(tmp_path, manifest(), overwrite=False)
    later = manifest(fingerprint="g", tasks=["OVEN"])
    assert settings.joined(tmp_path, later, overwrite=False)["tasks"] == ["OVEN"]
    settings.begin(tmp_path, later, overwrite=False)
    assert settings.read_manifest(tmp_path)["fingerprint"] == "g"


def test_tasks_add_up_on_the_same_data_only(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    out = tmp_path / "out"
    out.mkdir()
    settings.begin(out, manifest(data=str(tmp_path / "data")), overwrite=False)
    results_in(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    through_link = manifest(tasks=["OVEN"], data=str(tmp_path / "link"))
    assert settings.joined(out, through_link, overwrite=False)["tasks"] == ["OVEN", "CIRR"]
    mistyped = manifest(tasks=["OVEN"], data=str(tmp_path))
    with pytest.raises(StoreError, match=r"scores of 1 other tasks on the data of .*name those"):
        settings.joined(out, mistyped, overwrite=False)
    # the same tasks on data that moved: their digests tell what counts
    moved = manifest(data=str(tmp_path))
    assert settings.joined(out, moved, overwrite=False) == moved
    assert settings.joined(out, mistyped, overwrite=True) == mistyped
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
