"""MMEB-V1 with the content of the image tasks."""

from __future__ import annotations

from ume_models.mmeb.miniature.folder import DataFolder
from ume_models.mmeb.miniature.image_tasks import image_rows
from ume_models.mmeb.mmeb_v1 import MMEB_V1


def write_mmeb_v1(folder: DataFolder) -> None:
    """Tables and pictures of MMEB-V1: instructions and texts are one, on both sides."""
    for task in MMEB_V1:
        rows = image_rows(folder, task.name, "MMEB-eval/eval_images")
        joined = [
            {
                "qry_text": f"{row['qry_inst']} {row['qry_text']}".rstrip() + "\n",
                "qry_img_path": row["qry_img_path"],
                "tgt_text": [f"{row['tgt_inst']} {text}".strip() for text in row["tgt_text"]],
                "tgt_img_path": row["tgt_img_path"],
            }
            for row in rows
        ]
        folder.table("MMEB-eval", task.name, "test", joined)
