"""PLUME's evaluation script, ``VLM2Vec/eval_twomode.py``: its samples in batches.

The script takes one sample at a time, and insists on it in three places. Its loop stays as it is:
the loader is read some samples ahead, the first call of a chunk computes all of it as one batch,
and the following calls find their answer waiting.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch

from ume_models.embedders.rows import PROCESSOR_INPUTS
from ume_models.patching.engine import Engine
from ume_models.patching.latent_call import (
    Answer,
    LatentCall,
    model_for_original,
)
from ume_models.patching.look_ahead import LookAhead, Snapshot, limits
from ume_models.patching.recipes import Recipe, Target
from ume_models.patching.report import Entry
from ume_models.patching.suffix_mask import RepairedBackbone
from ume_models.patching.ume_r1 import on_lists, with_single_pass

logger = logging.getLogger(__name__)

_told: set[str] = set()


class Chunk:
    """Answers computed ahead for the samples of a loader.

    Args:
        ahead: the loader.
    """

    def __init__(self, ahead: LookAhead) -> None:
        self.ahead = ahead
        self._call: LatentCall | None = None
        self._engine: Engine | None = None
        self._answers: list[Answer | None] = []
        self._left = 0
        self._number = 0

    def serves(self, inputs: Mapping[str, Any]) -> bool:
        """Whether ``inputs`` are those of the sample the loader yielded last."""
        coming = self.ahead.coming
        return bool(coming) and coming[0] is not None and same_sample(coming[0], inputs)

    def answer(
        self,
        call: LatentCall,
        engine: Engine,
        normalize: Callable[[torch.Tensor], torch.Tensor],
    ) -> Answer | None:
        """The current sample's answer; computes this and all samples read ahead if needed."""
        coming = self.ahead.coming
        fresh = (
            self._call is not None
            and self._number == self.ahead.chunk
            and len(coming) <= self._left
            and self._engine is engine  # another one once a weight has changed
            and self._call.same_run(call)
        )
        if not fresh:
            samples = [None if one is None else one.inputs for one in coming]
            self._answers = call.answers(engine, samples, normalize)
            self._left, self._number = len(coming), self.ahead.chunk
            self._call, self._engine = call, engine
        return self._answers[self._left - len(coming)]


def same_sample(expected: Snapshot, given: Mapping[str, Any]) -> bool:
    """Whether a call's inputs are what the loader yielded, moved to another device at most."""
    for name in PROCESSOR_INPUTS:
        mine, theirs = expected.inputs.get(name), given.get(name)
        if not expected.untouched(name):
            return False
        if mine is theirs:
            continue
        if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor):
            return False
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return False
        if not torch.equal(mine.to(theirs.device, non_blocking=True), theirs):
            return False
    return True


_chunk: ContextVar[Chunk | None] = ContextVar("chunk", default=None)


def batched_rep(original: Callable[..., Any]) -> Callable[..., Any]:
    """``_latent_reasoning_generate_rep`` by the engine, with samples read ahead as a batch."""
    signature = inspect.signature(original)
    normalize = original.__globals__.get("normalize_reps", _normalize)

    @functools.wraps(original)
    def latent_reasoning_generate_rep(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["inputs"]["input_ids"].shape[0] != 1:
            return original(*args, **kwargs)  # which says so
        call = LatentCall.of(bound.arguments)
        reason = call.obstacle()
        answer = None
        if reason is None:
            engine, reason = call.engine()
            if engine is not None:
                answer = _answer(call, engine, bound.arguments["inputs"], normalize)
        if answer is not None:
            return answer
        _tell(
            reason or "the model goes on after the forced suffix, or the sample is not a plain one"
        )
        bound.arguments["model"] = model_for_original(call.model)
        return original(*bound.args, **bound.kwargs)

    return latent_reasoning_generate_rep


def _answer(
    call: LatentCall,
    engine: Engine,
    inputs: Mapping[str, Any],
    normalize: Callable[[torch.Tensor], torch.Tensor],
) -> Answer | None:
    chunk = _chunk.get()
    if chunk is not None and chunk.serves(inputs):
        return chunk.answer(call, engine, normalize)
    return call.answers(engine, [inputs], normalize)[0]


def _normalize(hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(hidden, p=2, dim=-1)


def _tell(reason: str) -> None:
    """Each reason why the original runs is logged once."""
    if reason not in _told:
        _told.add(reason)
        logger.warning("_latent_reasoning_generate_rep: the original runs: %s", reason)


def looking_ahead(original: Callable[..., Any]) -> Callable[..., Any]:
    """``encode_embeddings`` whose loader is read ahead while the latent function is called."""
    signature = inspect.signature(original)
    other_modes = with_single_pass("get_embedding_idx")(original)

    @functools.wraps(original)
    def encode_embeddings(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        settings = bound.arguments.get("eval_args")
        latent = bound.arguments.get("mode") == "gen" and bool(
            getattr(settings, "use_coconut_latent_reasoning", False)
        )
        if not latent:
            return other_modes(*args, **kwargs)
        ahead = LookAhead(bound.arguments["loader"], *limits())
        bound.arguments["loader"] = ahead
        token = _chunk.set(Chunk(ahead))
        try:
            return original(*bound.args, **bound.kwargs)
        finally:
            _chunk.reset(token)

    return encode_embeddings


def repaired_backbone(original: Callable[..., Any]) -> Callable[..., Any]:
    """``_get_backbone_model`` whose result reads the suffix mask as flash-attention does."""

    @functools.wraps(original)
    def get_backbone_model(model: torch.nn.Module) -> Any:
        return RepairedBackbone(original(model))

    return get_backbone_model


_KNOWN = {  # PLUME 942c2fa and 18db7e4
    "_cast_past_key_values_dtype": "de00bb36edc96e94",
    "_extract_last_token_rep": "dfc8421ddb2d93c7",
    "_get_backbone_model": "6a56d619a9f25374",
    "_get_latent_moe_module": "b5f7ed613e2b05a4",
    "_get_lm_head": "8c8659e53a673e38",
    "_infer_compute_dtype": "0cf07bd105c7f150",
    "_latent_reasoning_generate_rep": "b871fdecc589e6c1",
    "_safe_dist_barrier": "d6a9339b9db2a776",
    "_unwrap_model": "00f2f26d6b44fcb2",
    "encode_embeddings": "464ddd03ecda7da2",
    "get_embedding_idx": "6a4cbf1e2ad8179c",
    "normalize_reps": "5a03482cacad89da",
}

RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="plume-eval",
        modules=("eval_twomode", "__main__"),
        marks=("_latent_reasoning_generate_rep", "encode_embeddings", "_get_backbone_model"),
        known=_KNOWN,
        targets=(
            Target(
                "encode_embeddings",
                ("model", "loader", "training_args", "model_args", "full_dataset", "encode_side"),
                make=looking_ahead,
                by="the same loop over a loader that is read ahead",
                reason="up to 64 samples (UME_LOOK_AHEAD) become one batch of the latent function; "
                "order, guards and gathering are the script's. Modes without latent reasoning: "
                "within ume_models.patching.single_pass",
            ),
            Target(
                "_latent_reasoning_generate_rep",
                (
                    "model",
                    "inputs",
                    "tokenizer",
                    "max_new_tokens",
                    "latent_steps",
                    "prefix_token_ids",
                    "forced_suffix_token_ids",
                    "gen_emb_token_id",
                    "use_latent_moe",
                    "latent_moe_context_type",
                    "disc_emb_token_id",
                    "local_rank",
                    "debug_log_tokens",
                    "collect_latent_trace",
                ),
                make=batched_rep,
                by="packed prefill and latent rollout on the model's own weights",
                reason="M-RoPE as in transformers 4 under every version. The original runs for "
                "samples that go on decoding after <gen_emb>, in training mode, with gradients, "
                "hooks, debug_log_tokens, sharded or quantised weights; the first time is logged",
            ),
            Target(
                "_get_backbone_model",
                ("model",),
                make=repaired_backbone,
                by="ume_models.patching.suffix_mask",
                reason="the suffix call's mask has the suffix's length: right under "
                "flash-attention alone, an error or silently wrong under sdpa and eager",
                action="repaired",
            ),
            Target(
                "get_embedding_idx",
                ("generated_ids_trimmed", "EMBEDDING_TOKEN_ID"),
                make=on_lists,
                by="the same look-up in lists",
                reason="one copy from the device instead of one for each token",
                required=False,
            ),
        ),
        left_alone=(
            Entry(
                "model.generate",
                "left alone",
                reason="gen mode without latent reasoning: generation is transformers' own, so "
                "that the same tokens come out",
            ),
            Entry(
                "MultimodalEvalDataCollator",
                "left alone",
                reason="what it makes of an image decides the embedding; "
                "--dataloader_num_workers runs it beside the model",
            ),
        ),
    ),
)
