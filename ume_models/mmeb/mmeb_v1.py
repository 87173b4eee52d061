"""The 36 tasks of MMEB, first version (arXiv 2410.05160).

Names, groups and metric are those of the image tasks of MMEB-v2, which took them over. The tables
differ: texts contain their instructions, so there is one wording.

Source: VLM2Vec at its first version, ``eval.py`` and ``src/dataset.py``; tables and pictures of
TIGER-Lab/MMEB-eval.
"""

from __future__ import annotations

from dataclasses import replace

from ume_models.mmeb.mmeb_v2 import MMEB_V2
from ume_models.mmeb.tasks import Source, Task

# The archive of pictures is published beside the tables; the scripts unpack it to eval_images.
# MMEB-v2 has the same pictures.
_MEDIA = (
    "MMEB-eval/eval_images",
    "MMEB-eval/images",
    "MMEB-eval/MMEB",
    "eval_images",
    "image-tasks/MMEB",
    "image-tasks",
)

MMEB_V1: tuple[Task, ...] = tuple(
    replace(
        task,
        benchmark="MMEB-v1",
        reader="mmeb_v1",
        source=Source("TIGER-Lab/MMEB-eval", task.name, "test"),
        media=_MEDIA,
    )
    for task in MMEB_V2
    if task.modality == "image"
)
