"""What a forward call returns when only the last layer's hidden states are going to be read.

These objects stand for transformers' own outputs. What a script reads of them is computed; what
they do not hold is a clear error, never something else in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ume_models.errors import PatchError

_REMEDY = "to have it, run without UME_ACCELERATE, or ume_models.patching.revert the report"


class LastLayer(Sequence[Any]):
    """Hidden states of all layers, of which only the last are there.

    Args:
        states: ``[B, S, D]`` after the final norm, there or pending.
        length: of the tuple this stands for: layers + 1.
    """

    def __init__(self, states: torch.Tensor | PendingStates, length: int) -> None:
        self.states, self.length = states, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and index in (-1, self.length - 1):
            return self.states
        if isinstance(index, int) and not -self.length <= index < self.length:
            raise IndexError(f"hidden state {index} of {self.length}")
        raise PatchError(
            f"hidden_states[{index}]: only the last layer's hidden states are kept; {_REMEDY}"
        )


class LastStates:
    """Output of a forward call: hidden states of the last layer, and logits if asked for.

    Args:
        states: of the last layer, ``[B, S, D]``.
        length: layers + 1.
        head: the language-model head.
    """

    loss = None
    attentions = None

    def __init__(
        self, states: torch.Tensor | PendingStates, length: int, head: Callable[..., Any]
    ) -> None:
        self.hidden_states = LastLayer(states, length)
        self._head = head

    @property
    def logits(self) -> torch.Tensor:
        """``[B, S, V]``, computed when read."""
        logits: torch.Tensor = self._head(_tensor(self.hidden_states[-1]))
        return logits

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        if key == 0:
            return self.logits
        raise PatchError(f"output[{key}]: read output.hidden_states[-1] or output.logits instead")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle look for
            raise AttributeError(name)
        raise PatchError(
            f"output.{name}: of this call only hidden_states[-1] and logits are kept; {_REMEDY}"
        )


class PendingStates:
    """Hidden states ``[B, S, D]`` of which a script will read one token per row.

    Which ones is known when the script has looked them up: then all are computed together, and
    nothing behind them. Everything else that is done with this object computes all states first.

    Args:
        batch: rows.
        at: hidden states ``[B, D]`` of one position per row, or None where that cannot be done.
        whole: all of them, ``[B, S, D]``.
    """

    def __init__(
        self,
        batch: int,
        at: Callable[[list[int]], torch.Tensor | None],
        whole: Callable[[], torch.Tensor],
    ) -> None:
        self._batch, self._at, self._compute = batch, at, whole
        self._expected: list[int] | None = None
        self._found: torch.Tensor | None = None
        self._states: torch.Tensor | None = None

    def expect(self, positions: Sequence[int]) -> None:
        """Positions in the padded rows, negative from the end, that will be read."""
        if len(positions) == self._batch and self._states is None:
            self._expected, self._found = [int(p) for p in positions], None

    def whole(self) -> torch.Tensor:
        """All states ``[B, S, D]``."""
        if self._states is None:
            self._states = self._compute()
        return self._states

    def token(self, row: int, position: int) -> torch.Tensor:
        """State ``[D]`` of one token."""
        if self._states is None and self._expected is not None:
            if self._found is None:
                self._found = self._at(self._expected)
            if self._found is None:
                self._expected = None
            elif self._expected[row] == position:
                return self._found[row]
        return self.whole()[row][position]

    def __len__(self) -> int:
        return self._batch

    def __getitem__(self, key: Any) -> Any:
        if type(key) is int and self._states is None and -self._batch <= key < self._batch:
            return _PendingRow(self, key % self._batch)
        return self.whole()[key]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.whole())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*tree_map(_tensor, args), **tree_map(_tensor, kwargs or {}))


class _PendingRow:
    """One row of pending states, ``[S, D]``."""

    def __init__(self, states: PendingStates, row: int) -> None:
        self._all, self._row = states, row

    def whole(self) -> torch.Tensor:
        return self._all.whole()[self._row]

    def __getitem__(self, key: Any) -> Any:
        return self._all.token(self._row, key) if type(key) is int else self.whole()[key]

    def __len__(self) -> int:
        return len(self.whole())

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.whole())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    __torch_function__ = PendingStates.__torch_function__


def _tensor(value: Any) -> Any:
    return value.whole() if isinstance(value, PendingStates | _PendingRow) else value


def layers_of(model: nn.Module) -> int:
    """Number of decoder layers by a model's configuration."""
    config: Any = model.config
    text = getattr(config, "text_config", None) or config
    return int(text.num_hidden_layers)
