"""Values and options that several commands have."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

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


DeviceOption = Annotated[
    str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, …", metavar="DEVICE")
]
WorkersOption = Annotated[
    int, typer.Option(min=0, help="Threads that read and decode media ahead of the model.")
]
HtmlOption = Annotated[
    Optional[Path],  # noqa: UP045 - evaluated at run time
    typer.Option("--html", help="Write a page with pictures of the results.", metavar="FILE"),
]
