"""``ume demo``: the shipped held-out items through both engines, measured, compared and shown."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

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


class TaskRun(NamedTuple):
    """One engine over the items of one task.

    Attributes:
        embeddings: float32 ``[Q + N, D]`` of the queries, then of the candidates.
        ranking: all candidates for every query, best first.
        seconds: wall time of embedding, media decoding included.
    """

    embeddings: torch.Tensor
    ranking: SearchResult
    seconds: float


Runs = dict[str, list[TaskRun]]
"""The finished tasks of every engine, in order."""


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
    tasks = [
        replace(task, queries=task.queries[:queries], relevant=task.relevant[:queries])
        for task in heldout().tasks  # candidates are never reduced: that makes a task easier
    ]
    load = machine.load_average()
    runs, dtype = _run_engines(
        ["fast", "reference"] if engine == "both" else [engine], options, tasks
    )
    name, done = next(iter(runs.items()))
    qualities = [
        ranking_quality(finished.ranking.ids, task.relevant, len(task.candidates))
        for task, finished in zip(tasks, done, strict=False)
    ]
    lines = [*_run_lines(runs), f"Machine: {_machine_line(dtype, load)}"]
    _print_quality(tasks, qualities, name)
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
    names: Sequence[str], options: EncodingOptions, tasks: Sequence[Task]
) -> tuple[Runs, str]:
    """Every engine over the tasks, taking turns, so that a busy machine slows all of them.

    Returns:
        What they did, and the number format of their weights.
    """
    from ume_models import encode
    from ume_models.cli.encoding import SMALL, load_model, require_clips

    models = {name: load_model(replace(options, engine=name), told=False) for name in names}
    if options.model == BUNDLED:
        log.warning(SMALL)
    first = models[names[0]]
    require_clips(first, "or another model: some of the examples are clips")
    runs: Runs = {name: [] for name in names}
    query, *_, candidate = _items(tasks[0])
    for model in models.values():
        # The first call allocates and builds what later calls reuse.
        encode.encode_detailed(model, [query, candidate], progress=False)
    for number, task in enumerate(tasks, start=1):
        tell(f"task {number} of {len(tasks)}: {task.name}")
        for name, model in models.items():
            if name == "fast" or _seconds(runs[name]) <= _REFERENCE_SECONDS:
                runs[name].append(_run_task(model, task))
    return runs, str(first.dtype).removeprefix("torch.")


def _run_task(model: Embedder, task: Task) -> TaskRun:
    from ume_models import encode
    from ume_models.retrieval import ExactIndex

    begun = time.perf_counter()
    items, split = _items(task), len(task.queries)
    embeddings = encode.encode_detailed(model, items, progress=False).embeddings
    seconds = time.perf_counter() - begun
    index = ExactIndex(embeddings[split:], [item.id for item in items[split:]])
    return TaskRun(embeddings, index.search(embeddings[:split], len(index)), seconds)


def _items(task: Task) -> list[Item]:
    """Queries, then candidates."""
    from ume_models.processing import parse_item

    return [parse_item(item, at) for at, item in enumerate([*task.queries, *task.candidates])]


def _seconds(done: Sequence[TaskRun]) -> float:
    return sum(run.seconds for run in done)


def _print_quality(
    tasks: Sequence[Task], qualities: Sequence[RankingQuality], engine: str
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


def _run_lines(runs: Runs) -> list[str]:
    """What was measured, in sentences: agreement and speed over the same items of this run."""
    if len(runs) == 1:
        return [_speed_line(name, done) for name, done in runs.items()]
    fast, reference = runs["fast"], runs["reference"]
    pairs = [*zip(fast, reference, strict=False)]
    ratios = [slow.seconds / quick.seconds for quick, slow in pairs]
    compared = fast[: len(pairs)]
    lines = [
        *_agreement(pairs),
        _speed_line("fast", compared),
        _speed_line("reference", reference),
        f"Speed-up in this run: {_seconds(reference) / _seconds(compared):.1f}× in total time, "
        f"{min(ratios):.1f}× to {max(ratios):.1f}× by task "
        "(this model is small; larger ones have other ratios)",
    ]
    if len(reference) < len(fast):
        stopped = (
            f"The reference engine was stopped after {len(reference)} of {len(fast)} tasks, "
            f"which took {_seconds(reference):.0f} s; the comparison covers these"
        )
        lines.insert(0, stopped)
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


def _speed_line(name: str, done: Sequence[TaskRun]) -> str:
    items, seconds = sum(len(run.embeddings) for run in done), _seconds(done)
    return f"{name} engine: {items} items in {seconds:.2f} s, {items / seconds:.1f} items/s"


def _machine_line(dtype: str, load: float | None) -> str:
    import torch

    if torch.cuda.is_available():
        place = torch.cuda.get_device_name()
    else:
        place = f"{machine.cpu_name()}, {torch.get_num_threads()} threads"
    line = f"{place}, {dtype}, torch {torch.__version__}"
    if load is not None and load > machine.usable_cores():
        line += (
            f"; busy with other work (load {load:.1f} on {machine.usable_cores()} cores "
            "at the beginning), so the times are not to be relied on"
        )
    return line


def _section(task: Task, ranking: SearchResult, quality: RankingQuality) -> Section:
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


def _block(task: Task, ranking: SearchResult, position: int) -> QueryBlock:
    from ume_models.retrieval.gallery import Found, QueryBlock
    from ume_models.retrieval.metrics import best_rank

    relevant = task.relevant[position]
    rows = ranking.rows[position, :_RESULTS_SHOWN].tolist()
    scores = ranking.scores[position, :_RESULTS_SHOWN].tolist()
    found = [
        Found(_card(task.candidates[row]), score, task.candidates[row]["id"] in relevant)
        for row, score in zip(rows, scores, strict=True)
    ]
    first = best_rank(ranking.ids[position], relevant)
    place = " not among the candidates" if first is None else f": rank {first}"
    return QueryBlock(_card(task.queries[position]), found, "right answer" + place, first == 1)


def _card(fields: dict[str, Any]) -> Card:
    from ume_models.processing import parse_item
    from ume_models.retrieval.gallery import Card

    item = parse_item(fields, 0)
    return Card(item.id, item.text, item.images, item.video or ())
