"""Finding table files: below a data root, in the hub's cache on this machine, on the hub.

A folder is read as Hugging Face's ``load_dataset`` reads a dataset repository: what its README
declares for a configuration and split comes first, then data written by ``save_to_disk``, then
the names that the hub uses where nothing is declared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ume_models.errors import DataError
from ume_models.mmeb.tasks import Source, Task

# In order of preference where a folder has several.
TABLE_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv")

_NUMBERED = re.compile(r"(?P<before>.*)-(?P<number>\d{5})-of-(?P<of>\d{5})(?P<after>\.\w+)")
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def locate(source: Source, root: Path, *, download: bool = False) -> list[Path]:
    """The table files of one configuration and split, in order.

    Args:
        source: what is looked for; ``source.paths`` come first, in their order, then folders named
            like the repository, then the hub's cache.
        root: the data root.
        download: fetch from the hub what is nowhere on the disk.

    Raises:
        DataError: there are none; the places are named.
    """
    named = (source.repository.rsplit("/", 1)[-1], source.repository)
    for place in dict.fromkeys((*source.paths, *named)):
        path = root / place
        if path.suffix in TABLE_SUFFIXES and path.is_file():
            return [path]
        if found := find_tables(path, source.config, source.split):
            return found
    for folder in _hub_folders(source, download):
        if found := find_tables(folder, source.config, source.split):
            return found
    config = f", configuration {source.config!r}" if source.config else ""
    places = [str(root / path) for path in source.paths or named[:1]]
    raise DataError(
        f"there are no tables of {source.repository}{config}, split {source.split!r}, in "
        f"{' or '.join(places)}, nor in the hub's cache; get them with `hf download --repo-type "
        f"dataset {source.repository} --local-dir {places[0]}`, or give --download"
    )


def media_folder(task: Task, root: Path) -> Path:
    """The folder that a task's media paths are relative to: the first of its places that exists.

    Where none does, the first place: paths into it name what is missing.
    """
    places = [root / folder for folder in task.media]
    return next((place for place in places if place.is_dir()), places[0])


def misplaced(root: Path, tasks: Iterable[Task]) -> str:
    """What to say of a data root that has none of the folders of these tasks; empty if it has."""
    if not root.is_dir():
        return f"{root} is not a folder"
    tops = sorted(
        {
            Path(place).parts[0]
            for task in tasks
            for place in (*task.source.paths, *task.media)
            if Path(place).parts
        }
    )

    def fits(folder: Path) -> bool:
        return any((folder / top).exists() for top in tops)

    if fits(root):
        return ""
    root = root.absolute()
    below = sorted(path for path in root.iterdir() if path.is_dir())
    near = next((folder for folder in (root.parent, *below) if fits(folder)), None)
    meant = f"; did you mean {near}?" if near is not None else ""
    return f"{root} has no folder {' or '.join(tops)}{meant}"


def find_tables(folder: Path, config: str | None, split: str) -> list[Path]:
    """Table files of a configuration and split in the copy of a dataset repository.

    Args:
        folder: the copy; it may lack files or not exist.
        config: name of the configuration, or None where there is one only.
        split: name of the split.

    Returns:
        Files in the order of their rows; empty where there are none.

    Raises:
        DataError: the README's head or a ``state.json`` is damaged, or one of several files that
            are numbered is missing.
    """
    found = _found_tables(folder, config, split) if folder.is_dir() else []
    _require_whole(found)
    return found


def _require_whole(files: Sequence[Path]) -> None:
    """Numbered files, "test-00000-of-00002.parquet", must all be there, and in one numbering."""
    sets: dict[tuple[Path, str, str], dict[int, set[int]]] = {}
    for path in files:
        if match := _NUMBERED.fullmatch(path.name):
            kind = (path.parent, match["before"], match["after"])
            sets.setdefault(kind, {}).setdefault(int(match["of"]), set()).add(int(match["number"]))
    for (folder, before, after), numbered in sets.items():
        (of, there), *others = numbered.items()
        if others:
            raise DataError(
                f"{folder} has files {before}-…{after} of {of} and of {others[0][0]}: keep those "
                "of one version"
            )
        lost = [number for number in range(of) if number not in there]
        if lost:
            raise DataError(
                f"{folder} lacks {before}-{lost[0]:05d}-of-{of:05d}{after} ({len(lost)} of {of} "
                "files are missing): download them again"
            )


def _found_tables(folder: Path, config: str | None, split: str) -> list[Path]:
    declared = _declared_patterns(folder / "README.md", config, split)
    if declared is not None:
        try:
            found = _matching(folder, declared)
        except (OSError, ValueError, NotImplementedError) as error:  # too long, odd stars
            raise _not_of_the_hub(folder / "README.md", f"the pattern of a path: {error}") from None
        if found or not declared:  # the configuration is there and has no such split
            return found
    place = folder / config if config else folder
    return _saved_to_disk(place / split) or _saved_to_disk(place) or _conventional(
        folder, config, split
    )  # fmt: skip


def _declared_patterns(readme: Path, config: str | None, split: str) -> list[str] | None:
    """What a README declares; None where it says nothing about the configuration."""
    listed = _front_matter(readme).get("configs") or []
    if not isinstance(listed, list):
        raise _not_of_the_hub(readme, f"'configs' is {listed!r}, not a list")
    configs = [entry for entry in listed if isinstance(entry, Mapping)]
    if config is None:
        chosen = [entry for entry in configs if entry.get("config_name") == "default"]
        chosen = chosen or [entry for entry in configs if entry.get("default")]
        chosen = chosen or (configs if len(configs) == 1 else [])
    else:
        chosen = [entry for entry in configs if str(entry.get("config_name")) == config]
    if not chosen or chosen[0].get("data_files") is None:
        return None
    base = str(chosen[0].get("data_dir") or "").strip("/")
    files = chosen[0]["data_files"]
    if isinstance(files, Mapping):
        files = [{"split": name, "path": path} for name, path in files.items()]
    elif isinstance(files, str):
        files = [files]
    if not isinstance(files, list):
        raise _not_of_the_hub(readme, f"'data_files' is {files!r}, not a path or a list")
    patterns: list[str] = []
    for entry in files:
        # Patterns without a split are the split "train", as on the hub.
        of = str(entry.get("split", "train")) if isinstance(entry, Mapping) else "train"
        paths = entry.get("path", []) if isinstance(entry, Mapping) else entry
        if of == split:
            paths = [paths] if isinstance(paths, str) else paths
            if not isinstance(paths, list) or not all(isinstance(p, str) and p for p in paths):
                raise _not_of_the_hub(readme, f"'path' is {paths!r}, not a path or a list of them")
            patterns += paths
    return [f"{base}/{pattern}" if base else pattern for pattern in patterns]


def _not_of_the_hub(readme: Path, reason: str) -> DataError:
    return DataError(f"the head of {readme} does not declare files ({reason}); get the file again")


def _front_matter(readme: Path) -> Mapping[str, Any]:
    if not readme.is_file():
        return {}
    text = readme.read_text(encoding="utf-8", errors="replace")
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if match is None:
        return {}
    try:
        import yaml
    except ImportError:  # names of files must do
        return {}
    try:
        head = yaml.safe_load(match.group(1))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: impossible dates
        raise DataError(f"the head of {readme} is not YAML ({error}); get the file again") from None
    return head if isinstance(head, Mapping) else {}


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    found: dict[Path, None] = {}
    for pattern in patterns:
        if "://" in pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            continue
        if pattern.endswith("**"):
            pattern += "/*"  # means files on the hub, folders to pathlib
        elif (folder / pattern).is_dir():
            pattern = f"{pattern.rstrip('/')}/**/*"
        found |= dict.fromkeys(sorted(path for path in folder.glob(pattern) if _is_table(path)))
    return list(found)


def _saved_to_disk(folder: Path) -> list[Path]:
    """Files of ``Dataset.save_to_disk``, in the order that its ``state.json`` gives them."""
    state = folder / "state.json"
    if not state.is_file():
        return []
    try:
        entries = json.loads(state.read_bytes())["_data_files"]
        return [folder / entry["filename"] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{state} cannot be read ({error}); save the dataset again") from None


def _conventional(folder: Path, config: str | None, split: str) -> list[Path]:
    """Files named as the hub names them: ``data/test-00000-of-00001.parquet`` and the like."""
    bases = (folder, folder / "data", folder / "json")
    for base in bases:
        if config is None:
            found = _of_split(base, split)
        else:
            found = _of_split(base / config, split) or _of_split(base / config / "data", split)
            named = [path for path in _tables(base) if _is_of_config(path.stem, config)]
            found = found or _with_split(named, split, len(config))
        if found:
            return found
    return []


def _of_split(folder: Path, split: str) -> list[Path]:
    for word in _words(split):
        if found := _one_kind(_tables(folder / word)):
            return found
    return _with_split(_tables(folder), split)


def _with_split(paths: Sequence[Path], split: str, skip: int = 0) -> list[Path]:
    """Of these files those of the split; all of them where no name mentions any split."""
    for word in _words(split):
        if found := [path for path in paths if _mentions(path.stem[skip:], word)]:
            return _one_kind(found)
    every = [word for words in _SPLIT_WORDS.values() for word in words]
    if any(_mentions(path.stem[skip:], word) for path in paths for word in every):
        return []
    return _one_kind(paths)


def _words(split: str) -> Iterator[str]:
    yield split
    for words in _SPLIT_WORDS.values():
        if split in words:
            yield from (word for word in words if word != split)


def _mentions(stem: str, word: str) -> bool:
    return re.search(rf"(^|[^A-Za-z0-9]){re.escape(word)}([^A-Za-z]|$)", stem) is not None


def _is_of_config(stem: str, config: str) -> bool:
    # "RefCOCO-test", "RefCOCO-00000-of-00001", but not "RefCOCO-Matching-test".
    words = "|".join(word for words in _SPLIT_WORDS.values() for word in words)
    return re.match(rf"{re.escape(config)}($|[-_.](\d|({words})(?![A-Za-z])))", stem) is not None


def _tables(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_table(path)) if folder.is_dir() else []


def _is_table(path: Path) -> bool:
    return path.suffix in TABLE_SUFFIXES and path.name not in _DESCRIPTIONS and path.is_file()


def _one_kind(paths: Sequence[Path]) -> list[Path]:
    for suffix in TABLE_SUFFIXES:
        if found := [path for path in paths if path.suffix == suffix]:
            return found
    return []


def _hub_folders(source: Source, download: bool) -> Iterator[Path]:
    """The repository's snapshot in the hub's cache; with ``download``, after fetching tables."""
    try:
        import huggingface_hub as hub
    except ImportError:
        return
    found: Path | None = None
    with suppress(Exception):  # not there; which class says so depends on the hub's version
        cached = hub.snapshot_download(
            source.repository, repo_type="dataset", local_files_only=True
        )
        found = Path(cached)
    if found is not None:
        yield found
    if not download:
        return
    try:
        copy = hub.snapshot_download(
            source.repository, repo_type="dataset", allow_patterns=["README.md"]
        )
        wanted = _declared_patterns(Path(copy) / "README.md", source.config, source.split)
        if wanted:
            wanted += [f"{pattern.rstrip('/')}/*" for pattern in wanted]  # names of folders
        else:  # all its tables, but never the archives with media beside them
            wanted = [f"*{source.config or ''}*{suffix}" for suffix in TABLE_SUFFIXES]
        copy = hub.snapshot_download(
            source.repository, repo_type="dataset", allow_patterns=["README.md", *wanted]
        )
    except Exception as error:
        raise DataError(
            f"{source.repository} cannot be downloaded: {error}; try again, or get it with `hf "
            "download`"
        ) from error
    yield Path(copy)
