"""``ume embed``: items to a folder of embeddings, resumable shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ume_models.cli.options import OnError, WorkersOption, encoding_options, path_option, takes
from ume_models.cli.terminal import ExitCode, resumable, tell, visible

if TYPE_CHECKING:
    from ume_models.store import Skipped

_SHOWN = 10


@takes(encoding=encoding_options)
def embed(
    items: Annotated[str, typer.Argument(
        metavar="ITEMS",
        help="A file with one JSON object per line: text, image | images | video (a list of "
        "frames), instruction, id; paths are relative to its folder. Or a folder of pictures "
        "(.jpg, .png, …) and texts (.txt, .md), whose ids are their paths in it. "
        "Or - for such lines on standard input.",
    )],
    output: Annotated[Path, path_option(
        "--output", "-o", metavar="DIR", help="Folder for the embeddings."
    )],
    encoding: Any,
    shard_size: Annotated[int, typer.Option(
        min=1,
        metavar="N",
        help="Items per shard; a stopped run loses at most one shard. Small shards cost speed: "
        "batches do not reach across them.",
    )] = 1024,
    workers: WorkersOption = 2,
    on_error: Annotated[OnError, typer.Option(
        help="What to do with an item that cannot be embedded; skips are recorded and last "
        "until --overwrite. Two items with one id always stop."
    )] = "stop",
    overwrite: Annotated[bool, typer.Option(
        "--overwrite", help="Start anew and replace the embeddings in DIR."
    )] = False,
) -> None:
    """Embed a file or a folder of items. A stopped run goes on where it was.

    DIR gets manifest.json and shards of safetensors and JSON files.
    After a stop, run the same command again: the result is the same to the byte.
    Media files are known by path, not by content: if one changed, --overwrite.
    Duplicate ids always stop the run.

    [bold]Examples[/]

        ume embed items.jsonl -o index

        ume embed photos/ -o index --model PLUME-2B --on-error skip
    """
    from ume_models.cli.encoding import describe_run, embed_rows, load_model
    from ume_models.cli.items_file import open_items
    from ume_models.cli.progress import ItemProgress
    from ume_models.disk_space import require_space
    from ume_models.store import EmbeddingStore

    with resumable("Finished shards are kept: run the same command again to go on."):
        lines = open_items(items, leave_out=output, on_error=on_error)
        model = load_model(encoding)
        manifest = describe_run(model, encoding, lines, output, shard_size)
        with EmbeddingStore.begin(output, manifest, overwrite=overwrite) as store:
            pending = store.pending()
            missing = sum(len(store.item_range(shard)) for shard in pending)
            require_space(output, store.least_bytes(missing))
            done = len(lines) - missing
            if done:
                then = "going on from there" if pending else "nothing to do"
                tell(f"{output}: {done} of {_count(len(lines), 'item')} are done, {then}")
            with ItemProgress(len(lines), done) as progress:
                for shard in pending:
                    rows = store.item_range(shard)
                    with progress.part(len(rows)) as within:
                        content = embed_rows(
                            model, lines, rows, batch_tokens=encoding.batch_tokens,
                            on_error=on_error, workers=workers, progress=within,
                        )  # fmt: skip
                        store.write(shard, content)
            skipped = store.skipped()
    made = _count(len(lines) - len(skipped), "embedding")
    shards = _count(store.num_shards, "shard")
    print(visible(f"{made} of {manifest.hidden_size} numbers in {shards}: {output}"))
    if skipped:
        _list_skipped(skipped)
        raise typer.Exit(ExitCode.SKIPPED)


def _list_skipped(skipped: list[Skipped]) -> None:
    what = "1 item was" if len(skipped) == 1 else f"{len(skipped)} items were"
    tell(f"{what} skipped (later runs leave them out too, unless with --overwrite):")
    for entry in skipped[:_SHOWN]:
        tell(f"  {entry.id}: {entry.reason}")
    if len(skipped) > _SHOWN:
        tell(f"  … and {len(skipped) - _SHOWN} more, in the shard-*.json files under 'skipped'")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
