"""The files of a data root: tables in either form, pictures, frames."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any, Literal

from PIL import Image, ImageOps

Rows = Sequence[Mapping[str, Any]]
Change = Literal["grey", "palette", "alpha", "frame", "crop", "large", "jpeg"]

_ROWS_PER_GROUP = 4  # small, so that even these tables have several row groups


class DataFolder:
    """Writes below one root.

    Args:
        root: the folder.
        tables: "parquet" or "jsonl".
        seed: what every random choice follows from.
    """

    def __init__(self, root: Path, tables: Literal["parquet", "jsonl"], seed: int) -> None:
        self.root, self.tables, self.seed = root, tables, seed

    def rng(self, task: str) -> Random:
        """The random numbers of one task, independent of all others."""
        return Random(f"{self.seed}/{task}")

    def table(
        self, folder: str, config: str | None, split: str, rows: Rows, *, shards: int = 1
    ) -> None:
        """A table where the hub's conventions put it.

        ``folder/config/split-00000-of-00001.parquet``, ``data`` for the one configuration without
        a name; ``folder/config/split.jsonl``, or directly below ``folder``.
        """
        if self.tables == "jsonl":
            self.jsonl("/".join(filter(None, [folder, config, f"{split}.jsonl"])), rows)
            return
        size = -(-len(rows) // shards)
        for shard in range(shards):
            name = f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            part = rows[shard * size : (shard + 1) * size]
            self.parquet(f"{folder}/{config or 'data'}/{name}", part)

    def parquet(self, path: str, rows: Rows) -> None:
        """One Parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist([dict(row) for row in rows])
        pq.write_table(table, self._new(path), row_group_size=_ROWS_PER_GROUP)

    def jsonl(self, path: str, rows: Rows) -> None:
        """One JSON object per line."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        self._new(path).write_text("".join(lines), encoding="utf-8")

    def described_json(self, folder: str, config: str, split: str, name: str, rows: Rows) -> None:
        """A JSON array under a name of its own, found through the header of the README."""
        text = json.dumps([dict(row) for row in rows], ensure_ascii=False, indent=1) + "\n"
        self._new(f"{folder}/{name}").write_text(text, encoding="utf-8")
        header = (
            f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
            f"  - split: {split}\n    path: {name}\n---\n"
        )
        self._new(f"{folder}/README.md").write_text(header, encoding="utf-8")

    def text(self, path: str, content: str) -> None:
        """A text file as it is."""
        self._new(path).write_text(content, encoding="utf-8")

    def picture(self, path: str, source: Path, change: Change | None = None) -> None:
        """A copy of a picture, or a changed one that still shows the same."""
        target = self._new(path)
        if change is None:
            shutil.copyfile(source, target)
        else:
            target.write_bytes(changed(source, change))

    def frames(self, folder: str, frames: Sequence[Path], *, each: int = 1) -> None:
        """Frames in a folder, every one ``each`` times.

        Numbers begin at 8, so the order of names is not the order of time.
        """
        repeated = [frame for frame in frames for _ in range(each)]
        for number, frame in enumerate(repeated, start=8):
            self.picture(f"{folder}/frame_{number}.png", frame)

    def _new(self, path: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


def changed(source: Path, change: Change) -> bytes:
    """A picture in another mode or size, as a file.

    "grey": one channel; "palette": 64 colours; "alpha": with an opacity channel; "frame": a narrow
    margin around it, no side a multiple of a patch; "crop": without its edge; "large": three times
    as large; "jpeg": compressed with losses.
    """
    with Image.open(source) as opened:
        image = opened.convert("RGB")
    form, settings = "PNG", {}
    if change == "grey":
        image = image.convert("L")
    elif change == "palette":
        image = image.quantize(64, method=Image.Quantize.MEDIANCUT)
    elif change == "alpha":
        image.putalpha(255)
    elif change == "frame":
        image = ImageOps.expand(image, (5, 3, 6, 2), image.getpixel((0, 0)))  # type: ignore[arg-type]
    elif change == "crop":
        width, height = image.size
        image = image.crop((3, 2, width - 4, height - 3))
    elif change == "large":
        image = image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST)
    else:
        form, settings = "JPEG", {"quality": 92}
    buffer = BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()
