"""transformers' own batched ``generate`` with hidden states, as an embedder has to ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def generate(
    module: Any,
    prompts: Sequence[torch.Tensor],
    rows: int,
    budget: int,
    ends: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Greedy tokens of prompts, left-padded in batches of ``rows``; each waits for its longest.

    Args:
        module: a transformers model.
        prompts: int64 ``[n]`` each.
        rows: of a batch.
        budget: tokens of a row.
        ends: whether a row has ended; None lets every row spend its budget.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    written: list[list[int]] = []
    for start in range(0, len(prompts), rows):
        part = prompts[start : start + rows]
        width = max(map(len, part))
        ids = torch.zeros(len(part), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(part):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1

        class Ended(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                assert ends is not None
                return torch.tensor([ends(row[width:].tolist()) for row in input_ids])  # noqa: B023

        found = module.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=budget,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_hidden_states=True,
            return_dict_in_generate=True,
            stopping_criteria=None if ends is None else StoppingCriteriaList([Ended()]),
        )
        written += found.sequences[:, width:].tolist()
    return written
