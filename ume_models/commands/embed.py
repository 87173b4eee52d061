"""``ume embed``: a file of items to a folder of embeddings, resumable shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from ume_models.commands.console import messages
from ume_models.commands.encoding import EncodingOptions, describe_run, embed_rows, load_model
from ume_models.commands.items_file import ItemsFile
from ume_models.commands.outcome import ExitCode, failures_reported
from ume_models.commands.progress import ItemProgress
from ume_models.disk_space import require_space
from ume_models.store import EmbeddingStore, Skipped

_SHOWN = 10


def run(
    items_path: Path,
    output: Path,
    options: EncodingOptions,
    *,
    shard_size: int,
    workers: int,
    on_error: Literal["stop", "skip"],
    overwrite: bool,
) -> None:
    """Embed every item that is not in ``output`` yet; exits with 3 if any was skipped."""
    hint = "Finished shards are kept: run the same command again to go on."
    with failures_reported(when_interrupted=hint):
        items = ItemsFile(items_path, on_error)
        model = load_model(options)
        manifest = describe_run(model, options, items, output, shard_size)
        with EmbeddingStore.begin(output, manifest, overwrite=overwrite) as store:
            pending = store.pending()
            missing = sum(len(store.item_range(shard)) for shard in pending)
            require_space(output, store.least_bytes(missing))
            done = len(items) - missing
            if done:
                then = "going on from there" if pending else "nothing to do"
                _tell(f"{output}: {done} of {_count(len(items), 'item')} are done, {then}")
            with ItemProgress(len(items), done) as progress:
                for shard in pending:
                    rows = store.item_range(shard)
                    with progress.part(len(rows)) as within:
                        content = embed_rows(
                            model,
                            items,
                            rows,
                            batch_tokens=options.batch_tokens,
                            on_error=on_error,
                            workers=workers,
                            progress=within,
                        )
                        store.write(shard, content)
            skipped = store.skipped()
        print(
            f"{_count(len(items) - len(skipped), 'embedding')} of {manifest.hidden_size} numbers "
            f"in {_count(store.num_shards, 'shard')}: {output}"
        )
        if skipped:
            _list_skipped(skipped)
            raise typer.Exit(ExitCode.SKIPPED)


def _list_skipped(skipped: list[Skipped]) -> None:
    what = "1 item was" if len(skipped) == 1 else f"{len(skipped)} items were"
    _tell(f"{what} skipped (later runs leave them out too, unless with --overwrite):")
    for entry in skipped[:_SHOWN]:
        _tell(f"  {entry.id}: {entry.reason}")
    if len(skipped) > _SHOWN:
        _tell(f"  … and {len(skipped) - _SHOWN} more, in the shard-*.json files under 'skipped'")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _tell(text: str) -> None:
    messages().print(text, markup=False)
