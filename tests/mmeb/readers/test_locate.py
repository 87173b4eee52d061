"""Finding tables: what a README declares, the hub's names, the hub's cache, and the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ume_models.errors import DataError
from ume_models.mmeb.locate import find_tables, locate, media_folder, misplaced
from ume_models.mmeb.mmeb_v2 import MMEB_V2
from ume_models.mmeb.tasks import Source


def write(folder: Path, *names: str, readme: str | None = None) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    if readme is not None:
        (folder / "README.md").write_text(f"---\nlicense: mit\n{readme}\n---\n# Data\n")


def found(folder: Path, config: str | None, split: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_tables(folder, config, split)]


@pytest.mark.parametrize(
    ("names", "config", "split", "expected"),
    [
        (["data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet",
          "data/train-00000-of-00001.parquet"], None, "test",
         ["data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet"]),
        (["VOC2007/test-00000-of-00001.parquet", "SUN397/test-00000-of-00001.parquet"], "VOC2007",
         "test", ["VOC2007/test-00000-of-00001.parquet"]),
        (["corpus/test/0.parquet", "corpus/train/0.parquet"], "corpus", "test",
         ["corpus/test/0.parquet"]),
        (["qrels/part.jsonl"], "qrels", "train", ["qrels/part.jsonl"]),
        (["test.jsonl"], None, "test", ["test.jsonl"]),
        (["HMDB51.jsonl"], None, "test", ["HMDB51.jsonl"]),
        (["MSCOCO-test.parquet", "MSCOCO_i2t-test.parquet", "MSCOCO_t2i.parquet"], "MSCOCO",
         "test", ["MSCOCO-test.parquet"]),
        (["MSCOCO-test.parquet", "MSCOCO_i2t-test.parquet", "MSCOCO_t2i.parquet"], "MSCOCO_t2i",
         "test", ["MSCOCO_t2i.parquet"]),
        (["RefCOCO-testA.parquet"], "RefCOCO", "test", []),
        (["test_1k/test.parquet", "test_1k/train.parquet"], "test_1k", "test",
         ["test_1k/test.parquet"]),
        (["data/validation.json"], None, "val", ["data/validation.json"]),
        (["json/action_count.json", "json/action_antonym.json"], "action_count", "train",
         ["json/action_count.json"]),
        (["a.csv", "a.parquet"], None, "train", ["a.parquet"]),
        (["data/train.parquet"], None, "test", []),
        (["dataset_infos.json", "notes.txt"], None, "test", []),
        (["other/test.parquet"], "MC", "test", []),
    ],
)  # fmt: skip
def test_names_that_the_hub_uses(
    tmp_path: Path, names: list[str], config: str | None, split: str, expected: list[str]
) -> None:
    write(tmp_path, *names)
    assert found(tmp_path, config, split) == expected


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        ("    data_files:\n    - split: test\n      path: x/b-*\n    - split: train\n      path: y",
         "test", ["x/b-1.jsonl", "x/b-2.jsonl"]),
        ("    data_files:\n    - split: test\n      path: [x/b-2.jsonl, x/b-1.jsonl]", "test",
         ["x/b-2.jsonl", "x/b-1.jsonl"]),
        ("    data_files: x/a.json", "train", ["x/a.json"]),
        ("    data_files: [x/a.json]", "train", ["x/a.json"]),
        ("    data_files:\n      test: x/b-*", "test", ["x/b-1.jsonl", "x/b-2.jsonl"]),
        ("    data_dir: x\n    data_files: a.json", "train", ["x/a.json"]),
        ("    data_files:\n    - split: test\n      path: x", "test",
         ["x/a.json", "x/b-1.jsonl", "x/b-2.jsonl"]),
        ("    data_files:\n    - split: dev\n      path: x/b-*", "test", []),
    ],
)  # fmt: skip
def test_declarations_of_a_readme(
    tmp_path: Path, files: str, split: str, expected: list[str]
) -> None:
    pytest.importorskip("yaml")
    readme = f"configs:\n  - config_name: other\n    data_files: z\n  - config_name: it\n{files}"
    write(tmp_path, "x/a.json", "x/b-1.jsonl", "x/b-2.jsonl", "it/test.parquet", readme=readme)
    assert found(tmp_path, "it", split) == expected


def test_the_configuration_without_a_name(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    write(tmp_path, "a.json", readme="configs:\n- config_name: only\n  data_files: a.json")
    assert found(tmp_path, None, "train") == ["a.json"]
    both = "configs:\n- config_name: a\n  data_files: b.json\n- config_name: default\n"
    write(tmp_path, readme=f"{both}  data_files: a.json")
    assert found(tmp_path, None, "train") == ["a.json"]
    write(tmp_path, readme="configs: [")
    with pytest.raises(DataError, match=r"README\.md is not YAML"):
        find_tables(tmp_path, None, "train")


def test_a_declared_file_that_is_not_there_may_have_another_name(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    readme = "configs:\n- config_name: MC\n  data_files:\n  - split: test\n    path: raw/mc*"
    write(tmp_path, "MC/test.jsonl", readme=readme)
    assert found(tmp_path, "MC", "test") == ["MC/test.jsonl"]


def test_what_datasets_saves(tmp_path: Path) -> None:
    for folder in (tmp_path / "plain", tmp_path / "dict/test"):
        write(folder, "data-00001-of-00002.arrow", "data-00000-of-00002.arrow", "dataset_info.json")
        files = [{"filename": f"data-0000{n}-of-00002.arrow"} for n in (0, 1)]
        (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert found(tmp_path / "plain", None, "test") == names
    assert found(tmp_path / "dict", None, "test") == [f"test/{name}" for name in names]
    assert found(tmp_path / "dict", None, "train") == []
    for content in ("{}", '{"_data_files": [{"filename": 3}]}', '{"_data_files": 3}', "["):
        (tmp_path / "plain/state.json").write_text(content)
        with pytest.raises(DataError, match=r"state\.json cannot be read.*save the dataset again"):
            find_tables(tmp_path / "plain", None, "test")


@pytest.mark.parametrize(
    "readme",
    [
        "configs: 5",
        "configs: [{config_name: default, data_files: 7}]",
        "configs: [{config_name: default, data_files: {test: ''}}]",
        "configs: [{config_name: default, data_files: [{split: test, path: ''}]}]",
        "configs: [{config_name: default, data_files: [{split: test, path: [1]}]}]",
        "configs: [{config_name: default, data_files: [{split: test, path: 4}]}]",
        "configs: [{config_name: default, data_files: [{split: test, path: 'a**b'}]}]",
        f"configs: [{{config_name: default, data_files: [{{split: test, path: {'a' * 300}}}]}}]",
    ],
)
def test_heads_that_declare_no_files_are_named(tmp_path: Path, readme: str) -> None:
    pytest.importorskip("yaml")
    write(tmp_path, "test.jsonl", readme=readme)
    with pytest.raises(DataError, match=r"README\.md does not declare files .*get the file again"):
        find_tables(tmp_path, None, "test")


def test_places_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    source = Source("owner/Name", None, "test", ("tasks/Name", "tasks/data/name.jsonl"))
    with pytest.raises(DataError, match=r"no tables of owner/Name, split 'test', in .*tasks/Name "):
        locate(source, tmp_path)
    places = ["owner/Name/test.jsonl", "Name/test.jsonl", "tasks/data/name.jsonl",
              "tasks/Name/test.jsonl"]  # fmt: skip
    for place in places:
        write(tmp_path, place)
        assert locate(source, tmp_path) == [tmp_path / place]


def test_numbered_files_must_all_be_there(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path, f"data/test-{number:05d}-of-00003.parquet")
    write(tmp_path, "data/train-00001-of-00002.parquet")  # of another split
    assert len(find_tables(tmp_path, None, "test")) == 3
    (tmp_path / "data/test-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"data lacks test-00001-of-00003\.parquet \(1 of 3 files"):
        find_tables(tmp_path, None, "test")
    write(tmp_path, "data/test-00001-of-00003.parquet")
    write(tmp_path, "data/test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"test-….parquet of 1 and of 3: keep those of one version"):
        find_tables(tmp_path, None, "test")


def test_a_root_of_another_level_is_noticed(tmp_path: Path) -> None:
    tasks = [task for task in MMEB_V2 if task.name in ("CIRR", "MSR-VTT")]
    root = tmp_path / "MMEB-V2"
    (root / "image-tasks" / "CIRR").mkdir(parents=True)
    assert misplaced(root, tasks) == ""
    named = "has no folder image-tasks or video-tasks; did you mean "
    for other in (root / "image-tasks", tmp_path):
        assert misplaced(other, tasks) == f"{other} {named}{root}?"
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    assert misplaced(tmp_path / "empty" / "folder", tasks).endswith("image-tasks or video-tasks")
    assert misplaced(tmp_path / "nowhere", tasks) == f"{tmp_path / 'nowhere'} is not a folder"


def test_the_hub_is_asked_last_and_only_if_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("yaml")
    calls: list[dict] = []

    def snapshot_download(repository: str, **options: object) -> str:
        calls.append({"repository": repository, **options})
        if options.get("local_files_only") and not (tmp_path / "hub").exists():
            raise OSError("not cached")
        readme = "configs:\n- config_name: MC\n  data_files:\n  - split: test\n    path: MC/t-*"
        write(tmp_path / "hub", "MC/t-0.parquet", readme=readme)
        return str(tmp_path / "hub")

    hub = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    source = Source("owner/Name", "MC", "test", ("tasks/Name",))
    with pytest.raises(DataError, match="no tables of owner/Name, configuration 'MC'"):
        locate(source, tmp_path)
    assert [call["local_files_only"] for call in calls] == [True]
    assert locate(source, tmp_path, download=True) == [tmp_path / "hub/MC/t-0.parquet"]
    # Archives with media are not among what is fetched.
    assert calls[-1]["allow_patterns"] == ["README.md", "MC/t-*", "MC/t-*/*"]
    calls.clear()
    assert locate(source, tmp_path) == [tmp_path / "hub/MC/t-0.parquet"]
    assert len(calls) == 1


def test_the_first_folder_of_media_that_exists_counts(tmp_path: Path) -> None:
    task = next(task for task in MMEB_V2 if task.name == "MSR-VTT")
    places = [tmp_path / folder for folder in task.media]
    assert media_folder(task, tmp_path) == places[0]
    places[1].mkdir(parents=True)
    assert media_folder(task, tmp_path) == places[1]
    places[0].mkdir(parents=True)
    assert media_folder(task, tmp_path) == places[0]
