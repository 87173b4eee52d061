"""Videos as folders of extracted frames, sampled as the official evaluation samples them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ume_models.processing.items import Item
from ume_models.processing.rules import sampled_positions

# Frames per video in every video task of MMEB-v2, unless a model's profile has another number.
FRAMES = 8
FRAME_SUFFIXES = frozenset((".jpg", ".jpeg", ".png"))


class FrameFolders:
    """Lists folders of frames; each one is listed once.

    Args:
        count: how many frames stand for a video; None for ``FRAMES``.
    """

    def __init__(self, count: int | None = None) -> None:
        self._count = FRAMES if count is None else count
        self._frames: dict[Path, list[Path]] = {}

    def frames(self, folder: Path) -> list[Path]:
        """All frames in a folder, "frame_10.jpg" after "frame_9.jpg"; empty if it is missing."""
        if folder not in self._frames:
            self._frames[folder] = _list_frames(folder)
        return self._frames[folder]

    def video(self, folder: Path, *, whole: bool = False) -> tuple[Path, ...]:
        """The frames that stand for a video.

        Args:
            folder: where its frames are.
            whole: take all of them.

        Returns:
            Paths of frames. Where there are none, the path of the folder itself: embedding fails
            and names it, and ``missing_frames`` finds it.
        """
        frames = self.frames(folder)
        if not frames:
            return (folder,)
        if whole:
            return tuple(frames)
        return tuple(frames[position] for position in sampled_positions(len(frames), self._count))


def missing_frames(item: Item) -> Path | None:
    """The folder that should hold the frames of an item's video and does not; the disk is not read.

    None where frames were found, and for items without a video.
    """
    if item.video is None or len(item.video) != 1 or not isinstance(item.video[0], Path):
        return None
    folder = item.video[0]
    return None if folder.suffix.lower() in FRAME_SUFFIXES else folder


def _list_frames(folder: Path) -> list[Path]:
    try:
        names = os.listdir(folder)
    except OSError:  # missing, or a file
        return []
    frames = [name for name in names if os.path.splitext(name)[1].lower() in FRAME_SUFFIXES]
    return [folder / name for name in sorted(frames, key=_natural)]


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    # Odd parts are numbers, so parts are compared with parts of their kind; the name itself settles
    # "1.jpg" and "01.jpg", whose order the official evaluation leaves to the file system.
    parts = re.split(r"(\d+)", name)
    key = [(int(part), "") if at % 2 else (0, part.lower()) for at, part in enumerate(parts)]
    return key, name
