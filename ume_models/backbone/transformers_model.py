"""The transformers module of a checkpoint, sharing the tensors we loaded.

Used by the reference engine and by training. The only place that knows how transformers
4.52, 4.57 and 5.x differ in building and calling Qwen2-VL.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ume_models.backbone.config import FAMILIES, BackboneConfig
from ume_models.errors import CheckpointError


def transformers_key(published: str) -> str:
    """Parameter name in transformers' module (4.52 and later) for a published key."""
    if published.startswith("visual."):
        return "model." + published
    if published.startswith("model."):
        return "model.language_model." + published.removeprefix("model.")
    return published


def build_transformers_model(
    config: BackboneConfig,
    state: Mapping[str, torch.Tensor],
    vocab_size: int,
    attention: str = "sdpa",
) -> torch.nn.Module:
    """``Qwen2VLForConditionalGeneration`` (or 2.5) whose parameters *are* the given tensors.

    The module is created without storage and the tensors are assigned, so nothing is copied,
    downloaded or initialised.

    Args:
        config: architecture.
        state: published keys; the adapter's are ignored.
        vocab_size: rows of the embedding.
        attention: transformers' attention implementation, ``"sdpa"`` or ``"eager"``.

    Raises:
        CheckpointError: this transformers version has parameters we do not provide.
    """
    model = _without_storage(config.raw, config.family, vocab_size, attention)
    assigned = {
        transformers_key(key): value
        for key, value in state.items()
        if not key.startswith("latent_moe_transition.")
    }
    if config.tie_word_embeddings or "lm_head.weight" not in assigned:
        assigned["lm_head.weight"] = state["model.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(assigned, strict=False, assign=True)
    if missing or unexpected:
        import transformers

        raise CheckpointError(
            f"transformers {transformers.__version__} names parameters differently: "
            f"missing {list(missing)[:3]}, unexpected {list(unexpected)[:3]}; "
            "please report this version"
        )
    _fill_rope_buffers(model, config, state["model.norm.weight"].device)
    return model.eval()


def empty_transformers_model(
    raw: Mapping[str, Any], source: str, attention: str = "sdpa"
) -> torch.nn.Module:
    """``…ForConditionalGeneration`` of a ``config.json``, on the meta device: parts, no weights.

    Args:
        raw: content of ``config.json``.
        source: its path, for errors.
        attention: transformers' attention implementation.

    Raises:
        CheckpointError: another architecture, or transformers cannot build it.
    """
    family = str(raw.get("model_type", ""))
    if family not in FAMILIES:
        raise CheckpointError(
            f"{source}: model_type is {family!r}; known here are {' and '.join(FAMILIES)}"
        )
    try:
        return _without_storage(raw, family, None, attention).eval()
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _without_storage(
    raw: Mapping[str, Any], family: str, vocab_size: int | None, attention: str
) -> torch.nn.Module:
    import transformers

    name = "Qwen2VL" if family == "qwen2_vl" else "Qwen2_5_VL"
    kept = {k: v for k, v in raw.items() if k not in ("torch_dtype", "dtype")}
    if vocab_size is not None:
        kept["vocab_size"] = vocab_size
        if isinstance(kept.get("text_config"), Mapping):
            kept["text_config"] = {**kept["text_config"], "vocab_size": vocab_size}
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    try:
        config = getattr(transformers, f"{name}Config").from_dict(kept)
        config._attn_implementation = attention
        with torch.device("meta"):
            model: torch.nn.Module = model_class._from_config(
                config, attn_implementation=attention
            )
            return model
    except Exception as error:  # a damaged configuration fails in many ways
        raise CheckpointError(
            f"transformers cannot build this model ({type(error).__name__}: {error})"
        ) from error


def _fill_rope_buffers(
    model: torch.nn.Module, config: BackboneConfig, device: torch.device
) -> None:
    """Compute the RoPE frequencies, the only buffers, which have no storage after assignment."""
    vision = config.vision
    widths = {
        True: (vision.embed_dim // vision.num_heads // 2, 10000.0),
        False: (config.head_dim, config.rope_theta),
    }
    for name, buffer in list(model.named_buffers()):
        if buffer.device.type != "meta":
            continue
        owner, _, leaf = name.rpartition(".")
        if leaf not in ("inv_freq", "original_inv_freq"):
            raise CheckpointError(f"transformers has a buffer we do not know: {name}")
        dim, theta = widths["visual" in owner]
        exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        model.get_submodule(owner)._buffers[leaf] = (1.0 / (theta**exponent)).to(device)


def full_forward(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    visual: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, Any]:
    """The official prefix call: logits of every token and all hidden states, with a cache.

    Returns:
        ``(last hidden states [1, n, D] after the final norm, cache)``; the rest is computed
        and dropped, as the official code does.
    """
    kwargs: dict[str, Any] = {"output_hidden_states": True, "use_cache": True, "return_dict": True}
    out = model(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        position_ids=position_ids,
        **visual,
        **kwargs,
    )
    return out.hidden_states[-1], out.past_key_values


def cached_forward(
    model: torch.nn.Module, embeds: torch.Tensor, position_ids: torch.Tensor, cache: Any
) -> torch.Tensor:
    """One call of the decoder on a cache; ``[1, q, D]`` after the final norm.

    No mask is passed: new tokens see the whole cache and are causal among themselves. The
    official call passes a mask of the new tokens' length, which only flash-attention
    interprets that way (other attentions fail or silently cut the cache).
    """
    decoder = model.get_submodule("model.language_model")
    renamed = "cache" in inspect.signature(decoder.forward).parameters  # transformers 5.24
    return decoder(
        inputs_embeds=embeds,
        position_ids=position_ids,
        use_cache=True,
        return_dict=True,
        cache_position=position_ids[0, 0],
        **{"cache" if renamed else "past_key_values": cache},
    ).last_hidden_state
