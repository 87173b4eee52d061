"""PLUME: latent reasoning embedder on Qwen2-VL or Qwen2.5-VL.

Paper: PLUME, arXiv 2604.02073; official code ``VLM2Vec/eval_twomode.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from typing_extensions import Self

from ume_kernels import MoETransition
from ume_models.backbone.checkpoint import ADAPTER_PREFIX
from ume_models.backbone.config import BackboneConfig
from ume_models.embedder import EmbedOptions
from ume_models.embedders.base import BackboneEmbedder, Signs
from ume_models.embedders.plume_prompt import PREFIX, PROFILES, SUFFIX
from ume_models.embedders.plume_reference import ReferenceEngine
from ume_models.embedders.plume_tokens import TokenIds, resize_vocabulary, token_ids
from ume_models.errors import CheckpointError, OptionError
from ume_models.processing.rules import whole_number
from ume_models.profile import Tap
from ume_models.rollout.engine import Policy, Trace
from ume_models.rollout.latent import Latent, LatentPlan, RolloutTrace
from ume_models.rollout.sequence import Sequence as Prompt
from ume_models.rollout.single_pass import SinglePass

Mode = Literal["gen", "disc", "last"]
Context = Literal["disc", "prefix_last", "none"]

# Not recorded with embeddings while they have these values.
_UNRECORDED: Mapping[str, Any] = {"exclude_experts": (), "verify_eos": False, "max_new_tokens": 1}


@dataclass(frozen=True)
class PlumeOptions(EmbedOptions):
    """How PLUME embeds.

    Attributes:
        mode: ``"gen"`` latent rollout, ``"disc"`` hidden state at ``<disc_emb>``, ``"last"``
            hidden state at the last prompt token.
        latent_steps: K ≥ 0, latent states rolled out before the suffix.
        context: what the router sees besides the latent state.
        exclude_experts: experts the router must not choose.
        verify_eos: check that the model would stop after the suffix, as the fast engine assumes,
            and run the official decode loop for rows where it would not.
        max_new_tokens: decode budget after the suffix in the reference loop. The official default
            is 4096; a trained model stops after one token.
        disc_offset: token read in ``mode="disc"``: 0 is ``<disc_emb>`` itself as in training, 1
            the token after it as in the official evaluation script.

    Raises:
        OptionError: a value is out of range; the option is named.
    """

    mode: Mode = "gen"
    latent_steps: int = 8
    context: Context = "disc"
    exclude_experts: tuple[int, ...] = ()
    verify_eos: bool = False
    max_new_tokens: int = 1
    disc_offset: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("mode", ("gen", "disc", "last")),
            ("context", ("disc", "prefix_last", "none")),
        ):
            if getattr(self, name) not in known:
                choices = ", ".join(map(repr, known))
                raise OptionError(f"{name} must be one of {choices}; got {getattr(self, name)!r}")
        for name in ("latent_steps", "max_new_tokens", "disc_offset"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.disc_offset > 1:
            raise OptionError(f"disc_offset must be 0 or 1, got {self.disc_offset}")
        if not isinstance(self.verify_eos, bool):
            raise OptionError(f"verify_eos must be True or False, got {self.verify_eos!r}")
        if not isinstance(self.exclude_experts, Iterable):
            raise OptionError(f"exclude_experts must be a list, got {self.exclude_experts!r}")
        excluded = tuple(whole_number("exclude_experts", e) for e in self.exclude_experts)
        object.__setattr__(self, "exclude_experts", excluded)

    def described(self) -> dict[str, Any]:
        found = asdict(self)
        return {k: v for k, v in found.items() if k not in _UNRECORDED or v != _UNRECORDED[k]}


class PlumeForEmbedding(BackboneEmbedder):
    """Embeds text, images and video into one space after K continuous latent steps.

    Its state dict has ``latent_moe_transition.*`` beside the backbone's weights.
    """

    family = "plume"
    Options = PlumeOptions
    options: PlumeOptions
    profiles = PROFILES
    build_options: ClassVar[tuple[str, ...]] = ("adapter", "top_k")

    def __init__(self, config: BackboneConfig, adapter: MoETransition | None, tied: bool) -> None:
        super().__init__(config, tied)
        self.latent_moe_transition = adapter

    @classmethod
    def fits(cls, signs: Signs) -> bool:
        return {"<bot>", "<disc_emb>"} <= signs.vocabulary.keys()

    @classmethod
    def owns(cls, signs: Signs) -> bool:
        return any(name.startswith(ADAPTER_PREFIX) for name in signs.tensors)

    @classmethod
    def fit_vocabulary(cls, *args: Any) -> BackboneConfig:
        return resize_vocabulary(*args)

    @classmethod
    def build(
        cls, config: BackboneConfig, state: Mapping[str, torch.Tensor], tied: bool, **options: Any
    ) -> Self:
        """A model with the adapter that the tensors describe.

        ``adapter=False`` runs without it (hidden states are fed back unchanged); ``top_k`` are the
        experts per latent step (the checkpoint does not record it; officially 2).
        """
        if not options.get("adapter", True):
            return cls(config, None, tied)
        top_k = whole_number("top_k", options.get("top_k", 2))
        return cls(config, _adapter_shape(config, state, top_k), tied)

    @classmethod
    def leaves_out(cls, key: str, **options: Any) -> bool:
        return not options.get("adapter", True) and key.startswith(ADAPTER_PREFIX)

    def attach(self, *args: Any, **kwargs: Any) -> None:
        super().attach(*args, **kwargs)
        self.tokens: TokenIds = token_ids(self.tokenizer, self.sources)
        self.prefix_ids = self.token_ids(PREFIX)
        self.suffix_ids = self.token_ids(SUFFIX)
        if self.latent_moe_transition is not None:
            self.latent_moe_transition.pack_experts()

    @property
    def latent_steps(self) -> int:
        """Default number of latent steps K."""
        return self.options.latent_steps

    @property
    def load_options(self) -> dict[str, Any]:
        adapter = self.latent_moe_transition
        shape = {"adapter": False} if adapter is None else {"top_k": adapter.top_k}
        return {**super().load_options, **shape}

    def _identity(self) -> dict[str, Any]:
        return {
            **super()._identity(),
            "ids": [self.prefix_ids, self.suffix_ids, sorted(self.tokens.eos)],
            "top_k": getattr(self.latent_moe_transition, "top_k", None),
        }

    def forced(self, options: EmbedOptions) -> tuple[int, ...]:
        return self.prefix_ids if _own(options).mode == "gen" else ()

    def policy(self, options: EmbedOptions) -> Policy:
        chosen = _own(options)
        if chosen.mode == "gen":
            return Latent(self._plan(chosen), self.latent_moe_transition)
        if chosen.mode == "last":
            return SinglePass(lambda prompt: len(prompt) - 1)
        tap = Tap("<disc_emb>", offset=chosen.disc_offset)
        return SinglePass(lambda prompt: tap.index(prompt.input_ids, self.tokens.disc_emb))

    def _plan(self, options: PlumeOptions) -> LatentPlan:
        adapter = self.latent_moe_transition
        if options.exclude_experts and adapter is None:
            raise OptionError("exclude_experts needs the adapter, but it was loaded without one")
        return LatentPlan(
            options.latent_steps,
            options.context,
            options.exclude_experts,
            self.suffix_ids,
            self.tokens.disc_emb,
        )

    def _make_reference(self, module: Any) -> ReferenceEngine:
        return ReferenceEngine(
            self.config, module, self.latent_moe_transition, self.tokens.eos, self.tokens.gen_emb
        )

    def _hidden(
        self, batch: Sequence[Prompt], options: EmbedOptions, trace: bool
    ) -> tuple[torch.Tensor, Trace | None]:
        chosen = _own(options)
        if chosen.mode != "gen":
            if trace:
                raise OptionError("return_trace needs mode='gen'; other modes have no rollout")
            return super()._hidden(batch, options, trace)
        if self.engine == "fast":
            hidden, found = super()._hidden(batch, options, trace)
            return self._verified(batch, chosen, hidden) if chosen.verify_eos else hidden, found
        plan, budget = self._plan(chosen), chosen.max_new_tokens
        results = [self.reference.run(prompt, plan, budget, trace) for prompt in batch]
        hidden = torch.stack([state for state, _ in results])
        return hidden, _stacked([t for _, t in results]) if trace else None

    def _verified(
        self, batch: Sequence[Prompt], options: PlumeOptions, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Replace rows that would go on generating by the official loop's result."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        following = F.linear(hidden, head.weight).float().argmax(dim=-1).tolist()
        stop = self.tokens.eos - {self.tokens.gen_emb}
        runaway = [row for row, token in enumerate(following) if token not in stop]
        if runaway:
            hidden = hidden.clone()
        for row in runaway:
            hidden[row] = self.reference.run(
                batch[row], self._plan(options), options.max_new_tokens
            )[0]
        return hidden


def _own(options: EmbedOptions) -> PlumeOptions:
    if not isinstance(options, PlumeOptions):
        raise TypeError(f"options are {type(options).__name__}; this model takes PlumeOptions")
    return options


def _stacked(traces: Sequence[RolloutTrace]) -> RolloutTrace:
    return RolloutTrace(
        torch.cat([t.hidden for t in traces]),
        torch.cat([t.latents for t in traces]),
        torch.cat([t.anchor for t in traces]),
    )


def _adapter_shape(
    config: BackboneConfig, state: Mapping[str, torch.Tensor], top_k: int
) -> MoETransition:
    """The adapter with the number of experts and steps that the tensors have."""
    if not any(key.startswith(ADAPTER_PREFIX) for key in state):
        raise CheckpointError(
            f"no {ADAPTER_PREFIX}* tensors, so this is not a PLUME checkpoint; use one trained "
            "with the latent adapter, or load(..., adapter=False) to feed hidden states back "
            "unchanged"
        )
    router = state.get(f"{ADAPTER_PREFIX}router.weight")
    table = state.get(f"{ADAPTER_PREFIX}step_embed.weight")
    experts = 4 if router is None or router.ndim != 2 else router.shape[0]
    if not 1 <= top_k <= experts:
        raise OptionError(
            f"top_k must be 1 … {experts}, the experts of this checkpoint, got {top_k}; "
            "pass load(..., top_k=…)"
        )
    return MoETransition(
        config.hidden_size,
        num_experts=experts,
        top_k=top_k,
        use_shared_expert=any(k.startswith(f"{ADAPTER_PREFIX}shared_expert.") for k in state)
        or router is None,
        step_embed_max_steps=32 if table is None or table.ndim != 2 else table.shape[0],
    )
