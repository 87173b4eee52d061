"""A deterministic stand-in for a model, and a process around it that can be killed anywhere.

As a program: ``fake_model.py [--pause SECONDS] UME-ARGUMENTS…`` runs ``ume`` with the stand-in;
``fake_model.py --crash-points DIR UME-ARGUMENTS…`` is described at ``run_every_crash``.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ume_models.embedder import EmbedOptions
from ume_models.embedders.registry import family_class
from ume_models.errors import ItemError
from ume_models.processing import Item, MediaSource
from ume_models.processing.media import decode_rgb, describe
from ume_models.profile import BEFORE_PROFILES

DIM = 8


@dataclass
class FakeModel:
    """What the commands use of an ``Embedder``."""

    family: str
    options: EmbedOptions
    profile: Any
    processor: Any
    fingerprint: str
    engine: str
    hidden_size: int = DIM
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def described(self, options: EmbedOptions) -> dict[str, Any]:
        named = {"embedder": self.family, "profile": self.profile.name}
        old = self.profile.name == BEFORE_PROFILES
        return {
            "engine": self.engine,
            "dtype": "float32",
            "hidden_size": self.hidden_size,
            **options.described(),
            **({} if old else {**named, "profile_fingerprint": self.profile.fingerprint}),
        }


def load(
    path: str | None = None,
    *,
    family: str | None = None,
    profile: str | None = None,
    engine: str = "fast",
    multi_image: str | None = None,
    pictures: str | None = None,
    empty: str = "error",
    device: str = "auto",
    dtype: str = "auto",
    **options: Any,
) -> FakeModel:
    """Stands in for ``ume_models.load``; path and profile are the identity of the weights."""
    cls = family_class(family or "plume")
    name = profile or "official"
    digest = hashlib.sha256(f"{path}{name}".encode()).hexdigest()
    return FakeModel(
        family=cls.family,
        options=cls.Options().replaced(options),
        profile=SimpleNamespace(
            name=name, fingerprint=f"of {name}", rules=cls.profiles[name].rules
        ),
        processor=SimpleNamespace(
            empty=empty, described=lambda: {"multi_image": multi_image, "empty": empty}
        ),
        fingerprint=digest[:32],
        engine=engine,
    )


def vector(item: Item) -> torch.Tensor:
    """A unit vector that follows from the content of an item."""
    media = b"".join(_pixels(source) for source in (*item.images, *(item.video or ())))
    digest = hashlib.sha256(f"{item.instruction}|{item.text}".encode() + media).digest()
    return torch.nn.functional.normalize(torch.tensor(list(digest[:DIM])).float() - 127.5, dim=0)


def _pixels(source: MediaSource) -> bytes:
    try:
        return decode_rgb(source).tobytes()
    except ItemError as error:
        raise error.at(None, reason=f"image {describe(source)} {error.reason}") from error


def make_encoder(before_item: Callable[[], None] = lambda: None) -> Callable[..., Any]:
    """Stands in for ``ume_models.encode.encode_detailed``."""

    def encode_detailed(
        model: FakeModel, items: Sequence[Item], *, on_error: str = "raise", **options: Any
    ) -> Any:
        rows, errors = [], []
        for index, item in enumerate(items):
            before_item()
            try:
                if item.text == "make it NaN":
                    rows.append(torch.full((DIM,), float("nan")))
                else:
                    rows.append(vector(item))
            except ItemError as error:
                named = error.at(index, item.id)
                if on_error == "raise":
                    raise named from error
                errors.append(named)
                rows.append(torch.full((DIM,), float("nan")))
            if callable(options.get("progress")):
                options["progress"](index + 1, len(items))
        return SimpleNamespace(
            embeddings=torch.stack(rows), ids=[item.id for item in items], errors=errors, stats={}
        )

    return encode_detailed


def install(before_item: Callable[[], None] = lambda: None) -> None:
    """Put the stand-ins in place for the rest of this process."""
    import ume_models
    import ume_models.encode

    ume_models.load = load
    ume_models.encode.encode_detailed = make_encoder(before_item)


def run_ume(arguments: Sequence[str]) -> None:
    """The command line, as a user starts it."""
    from ume_models.cli import main

    sys.argv = ["ume", *arguments]
    main()


def killed_at(step: int, arguments: Sequence[str]) -> bool:
    """Run in a child that kills itself at one of its steps on disk; whether it got that far.

    A step is anything that changes what is on disk: a file opened for writing, half of its bytes
    written, flushed, or renamed.
    """
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        _die_at_step(step)
        try:
            run_ume(arguments)
        except SystemExit as done:
            os._exit(int(done.code or 0))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, f"ume ended with {os.WEXITSTATUS(status)}"
    return False


def _die_at_step(step: int) -> None:
    left = step
    real_open, real_fsync, real_replace = builtins.open, os.fsync, os.replace

    def tick() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    class HalfWriter:
        def __init__(self, handle: Any) -> None:
            self._handle = handle

        def __enter__(self) -> HalfWriter:
            return self

        def __exit__(self, *error: object) -> None:
            self._handle.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._handle, name)

        def write(self, data: bytes) -> None:
            self._handle.write(data[: len(data) // 2])
            self._handle.flush()
            tick()
            self._handle.write(data[len(data) // 2 :])

    def stepping_open(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        handle = real_open(file, mode, *rest, **options)
        if mode != "wb":
            return handle
        tick()
        return HalfWriter(handle)

    def stepping_fsync(descriptor: int) -> None:
        tick()
        real_fsync(descriptor)

    def stepping_replace(source: Any, target: Any) -> None:
        tick()
        real_replace(source, target)
        tick()

    builtins.open = io.open = stepping_open  # type: ignore[assignment]
    os.fsync = stepping_fsync
    os.replace = stepping_replace  # type: ignore[assignment]


def run_every_crash(directory: Path, arguments: Sequence[str]) -> int:
    """Kill the run at its first step, its second, … and let a second run finish each.

    The whole run goes to ``directory/whole``, the continued ones to ``directory/0``, ``1``, …;
    ``-o`` is added to the arguments. Modules are loaded once and every run is a fork.

    Returns:
        how many runs were killed.
    """
    assert not killed_at(-1, [*arguments, "-o", str(directory / "whole")])
    step = 0
    while killed_at(step, [*arguments, "-o", str(directory / str(step))]):
        assert not killed_at(-1, [*arguments, "-o", str(directory / str(step))])
        step += 1
    shutil.rmtree(directory / str(step))
    return step


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--crash-points":
        install()
        import ume_models.cli.embed  # noqa: F401 - loaded once, before the forks

        print(run_every_crash(Path(sys.argv[2]), sys.argv[3:]))
    elif sys.argv[1] == "--pause":
        pause = float(sys.argv[2])
        install(lambda: time.sleep(pause))
        run_ume(sys.argv[3:])
    else:
        install()
        run_ume(sys.argv[1:])
