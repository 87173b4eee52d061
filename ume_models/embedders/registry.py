"""The families, and which one a checkpoint belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ume_models.embedders.base import BackboneEmbedder, Signs
from ume_models.errors import CheckpointError, OptionError, UnknownOptionError
from ume_models.profile import Profile

_HOMES = {
    "plume": "plume:PlumeForEmbedding",
    "ume_r1": "ume_r1:UmeR1ForEmbedding",
    "vlm2vec": "vlm2vec:Vlm2VecForEmbedding",
    "gme": "gme:GmeForEmbedding",
    "lamra": "lamra:LamraForEmbedding",
    "trace": "trace:TraceForEmbedding",
}


def families() -> tuple[str, ...]:
    """Names of all families."""
    return tuple(_HOMES)


def family_class(family: str) -> type[BackboneEmbedder]:
    """The class of a family.

    Raises:
        OptionError: there is none of this name.
    """
    if not isinstance(family, str) or family not in _HOMES:
        raise OptionError(f"family must be one of {', '.join(_HOMES)}; got {family!r}")
    module, _, name = _HOMES[family].partition(":")
    found: type[BackboneEmbedder] = getattr(
        import_module(f"ume_models.embedders.{module}"), name
    )
    return found


def profiles(family: str) -> tuple[str, ...]:
    """Names of a family's profiles, its default first.

    Raises:
        OptionError: there is no such family.
    """
    return tuple(family_class(family).profiles)


def pick_profile(family: type[BackboneEmbedder], profile: str | Profile | None) -> Profile:
    """The profile meant by a name, by None (the family's default), or the one given.

    Raises:
        OptionError: the family has none of this name.
    """
    if isinstance(profile, Profile):
        return profile
    known = family.profiles
    if profile is None:
        return next(iter(known.values()))
    if not isinstance(profile, str) or profile not in known:
        raise OptionError(
            f"profile must be one of {', '.join(known)} for the family {family.family}; "
            f"got {profile!r}"
        )
    return known[profile]


def pick_family(
    family: str | None, signs: Signs, options: Mapping[str, Any], source: Path
) -> type[BackboneEmbedder]:
    """The class of a family by name, or the one that a checkpoint belongs to.

    Args:
        family: its name; None looks at the checkpoint.
        signs: what the checkpoint looks like.
        options: options of ``load``; a family that does not have all of them is not meant.
        source: the checkpoint, for errors.

    Raises:
        CheckpointError: no family or several fit, or it is surely another's than the named one's.
        OptionError: there is no such family.
        UnknownOptionError: no family, or not the named one, has these options.
    """
    every = [family_class(name) for name in _HOMES]
    owner = next((cls.family for cls in every if cls.owns(signs)), signs.named)
    if family is not None:
        chosen = family_class(family)
        if owner not in (None, family):
            raise CheckpointError(
                f"{source}: is a checkpoint of the family {owner}, not of {family}; leave family "
                "out, or choose another checkpoint"
            )
        return _with_options([chosen], options)[0]
    if owner is not None:
        return _with_options([family_class(owner)], options)[0]
    able = _with_options(every, options)
    meant = [cls for cls in able if cls.fits(signs)] or (able if len(able) == 1 else [])
    if len(meant) == 1:
        return meant[0]
    names = ", ".join(cls.family for cls in meant or every)
    what = "fits several families" if meant else "looks like none of the families"
    raise CheckpointError(f"{source}: {what}; say which one with family= or --family ({names})")


def _with_options(
    classes: list[type[BackboneEmbedder]], options: Mapping[str, Any]
) -> list[type[BackboneEmbedder]]:
    """The classes that have all of these options."""
    able = [
        cls
        for cls in classes
        if {*options} <= {*cls.Options.names(), *cls.build_options}
    ]
    if not able:
        known = {name for cls in classes for name in (*cls.Options.names(), *cls.build_options)}
        wrong = ", ".join(sorted({*options} - known)) or "this combination"
        raise UnknownOptionError(
            f"{wrong}: no such option; beside those of every model there are "
            f"{', '.join(sorted(known)) or 'none'} for {', '.join(c.family for c in classes)}"
        )
    return able
