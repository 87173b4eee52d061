"""Every task of the table has a reader, and errors begin with the task's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ume_models.errors import DataError
from ume_models.mmeb import readers
from ume_models.mmeb.dataset import ReadOptions, TaskData
from ume_models.mmeb.mmeb_v2 import MMEB_V2, MMEB_V2_2026
from ume_models.mmeb.readers import READERS, read_task, reader


@pytest.mark.parametrize("name", READERS)
def test_every_reader_is_there(name: str) -> None:
    assert callable(reader(name))


def test_every_task_has_one(tmp_path: Path) -> None:
    assert len(MMEB_V2) == 78
    for task in MMEB_V2:
        with pytest.raises(DataError) as caught:
            read_task(task, tmp_path / "nothing", ReadOptions())
        assert str(caught.value).startswith(f"{task.name}: there are no tables of ")
        assert task.source.repository in str(caught.value)


def test_the_corrected_benchmark_has_one_version_of_every_task() -> None:
    assert [task.modality for task in MMEB_V2_2026] == [task.modality for task in MMEB_V2]
    assert {task.benchmark for task in MMEB_V2_2026} == {"MMEB-v2-2026"}
    renamed = {task.name for task in MMEB_V2_2026} - {task.name for task in MMEB_V2}
    assert renamed == {"ViDoSeek-page-fixed", "MMLongBench-page-fixed"}
    assert not any(task.legacy_source for task in MMEB_V2_2026)
    english = {"biomedical_lectures_v2", "economics_reports_v2", "esg_reports_v2"}
    assert not {f"ViDoRe_{name}" for name in english} & {task.name for task in MMEB_V2_2026}


@pytest.mark.parametrize(
    "error",
    [OSError(36, "File name too long"), ValueError("embedded null byte"), RecursionError(),
     UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_unexpected_errors_name_the_task_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def read(*_: object) -> TaskData:
        raise error

    monkeypatch.setattr(readers, "reader", lambda name: read)
    with pytest.raises(DataError, match=r"it is not in the layout .*; get it again$") as caught:
        read_task(MMEB_V2[0], tmp_path, ReadOptions())
    told = str(caught.value)
    assert told.startswith(f"{MMEB_V2[0].name}: ") and MMEB_V2[0].source.repository in told
    assert f"{type(error).__name__}: {error}" in told and caught.value.__cause__ is error


@pytest.mark.parametrize("defect", [TypeError, AttributeError, KeyError, IndexError])
def test_defects_of_readers_are_not_blamed_on_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defect: type[Exception]
) -> None:
    def read(*_: object) -> TaskData:
        raise defect

    monkeypatch.setattr(readers, "reader", lambda name: read)
    with pytest.raises(defect):
        read_task(MMEB_V2[0], tmp_path, ReadOptions())


def test_an_unknown_reader_is_named() -> None:
    with pytest.raises(DataError, match=r"no reader 'imagecls' \(known: image_cls"):
        reader("imagecls")
