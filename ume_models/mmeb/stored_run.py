"""A folder of stored embeddings to scores, task by task."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ume_kernels.version import __version__
from ume_models.errors import DataError
from ume_models.mmeb import settings
from ume_models.mmeb.dataset import ReadOptions
from ume_models.mmeb.progress import Progress
from ume_models.mmeb.readers import read_task
from ume_models.mmeb.results import RunFolder
from ume_models.mmeb.scoring import conclude
from ume_models.mmeb.settings import EvalOptions
from ume_models.mmeb.stored import read_stored, score_stored
from ume_models.mmeb.summary import Summary
from ume_models.mmeb.table_files import note_tables
from ume_models.mmeb.tasks import Task
from ume_models.store import LOCK_FILE


def score_folder(
    embeddings: Path,
    tasks: Sequence[Task],
    output: Path,
    *,
    data: Path | None = None,
    reading: ReadOptions | None = None,
    options: EvalOptions | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Score the embeddings of every task that a folder has; see ``stored`` for its layouts.

    Args:
        embeddings: the folder.
        tasks: the tasks, of one benchmark.
        output: folder for the results.
        data: the data root; None to take the answers stored with the embeddings.
        reading: how tasks are read.
        options: how they are ranked.
        overwrite: replace an evaluation that is there.
        progress: receives what happens.

    Raises:
        DataError: the folder has none of the tasks, or it lies in the output folder; or, with
            ``on_error="stop"``, embeddings of a task do not fit it.
        StoreError: the output folder belongs to another evaluation.
    """
    reading, options = reading or ReadOptions(), options or EvalOptions()
    progress = progress or Progress()
    if not embeddings.is_dir():
        raise DataError(f"{embeddings} is not a folder of stored embeddings")
    source, target = embeddings.resolve(), output.resolve()
    if target == source or target in source.parents:
        raise DataError(
            f"{embeddings} lies in the output folder {output}, whose contents an evaluation may "
            "replace: choose another folder with -o"
        )
    with settings.held(output):
        manifest = settings.describe(
            package_version=__version__,
            model=str(embeddings.absolute()),
            fingerprint=_files_digest(source, target),
            benchmark=tasks[0].benchmark,
            tasks=[task.name for task in tasks],
            data="" if data is None else str(data.absolute()),
            encoding={"source": "stored embeddings"},
            reading=reading,
            options=options,
            versions={},
        )
        manifest = settings.joined(output, manifest, overwrite=overwrite)
        settings.begin(output, manifest, overwrite=overwrite)
        settings.remove_conclusions(output)
        results = RunFolder(output)
        missing: dict[str, str] = {}
        found = False
        for task in tasks:
            try:
                stored = read_stored(embeddings, task, answers=data is None)
                if stored is None:
                    missing[task.name] = f"no embeddings of this task in {embeddings}"
                    results.discard(task.name)
                    continue
                found = True
                if odd := stored.not_unit_length():
                    progress.note(f"{task.name}: {odd}")
                table = None if data is None else read_task(task, data, reading)
                score = score_stored(
                    stored, task, table, results, top=options.top, legacy_ndcg=options.legacy_ndcg
                )
                progress.scored(score)
                if table is not None:
                    note_tables(output, [table])
            except DataError as error:
                results.discard(task.name)
                if options.on_error == "stop":
                    raise
                found = True
                missing[task.name] = str(error)
        if not found:
            raise DataError(
                f"{embeddings} has embeddings of none of the {len(tasks)} tasks; expected "
                "TASK/queries.npy, or TASK_qry and TASK_tgt (TASK_gen_qry and TASK_gen_tgt) as the "
                "official evaluations write them"
            )
        return conclude(results, manifest, tasks, missing)


def _files_digest(folder: Path, output: Path) -> str:
    """Names, sizes and times of the files: other embeddings are another evaluation.

    Args:
        folder: where the embeddings are.
        output: where results go; they do not count where they lie among the embeddings.
    """
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.name == LOCK_FILE:  # of a run that was killed; it comes and goes
            continue
        if path.is_file() and output not in path.parents:
            found = path.stat()
            name = path.relative_to(folder).as_posix()
            state.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return state.hexdigest()[:32]
