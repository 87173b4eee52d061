"""Options that several commands have, and how a command takes a group of them as one value."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from ume_models.cli.output_file import named_path
from ume_models.errors import UmeError

if TYPE_CHECKING:
    from ume_models.store import Manifest

BUNDLED = "bundled"
OnError = Literal["stop", "skip"]
MODEL_PANEL = "Model"


class Command(TyperCommand):
    """A command whose help shows flags without a type."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _flags_without_type(super().get_params(ctx))


class Group(TyperGroup):
    """The same for a group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _flags_without_type(super().get_params(ctx))


def _flags_without_type(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


def path_option(*names: str, metavar: str, **told: Any) -> Any:
    """A typer.Option for a path, of which an empty one is refused."""
    return typer.Option(*names, metavar=metavar, parser=named_path, **told)


def _model(text: str, **told: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=MODEL_PANEL, **told)


def _plume(text: str, **told: Any) -> Any:
    return typer.Option(help=text, rich_help_panel="PLUME", show_default="the model's", **told)


ModelOption = Annotated[str | None, _model(
    "Checkpoint folder or hub id.", metavar="PATH", show_default="the bundled one"
)]
FamilyOption = Annotated[str | None, _model(
    "Which embedder it is: plume, ume_r1, trace, vlm2vec, gme or lamra.",
    metavar="NAME", show_default="as the checkpoint says",
)]
ProfileOption = Annotated[str | None, _model(
    "Convention of prompts, pixels and taps. Embeddings of two are never mixed.",
    metavar="NAME", show_default="as the checkpoint says",
)]
DeviceOption = Annotated[str, _model(
    "Where to compute: auto, cpu, cuda, cuda:1, …", metavar="DEVICE"
)]
HtmlOption = Annotated[Path | None, path_option(
    "--html", help="Write a page with pictures of the results.", metavar="FILE"
)]
WorkersOption = Annotated[int, typer.Option(
    min=0, metavar="N", help="Threads that read and decode media ahead of the model."
)]


@dataclass(frozen=True)
class EncodingOptions:
    """How items are embedded.

    Attributes:
        model: checkpoint folder or name, or ``BUNDLED``.
        engine, device, dtype, family, profile, multi_image: as ``ume_models.load`` takes them.
        batch_tokens: tokens per batch, None for the default.
        options: the family's own; what is not there is left to the model.
        pictures: as ``ume_models.load`` takes it.
    """

    model: str = BUNDLED
    engine: str = "fast"
    device: str = "auto"
    dtype: str = "auto"
    family: str | None = None
    profile: str | None = None
    multi_image: str | None = None
    batch_tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    pictures: str | None = None

    @classmethod
    def recorded(cls, manifest: Manifest, device: str) -> EncodingOptions:
        """The options that make queries comparable with the embeddings of a store.

        Raises:
            UmeError: the manifest lacks a setting, or is of a family that is not known here.
        """
        from ume_models.embedders.registry import family_class
        from ume_models.store import under_profile

        settings = under_profile(manifest.encoding)
        try:
            names = family_class(settings["embedder"]).Options.names()
            return cls(
                model=manifest.model,
                engine=settings["engine"],
                device=device,
                dtype=settings["dtype"],
                family=settings["embedder"],
                profile=settings["profile"],
                multi_image=settings["multi_image"],
                batch_tokens=settings["batch_tokens"],
                options={name: settings[name] for name in names if name in settings},
                pictures=settings.get("images", {}).get("pictures"),
            )
        except KeyError as error:
            raise UmeError(f"the manifest of the index lacks the setting {error}") from None
        except ValueError as error:
            raise UmeError(f"the manifest of the index: {error}; update ume") from None


def encoding_options(
    model: ModelOption = None,
    family: FamilyOption = None,
    profile: ProfileOption = None,
    engine: Annotated[Literal["fast", "reference"], _model(
        "'reference' follows the official code step by step, slowly."
    )] = "fast",
    device: DeviceOption = "auto",
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], _model(
        "Number format of the model."
    )] = "auto",
    multi_image: Annotated[Literal["all", "first"] | None, _model(
        "Items with several images: all of them, or the first as PLUME's evaluation does.",
        show_default="the profile's",
    )] = None,
    pictures: Annotated[Literal["official", "as_seen"] | None, _model(
        "as_seen: as a viewer shows them, with EXIF rotation and 16 bits scaled.",
        show_default="the profile's",
    )] = None,
    option: Annotated[list[str] | None, _model(
        "An option of the family, such as max_new_tokens=512; may be repeated.",
        metavar="NAME=VALUE",
    )] = None,
    batch_tokens: Annotated[int | None, _model(
        "Tokens per batch; lower needs less memory.", min=1, metavar="N", show_default="by device"
    )] = None,
    mode: Annotated[Literal["gen", "disc", "last"] | None, _plume(
        "gen: after the latent steps; disc: before them; last: last token."
    )] = None,
    latent_steps: Annotated[int | None, _plume("Latent steps.", min=0, metavar="K")] = None,
    context: Annotated[Literal["disc", "prefix_last", "none"] | None, _plume(
        "What the router sees beside the latent state."
    )] = None,
    disc_offset: Annotated[int | None, _plume(
        "With --mode disc: 0 reads <disc_emb> as in training, 1 the token after it as the official "
        "evaluation.",
        min=0, max=1, metavar="N",
    )] = None,
) -> EncodingOptions:
    """How items are embedded, as options of a command."""
    of_family = {
        "mode": mode, "latent_steps": latent_steps, "context": context, "disc_offset": disc_offset
    }
    chosen = {name: value for name, value in of_family.items() if value is not None}
    return EncodingOptions(
        model or BUNDLED, engine, device, dtype, family, profile, multi_image, batch_tokens,
        {**chosen, **dict(map(_named, option or ()))}, pictures,
    )  # fmt: skip


def _named(given: str) -> tuple[str, Any]:
    """Name and value of ``NAME=VALUE``; a value that is no JSON is a text."""
    name, equals, value = given.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"--option takes NAME=VALUE, got {given!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def takes(**groups: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with the options of whole groups.

    Args:
        groups: for parameters of the command, functions whose parameters become options of the
            command; what they return is what the command gets.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        members = {
            name: signature(group, eval_str=True).parameters for name, group in groups.items()
        }
        own = signature(command, eval_str=True).parameters
        every = [
            *(one for name, one in own.items() if name not in groups),
            *(one for group in members.values() for one in group.values()),
        ]

        @wraps(command)
        def run(**given: Any) -> None:
            made = {
                name: groups[name](**{option: given.pop(option) for option in members[name]})
                for name in groups
            }
            command(**made, **given)

        every.sort(key=lambda one: one.default is not one.empty)
        run.__signature__ = Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in every}
        return run

    return decorated
