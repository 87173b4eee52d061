"""What an evaluation is of, written beside its results: other settings never mix with them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from ume_models.atomic import remove_leftovers, write_atomically
from ume_models.errors import ErrorKind, StoreError
from ume_models.json_files import read_object
from ume_models.mmeb.dataset import ReadOptions, require_one_of
from ume_models.mmeb.frames import FRAMES
from ume_models.mmeb.keys import KINDS, Kind
from ume_models.mmeb.table_files import TABLE_FILES
from ume_models.store import lock_folder, setting_differences, unlock_folder

FORMAT = "ume-eval"
FORMAT_VERSION = 1
MANIFEST = "run.json"
# Told for the reader's sake; another value of these gives the same results.
_INFORMATIVE = frozenset({"model", "tasks", "data", "versions"})
_CONCLUSIONS = ("summary.json", "summary.md", "report.html")


OnError: TypeAlias = Literal["stop", "skip"]
LEAST_TOP = 10


@dataclass(frozen=True)
class EvalOptions:
    """How tasks are embedded and ranked.

    Attributes:
        options: of the model's family, replacing its defaults.
        batch_tokens: prompt tokens per batch, None for the default of the device.
        workers: threads that read and decode media.
        top: places of each ranking that are kept and scored.
        legacy_ndcg: pair graded relevance with labels as the official metric does; where the
            labels are strings, that depends on ``PYTHONHASHSEED``.
        on_error: "stop" at the first item or task that cannot be used, or "skip": a task with
            one is listed as missing and the others go on.
        shard_sizes: items per shard of each input class, None for those of the device.

    Raises:
        ValueError: a value is none of these.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    batch_tokens: int | None = None
    workers: int = 2
    top: int = 100
    legacy_ndcg: bool = False
    on_error: OnError = "stop"
    shard_sizes: Mapping[Kind, int] | None = None

    def __post_init__(self) -> None:
        require_one_of("on_error", self.on_error, get_args(OnError))
        if self.top < LEAST_TOP:  # measures look at the first ten places
            raise ValueError(f"top must be at least {LEAST_TOP}, got {self.top}")
        sizes = self.shard_sizes
        if sizes is not None and not all(sizes.get(kind, 0) > 0 for kind in KINDS):
            raise ValueError(f"shard_sizes needs a number above 0 for each of {', '.join(KINDS)}")


def describe(
    *,
    package_version: str,
    model: str,
    fingerprint: str,
    benchmark: str,
    tasks: list[str],
    data: str,
    encoding: Mapping[str, Any],
    reading: ReadOptions,
    options: EvalOptions,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of an evaluation, as it is written to ``run.json``."""
    read = asdict(reading)
    del read["download"]  # where a table came from does not change it
    if reading.frames in (None, FRAMES):  # as it was before there was a choice
        del read["frames"]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": package_version,
        "benchmark": benchmark,
        "model": model,
        "fingerprint": fingerprint,
        "data": data,
        "settings": {
            **encoding,
            **read,
            "top": options.top,
            "legacy_ndcg": options.legacy_ndcg,
            **({"hash_seed": os.environ.get("PYTHONHASHSEED")} if options.legacy_ndcg else {}),
        },
        "tasks": tasks,
        "versions": dict(versions),
    }


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """An output folder, made if missing, that no other process writes to within the block.

    Raises:
        StoreError: it is a file, or another process writes to it.
    """
    if folder.is_file():
        raise StoreError(f"{folder} is a file: give the name of a folder with -o")
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    try:
        yield
    finally:
        unlock_folder(folder, lock)


def joined(folder: Path, manifest: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any]:
    """The manifest with the tasks that were evaluated in a folder before; nothing is written.

    Args:
        folder: the output folder.
        manifest: what ``describe`` returned.
        overwrite: an evaluation that is there is going to be replaced.

    Raises:
        StoreError: the folder holds an evaluation with other settings, which are named, scores of
            other tasks on other data, or files that are not an evaluation's.
    """
    path = folder / MANIFEST
    if not path.is_file() and any((folder / name).exists() for name in ("tasks", "embeddings")):
        raise StoreError(
            f"{folder} has a folder tasks or embeddings but no {MANIFEST}: it is not the output of "
            "`ume eval`; choose another one with -o"
        )
    there = None if overwrite else earlier_manifest(folder)
    differences = [] if there is None else manifest_differences(there, manifest)
    if there is None or (differences and not _holds_results(folder)):  # nothing to go on with
        return dict(manifest)
    if differences:
        raise StoreError(
            f"{folder} holds an evaluation with other settings:\n  "
            + "\n  ".join(differences)
            + "\nchoose another folder with -o, or replace it with --overwrite",
            kind=ErrorKind.OTHER_SETTINGS,
        )
    earlier = [name for name in there["tasks"] if name not in manifest["tasks"]]
    scored = [name for name in earlier if (folder / "tasks" / name / "scores.json").is_file()]
    data = [str(one.get("data")) for one in (there, manifest)]
    if scored and os.path.realpath(data[0]) != os.path.realpath(data[1]):
        raise StoreError(
            f"{folder} holds scores of {len(scored)} other tasks on the data of {data[0]}, and "
            f"--data is {data[1]} now: name those tasks as well, choose another folder with -o, or "
            "replace everything with --overwrite",
            kind=ErrorKind.OTHER_SETTINGS,
        )
    return {**manifest, "tasks": [*manifest["tasks"], *earlier]}


def begin(folder: Path, manifest: Mapping[str, Any], *, overwrite: bool) -> None:
    """Begin an evaluation in a folder, or go on with one of the same settings.

    Args:
        folder: the output folder.
        manifest: what ``joined`` returned.
        overwrite: remove results and embeddings of an evaluation that is there. No other file of
            the folder is touched.

    Raises:
        StoreError: as ``joined``.
        OSError: the folder cannot be written.
    """
    joined(folder, manifest, overwrite=overwrite)
    for place in (folder, *_folders(folder / "tasks"), *_folders(folder / "embeddings")):
        remove_leftovers(place, "")
    path = folder / MANIFEST
    if (overwrite and path.is_file()) or _is_being_replaced(path):
        _remove_results(folder)
    write_atomically(path, (json.dumps(manifest, ensure_ascii=False, indent=1) + "\n").encode())


def remove_conclusions(folder: Path) -> None:
    """Remove what was written of all tasks together: it is written again when they are done."""
    for name in _CONCLUSIONS:
        (folder / name).unlink(missing_ok=True)


def _holds_results(folder: Path) -> bool:
    """Whether anything has been embedded or scored there."""
    return (folder / "embeddings").exists() or any((folder / "tasks").glob("*/scores.json"))


def _remove_results(folder: Path) -> None:
    """Remove what an evaluation wrote; stopped in between, the next run goes on removing."""
    path = folder / MANIFEST
    write_atomically(path, (json.dumps({"format": FORMAT, "replaced": True}) + "\n").encode())
    for name in (*_CONCLUSIONS, "timing.json", "media.json", TABLE_FILES):
        (folder / name).unlink(missing_ok=True)
    for task in _folders(folder / "tasks"):
        for name in ("items.json", "scores.json", "predictions.jsonl"):
            (task / name).unlink(missing_ok=True)
        remove_leftovers(task, "")
    for store in _folders(folder / "embeddings"):
        if (store / "keys.json").is_file():
            # The keys last: they tell that the folder is a store.
            for rest in (*store.glob("shard-*"), *store.glob("manifest.json")):
                rest.unlink()
            shutil.rmtree(store)
    for name in ("tasks", "embeddings"):
        for empty in [*_folders(folder / name), folder / name]:
            with suppress(OSError):  # something else lies in it
                empty.rmdir()
    path.unlink()


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


def _is_being_replaced(path: Path) -> bool:
    try:
        return read_object(path).get("replaced") is True
    except (OSError, ValueError):
        return False


def earlier_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an evaluation that is there and that is not being replaced."""
    path = folder / MANIFEST
    return read_manifest(folder) if path.is_file() and not _is_being_replaced(path) else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an evaluation.

    Raises:
        StoreError: there is none, it is damaged, or of another version of the format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(
            f"{folder} has no {MANIFEST}: it is not the output of `ume eval`; give its folder",
            kind=ErrorKind.NOT_FOUND,
        )
    try:
        value = read_object(path)
    except ValueError as error:
        raise StoreError(f"{path}: {error}: start anew with --overwrite") from None
    if value.get("format") != FORMAT:
        raise StoreError(f"{path} is not the manifest of an evaluation")
    if value.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {value.get('format_version')!r}; this version of ume reads "
            f"{FORMAT_VERSION}: update ume, or start anew with --overwrite"
        )
    types = {"settings": dict, "tasks": list, "benchmark": str}
    for name, kind in types.items():
        if not isinstance(value.get(name), kind):
            raise StoreError(f"{path}: {name!r} is missing or damaged: start anew with --overwrite")
    return value


def manifest_differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each setting in which two manifests differ, but for informative ones."""
    return setting_differences(there, now, _INFORMATIVE, "there")
