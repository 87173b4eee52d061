"""Values and options that several commands have."""

# ruff: noqa: UP045 - typer evaluates annotations at run time
from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any, Optional

import typer


class Engine(str, Enum):
    """Which implementation embeds."""

    FAST = "fast"
    REFERENCE = "reference"


class DemoEngine(str, Enum):
    """Which implementations the demo runs."""

    BOTH = "both"
    FAST = "fast"
    REFERENCE = "reference"


class Mode(str, Enum):
    """Which hidden state is the embedding."""

    GEN = "gen"
    DISC = "disc"
    LAST = "last"


class Context(str, Enum):
    """What the router sees beside the latent state."""

    DISC = "disc"
    PREFIX_LAST = "prefix_last"
    NONE = "none"


class DType(str, Enum):
    """Number format of weights and activations."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class OnError(str, Enum):
    """What an unusable item does."""

    STOP = "stop"
    SKIP = "skip"


class MultiImage(str, Enum):
    """Which images of an item count."""

    ALL = "all"
    FIRST = "first"


class IndexType(str, Enum):
    """Which index searches."""

    EXACT = "exact"
    FAISS = "faiss"


MODEL_PANEL = "Model"


def _model(**told: Any) -> Any:
    return typer.Option(rich_help_panel=MODEL_PANEL, **told)


def _plume(**told: Any) -> Any:
    return typer.Option(rich_help_panel="PLUME", show_default="the model's", **told)


ModelOption = Annotated[
    Optional[str],
    _model(help="Checkpoint folder or hub id.", metavar="PATH", show_default="the bundled one"),
]
FamilyOption = Annotated[
    Optional[str],
    _model(help="Which embedder it is: plume, vlm2vec, …", show_default="as the checkpoint says"),
]
ProfileOption = Annotated[
    Optional[str],
    _model(
        help="Convention of prompts, pixels and taps. Embeddings of two are never mixed.",
        show_default="as the checkpoint says",
    ),
]
DeviceOption = Annotated[
    str, _model(help="Where to compute: auto, cpu, cuda, cuda:1, …", metavar="DEVICE")
]
WorkersOption = Annotated[
    int, typer.Option(min=0, help="Threads that read and decode media ahead of the model.")
]
HtmlOption = Annotated[
    Optional[Path],
    typer.Option("--html", help="Write a page with pictures of the results.", metavar="FILE"),
]


def _encoding(
    model: ModelOption = None,
    family: FamilyOption = None,
    profile: ProfileOption = None,
    engine: Annotated[
        Engine, _model(help="'reference' follows the official code step by step, slowly.")
    ] = Engine.FAST,
    device: DeviceOption = "auto",
    dtype: Annotated[DType, _model(help="Number format of the model.")] = DType.AUTO,
    multi_image: Annotated[
        Optional[MultiImage],
        _model(
            help="Items with several images: all of them, or the first as PLUME's evaluation does.",
            show_default="the profile's",
        ),
    ] = None,
    batch_tokens: Annotated[
        Optional[int],
        _model(
            min=1,
            help="Tokens per batch; lower needs less memory.",
            metavar="N",
            show_default="by device",
        ),
    ] = None,
    mode: Annotated[
        Optional[Mode],
        _plume(help="gen: after the latent steps; disc: before them; last: last token."),
    ] = None,
    latent_steps: Annotated[Optional[int], _plume(min=0, help="Latent steps.", metavar="K")] = None,
    context: Annotated[
        Optional[Context], _plume(help="What the router sees beside the latent state.")
    ] = None,
    disc_offset: Annotated[
        Optional[int],
        _plume(
            min=0,
            max=1,
            help="With --mode disc: 0 reads <disc_emb> as in training, 1 the token after it as the "
            "official evaluation.",
        ),
    ] = None,
) -> Any:
    from ume_models.commands.encoding import BUNDLED, EncodingOptions

    of_family = {
        "mode": mode and mode.value,
        "latent_steps": latent_steps,
        "context": context and context.value,
        "disc_offset": disc_offset,
    }
    return EncodingOptions(
        model=model or BUNDLED,
        engine=engine.value,
        device=device,
        dtype=dtype.value,
        family=family,
        profile=profile,
        multi_image=multi_image.value if multi_image else None,
        batch_tokens=batch_tokens,
        options={name: value for name, value in of_family.items() if value is not None},
    )


def takes_encoding(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of a model for its parameter ``encoding``."""
    shared = signature(_encoding, eval_str=True).parameters
    parameters = dict(signature(command, eval_str=True).parameters)
    del parameters["encoding"]

    @wraps(command)
    def run(**given: Any) -> None:
        encoding = _encoding(**{name: given.pop(name) for name in shared})
        command(encoding=encoding, **given)

    every = sorted(
        [*parameters.values(), *shared.values()], key=lambda one: one.default is not one.empty
    )
    run.__signature__ = Signature(every)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in every}
    return run
