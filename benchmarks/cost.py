"""Bytes and operations that each part of the model cannot avoid, counted from its shape.

Everything is 2 bytes wide (bfloat16). Weights are read once per pass, keys and values once per
layer and pass, and a layer's input and output once; what stays inside a layer is free. An
operation is a multiplication or an addition of a matrix product or of attention; norms,
activations and softmax are free. So no implementation that keeps the numbers moves or computes
less.
"""

from __future__ import annotations

from dataclasses import dataclass

from ume_models.backbone.config import BackboneConfig, VisionConfig

WIDTH = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True)
class Work:
    """Bytes moved to and from memory, and operations; done at the same time at best."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Adapter:
    """Shape of the latent transition: ``experts`` of D → 2D → D, ``top_k`` and one shared."""

    experts: int = 4
    top_k: int = 2
    shared: int = 1

    def expert_parameters(self, width: int) -> int:
        """Weights and biases of one expert."""
        return 4 * width**2 + 3 * width

    def work(self, width: int, rows: int) -> Work:
        """One transition; the experts read are all that so many rows can hit."""
        hit = min(self.experts, rows * self.top_k) + self.shared
        router = 2 * width * self.experts
        # the norm, and the one row of the step embedding that a step uses
        parameters = hit * self.expert_parameters(width) + router + self.experts + 3 * width
        products = (self.top_k + self.shared) * 4 * width**2 + router
        # state and router context in, state out
        return Work(WIDTH * (parameters + 3 * rows * width), 2 * rows * products)


@dataclass(frozen=True)
class Decoder:
    """The text decoder's layers; the embedding table is only looked up and no logits are made."""

    config: BackboneConfig

    @property
    def heads(self) -> int:
        """Width of all query heads."""
        return self.config.num_heads * self.config.head_dim

    @property
    def kv(self) -> int:
        """Width of all key heads; of all value heads, too."""
        return self.config.num_kv_heads * self.config.head_dim

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.kv * WIDTH

    @property
    def layer_products(self) -> int:
        """Weights of a layer that are multiplied with."""
        c = self.config
        attention = c.hidden_size * (2 * self.heads + 2 * self.kv)
        return attention + 3 * c.hidden_size * c.intermediate_size

    @property
    def products(self) -> int:
        """Weights of all layers that are multiplied with."""
        return self.config.num_layers * self.layer_products

    @property
    def layer_parameters(self) -> int:
        """All parameters of a layer: products, biases of q, k and v, two norms."""
        return self.layer_products + self.heads + 2 * self.kv + 2 * self.config.hidden_size

    @property
    def parameters(self) -> int:
        """All layers and the final norm."""
        return self.config.num_layers * self.layer_parameters + self.config.hidden_size

    def layer(self, rows: int, new: int, cached: int) -> Work:
        """One layer over ``new`` tokens in each of ``rows`` sequences of ``cached`` tokens."""
        tokens = rows * new
        pairs = rows * (new * cached + new * (new + 1) // 2)
        moved = WIDTH * (self.layer_parameters + 2 * tokens * self.config.hidden_size)
        moved += self.kv_bytes * rows * (cached + new)
        return Work(moved, 2 * tokens * self.layer_products + 4 * self.heads * pairs)

    def step(self, rows: int, new: int, cached: int) -> tuple[Work, ...]:
        """All layers, one after the other."""
        return (self.layer(rows, new, cached),) * self.config.num_layers

    def prefill(self, rows: int, new: int, cached: int) -> tuple[Work, ...]:
        """As ``step``, but the last layer's output is read at few tokens: only k and v count."""
        last = self.layer(rows, new, cached)
        keys_values = 2 * rows * new * self.config.hidden_size * 2 * self.kv
        return (*self.step(rows, new, cached)[:-1], Work(last.bytes, keys_values))


@dataclass(frozen=True)
class Vision:
    """The vision tower."""

    config: VisionConfig

    @property
    def gated(self) -> bool:
        """Qwen2.5-VL: SwiGLU and RMSNorm instead of a plain MLP and LayerNorm."""
        return self.config.window_size is not None

    @property
    def block_products(self) -> int:
        """Weights of a block that are multiplied with."""
        v = self.config
        return 4 * v.embed_dim**2 + (3 if self.gated else 2) * v.embed_dim * v.intermediate_size

    @property
    def block_parameters(self) -> int:
        """All parameters of a block."""
        v = self.config
        biases = 5 * v.embed_dim + (2 if self.gated else 1) * v.intermediate_size
        return self.block_products + biases + (2 if self.gated else 4) * v.embed_dim

    @property
    def merged(self) -> int:
        """Width of the patches that become one token."""
        return self.config.embed_dim * self.config.merge_size**2

    @property
    def merger_products(self) -> int:
        """Weights of the merger that are multiplied with."""
        return self.merged**2 + self.merged * self.config.out_dim

    @property
    def merger_parameters(self) -> int:
        """All parameters of the merger."""
        norm = (1 if self.gated else 2) * self.config.embed_dim
        return self.merger_products + self.merged + self.config.out_dim + norm

    @property
    def parameters(self) -> int:
        """Patch embedding, blocks and merger."""
        v = self.config
        return v.patch_dim * v.embed_dim + v.depth * self.block_parameters + self.merger_parameters

    def work(self, images: int, tokens: int) -> tuple[Work, ...]:
        """Images of so many merged tokens each: patch embedding, every block, merger."""
        v = self.config
        per_image = tokens * v.merge_size**2
        patches = images * per_image
        rows = WIDTH * patches * v.embed_dim
        embedding = Work(
            WIDTH * (patches + v.embed_dim) * v.patch_dim + rows,
            2 * patches * v.patch_dim * v.embed_dim,
        )
        products = 2 * patches * self.block_products
        blocks = []
        for number in range(v.depth):
            seen = per_image
            if v.window_size is not None and number not in v.full_attention_blocks:
                seen = min(per_image, (v.window_size // v.patch_size) ** 2)
            attention = 4 * patches * seen * v.embed_dim
            blocks.append(Work(WIDTH * self.block_parameters + 2 * rows, products + attention))
        merger = Work(
            WIDTH * (self.merger_parameters + images * tokens * v.out_dim) + rows,
            2 * images * tokens * self.merger_products,
        )
        return (embedding, *blocks, merger)


def rollout(
    decoder: Decoder, adapter: Adapter, rows: int, prefix: int, steps: int, suffix: int
) -> tuple[Work, ...]:
    """K latent steps and the suffix: K passes, the last one over the last latent and the suffix.

    Without latent steps, one pass over the suffix.
    """
    transition = adapter.work(decoder.config.hidden_size, rows)
    done: list[Work] = []
    for step in range(steps - 1):
        done += [transition, *decoder.step(rows, 1, prefix + step)]
    if not steps:
        return decoder.step(rows, suffix, prefix)
    return (*done, transition, *decoder.step(rows, 1 + suffix, prefix + steps - 1))


def contrastive_loss(rows: int, columns: int, width: int, backward: bool) -> Work:
    """Log-sum-exp over all logits; the backward recomputes them and makes two gradients."""
    moved = WIDTH * (rows + columns) * width
    product = 2 * rows * columns * width
    return Work(3 * moved, 4 * product) if backward else Work(moved, product)


def similarity_topk(queries: int, candidates: int, width: int, k: int = 100) -> Work:
    """All inner products and the ``k`` best, a float32 and an int64 each."""
    moved = WIDTH * (queries + candidates) * width + 12 * queries * k
    return Work(moved, 2 * queries * candidates * width)
