"""``ume search``: the best items of an index for a query, or for each query of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ume_models.cli.options import (
    BUNDLED,
    DeviceOption,
    EncodingOptions,
    HtmlOption,
    WorkersOption,
    path_option,
)
from ume_models.cli.output_file import named_path, refuse_folder, write_output
from ume_models.cli.terminal import results, tell, visible
from ume_models.errors import ErrorKind, OptionError, UmeError

if TYPE_CHECKING:
    import torch

    from ume_models.cli.items_file import ItemsFile
    from ume_models.retrieval import Index
    from ume_models.retrieval.gallery import Gallery
    from ume_models.store import EmbeddingStore, Record

    Ranked = list[tuple[Record, list[tuple[Record, float]]]]

_TEXT_SHOWN = 70


def search(
    index: Annotated[Path, path_option(
        "--index", metavar="DIR", help="Folder written by `ume embed`."
    )],
    query: Annotated[str | None, typer.Argument(
        metavar="QUERY", help="Text to search for.", show_default=False
    )] = None,
    image: Annotated[Path | None, path_option(
        "--image", metavar="FILE", help="Picture to search for, alone or with QUERY."
    )] = None,
    queries: Annotated[str | None, typer.Option(
        metavar="Q.jsonl",
        help="Many queries, in the format of items; a folder, or - for standard input.",
    )] = None,
    k: Annotated[int, typer.Option("-k", min=1, metavar="K", help="Results per query.")] = 10,
    html: HtmlOption = None,
    json_to: Annotated[str | None, typer.Option(
        "--json", metavar="FILE|-", help="Write the results as JSON; - is stdout."
    )] = None,
    model: Annotated[str | None, typer.Option(
        help="Where the checkpoint is now.", metavar="PATH", show_default="as recorded in the index"
    )] = None,
    device: DeviceOption = "auto",
    index_type: Annotated[Literal["exact", "faiss"], typer.Option(
        help="faiss needs: pip install faiss-cpu"
    )] = "exact",
    workers: WorkersOption = 2,
) -> None:
    """Rank the items of an index for a query, or for each query of a file.

    Queries are embedded with the model, the profile and the settings recorded in the index.

    [bold]Examples[/]

        ume search --index index "a cat on a sofa"

        ume search --index index --image photo.jpg --html results.html

        ume search --index index --queries queries.jsonl -k 5 --json - > results.json
    """
    from ume_models.cli.items_file import open_items, query_item
    from ume_models.retrieval.gallery import render_gallery
    from ume_models.store import EmbeddingStore

    single = query is not None or image is not None
    if single == (queries is not None):
        raise typer.BadParameter("give a QUERY, an --image or both; or --queries and neither")
    for target in (html, None if json_to in (None, "-") else named_path(json_to)):
        if target is not None:
            refuse_folder(target)
    if queries is None:
        lines = query_item(query or "", image)
    else:
        lines = open_items(queries, when_changed="run the command again")
    store = EmbeddingStore.open(index)
    built, records = _read_index(store, index_type)
    if k > len(built):
        tell(f"the index has {len(built)} items only: -k {k} is more")
        k = len(built)
    embeddings, asked = _embed_queries(store, lines, model, device, workers)
    found = built.search(embeddings, k)
    tell(f"searched {len(built)} items: {built.description}")
    ranked: Ranked = [
        (one, [(records[row], score) for row, score in zip(rows, scores, strict=True)])
        for one, rows, scores in zip(asked, found.rows.tolist(), found.scores.tolist(), strict=True)
    ]
    if html is not None:
        write_output(html, render_gallery(_gallery(store, lines, ranked, len(built))))
        tell(f"gallery: {html}")
    answers = [
        {
            "query": one.to_json(),
            "results": [
                {"rank": rank, "score": score, **record.to_json()}
                for rank, (record, score) in enumerate(best, start=1)
            ],
        }
        for one, best in ranked
    ]
    text = json.dumps(answers, ensure_ascii=False, indent=1)
    if json_to == "-":
        print(visible(text))
        return
    if json_to is not None:
        write_output(Path(json_to), text + "\n")
        tell(f"results: {json_to}")
    _show(ranked)


def _read_index(store: EmbeddingStore, index_type: str) -> tuple[Index, list[Record]]:
    import torch

    from ume_models.retrieval import ExactIndex, FaissIndex

    shards = list(store.shards())
    records = [record for shard in shards for record in shard.records]
    if not records:
        raise UmeError(f"{store.directory} holds no embeddings: every item was skipped")
    embeddings = torch.cat([shard.embeddings for shard in shards])
    ids = [record.id for record in records]
    build = {"exact": ExactIndex, "faiss": FaissIndex}[index_type]
    return build(embeddings, ids), records


def _embed_queries(
    store: EmbeddingStore, queries: ItemsFile, model: str | None, device: str, workers: int
) -> tuple[torch.Tensor, Sequence[Record]]:
    from ume_models.cli.encoding import embed_rows, load_model
    from ume_models.store import require_one_profile

    options = EncodingOptions.recorded(store.manifest, device)
    if model is not None:
        options = replace(options, model=model)
    try:
        loaded = load_model(options)
    except OptionError as error:
        raise OptionError(
            f"the settings of {store.directory} (profile {options.profile}) cannot be used with "
            f"--model {options.model} --device {device}: {error}"
        ) from error
    require_one_profile(
        (str(store.directory), store.manifest.encoding),
        (options.model, loaded.described(loaded.options)),
        "embed the items again",
    )
    if loaded.fingerprint != store.manifest.fingerprint:
        raise UmeError(
            f"the index was made with the model {store.manifest.model!r} (fingerprint "
            f"{store.manifest.fingerprint}), and {options.model!r} has fingerprint "
            f"{loaded.fingerprint}: their embeddings cannot be compared; give the model of the "
            "index with --model, or embed the items again",
            kind=ErrorKind.OTHER_SETTINGS,
        )
    shard = embed_rows(
        loaded, queries, range(len(queries)), batch_tokens=options.batch_tokens, on_error="stop",
        workers=workers,
    )  # fmt: skip
    if not bool(shard.embeddings.isfinite().all()):
        raise UmeError(
            "an embedding of a query is not finite: the weights hold NaN or infinity",
            kind=ErrorKind.NOT_FINITE,
        )
    return shard.embeddings, shard.records


def _show(ranked: Ranked) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = results()
    for query, best in ranked:
        console.print(f"[bold]{escape(query.id)}[/]  {escape(_summary(query))}")
        table = Table(box=None, pad_edge=True, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(justify="right")
        table.add_column(justify="right")
        table.add_column(overflow="fold")
        table.add_column(overflow="ellipsis", no_wrap=True)
        for rank, (record, score) in enumerate(best, start=1):
            table.add_row(str(rank), f"{score:.4f}", escape(record.id), escape(_summary(record)))
        console.print(table)
        console.print()


def _summary(record: Record) -> str:
    """One line that lets a person recognise an item."""
    parts = []
    if record.video:
        parts.append(f"[{len(record.video)} frames: {record.video[0]} …]")
    elif record.images:
        more = f" and {len(record.images) - 1} more" if len(record.images) > 1 else ""
        parts.append(f"[{record.images[0]}{more}]")
    text = " ".join(record.text.split())
    parts.append(text if len(text) <= _TEXT_SHOWN else text[: _TEXT_SHOWN - 1] + "…")
    return " ".join(part for part in parts if part)


def _gallery(store: EmbeddingStore, queries: ItemsFile, ranked: Ranked, items: int) -> Gallery:
    from ume_models.cli.encoding import SMALL
    from ume_models.retrieval.gallery import Card, Found, Gallery, QueryBlock, Section
    from ume_models.store import under_profile

    def card(record: Record, locate: Callable[[str], Path]) -> Card:
        images, video = map(locate, record.images), map(locate, record.video)
        return Card(record.id, record.text, tuple(images), tuple(video))

    blocks = [
        QueryBlock(
            card(query, lambda name: queries.folder / name),
            [Found(card(record, store.locate), score) for record, score in best],
        )
        for query, best in ranked
    ]
    manifest, encoding = store.manifest, under_profile(store.manifest.encoding)
    options = EncodingOptions.recorded(manifest, "auto").options
    return Gallery(
        title=f"{Path(queries.name).name} in {store.directory.name or store.directory}",
        lead=f"The best {len(ranked[0][1])} of {items} items for each query.",
        remarks=[SMALL] * (manifest.model == BUNDLED),
        sections=[Section("Queries", blocks)],
        facts=[
            ("queries", str(len(ranked))),
            ("items", str(items)),
            ("model", manifest.model),
            *((name, str(encoding[name])) for name in ("embedder", "profile")),
            *((name.replace("_", " "), str(value)) for name, value in options.items()),
        ],
    )
