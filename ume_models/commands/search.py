"""``ume search``: the best items of an index for each query of a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from ume_models.commands.console import messages, results
from ume_models.commands.encoding import EncodingOptions, embed_rows, load_model
from ume_models.commands.items_file import ItemsFile
from ume_models.commands.outcome import failures_reported
from ume_models.commands.output_file import refuse_folder, write_output
from ume_models.errors import ErrorKind, OptionError, UmeError
from ume_models.retrieval import ExactIndex, FaissIndex, Index, SearchResult
from ume_models.retrieval.gallery import Card, Found, Gallery, QueryBlock, Section, render_gallery
from ume_models.store import EmbeddingStore, Record, require_one_profile, under_profile

_TEXT_SHOWN = 70


def run(
    index_path: Path,
    queries_path: Path,
    *,
    k: int,
    model: str | None,
    device: str,
    index_type: str,
    workers: int,
    html: Path | None,
    json_to: str | None,
) -> None:
    """Embed the queries as the index was embedded, rank, and show."""
    with failures_reported():
        for target in (html, None if json_to == "-" else json_to):
            if target is not None:
                refuse_folder(Path(target))
        queries = ItemsFile(queries_path, when_changed="run the command again")
        store = EmbeddingStore.open(index_path)
        index, records = _read_index(store, index_type)
        if k > len(index):
            messages().print(f"the index has {len(index)} items only: -k {k} is more", markup=False)
            k = len(index)
        embeddings, asked = _embed_queries(store, queries, model, device, workers)
        result = index.search(embeddings, k)
        messages().print(f"searched {len(index)} items: {index.description}", markup=False)

        if html is not None:
            page = render_gallery(_gallery(store, queries, asked, records, result))
            write_output(html, page)
            messages().print(f"gallery: {html}", markup=False)
        answers = _answers(asked, records, result)
        if json_to == "-":
            print(json.dumps(answers, ensure_ascii=False, indent=1))
            return
        if json_to is not None:
            write_output(Path(json_to), json.dumps(answers, ensure_ascii=False, indent=1) + "\n")
            messages().print(f"results: {json_to}", markup=False)
        _show(asked, records, result)


def _read_index(store: EmbeddingStore, index_type: str) -> tuple[Index, list[Record]]:
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
    rows = range(len(queries))
    shard = embed_rows(
        loaded,
        queries,
        rows,
        batch_tokens=options.batch_tokens,
        on_error="stop",
        workers=workers,
    )
    if not bool(shard.embeddings.isfinite().all()):
        raise UmeError(
            "an embedding of a query is not finite: the weights hold NaN or infinity",
            kind=ErrorKind.NOT_FINITE,
        )
    return shard.embeddings, shard.records


def _answers(
    asked: Sequence[Record], records: Sequence[Record], result: SearchResult
) -> list[dict[str, Any]]:
    return [
        {
            "query": query.to_json(),
            "results": [
                {"rank": rank, "score": score, **records[row].to_json()}
                for rank, (row, score) in enumerate(zip(rows, scores, strict=True), start=1)
            ],
        }
        for query, rows, scores in zip(
            asked, result.rows.tolist(), result.scores.tolist(), strict=True
        )
    ]


def _show(asked: Sequence[Record], records: Sequence[Record], result: SearchResult) -> None:
    console = results()
    for query, rows, scores in zip(
        asked, result.rows.tolist(), result.scores.tolist(), strict=True
    ):
        console.print(f"[bold]{escape(query.id)}[/]  {escape(_summary(query))}")
        table = Table(box=None, pad_edge=True, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(justify="right")
        table.add_column(justify="right")
        table.add_column(overflow="fold")
        table.add_column(overflow="ellipsis", no_wrap=True)
        for rank, (row, score) in enumerate(zip(rows, scores, strict=True), start=1):
            found = records[row]
            table.add_row(str(rank), f"{score:.4f}", escape(found.id), escape(_summary(found)))
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


def _gallery(
    store: EmbeddingStore,
    queries: ItemsFile,
    asked: Sequence[Record],
    records: Sequence[Record],
    result: SearchResult,
) -> Gallery:
    def candidate(record: Record) -> Card:
        images, video = map(store.locate, record.images), map(store.locate, record.video)
        return Card(record.id, record.text, tuple(images), tuple(video))

    def query(record: Record) -> Card:
        images = tuple(queries.folder / image for image in record.images)
        return Card(record.id, record.text, images, tuple(queries.folder / f for f in record.video))

    blocks = [
        QueryBlock(
            query(record),
            [
                Found(candidate(records[row]), score)
                for row, score in zip(rows, scores, strict=True)
            ],
        )
        for record, rows, scores in zip(
            asked, result.rows.tolist(), result.scores.tolist(), strict=True
        )
    ]
    manifest, encoding = store.manifest, under_profile(store.manifest.encoding)
    options = EncodingOptions.recorded(manifest, "auto").options
    return Gallery(
        title=f"{queries.path.name} in {store.directory.name or store.directory}",
        lead=f"The best {result.rows.shape[1]} of {len(records)} items for each query.",
        sections=[Section("Queries", blocks)],
        facts=[
            ("queries", str(len(asked))),
            ("items", str(len(records))),
            ("model", manifest.model),
            *((name, str(encoding[name])) for name in ("embedder", "profile")),
            *((name.replace("_", " "), str(value)) for name, value in options.items()),
        ],
    )
