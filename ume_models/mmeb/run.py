"""An evaluation from tables to scores, alone or by a team of processes, resumable at any point.

The leader reads the tasks, names everything that is to be embedded, and plans; every process embeds
shards; the leader ranks and scores a task as soon as its last shard is written. All that is
written is a function of data, model and settings, so an interrupted run ends with the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ume_kernels.version import __version__
from ume_models.atomic import write_atomically
from ume_models.disk_space import require_space
from ume_models.embedder import Embedder
from ume_models.encode import EncodeStats, encoding_settings
from ume_models.errors import DataError, ErrorKind, OptionError, StoreError
from ume_models.mmeb import settings
from ume_models.mmeb.answers import problems_of_answers
from ume_models.mmeb.benchmarks import benchmark
from ume_models.mmeb.dataset import ReadOptions, TaskData
from ume_models.mmeb.embed import Library, embed_shard
from ume_models.mmeb.keys import KINDS, ContentKeys, Kind, key_kind
from ume_models.mmeb.listing import (
    Listing,
    Place,
    list_task,
    needed_keys,
    places,
    read_listing,
    write_listing,
)
from ume_models.mmeb.locate import misplaced
from ume_models.mmeb.plan import SHARD_SIZES, KeyedStore, Plan, Work, make_plan, open_store
from ume_models.mmeb.predictions import least_prediction_bytes
from ume_models.mmeb.progress import Pace, Progress
from ume_models.mmeb.results import RunFolder
from ume_models.mmeb.scoring import Scorer, conclude, first_few
from ume_models.mmeb.settings import EvalOptions
from ume_models.mmeb.summary import Summary
from ume_models.mmeb.table_files import note_tables
from ume_models.mmeb.tasks import Task
from ume_models.mmeb.team import LoneTeam, Team, TeamError
from ume_models.store import Manifest

_NAMED = 5
_SECONDS_UNTIL_SEEN = 90.0  # NFS remembers for up to 60 that a file is not there
_POLL_SECONDS = 0.5
_PARTS = 1_000_000  # teams count in whole numbers: microseconds
_SECONDS_BETWEEN_SAVES = 60.0


def evaluate(
    model: Embedder,
    tasks: Sequence[Task],
    data: str | Path,
    output: str | Path,
    *,
    name: str = "",
    reading: ReadOptions | None = None,
    options: EvalOptions | None = None,
    overwrite: bool = False,
    team: Team | None = None,
    progress: Progress | None = None,
) -> Summary | None:
    """Embed, rank and score tasks; go on with what ``output`` holds already.

    Writes ``run.json`` (what was evaluated and how), ``tasks/NAME/scores.json`` and
    ``predictions.jsonl``, ``embeddings/``, ``summary.json``, and ``timing.json`` with what
    embedding took. Pages for readers are made by ``ume_models.mmeb.report``.

    Args:
        model: what ``ume_models.load(…, empty="reference")`` returned.
        tasks: the tasks, of one benchmark, as ``select_tasks`` returns them.
        data: the data root.
        output: folder for the results; made if missing.
        name: of the model, for the reader.
        reading: how tasks are read.
        options: how they are embedded and ranked.
        overwrite: begin anew and remove what an earlier evaluation wrote there.
        team: the processes that work on it; ``gather()`` finds those of a launcher.
        progress: receives what happens.

    Returns:
        The scores of all tasks that were ever asked for in this folder; None for processes that
        do not lead the team.

    Raises:
        DataError: data are missing or an item cannot be embedded (with ``on_error="stop"``).
        StoreError: the folder belongs to an evaluation with other settings or to another process,
            or what is to be written does not fit on its disk.
        TeamError: another process has failed or died.
        OSError: the disk is full or not writable.
        ValueError: there are no tasks, they are not those of one benchmark, the model was loaded
            without ``empty="reference"``, its family tells queries from candidates by their
            instruction, which no table holds apart, or an option of it is out of range.
        TypeError: its family does not have an option.
    """
    tasks, data, output = list(tasks), Path(data), Path(output)
    if not tasks or not all(isinstance(task, Task) for task in tasks):
        raise ValueError('tasks must be Tasks: select_tasks(benchmark("MMEB-v2"), names=["CIRR"])')
    _require_a_benchmark(tasks)
    if model.processor.empty != "reference":
        raise ValueError(
            'load the model with empty="reference": some candidates have empty texts, which the '
            "official evaluation embeds"
        )
    if model.asymmetric:
        raise OptionError(
            f"the family {model.family} takes items with an instruction as queries, but these "
            "tables have instructions inside their texts; encode queries and candidates yourself "
            "and score them with --embeddings"
        )
    reading, options = reading or ReadOptions(), options or EvalOptions()
    if reading.frames is None:
        reading = replace(reading, frames=model.profile.rules.max_frames)
    team, progress = team or LoneTeam(), progress or Progress()
    team.begin()
    member = _Member(model, tasks, data, output, reading, options, team, progress)
    try:
        if not team.leads:
            member.follow()
            return None
        with settings.held(output):
            return member.lead(name, overwrite)
    except TeamError:
        raise  # the others see for themselves
    except BaseException as error:
        team.fail(str(error) or type(error).__name__)
        raise


def _require_a_benchmark(tasks: Sequence[Task]) -> None:
    names = sorted({task.benchmark for task in tasks})
    if len(names) > 1:
        raise ValueError(f"tasks of {' and '.join(names)}: evaluate one benchmark at a time")
    known = {task.name for task in benchmark(names[0])}
    seen: set[str] = set()
    for task in tasks:
        if task.name not in known:
            raise ValueError(f"{task.name!r} is no task of {names[0]}; `ume eval --list` has them")
        if task.name in seen:
            raise ValueError(f"the task {task.name} is given twice")
        seen.add(task.name)


@dataclass(eq=False)
class _Member:
    """One process of an evaluation."""

    model: Embedder
    tasks: list[Task]
    data: Path
    output: Path
    reading: ReadOptions
    options: EvalOptions
    team: Team
    progress: Progress

    def __post_init__(self) -> None:
        self.library = Library(self.tasks, self.data, self.reading)
        self.results = RunFolder(self.output)
        chosen = self.model.options.replaced(self.options.options)
        self.encoding = encoding_settings(self.model, chosen, self.options.batch_tokens)
        self.times: dict[Kind, EncodeStats] = {kind: EncodeStats() for kind in KINDS}

    # The leader ------------------------------------------------------------------------------

    def lead(self, name: str, overwrite: bool) -> Summary:
        # Nothing that is there is touched before the data have been read.
        manifest = settings.joined(self.output, self._manifest(name), overwrite=overwrite)
        missing: dict[str, str] = {}
        read = self._read(missing)
        settings.begin(self.output, manifest, overwrite=overwrite)
        for task in missing:
            self.results.discard(task)
        listings = self._list(read)
        settings.remove_conclusions(self.output)
        note_tables(self.output, read)
        where, wanted = places(listings), needed_keys(read, listings)
        device = self.model.device.type
        sizes = self.options.shard_sizes or SHARD_SIZES.get(device, SHARD_SIZES["cpu"])
        plan = make_plan(self.output / "embeddings", wanted, self._store_manifest(), sizes)
        try:
            self._require_space(plan, read)
            self.team.announce(
                {
                    "manifest": manifest,
                    "tasks": [data.task.name for data in read],
                    "work": [vars(part) for part in plan.work],
                }
            )
            scorer = Scorer(
                plan.stores,
                read,
                listings,
                missing,
                self.results,
                self.options,
                self.model.device,
                self.progress,
            )
            done = dict.fromkeys(KINDS, 0)
            for store, shards in plan.finished.items():
                for shard in shards:
                    scorer.lookup.add(store, shard)
            totals = dict(done)
            for key in where:
                totals[key_kind(key)] += 1
                done[key_kind(key)] += scorer.lookup.has(key)
            self.progress.planned(totals, done)
            scorer.score_ready()
            pace = Pace(self.team, totals, done)
            self._embed(plan.work, plan.stores, where, pace, scorer)
            self._pool_times()
            self.team.finish()
            self._see_everything(scorer, plan)
            scorer.score_ready()
        finally:
            plan.close()
        return self._conclude(manifest, missing)

    def _manifest(self, name: str = "") -> dict[str, Any]:
        return settings.describe(
            package_version=__version__,
            model=name,
            fingerprint=self.model.fingerprint,
            benchmark=self.tasks[0].benchmark,
            tasks=[task.name for task in self.tasks],
            data=str(self.data.absolute()),
            encoding=self.encoding,
            reading=self.reading,
            options=self.options,
            versions={name: metadata.version(name) for name in ("torch", "transformers")},
        )

    def _read(self, missing: dict[str, str]) -> list[TaskData]:
        """The tasks that can be read; the others stop the run, or are missing."""
        read = []
        for task in self.tasks:
            try:
                data = self.library.data(task.name)
                if problems := problems_of_answers(data):
                    raise DataError(f"{task.name}: {'; '.join(problems)}")
                read.append(data)
            except DataError as error:
                missing[task.name] = str(error)
        if missing and self.options.on_error == "stop":
            wrong_root = misplaced(self.data, self.tasks)
            raise DataError(
                (f"{wrong_root}\n" if wrong_root else "")
                + first_few(
                    f"{len(missing)} of {len(self.tasks)} tasks cannot be read", missing.values()
                )
                + "\n--on-error skip evaluates the others; ume eval --check tells everything"
            )
        return read

    def _list(self, read: Sequence[TaskData]) -> list[Listing]:
        """Name everything that is to be embedded, and notice what is not there."""
        keys = ContentKeys(self.output / "media.json", self.data)
        listings, absent = [], []
        saved = time.monotonic()
        try:
            for number, data in enumerate(read):
                self.progress.reading(data.task.name, number, len(read))
                before = len(keys.missing)
                listing = list_task(data, keys)
                absent += [f"{data.task.name}: {path}" for path in keys.missing[before:]]
                listings.append(listing)
                if time.monotonic() - saved >= _SECONDS_BETWEEN_SAVES:
                    keys.save()
                    saved = time.monotonic()
        finally:  # digests of millions of files are not read twice because of one
            keys.save()
        if absent and self.options.on_error == "stop":
            raise DataError(
                first_few(f"{len(absent)} media files are missing", absent)
                + "\n--on-error skip goes on without their tasks; ume eval --check tells everything"
            )
        for listing in listings:  # not before: the scores that are there are of the old ones
            write_listing(self.output, listing)
        return listings

    def _require_space(self, plan: Plan, read: Sequence[TaskData]) -> None:
        """Notice now that embeddings or predictions will not fit, not in the last hour."""
        embeddings = sum(
            plan.stores[part.store].store.least_bytes(part.items) for part in plan.work
        )
        predictions = sum(
            least_prediction_bytes(data, self.options.top)
            for data in read
            if not self.results.has(data.task.name)
        )
        require_space(self.output, embeddings + predictions)

    def _store_manifest(self) -> Manifest:
        return Manifest(
            package_version=__version__,
            model="",
            fingerprint=self.model.fingerprint,
            hidden_size=self.model.hidden_size,
            encoding=self.encoding,
            items_digest="",
            num_items=0,
            shard_size=0,
        )

    def _see_everything(self, scorer: Scorer, plan: Plan) -> None:
        """Find the last shards of the others: network file systems show new files late."""
        deadline = time.monotonic() + (_SECONDS_UNTIL_SEEN if self.team.size > 1 else 0)
        while unseen := scorer.look_for(plan.work):
            if time.monotonic() >= deadline:
                part = unseen[0]
                raise StoreError(
                    f"{len(unseen)} finished shards cannot be seen, such as {part.shard} of "
                    f"{plan.stores[part.store].store.directory}: the output folder must be on a "
                    "file system that all hosts share; run the same command again"
                )
            time.sleep(_POLL_SECONDS)

    def _conclude(self, manifest: Mapping[str, Any], missing: Mapping[str, str]) -> Summary:
        summary = conclude(self.results, manifest, self.tasks, missing)
        times = {kind: vars(stats) for kind, stats in self._pooled_times().items() if stats.batches}
        if times:
            write_atomically(
                self.output / "timing.json", (json.dumps(times, indent=1) + "\n").encode()
            )
        return summary

    # Everyone --------------------------------------------------------------------------------

    def follow(self) -> None:
        orders = self.team.orders()
        differences = settings.manifest_differences(orders["manifest"], self._manifest())
        unknown = {*orders["tasks"]} - {task.name for task in self.tasks}
        if unknown:
            differences.append(f"tasks: without {', '.join(sorted(unknown)[:_NAMED])}")
        if differences:
            raise StoreError(
                f"rank {self.team.rank} was started with other settings than rank 0 (there):\n  "
                + "\n  ".join(differences),
                kind=ErrorKind.OTHER_SETTINGS,
            )
        folder = self.output / "embeddings"
        work = [Work(**part) for part in orders["work"]]
        try:
            stores = {part.store: open_store(folder, part.store) for part in work}
            where = places(read_listing(self.output, task) for task in orders["tasks"])
        except StoreError as error:
            raise StoreError(
                f"rank {self.team.rank} does not see what rank 0 wrote ({error}): the output "
                "folder must be on a file system that all hosts share"
            ) from error
        zero = dict.fromkeys(KINDS, 0)
        self._embed(work, stores, where, Pace(self.team, zero, zero), None)
        self._pool_times()
        self.team.finish()

    def _embed(
        self,
        work: Sequence[Work],
        stores: Mapping[str, KeyedStore],
        where: Mapping[str, Place],
        pace: Pace,
        scorer: Scorer | None,
    ) -> None:
        for number in self.team.take(len(work)):
            part = work[number]
            started = time.perf_counter()

            def within(done: int, items: int, kind: Kind = part.kind) -> None:
                self.progress.embedding(kind, done, items)
                self.team.check()

            stats = embed_shard(
                self.model,
                stores[part.store],
                part.shard,
                where,
                self.library,
                self.options,
                within,
            )
            _add(self.times[part.kind], stats)
            pace.add(part.kind, part.items, time.perf_counter() - started)
            if scorer is not None:
                scorer.look_for(work[: number + 1])
                self.progress.embedded(pace.done(), pace.remaining())
                scorer.score_ready()

    def _pool_times(self) -> None:
        """Add what embedding took here to what it took in the other processes."""
        for kind, stats in self.times.items():
            for name, value in vars(stats).items():
                self.team.tally(f"times/{kind}/{name}", round(value * _PARTS))

    def _pooled_times(self) -> dict[Kind, EncodeStats]:
        pooled = {kind: EncodeStats() for kind in KINDS}
        for kind, stats in pooled.items():
            for name, value in vars(stats).items():
                total = self.team.tally(f"times/{kind}/{name}") / _PARTS
                setattr(stats, name, type(value)(total))
        return pooled


def _add(total: EncodeStats, part: EncodeStats) -> None:
    for name, value in vars(part).items():
        setattr(total, name, getattr(total, name) + value)
