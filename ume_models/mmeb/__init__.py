"""Evaluation on MMEB-v2 (78 tasks), MMEB-V1 and M-BEIR: readers, metrics, runner, reports."""

from ume_models.mmeb.benchmarks import BENCHMARKS, benchmark
from ume_models.mmeb.dataset import Query, ReadOptions, TaskData
from ume_models.mmeb.readers import read_task
from ume_models.mmeb.run import evaluate
from ume_models.mmeb.settings import EvalOptions
from ume_models.mmeb.tasks import Task, select_tasks
from ume_models.mmeb.team import gather

__all__ = [
    "BENCHMARKS",
    "EvalOptions",
    "Query",
    "ReadOptions",
    "Task",
    "TaskData",
    "benchmark",
    "evaluate",
    "gather",
    "read_task",
    "select_tasks",
]
