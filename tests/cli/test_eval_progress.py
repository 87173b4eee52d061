"""What ``ume eval`` tells while it works."""

from __future__ import annotations

import pytest

from ume_models.cli import progress as display
from ume_models.cli.eval.progress import EvalProgress
from ume_models.cli.terminal import set_verbosity


@pytest.fixture(autouse=True)
def loud() -> None:
    set_verbosity(verbose=False, quiet=False)


@pytest.mark.parametrize("terminal", [False, True])
def test_what_must_be_known_is_always_told(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display.sys.stderr, "isatty", lambda: terminal)
    with EvalProgress() as progress:
        progress.reading("CIRR", 0, 2)
        progress.note("CIRR: 3 of 4 embeddings are not of unit length")
        progress.planned({"text": 2, "image": 0, "video": 0}, {"text": 0, "image": 0, "video": 0})
        progress.note("a second sentence")
    told = capsys.readouterr().err
    assert "CIRR: 3 of 4 embeddings are not of unit length" in told
    assert "a second sentence" in told


def test_steps_are_told_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    progress = EvalProgress()
    for number in range(30):
        progress.reading(f"task {number}", number, 30)
        now[0] += 1
    told = capsys.readouterr().err.splitlines()
    assert told == ["reading task 10", "reading task 20"]


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    set_verbosity(verbose=False, quiet=True)
    with EvalProgress() as progress:
        progress.note("anything")
    assert capsys.readouterr().err == ""
