"""A decoder that reads the mask of a call on its cache the way flash-attention does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ume_models.patching.forwards import cached_tokens, repair_suffix_mask


class RepairedBackbone:
    """Calls a decoder with a repaired ``attention_mask``; everything else is the decoder's.

    Official PLUME code asks a function for the decoder and then calls what it got. This stands
    between the two, so that nothing is set on the model.

    Args:
        module: the decoder, transformers' ``Qwen2VLModel`` or ``Qwen2VLTextModel``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's call; see ``forwards.repair_suffix_mask`` for what changes."""
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        new = kwargs.get("input_ids")
        new = kwargs.get("inputs_embeds") if new is None else new
        if isinstance(mask, torch.Tensor) and isinstance(new, torch.Tensor) and cache is not None:
            kwargs["attention_mask"] = repair_suffix_mask(mask, new.shape[1], cached_tokens(cache))
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "module":  # not yet set: copying and unpickling ask before
            raise AttributeError(name)
        return getattr(self.module, name)
