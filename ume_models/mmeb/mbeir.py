"""The 16 tasks of M-BEIR (arXiv 2311.17136), each with a collection of its own.

Queries and candidates are texts, pictures or both. Composed retrieval, a picture and what to change
about it, are the tasks ending in 7 (group IT2I). The score is what M-BEIR calls Recall@k: whether
any of the answers stands among the first k. k is 5, and 10 for the fashion data sets.

Source: TIGER-Lab/M-BEIR; UniIR ``src/data/preprocessing/utils.py`` for the modalities of tasks and
the configurations of its evaluation for the metrics.
"""

from __future__ import annotations

from ume_models.mmeb.tasks import Source, Task

# Number of the task, in its name: modalities of queries and candidates, and the group here.
MODALITIES: dict[int, tuple[str, str, str]] = {
    0: ("text", "image", "T2I"),
    1: ("text", "text", "T2T"),
    2: ("text", "image,text", "T2IT"),
    3: ("image", "text", "I2T"),
    4: ("image", "image", "I2I"),
    6: ("image,text", "text", "IT2T"),
    7: ("image,text", "image", "IT2I"),
    8: ("image,text", "image,text", "IT2IT"),
}


def task_number(name: str) -> int:
    """The number in the name of a task, a key of ``MODALITIES``."""
    return int(name.rsplit("_task", 1)[1])


def _task(name: str) -> Task:
    return Task(
        name, "M-BEIR", "image", MODALITIES[task_number(name)][2], "mbeir", "global",
        "hit@10" if name.startswith("fashion") else "hit@5",
        Source("TIGER-Lab/M-BEIR", name, "test"), ("M-BEIR", "."),
    )  # fmt: skip


MBEIR: tuple[Task, ...] = tuple(
    _task(name)
    for name in (
        "visualnews_task0", "mscoco_task0", "fashion200k_task0", "webqa_task1", "edis_task2",
        "webqa_task2", "visualnews_task3", "mscoco_task3", "fashion200k_task3", "nights_task4",
        "oven_task6", "infoseek_task6", "fashioniq_task7", "cirr_task7", "oven_task8",
        "infoseek_task8",
    )
)  # fmt: skip
