"""The families of pictures the bundled checkpoint is trained on, all made on the spot."""

from __future__ import annotations

from .base import Family, Spec
from .charts import Charts
from .clips import Clips
from .digits import Digits
from .pages import Pages
from .scenes import Scenes

FAMILIES: dict[str, Family] = {
    family.name: family for family in (Scenes(), Digits(), Clips(), Charts(), Pages())
}

__all__ = ["FAMILIES", "Charts", "Clips", "Digits", "Family", "Pages", "Scenes", "Spec"]
