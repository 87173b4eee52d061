"""Every task of the table has a reader, and errors begin with the task's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ume_models.errors import DataError
from ume_models.mmeb.dataset import ReadOptions
from ume_models.mmeb.mmeb_v2 import MMEB_V2
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


def test_an_unknown_reader_is_named() -> None:
    with pytest.raises(DataError, match=r"no reader 'imagecls' \(known: image_cls"):
        reader("imagecls")
