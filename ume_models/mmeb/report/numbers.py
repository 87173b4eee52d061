"""How numbers are written in every form of the report, so that the forms agree to the digit."""

from __future__ import annotations

import math
from collections.abc import Sequence

MINUS = "−"
NONE = "–"
# Narrower is what floating-point arithmetic makes of equal values.
_WIDTH = 1e-9
NO_INTERVAL = (
    "A dash stands for an interval where every query has the same value: resampling has no spread "
    "there, which does not make the score certain."
)


def points(value: float | None) -> str:
    """A share in 0 … 1 as points of 100 with one decimal, "61.4"; a dash where there is none."""
    return NONE if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def has_width(bounds: Sequence[float] | None) -> bool:
    """Whether a bootstrap interval tells anything: equal values have one without width."""
    if bounds is None or not all(map(math.isfinite, bounds)):
        return False
    low, high = bounds
    return high - low > _WIDTH


def interval(bounds: Sequence[float] | None) -> str:
    """Lower and upper bound of a share as points, "60.9–61.8"; a dash for none and no width."""
    if bounds is None or not has_width(bounds):
        return NONE
    low, high = bounds
    return f"{points(low)}–{points(high)}"


def signed(value: float | None) -> str:
    """A difference of shares as points with its sign, "+1.2", "−0.3", "0.0"."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{abs(100 * value):.1f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def signed_interval(bounds: Sequence[float] | None) -> str:
    """Bounds of a difference as points, "−0.4 … +1.1": a dash between them would look like a sign.

    A dash alone as for ``interval``.
    """
    if bounds is None or not has_width(bounds):
        return NONE
    low, high = bounds
    return f"{signed(low)} … {signed(high)}"


def count(value: int | None) -> str:
    """A number of things, with thousands apart: "12,043"."""
    return NONE if value is None else f"{value:,}"


def probability(value: float | None) -> str:
    """A p-value: "0.013", and "<0.001" instead of a zero it is not."""
    if value is None or not math.isfinite(value):
        return NONE
    return "<0.001" if value < 0.0005 else f"{value:.3f}"


def similarity(value: float | None) -> str:
    """A cosine: "0.9954", and "1 − 3e-7" close to 1, where the difference is what counts.

    What float64 cannot tell from 1 is "1".
    """
    if value is None or not math.isfinite(value):
        return NONE
    gap = 1 - value
    if gap < 1e-12:
        return "1"
    if gap < 1e-3:
        digits, exponent = f"{gap:.0e}".split("e")
        return f"1 {MINUS} {digits}e-{abs(int(exponent))}"
    return f"{value:.4f}".replace("-", MINUS)


def correlation(value: float | None) -> str:
    """A coefficient from −1 to 1 with three digits."""
    return NONE if value is None else f"{value:.3f}".replace("-", MINUS)


def ran(tasks: int, of: int) -> str:
    """How many tasks a mean is over: "18", or "16 of 18" where some are missing."""
    return str(tasks) if tasks == of else f"{tasks} of {of}"


def some(names: Sequence[str], shown: int = 4) -> str:
    """A list that stays short: "a, b, c, d and 3 more"."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def plural(number: int, noun: str) -> str:
    """ "1 task", "2 tasks", "2 queries"."""
    if number != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{count(number)} {noun}"
