"""One call of the official ``_latent_reasoning_generate_rep``, and many of them as a batch.

The official function takes one sample through prefix, latent steps and suffix, then decodes until
an end-of-sequence token. A batch of samples gives the same hidden states; whether a sample would
have gone on decoding is seen from one product with the language-model head. Those that would are
not answered here: the original runs for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ume_models.backbone.config import BackboneConfig
from ume_models.embedders.rows import MEDIA_INPUTS
from ume_models.encode import DEFAULT_BATCH_TOKENS, out_of_memory
from ume_models.patching.engine import Engine, engine_for, rows_of_inputs
from ume_models.patching.unwrap import unwrap
from ume_models.patching.view import NoViewError, configuration
from ume_models.rollout.engine import Trace
from ume_models.rollout.latent import LatentPlan, RolloutTrace
from ume_models.rollout.sequence import Sequence as Prompt
from ume_models.rollout.sequence import build_sequence

CONTEXTS = ("none", "prefix_last", "disc")

Answer = tuple[torch.Tensor, bool, "dict[str, Any] | None"]
"""What the official function returns: embedding ``[D]``, whether it hit the budget, trace."""


@dataclass(frozen=True)
class LatentCall:
    """Arguments of the official function that are the same for all samples of a run."""

    model: torch.nn.Module
    tokenizer: Any
    max_new_tokens: int
    latent_steps: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    gen_id: int
    use_adapter: bool
    context: str
    disc_id: int
    debug: bool
    trace: bool

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> LatentCall:
        """From the bound arguments, converted as the original converts them."""
        return cls(
            model=arguments["model"],
            tokenizer=arguments["tokenizer"],
            max_new_tokens=int(arguments["max_new_tokens"]),
            latent_steps=max(int(arguments["latent_steps"]), 0),
            prefix=tuple(int(i) for i in arguments["prefix_token_ids"] or ()),
            suffix=tuple(int(i) for i in arguments["forced_suffix_token_ids"] or ()),
            gen_id=int(arguments["gen_emb_token_id"]),
            use_adapter=bool(arguments["use_latent_moe"]),
            context=str(arguments["latent_moe_context_type"] or "prefix_last").strip().lower(),
            disc_id=int(arguments["disc_emb_token_id"]),
            debug=bool(arguments["debug_log_tokens"]),
            trace=bool(arguments["collect_latent_trace"]),
        )

    def same_run(self, other: LatentCall) -> bool:
        """Whether two calls differ in nothing but the sample."""
        mine, theirs = vars(self), vars(other)
        return all(
            mine[name] is theirs[name]
            if name in ("model", "tokenizer")
            else mine[name] == theirs[name]
            for name in mine
        )

    def obstacle(self) -> str | None:
        """Why the original has to run, whatever the sample; None if it need not."""
        if torch.compiler.is_compiling():
            return "torch.compile is tracing"
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured"
        if not self.suffix or self.suffix[-1] != self.gen_id:
            return "the forced suffix does not end with <gen_emb>, so the answer is generated"
        if self.context not in CONTEXTS:
            return f"{self.context!r} is not a router context"
        if self.debug:
            return "debug_log_tokens logs the decode loop"
        root = unwrap(self.model)
        if root.training:
            return "the model is in training mode"
        if torch.is_grad_enabled() and any(p.requires_grad for p in root.parameters()):
            return "gradients are on (the official loop has torch.no_grad())"
        if self.use_adapter and getattr(root, "latent_moe_transition", None) is None:
            return "the model has no latent_moe_transition"
        return None

    def engine(self) -> tuple[Engine | None, str]:
        """The engine for the model, or None and the reason."""
        engine, reason = engine_for(self.model)
        if engine is not None and torch.is_autocast_enabled(engine.device.type):
            wanted = torch.get_autocast_dtype(engine.device.type)
            if wanted != engine.dtype:
                return None, f"autocast to {wanted} of weights in {engine.dtype}"
        return engine, reason

    @property
    def plan(self) -> LatentPlan:
        """The rollout this call asks for."""
        context = self.context if self.use_adapter else "none"
        if context == "disc" and self.disc_id < 0:
            context = "prefix_last"
        return LatentPlan(self.latent_steps, context, (), self.suffix, self.disc_id)

    def prompt(self, engine: Engine, inputs: Mapping[str, Any]) -> Prompt | None:
        """One sample with the prefix appended; None for what only the original handles."""
        ids = inputs.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[0] != 1:
            return None
        mask = inputs.get("attention_mask")
        if mask is not None and not bool((mask == 1).all()):
            return None
        try:
            ((tokens, visuals),) = engine.rows(inputs)
            row = (self.with_prefix(tokens), visuals)
            return engine.prompt(row, self.latent_steps + len(self.suffix))
        except (ValueError, TypeError, IndexError):
            return None

    def with_prefix(self, tokens: np.ndarray) -> np.ndarray:
        """Ids that end with the assistant prefix, which is appended where it is missing."""
        prefix = np.array(self.prefix, dtype=np.int64)
        n = prefix.size
        if n == 0 or (tokens.size >= n and np.array_equal(tokens[-n:], prefix)):
            return tokens
        return np.concatenate([tokens, prefix])

    # -- a batch -------------------------------------------------------------------------------

    def answers(
        self,
        engine: Engine,
        samples: Sequence[Any],
        normalize: Callable[[torch.Tensor], torch.Tensor],
    ) -> list[Answer | None]:
        """Answers to samples in order; None where the original has to run.

        Args:
            engine: of the model.
            samples: inputs of one sample each.
            normalize: the script's own ``normalize_reps``, which decides the dtype.
        """
        found: list[Answer | None] = [None] * len(samples)
        prompts: dict[int, Prompt] = {}
        for number, inputs in enumerate(samples):
            prompt = self.prompt(engine, inputs) if isinstance(inputs, Mapping) else None
            if prompt is not None:
                prompts[number] = prompt
        for numbers in _batches(prompts, engine.device):
            batch = [prompts[number] for number in numbers]
            for number, answer in zip(numbers, self._run(engine, batch, normalize), strict=True):
                found[number] = answer
        return found

    def _run(
        self,
        engine: Engine,
        batch: Sequence[Prompt],
        normalize: Callable[[torch.Tensor], torch.Tensor],
    ) -> list[Answer | None]:
        try:
            hidden, trace = engine.rollout(
                batch, self.plan, adapter=self.use_adapter, trace=self.trace
            )
        except Exception as error:
            if not out_of_memory(error) or len(batch) == 1:
                raise
            hidden = None
        if hidden is None:  # outside of the handler, which holds on to the tensors
            engine.release()
            half = len(batch) // 2
            return [
                *self._run(engine, batch[:half], normalize),
                *self._run(engine, batch[half:], normalize),
            ]
        ends = self._ends(hidden)
        embeddings = normalize(hidden)
        return [
            (
                embeddings[row].clone(),
                False,
                None if trace is None else self._trace(trace, row, prompt),
            )
            if ends[row]
            else None
            for row, prompt in enumerate(batch)
        ]

    def _ends(self, hidden: torch.Tensor) -> list[bool]:
        """Whether decoding would end right after the suffix, row by row.

        Then the embedding is the suffix's own: the last ``<gen_emb>`` wins, and an end-of-sequence
        token is none. Rows that are not finite go the original's way.
        """
        finite = torch.isfinite(hidden).all(dim=-1)
        if self.max_new_tokens <= 0:
            return finite.tolist()
        following = _lm_head(self.model)(hidden).float().argmax(dim=-1).tolist()
        stop = self._stop_ids() - {self.gen_id}
        return [ok and token in stop for ok, token in zip(finite.tolist(), following, strict=True)]

    def _stop_ids(self) -> set[int]:
        """End-of-sequence ids, looked for where the original looks."""
        ids = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        if ids is None:
            ids = self.tokenizer.eos_token_id
        if isinstance(ids, (tuple, list, set)):
            return {int(i) for i in ids if i is not None}
        return set() if ids is None else {int(ids)}

    def _trace(self, trace: Trace, row: int, prompt: Prompt) -> dict[str, Any]:
        assert isinstance(trace, RolloutTrace)  # of a latent rollout
        known = self.disc_id >= 0 and bool((prompt.input_ids == self.disc_id).any())
        return {
            "latent_hiddens": trace.latents[row].clone(),
            "disc_anchor": trace.anchor[row].clone() if known else None,
            "gen_hidden": trace.hidden[row].clone(),
        }


def _batches(prompts: Mapping[int, Prompt], device: torch.device) -> list[list[int]]:
    """Sample numbers in batches of the tokens that ``encode`` takes for this device."""
    budget = DEFAULT_BATCH_TOKENS.get(device.type, DEFAULT_BATCH_TOKENS["cpu"])
    batches: list[list[int]] = []
    tokens = 0
    for number, prompt in prompts.items():
        if not batches or tokens + len(prompt) > budget:
            batches.append([])
            tokens = 0
        batches[-1].append(number)
        tokens += len(prompt)
    return batches


def _lm_head(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    root: Any = unwrap(model)
    head = getattr(root, "lm_head", None)
    if isinstance(head, nn.Module):
        return head
    return lambda hidden: F.linear(hidden, root.get_input_embeddings().weight)


class WithPositions:
    """A model that gets M-RoPE positions where its caller gives none.

    transformers 5 refuses visual inputs without ``mm_token_type_ids``, which the official function
    does not know of, and computes other positions for long videos. Everything else is the model's.

    Args:
        model: of transformers 5, wrapped or not.
        config: its architecture.
    """

    def __init__(self, model: torch.nn.Module, config: BackboneConfig) -> None:
        self._model = model
        self._config = config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model, with ``position_ids`` of the official version where there are visuals."""
        given = kwargs.get("position_ids") is not None or "mm_token_type_ids" in kwargs
        if not given and any(kwargs.get(name) is not None for name in MEDIA_INPUTS):
            ((tokens, visuals),) = rows_of_inputs(self._config, kwargs)
            positions = build_sequence(tokens, self._config, visuals).positions
            device = kwargs["input_ids"].device
            kwargs["position_ids"] = torch.from_numpy(positions)[:, None].to(device)
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        return WithPositions(value, self._config) if name == "module" else value


def model_for_original(model: torch.nn.Module) -> Any:
    """The model as the original can call it under this version of transformers."""
    root = unwrap(model)
    if "mm_token_type_ids" not in inspect.signature(type(root).forward).parameters:
        return model
    try:
        return WithPositions(model, configuration(root))
    except NoViewError:
        return model
