"""Profiles: named conventions of prompts, pixels and taps under which a model embeds.

One checkpoint gives other vectors under another convention, so vectors of two profiles are never
mixed: a profile's name and fingerprint stand in every manifest, cache key and model fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ume_models.processing.rules import MediaRules
from ume_models.processing.template import Template, sample_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE_PROFILES = "before-profiles"
"""What stores hold that were written before profiles had names."""


@dataclass(frozen=True)
class Tap:
    """Which state of a prompt, after the final norm, is its embedding.

    Attributes:
        token: the marker that it is read at; None reads the last token.
        occurrence: which one counts where the marker is repeated.
        offset: tokens from there: -1 is the state that predicts the marker, 1 the one after it
            (the last token where there is none).
    """

    token: str | None = None
    occurrence: Literal["first", "last"] = "last"
    offset: int = 0

    def index(self, input_ids: np.ndarray, marker: int | None) -> int:
        """Index in ``input_ids`` ``[n]`` of the token that is read; ``marker`` is ``token``'s id.

        Raises:
            ValueError: the marker is missing, or nothing stands before it.
        """
        last = int(input_ids.size) - 1
        if self.token is None:
            return last
        found = np.flatnonzero(input_ids == marker)
        if not found.size:
            raise ValueError(f"the prompt has no {self.token}, at which the embedding is read")
        at = int(found[0 if self.occurrence == "first" else -1]) + self.offset
        if at < 0:
            raise ValueError(f"nothing stands before {self.token}, where the embedding is read")
        return min(at, last)


@dataclass(frozen=True)
class Profile:
    """A convention.

    Attributes:
        name: unique within the family.
        template: makes the family's prompts of a tokenizer.
        rules: how pictures and clips become pixels.
        tap: which state is the embedding of a single pass.
        forced: text appended to every prompt that does not end with it.
    """

    name: str
    template: Callable[[PreTrainedTokenizerBase], Template]
    rules: MediaRules
    tap: Tap = Tap()
    forced: str = ""

    def fingerprint(self, template: Template) -> str:
        """Hash of everything the profile decides, rendered through a model's template."""
        rules, tap = _chosen(self.rules, MediaRules()), _chosen(self.tap, Tap())
        about = [self.name, rules, tap, self.forced, sample_prompts(template)]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _chosen(given: MediaRules | Tap, default: MediaRules | Tap) -> dict[str, Any]:
    """Fields that differ from the defaults: a field added later leaves fingerprints as they are."""
    plain = asdict(default)
    return {name: value for name, value in asdict(given).items() if value != plain[name]}


def by_name(*profiles: Profile) -> Mapping[str, Profile]:
    """Profiles of a family by their names, its default first."""
    return {profile.name: profile for profile in profiles}
