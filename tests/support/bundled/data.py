"""Rendered pictures, prompts as tokens, and the uniform batches the network takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer

from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.mrope import mrope_position_ids
from ume_models.embedders.plume_prompt import SUFFIX

from .families import FAMILIES, Family, Spec
from .tasks import Task
from .tokens import prompt, token_id

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
BLANK_SIZE = (56, 56)  # what the white 28×28 picture of text-only inputs is enlarged to

Grid = tuple[int, int, int]


def grid_of(size: tuple[int, int], frames: int, config: BackboneConfig) -> Grid:
    """Patch grid (t, h, w) of ``frames`` pictures of ``size`` (width, height)."""
    v = config.vision
    return -(-frames // v.temporal_patch_size), size[1] // v.patch_size, size[0] // v.patch_size


def to_patches(pixels: np.ndarray, config: BackboneConfig) -> torch.Tensor:
    """uint8 ``[N, T, H, W, 3]`` to float32 ``[N, t·h·w, C·2·p·p]`` in the processor's order."""
    v = config.vision
    p, m, tp = v.patch_size, v.merge_size, v.temporal_patch_size
    x = torch.from_numpy(pixels).float() / 255.0
    x = (x - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    if x.shape[1] % tp:
        x = torch.cat([x, x[:, -1:].expand(-1, tp - x.shape[1] % tp, -1, -1, -1)], dim=1)
    n, frames, height, width, channels = x.shape
    t, h, w = frames // tp, height // p, width // p
    x = x.reshape(n, t, tp, h // m, m, p, w // m, m, p, channels)
    # -> n, t, h/m, w/m, m, m, C, tp, p, p
    x = x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    return x.reshape(n, t * h * w, channels * tp * p * p)


class Pool:
    """Pre-rendered pictures of one family.

    Args:
        family: what to draw.
        specs: what to show.
        copies: how many different pictures of each spec.
        seed: everything drawn follows from it.
        held_out: use held-out source material.
    """

    def __init__(
        self, family: Family, specs: Sequence[Spec], copies: int, seed: int, held_out: bool
    ) -> None:
        rng = Random(f"{seed}/{family.name}/{held_out}")
        width, height = family.size
        self.family, self.specs, self.copies = family, list(specs), copies
        shape = (len(self.specs), copies, family.frames, height, width, 3)
        self.pixels = np.empty(shape, dtype=np.uint8)
        for i, spec in enumerate(self.specs):
            for copy in range(copies):
                for f, frame in enumerate(family.render(spec, rng, held_out)):
                    self.pixels[i, copy, f] = np.asarray(frame)


@dataclass
class Side:
    """One side (queries or targets) of a uniform batch; see ``PlumeNetwork``.

    Attributes:
        ids: int64 ``[B, S]``, right-padded. lengths: ``[B]``.
        taps: ``[B, 2]`` positions of ``<disc_emb>`` and of ``<bot>``.
        positions: ``[3, S]``.
        visual_start: column of the first visual token.
        patches: ``[B or 1, P, …]``; one row when all rows share the blank picture.
        grid: patch grid of every picture.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    taps: torch.Tensor
    positions: torch.Tensor
    visual_start: int
    patches: torch.Tensor
    grid: Grid


@dataclass
class Group:
    """A uniform batch of one task.

    Attributes:
        task: where the pairs come from.
        queries, targets: the two sides, row by row a pair.
        keys: what each pair shows; equal keys are not negatives.
        attributes: ``[B, slots]`` classes describing each pair.
    """

    task: Task
    queries: Side
    targets: Side
    keys: list[str]
    attributes: torch.Tensor


class Encoder:
    """Turns captions and pictures into ``Side``s with one tokenizer and one architecture."""

    def __init__(self, tokenizer: Tokenizer, config: BackboneConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.disc = token_id(tokenizer, "<disc_emb>")
        suffix = tokenizer.encode(SUFFIX, add_special_tokens=False).ids
        self.suffix = torch.tensor(suffix)
        self.suffix_labels = torch.tensor([*suffix, token_id(tokenizer, "<|im_end|>")])
        blank = np.full((1, 1, BLANK_SIZE[1], BLANK_SIZE[0], 3), 255, dtype=np.uint8)
        self._blank = to_patches(blank, config)

    def _assemble(
        self, texts: Sequence[str], patches: torch.Tensor, grid: Grid, video: bool
    ) -> Side:
        encoded = [
            e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ]
        lengths = torch.tensor([len(ids) for ids in encoded])
        ids = torch.zeros(len(encoded), int(lengths.max()), dtype=torch.long)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        longest = encoded[int(lengths.argmax())]
        grids = {"video_grids" if video else "image_grids": [grid]}
        positions = mrope_position_ids(longest, self.config, **grids)
        pad = self.config.video_token_id if video else self.config.image_token_id
        # The prompt ends with a constant text, so the last <disc_emb> is the anchor.
        column = torch.arange(ids.shape[1])
        disc = column.expand_as(ids).masked_fill(ids.ne(self.disc), -1).amax(dim=1)
        taps = torch.stack([disc, lengths - 1], dim=1)
        start = longest.index(pad)
        return Side(ids, lengths, taps, torch.from_numpy(positions), start, patches, grid)

    def texts(self, instruction: str, captions: Sequence[str]) -> Side:
        """Text-only inputs, with the white picture in front as the official prompt has it."""
        grid = grid_of(BLANK_SIZE, 1, self.config)
        pads = "<|image_pad|>" * (grid[1] * grid[2] // self.config.vision.merge_size**2)
        prompts = [prompt(instruction, caption, pads) for caption in captions]
        return self._assemble(prompts, self._blank, grid, video=False)

    def pictures(self, instruction: str, pixels: np.ndarray) -> Side:
        """Pictures or clips, uint8 ``[N, T, H, W, 3]``."""
        frames, height, width = pixels.shape[1:4]
        grid = grid_of((width, height), frames, self.config)
        pad = "<|video_pad|>" if frames > 1 else "<|image_pad|>"
        count = grid[0] * grid[1] * grid[2] // self.config.vision.merge_size**2
        prompts = [prompt(instruction, "", pad * count)] * len(pixels)
        return self._assemble(prompts, to_patches(pixels, self.config), grid, frames > 1)


class Sampler:
    """Draws training groups. All randomness comes from ``seed``.

    Args:
        encoder: makes the token side.
        seed: seed of pictures and draws.
        pictures: pictures to render per family.
        families: names to prepare; all by default.
    """

    def __init__(
        self,
        encoder: Encoder,
        seed: int,
        pictures: int = 6000,
        families: Sequence[str] = tuple(FAMILIES),
    ) -> None:
        self.encoder = encoder
        self.rng = Random(f"{seed}/sampler")
        self.pools: dict[str, Pool] = {}
        for name in families:
            family = FAMILIES[name]
            specs = family.split(held_out=False)
            if len(specs) * 2 > pictures:
                specs = Random(f"{seed}/specs").sample(specs, max(2, pictures // 2))
            self.pools[name] = Pool(family, specs, max(2, pictures // len(specs)), seed, False)

    def group(self, task: Task, size: int) -> Group:
        """``size`` pairs of ``task``, of different specs where there are enough."""
        pool, rng = self.pools[task.family], self.rng
        family = pool.family
        repeats = -(-size // len(pool.specs))
        chosen = rng.sample(list(range(len(pool.specs))) * repeats, size)
        specs = [pool.specs[i] for i in chosen]
        copies = [rng.sample(range(pool.copies), 2) for _ in chosen]
        sides = []
        for column, (visual, instruction) in enumerate(
            (
                (task.query_visual, task.query_instruction),
                (task.target_visual, task.target_instruction),
            )
        ):
            if visual:
                picked = np.array([pair[column] for pair in copies])
                sides.append(self.encoder.pictures(instruction, pool.pixels[chosen, picked]))
            else:
                captions = [family.caption(spec, rng) for spec in specs]
                sides.append(self.encoder.texts(instruction, captions))
        attributes = torch.tensor([family.attributes(spec) for spec in specs])
        return Group(task, sides[0], sides[1], [family.key(spec) for spec in specs], attributes)
