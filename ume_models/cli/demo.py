"""``ume demo``: the shipped held-out items through both engines, measured, compared and shown."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ume_models import machine
from ume_models.cli.options import (
    BUNDLED,
    EncodingOptions,
    FamilyOption,
    ModelOption,
    ProfileOption,
    path_option,
)
from ume_models.cli.output_file import refuse_folder, write_output
from ume_models.cli.terminal import log, results, tell

if TYPE_CHECKING:
    import torch

    from ume_models.assets import Task
    from ume_models.embedder import Embedder
    from ume_models.processing import Item
    from ume_models.retrieval import RankingQuality, SearchResult
    from ume_models.retrieval.gallery import Card, QueryBlock, Section

_MEASURES = {"hit@1": "hit_at_1", "hit@5": "hit_at_5", "MRR": "mrr", "chance": "chance"}
_QUERIES_SHOWN = 8
_RESULTS_SHOWN = 5
# The reference engine works item by item. A slow machine stops it after the task in which this
# much time is over, and the comparison then covers the tasks that both engines have done.
_REFERENCE_SECONDS = 60.0


@dataclass(frozen=True)
class DemoTask:
    """Queries, what they are ranked against, and the right answers.

    Attributes:
        name: identifies the task.
        kind: what is asked with and what is found, as in "text→image".
        queries, candidates: items; ids are unique within the task.
        relevant: ids of the candidates that answer each query.
    """

    name: str
    kind: str
    queries: Sequence[Item]
    candidates: Sequence[Item]
    relevant: Sequence[frozenset[str]]

    @classmethod
    def shipped(cls, task: Task, queries: int | None) -> DemoTask:
        """With so many of its queries, None for all; candidates are never reduced, which would
        make the task easier.
        """
        from ume_models.processing import parse_item

        return cls(
            task.name,
            task.kind,
            [parse_item(item, index) for index, item in enumerate(task.queries[:queries])],
            [parse_item(item, index) for index, item in enumerate(task.candidates)],
            [frozenset(ids) for ids in task.relevant[:queries]],
        )


@dataclass(frozen=True)
class TaskRun:
    """One engine over the items of one task.

    Attributes:
        embeddings: float32 ``[Q + N, D]`` of the queries, then of the candidates.
        ranking: all candidates for every query, best first.
        seconds: wall time of embedding, media decoding included.
    """

    embeddings: torch.Tensor
    ranking: SearchResult
    seconds: float


@dataclass(frozen=True)
class EngineRun:
    """One engine over the tasks, or the first of them.

    Attributes:
        name: of the engine.
        dtype: of the weights.
        tasks: the finished tasks, in order.
    """

    name: str
    dtype: str
    tasks: Sequence[TaskRun]

    def first(self, count: int) -> EngineRun:
        """The same run, as if it had ended after ``count`` tasks."""
        return EngineRun(self.name, self.dtype, self.tasks[:count])

    @property
    def items(self) -> int:
        """Number of embedded items."""
        return sum(len(task.embeddings) for task in self.tasks)

    @property
    def seconds(self) -> float:
        """Time of embedding them, after a warm-up."""
        return sum(task.seconds for task in self.tasks)


def demo(
    html: Annotated[Path, path_option(
        "--html", help="Where to write the gallery.", metavar="FILE"
    )] = Path("ume-demo.html"),
    model: ModelOption = None,
    family: FamilyOption = None,
    profile: ProfileOption = None,
    queries: Annotated[int | None, typer.Option(
        min=1, help="Queries per task.", metavar="N", show_default="all"
    )] = None,
    engine: Annotated[Literal["both", "fast", "reference"], typer.Option(
        help="What to run; only both can be compared."
    )] = "both",
) -> None:
    """Try it: embed the shipped examples, rank them, compare both engines, show pictures.

    Needs no data, no network and no GPU, and takes well under two minutes.

    [bold]Example[/]

        ume demo --html gallery.html
    """
    from ume_models.assets import heldout
    from ume_models.cli.encoding import SMALL
    from ume_models.retrieval import ranking_quality
    from ume_models.retrieval.gallery import Gallery, render_gallery

    refuse_folder(html)
    options = EncodingOptions(model=model or BUNDLED, family=family, profile=profile)
    tasks = [DemoTask.shipped(task, queries) for task in heldout().tasks]
    names = ["fast", "reference"] if engine == "both" else [engine]
    load = machine.load_average()
    runs = _run_engines(names, options, tasks)
    done = runs[0].tasks
    qualities = [
        ranking_quality(finished.ranking.ids, task.relevant, len(task.candidates))
        for task, finished in zip(tasks, done, strict=False)
    ]
    lines = [*_run_lines(runs, len(tasks)), f"Machine: {_machine_line(runs[0], load)}"]
    _print_quality(tasks, qualities, runs[0].name)
    console = results()
    for line in lines:
        console.print(line, soft_wrap=True)
    page = Gallery(
        title="ume demo",
        lead="Held-out queries and the best results of the model "
        f"{options.model}. The right answer is marked.",
        remarks=[SMALL] * (options.model == BUNDLED) + lines,
        sections=[
            _section(task, finished.ranking, quality)
            for task, finished, quality in zip(tasks, done, qualities, strict=True)
        ],
    )
    write_output(html, render_gallery(page))
    place = html.resolve()
    console.print(f"\nGallery of the queries and what was found: {place}", soft_wrap=True)


def _run_engines(
    names: Sequence[str], options: EncodingOptions, tasks: Sequence[DemoTask]
) -> list[EngineRun]:
    """Every engine over the tasks, taking turns, so that a busy machine slows all of them."""
    from ume_models import encode
    from ume_models.cli.encoding import SMALL, load_model, require_clips

    models = {name: load_model(replace(options, engine=name), told=False) for name in names}
    if options.model == BUNDLED:
        log.warning(SMALL)
    require_clips(models[names[0]], "or another model: some of the examples are clips")
    finished: dict[str, list[TaskRun]] = {name: [] for name in names}
    for model in models.values():
        # The first call allocates and builds what later calls reuse.
        encode.encode_detailed(model, [tasks[0].queries[0], tasks[0].candidates[0]], progress=False)
    for number, task in enumerate(tasks, start=1):
        tell(f"task {number} of {len(tasks)}: {task.name}")
        for name, model in models.items():
            spent = sum(done.seconds for done in finished[name])
            if name == "fast" or spent <= _REFERENCE_SECONDS:
                finished[name].append(_run_task(model, task))
    return [
        EngineRun(name, str(models[name].dtype).removeprefix("torch."), finished[name])
        for name in names
    ]


def _run_task(model: Embedder, task: DemoTask) -> TaskRun:
    from ume_models import encode
    from ume_models.retrieval import ExactIndex

    begun = time.perf_counter()
    items = [*task.queries, *task.candidates]
    embeddings = encode.encode_detailed(model, items, progress=False).embeddings
    seconds = time.perf_counter() - begun
    split = len(task.queries)
    index = ExactIndex(embeddings[split:], [item.id for item in task.candidates])
    return TaskRun(embeddings, index.search(embeddings[:split], len(index)), seconds)


def _print_quality(
    tasks: Sequence[DemoTask], qualities: Sequence[RankingQuality], engine: str
) -> None:
    from rich.table import Table

    console = results()
    table = Table(title=f"Held-out retrieval, {engine} engine", title_justify="left")
    for name in ("task", "kind"):
        table.add_column(name, no_wrap=True)
    for name in ("of", *_MEASURES):
        table.add_column(name, justify="right")
    for task, quality in zip(tasks, qualities, strict=True):
        size = f"{quality.queries} × {quality.candidates}"
        figures = _figures([quality])
        table.add_row(task.name, task.kind, size, *figures, end_section=task is tasks[-1])
    table.add_row("mean", "", "", *_figures(qualities))
    console.print(table)
    console.print(
        "of: queries × candidates; chance: hit@1 of a random order. The model card's figures are "
        "for 100 × 100, which is harder.",
        soft_wrap=True,
    )


def _figures(qualities: Sequence[RankingQuality]) -> list[str]:
    """Means of the measures."""
    means = [sum(getattr(q, n) for q in qualities) / len(qualities) for n in _MEASURES.values()]
    return [*(f"{mean:.2f}" for mean in means[:-1]), f"{means[-1]:.3f}"]


def _run_lines(runs: Sequence[EngineRun], tasks: int) -> list[str]:
    """What was measured, in sentences: agreement and speed over the same items of this run."""
    if len(runs) == 1:
        return [_speed_line(runs[0])]
    fast, reference = runs[0].first(len(runs[1].tasks)), runs[1]
    pairs = [*zip(fast.tasks, reference.tasks, strict=True)]
    ratios = [slow.seconds / quick.seconds for quick, slow in pairs]
    lines = [
        *_agreement(pairs),
        _speed_line(fast),
        _speed_line(reference),
        f"Speed-up in this run: {reference.seconds / fast.seconds:.1f}× in total time, "
        f"{min(ratios):.1f}× to {max(ratios):.1f}× by task "
        "(this model is small; larger ones have other ratios)",
    ]
    if len(reference.tasks) < tasks:
        lines.insert(
            0,
            f"The reference engine was stopped after {len(reference.tasks)} of {tasks} tasks, "
            f"which took {reference.seconds:.0f} s; the comparison covers these",
        )
    return lines


def _agreement(pairs: Sequence[tuple[TaskRun, TaskRun]]) -> list[str]:
    """How far the engines agree in numbers and in rankings."""
    import torch

    ours, theirs = (
        torch.cat([task.embeddings for task in run]) for run in zip(*pairs, strict=True)
    )
    cosine = torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=1).min()
    ranked = [
        both
        for one, other in pairs
        for both in zip(one.ranking.ids, other.ranking.ids, strict=True)
    ]
    same = [sum(one[:n] == other[:n] for one, other in ranked) / len(ranked) for n in (1, 10)]
    return [
        "Agreement of the engines: largest difference of two numbers "
        f"{(ours - theirs).abs().max():.1e}, smallest cosine {cosine:.7f}",
        f"Same best result for {same[0]:.1%} of the queries, "
        f"same ten best in the same order for {same[1]:.1%}",
    ]


def _speed_line(run: EngineRun) -> str:
    rate = run.items / run.seconds
    return f"{run.name} engine: {run.items} items in {run.seconds:.2f} s, {rate:.1f} items/s"


def _machine_line(run: EngineRun, load: float | None) -> str:
    import torch

    if torch.cuda.is_available():
        place = torch.cuda.get_device_name()
    else:
        place = f"{machine.cpu_name()}, {torch.get_num_threads()} threads"
    line = f"{place}, {run.dtype}, torch {torch.__version__}"
    if load is not None and load > machine.usable_cores():
        line += (
            f"; busy with other work (load {load:.1f} on {machine.usable_cores()} cores "
            "at the beginning), so the times are not to be relied on"
        )
    return line


def _section(task: DemoTask, ranking: SearchResult, quality: RankingQuality) -> Section:
    from ume_models.retrieval.gallery import Section

    shown = min(_QUERIES_SHOWN, len(task.queries))
    return Section(
        title=f"{task.kind} ({task.name})",
        facts=[
            ("queries", f"{quality.queries}" + (f", {shown} shown" * (shown < quality.queries))),
            ("candidates", str(quality.candidates)),
            *zip(_MEASURES, _figures([quality]), strict=True),
        ],
        blocks=[_block(task, ranking, position) for position in range(shown)],
    )


def _block(task: DemoTask, ranking: SearchResult, position: int) -> QueryBlock:
    from ume_models.retrieval.gallery import Found, QueryBlock
    from ume_models.retrieval.metrics import best_rank

    relevant = task.relevant[position]
    ids = ranking.ids[position]
    rows = ranking.rows[position, :_RESULTS_SHOWN].tolist()
    scores = ranking.scores[position, :_RESULTS_SHOWN].tolist()
    found = [
        Found(_card(task.candidates[row]), score, task.candidates[row].id in relevant)
        for row, score in zip(rows, scores, strict=True)
    ]
    first = best_rank(ids, relevant)
    place = " not among the candidates" if first is None else f": rank {first}"
    note = "right answer" + place
    return QueryBlock(_card(task.queries[position]), found, note, first == 1)


def _card(item: Item) -> Card:
    from ume_models.retrieval.gallery import Card

    return Card(item.id, item.text, item.images, item.video or ())
