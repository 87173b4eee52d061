"""A miniature of the benchmarks: every task in the layout it is published in, on small pictures.

The pictures, clips and captions are the held-out items that ship with the package, which the
bundled checkpoint was not trained on. It scores well above chance on most of the tasks; the tasks
say nothing about any other model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ume_models.mmeb.miniature.document_tasks import write_document_tasks
from ume_models.mmeb.miniature.folder import DataFolder
from ume_models.mmeb.miniature.image_tasks import write_image_tasks
from ume_models.mmeb.miniature.mbeir_tasks import write_mbeir
from ume_models.mmeb.miniature.mmeb_v1_tasks import write_mmeb_v1
from ume_models.mmeb.miniature.video_questions import write_video_questions
from ume_models.mmeb.miniature.video_tasks import write_video_tasks

__all__ = ["write_miniature"]


def write_miniature(
    root: Path, *, tables: Literal["parquet", "jsonl"] = "parquet", seed: int = 0
) -> None:
    """Write a small data root with all tasks of MMEB-v2, MMEB-V1 and M-BEIR.

    The same arguments give the same bytes. Needs about 8 MB and a second or two.

    Args:
        root: folder to write to; created, or empty.
        tables: form of the tables. "jsonl" needs no pyarrow; its tables hold no pictures, so the
            pages of documents all lie in folders then.
        seed: which of the held-out items stand in which task.

    Raises:
        FileExistsError: ``root`` has files in it.
        ImportError: ``tables`` is "parquet" and pyarrow is not installed.
    """
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty; give a new folder")
    folder = DataFolder(root, tables, seed)
    write_image_tasks(folder)
    write_video_tasks(folder)
    write_video_questions(folder)
    write_document_tasks(folder)
    write_mmeb_v1(folder)
    write_mbeir(folder)
