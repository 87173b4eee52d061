"""What every interface does with the model it is given, whatever the family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ume_models.embedder import Embedder, EmbedOptions
from ume_models.embedders.loading import load

Source = Embedder | str | Path | None
"""A loaded model, a folder, a hub id, or None for the bundled model."""


def open_model(source: Source, options: Mapping[str, Any]) -> tuple[Embedder, EmbedOptions]:
    """The model, and the options to embed with.

    Args:
        source: a loaded model is used, not copied.
        options: of ``ume_models.load``; beside a loaded model only its family's own, such as
            PLUME's ``mode``, which replace its defaults here and not in the model.

    Raises:
        CheckpointError: the checkpoint does not load.
        TypeError, ValueError: an option does not exist, or is out of range.
    """
    if not isinstance(source, Embedder):
        model = load(source, **options)
        return model, model.options
    wrong = sorted({*options} - {*source.Options.names()})
    if wrong:
        raise TypeError(
            f"a loaded model takes no load options, got {', '.join(wrong)}; give its folder instead"
        )
    return source, source.options.replaced(options)


def load_options(model: Embedder, options: EmbedOptions) -> dict[str, Any]:
    """Options with which ``load`` gives a model that embeds like this one with ``options``."""
    own = model.Options.names()
    found = {name: value for name, value in model.load_options.items() if name not in own}
    return {**found, **options.described()}


def prompt_limit(model: Embedder, options: EmbedOptions | None = None) -> int:
    """Longest prompt in tokens: the model's positions less what follows a prompt."""
    return model.max_positions - model.reserve(model.options if options is None else options)
