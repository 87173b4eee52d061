"""Items to embeddings: batches by token budget, media decoded ahead of the model.

items → plan (tokens and sizes, cheap) → duplicates once → sorted by length → batches
      → decoded in a thread pool → model → rows in the caller's order
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ume_models.embedder import Embedder, EmbedOptions
from ume_models.errors import ErrorKind, ItemError, OptionError
from ume_models.processing import PlannedItem, PreparedItem, prefetch
from ume_models.processing.rules import whole_number
from ume_models.rollout.tokens import TokenTrace

Progress = Callable[[int, int], None]

# Tokens per batch: enough rows to amortise reading the weights, little enough activations.
DEFAULT_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
MAX_BATCH_ROWS = 256
_MAX_AHEAD = 64


@dataclass
class EncodeStats:
    """What a call did.

    Attributes:
        items: rows asked for.
        unique: rows that went through the model.
        tokens: prompt tokens of those.
        batches: calls of the model.
        splits: batches halved because memory ran out.
        written: tokens that the model wrote, where it reasons in words.
        direct, fallbacks: rows that wrote none, and rows whose embedding token never came.
        plan_seconds, wait_seconds, model_seconds: planning, waiting for media, computing.
    """

    items: int = 0
    unique: int = 0
    tokens: int = 0
    batches: int = 0
    splits: int = 0
    written: int = 0
    direct: int = 0
    fallbacks: int = 0
    plan_seconds: float = 0.0
    wait_seconds: float = 0.0
    model_seconds: float = 0.0


@dataclass(frozen=True)
class EncodeOutput:
    """Embeddings of items in their order.

    Attributes:
        embeddings: float32 ``[N, D]`` on the CPU; rows of skipped items are NaN.
        ids: the items' ids.
        errors: one error per skipped item, with its index and id.
        stats: counts and times.
    """

    embeddings: torch.Tensor
    ids: list[str]
    errors: list[ItemError] = field(default_factory=list)
    stats: EncodeStats = field(default_factory=EncodeStats)


def encode(model: Embedder, items: Iterable[Any], **options: Any) -> torch.Tensor:
    """Embeddings float32 ``[N, D]`` of items; the options are those of ``encode_detailed``."""
    return encode_detailed(model, items, **options).embeddings


def encode_detailed(
    model: Embedder,
    items: Iterable[Any],
    *,
    batch_tokens: int | None = None,
    workers: int = 2,
    progress: bool | Progress | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    base_dir: str | Path | None = None,
    **options: Any,
) -> EncodeOutput:
    """Embed items ``{"text", "image" | "images" | "video", "instruction", "id"}``.

    Images are paths, bytes or PIL images, videos are lists of them. Prompts and resizing are
    those of the model's profile. Items that are equal in content are embedded once.

    Args:
        model: a loaded model.
        items: mappings, or ``processing.Item`` objects.
        batch_tokens: prompt tokens per batch; default 4096 on a CPU, 32768 on a GPU. A batch
            that runs out of memory is halved, and so is the budget of the following ones.
        workers: threads that decode media ahead of the model; 0 decodes in between.
        progress: True or False for a bar, a function of (done, total), or None for a bar when
            standard error is a terminal.
        on_error: ``"raise"`` the first bad item — before anything is embedded, if planning
            finds it — or ``"skip"``: its row is NaN and the error is listed.
        base_dir: what relative media paths are relative to.
        options: of the model's family, replacing its defaults.

    Raises:
        ItemError: names the item, with ``on_error="raise"``.
        OptionError: an option is out of range, or the model's family does not have it.
    """
    if on_error not in ("raise", "skip"):
        raise OptionError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    if isinstance(items, (str, bytes, Mapping)):
        raise TypeError("items must be a list of items; put a single one into a list: [item]")
    chosen = model.options.replaced(options)
    budget = (
        DEFAULT_BATCH_TOKENS.get(model.device.type, 4096)
        if batch_tokens is None
        else whole_number("batch_tokens", batch_tokens, 1)
    )
    stats = EncodeStats()
    started = time.perf_counter()
    plans = model.processor.plan(list(items), on_error, base_dir=base_dir)
    extra = model.reserve(chosen)
    plans = [_check_capacity(model, plan, extra, on_error) for plan in plans]
    unique = {plan.digest: plan for plan in reversed(plans) if plan.error is None}
    ordered = sorted(unique.values(), key=lambda plan: (-plan.num_tokens, plan.index))
    stats.items, stats.unique = len(plans), len(ordered)
    stats.plan_seconds = time.perf_counter() - started

    embed = _Batches(model, stats, chosen)
    rows: dict[str, torch.Tensor] = {}
    failed: dict[str, ItemError] = {}
    with _progress(progress, len(ordered)) as advance:
        for batch in _loaded_batches(model, ordered, budget, workers, stats, embed):
            good = [item for item in batch if isinstance(item, PreparedItem)]
            for plan_error in (item for item in batch if isinstance(item, _Failed)):
                failed[plan_error.digest] = plan_error.error
            for item, result in embed(good):
                if isinstance(result, ItemError):
                    failed[item.digest] = result
                else:
                    rows[item.digest] = result
            if failed and on_error == "raise":
                raise next(iter(failed.values()))
            advance(len(batch))

    embeddings = torch.full(
        (len(plans), model.hidden_size), float("nan"), dtype=torch.float32, device="cpu"
    )
    errors = []
    for number, plan in enumerate(plans):
        error = plan.error or failed.get(plan.digest)
        if error is None:
            embeddings[number] = rows[plan.digest]
        else:
            errors.append(error.at(plan.index, plan.id))
    return EncodeOutput(embeddings, [plan.id for plan in plans], errors, stats)


def encoding_settings(
    model: Embedder, options: EmbedOptions | None = None, batch_tokens: int | None = None
) -> dict[str, Any]:
    """Everything beside weights and items that determines embeddings; JSON-serialisable.

    What is stored or cached is comparable where these and the model's fingerprint agree.
    """
    settings = {
        **model.described(model.options if options is None else options),
        "device": model.device.type,
        "batch_tokens": None if batch_tokens is None else int(batch_tokens),
        **model.processor.described(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _check_capacity(
    model: Embedder, plan: PlannedItem, extra: int, on_error: str
) -> PlannedItem:
    """Give the plan an error if the prompt does not fit the model's positions."""
    limit = model.max_positions
    if plan.error is not None or plan.num_tokens + extra <= limit:
        return plan
    error = ItemError(
        f"the prompt has {plan.num_tokens} tokens (and {extra} follow), but the model holds "
        f"{limit}; shorten the text, send fewer frames or lower max_pixels",
        plan.index,
        plan.id,
        kind=ErrorKind.TOO_LONG,
    )
    if on_error == "raise":
        raise error
    return PlannedItem(plan.index, plan.id, error=error)


@dataclass(frozen=True)
class _Failed:
    """An item whose media did not decode."""

    digest: str
    error: ItemError


def _loaded_batches(
    model: Embedder,
    ordered: Sequence[PlannedItem],
    budget: int,
    workers: int,
    stats: EncodeStats,
    embed: _Batches,
) -> Iterator[list[PreparedItem | _Failed]]:
    """Batches of decoded items, longest first, inside the token budget."""
    if not ordered:
        return

    def load(plan: PlannedItem) -> PreparedItem | _Failed:
        try:
            return model.processor.load(plan)
        except ItemError as error:
            return _Failed(plan.digest, error)
        except MemoryError:
            reason = "its media do not fit into memory; make them smaller"
            too_large = ItemError(reason, plan.index, plan.id, kind=ErrorKind.OUT_OF_MEMORY)
            return _Failed(plan.digest, too_large)

    # Decoded pixels wait in memory, so look ahead by tokens rather than by items.
    ahead = max(1, min(_MAX_AHEAD, 2 * budget // max(ordered[0].num_tokens, 1)))
    loaded = prefetch(load, ordered, workers, max(ahead, workers, 1))
    try:
        at = 0
        while at < len(ordered):
            # Memory that ran out once will again, so the budget stays halved.
            limit = max(1, budget >> embed.halvings)
            end, tokens = at, 0
            while end < len(ordered) and end - at < MAX_BATCH_ROWS:
                tokens += ordered[end].num_tokens
                if tokens > limit and end > at:
                    break
                end += 1
            waiting = time.perf_counter()
            batch = [next(loaded) for _ in range(end - at)]
            stats.wait_seconds += time.perf_counter() - waiting
            yield batch
            at = end
    finally:
        loaded.close()


class _Batches:
    """Runs batches; halves those that do not fit and isolates rows that fail."""

    def __init__(self, model: Embedder, stats: EncodeStats, options: EmbedOptions) -> None:
        self.model = model
        self.stats = stats
        self.options = options
        self.halvings = 0

    def __call__(
        self, items: Sequence[PreparedItem]
    ) -> Iterator[tuple[PreparedItem, torch.Tensor | ItemError]]:
        """Every item with its row ``[D]`` on the CPU, or with the error that it raises alone."""
        if not items:
            return
        problem: ItemError | None = None
        started = time.perf_counter()
        try:
            result = self._embed(items).cpu()
        except FloatingPointError as error:
            problem = ItemError(str(error), kind=ErrorKind.NOT_FINITE)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            reason = "does not fit into memory, even alone; lower max_pixels or shorten it"
            problem = ItemError(reason, kind=ErrorKind.OUT_OF_MEMORY)
        finally:
            self.stats.model_seconds += time.perf_counter() - started
        if problem is None:
            self.stats.batches += 1
            self.stats.tokens += sum(item.input_ids.numel() for item in items)
            yield from zip(items, result.unbind(0), strict=True)
            return
        # Outside the except block, so that the failed batch's tensors are already released.
        if problem.kind is ErrorKind.OUT_OF_MEMORY:
            self._free_memory()
        if len(items) == 1:
            yield items[0], problem.at(items[0].index, items[0].id)
            return
        middle = len(items) // 2
        yield from self(items[:middle])
        yield from self(items[middle:])

    def _embed(self, items: Sequence[PreparedItem]) -> torch.Tensor:
        if not self.model.writes(self.options):
            return self.model.embed_prepared(items, self.options)
        result, trace = self.model.embed_traced(items, self.options)
        assert isinstance(trace, TokenTrace)
        self.stats.written += sum(map(len, trace.token_ids))
        self.stats.direct += trace.route.count("direct")
        self.stats.fallbacks += sum(trace.fallback)
        return result

    def _free_memory(self) -> None:
        self.stats.splits += 1
        self.halvings = min(self.halvings + 1, 20)
        self.model.free_memory()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "can't allocate memory" in text or "not enough memory" in text


@contextmanager
def _progress(progress: bool | Progress | None, total: int) -> Iterator[Callable[[int], None]]:
    """A function that takes the number of items just finished."""
    done = 0
    if callable(progress):
        report = progress

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report(done, total)

        yield advance
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task("embedding", total=total)
        yield lambda count: bar.advance(task, count)
