"""Where a checkpoint lies: a local folder, or a download with the hub options libraries pass on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ume_models.errors import CheckpointError

_FILES = ["*.json", "*.safetensors", "*.jinja", "*merges.txt"]


def checkpoint_folder(path_or_id: str | Path, subfolder: str = "", **hub_options: Any) -> Path:
    """Local folder of a checkpoint; a hub id is downloaded (weights, tokenizer, JSON only).

    Args:
        path_or_id: folder or hub id.
        subfolder: folder inside it.
        hub_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` of
            ``huggingface_hub.snapshot_download``; None counts as absent.

    Raises:
        CheckpointError: neither a folder nor a hub id that can be had.
    """
    path = Path(path_or_id).expanduser()
    if not path.is_dir():
        text = str(path_or_id)
        if text.count("/") != 1 or text.startswith((".", "/", "~")) or path.exists():
            raise CheckpointError(f"{path}: no such directory")
        from huggingface_hub import snapshot_download

        options = {name: value for name, value in hub_options.items() if value is not None}
        try:
            path = Path(snapshot_download(text, allow_patterns=_FILES, **options))
        except Exception as error:  # the hub client raises many types
            reason = str(error).strip().splitlines()
            raise CheckpointError(
                f"{text}: no such directory, and not to be had from the hub either "
                f"({type(error).__name__}: {reason[0] if reason else 'no reason given'})"
            ) from None
    return path / subfolder if subfolder else path
