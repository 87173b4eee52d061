"""Commands about items of one's own: demo, embed, search, doctor."""

# ruff: noqa: UP045 - typer evaluates annotations at run time
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from ume_models.cli.options import (
    DemoEngine,
    DeviceOption,
    FamilyOption,
    HtmlOption,
    IndexType,
    ModelOption,
    OnError,
    ProfileOption,
    WorkersOption,
    takes_encoding,
)


def demo(
    html: Annotated[
        Path, typer.Option("--html", help="Where to write the gallery.", metavar="FILE")
    ] = Path("ume-demo.html"),
    model: ModelOption = None,
    family: FamilyOption = None,
    profile: ProfileOption = None,
    queries: Annotated[
        Optional[int],
        typer.Option(min=1, help="Queries per task.", metavar="N", show_default="all"),
    ] = None,
    engine: Annotated[
        DemoEngine, typer.Option(help="What to run; only both can be compared.")
    ] = DemoEngine.BOTH,
) -> None:
    """Try it: embed the shipped examples, rank them, compare both engines, show pictures.

    Needs no data, no network and no GPU, and takes well under two minutes.

    [bold]Example[/]

        ume demo --html gallery.html
    """
    from ume_models.commands import demo as command
    from ume_models.commands.encoding import BUNDLED, EncodingOptions

    options = EncodingOptions(model=model or BUNDLED, family=family, profile=profile)
    command.run(html, options, queries, engine.value)


@takes_encoding
def embed(
    items: Annotated[
        Path,
        typer.Argument(
            metavar="ITEMS.jsonl",
            help="One JSON object per line: text, image | images | video (a list of frames), "
            "instruction, id. Paths are relative to this file's folder.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the embeddings.")
    ],
    encoding: Any,
    shard_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Items per shard; a stopped run loses at most one shard. Small shards cost speed: "
            "batches do not reach across them.",
        ),
    ] = 1024,
    workers: WorkersOption = 2,
    on_error: Annotated[
        OnError,
        typer.Option(
            help="What to do with an item that cannot be embedded; skips are recorded and last "
            "until --overwrite. Two items with one id always stop."
        ),
    ] = OnError.STOP,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew and replace the embeddings in DIR.")
    ] = False,
) -> None:
    """Embed a file of items into a folder. A stopped run goes on where it was.

    The folder gets manifest.json and shards of safetensors and JSON files.
    After a stop, run the same command again: the result is the same to the byte.
    Media files are known by path, not by content: if one changed, --overwrite.
    Duplicate ids always stop the run.

    [bold]Examples[/]

        ume embed items.jsonl -o index

        ume embed items.jsonl -o index --model PLUME-2B --on-error skip
    """
    from ume_models.commands import embed as command

    skip_or_stop: Literal["stop", "skip"] = "skip" if on_error is OnError.SKIP else "stop"
    command.run(
        items,
        output,
        encoding,
        shard_size=shard_size,
        workers=workers,
        on_error=skip_or_stop,
        overwrite=overwrite,
    )


def search(
    index: Annotated[
        Path, typer.Option("--index", metavar="DIR", help="Folder written by `ume embed`.")
    ],
    queries: Annotated[
        Path,
        typer.Option("--queries", metavar="Q.jsonl", help="Queries, in the format of items."),
    ],
    k: Annotated[int, typer.Option("-k", min=1, help="Results per query.")] = 10,
    html: HtmlOption = None,
    json_to: Annotated[
        Optional[str],
        typer.Option("--json", metavar="FILE|-", help="Write the results as JSON; - is stdout."),
    ] = None,
    model: Annotated[
        Optional[str],
        typer.Option(
            help="Where the checkpoint is now.",
            metavar="PATH",
            show_default="as recorded in the index",
        ),
    ] = None,
    device: DeviceOption = "auto",
    index_type: Annotated[
        IndexType, typer.Option(help="faiss needs: pip install faiss-cpu")
    ] = IndexType.EXACT,
    workers: WorkersOption = 2,
) -> None:
    """Rank the items of an index for each query of a file.

    Queries are embedded with the model, the profile and the settings recorded in the index.

    [bold]Examples[/]

        ume search --index index --queries queries.jsonl -k 5 --html results.html

        ume search --index index --queries queries.jsonl --json - > results.json
    """
    from ume_models.commands import search as command

    command.run(
        index,
        queries,
        k=k,
        model=model,
        device=device,
        index_type=index_type.value,
        workers=workers,
        html=html,
        json_to=json_to,
    )


def doctor(
    model: Annotated[
        Optional[str],
        typer.Argument(
            metavar="[MODEL]",
            help="Checkpoint folder or hub id: what could be accelerated in it, instead.",
        ),
    ] = None,
    family: FamilyOption = None,
    profile: ProfileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable report.")] = False,
) -> None:
    """Show versions, devices, what would run here and why, and what is missing.

    Ends with 0 when the package can be used, else with 1.

    With MODEL: what ume_models.accelerate would replace in that checkpoint on this machine, which
    repositories' scripts it suits, and whether ume_models.load takes it. The weights are not read.
    Ends with 1 when the checkpoint cannot be accelerated.

    [bold]Examples[/]

        ume doctor

        ume doctor PLUME-2B --json
    """
    if model is not None:
        from ume_models.commands import doctor_model

        doctor_model.run(model, as_json, family, profile)
        return
    from ume_models.commands import doctor as command

    command.run(as_json)
