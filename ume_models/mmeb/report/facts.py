"""Settings of a run as people read them: what identifies it first, nothing left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = {
    "model": "model",
    "fingerprint": "model fingerprint",
    "embedder": "family",
    "profile": "profile",
    "profile_fingerprint": "profile fingerprint",
    "family": "backbone",
    "benchmark": "benchmark",
    "package_version": "ume-kernels version",
    "latent_steps": "latent steps K",
    "mode": "mode",
    "dtype": "dtype",
    "engine": "engine",
    "device": "device",
    "labels": "labels",
    "instructions": "instructions",
    "limit": "queries per task",
    "frames": "frames per video",
    "multi_image": "several images",
    "context": "router context",
    "top": "ranks kept",
    "legacy_ndcg": "official nDCG pairing",
}


def setting_facts(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of all settings, those that identify the run first.

    What is inside of a setting is told under both names: "images: min_pixels".
    """
    known = [name for name in _NAMES if name in settings]
    others = [name for name in settings if name not in _NAMES]
    return [pair for name in [*known, *others] for pair in _pairs(name, settings[name])]


def setting_name(name: str) -> str:
    """A setting in words; its own name without underscores where there are none."""
    return _name(name)


def setting_value(name: str, value: Any) -> str:
    """A value of a setting as text: booleans as yes and no, nothing as a dash, no limit as all."""
    return "all" if name == "limit" and value is None else _text(value)


def model_name(settings: Mapping[str, Any]) -> str:
    """What to call the model in a heading: its hub id, or the last part of its path."""
    model = str(settings.get("model") or "unnamed model").rstrip("/\\")
    parts = model.replace("\\", "/").split("/")
    is_hub_id = len(parts) == 2 and all(parts) and not parts[0].startswith(("~", "."))
    return model if is_hub_id else parts[-1]


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{_name(key)} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "–"
    return str(value)


def _name(key: str) -> str:
    return _NAMES.get(key, key.replace("_", " "))


def _pairs(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [
            (f"{_name(name)}: {inside}", text)
            for key, inner in value.items()
            for inside, text in _pairs(key, inner)
        ]
    return [(_name(name), setting_value(name, value))]
