"""Read and write the official checkpoint layout: safetensors and JSON, nothing else.

Keys are handled in the published (older) form: ``model.layers.*``, ``visual.*``,
``lm_head.weight``, ``latent_moe_transition.*``. Newer transformers write
``model.language_model.*`` and ``model.visual.*``; both are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ume_models.atomic import replacing, write_atomically
from ume_models.backbone.fields import OBJECT, Rule, field, read_json, real
from ume_models.errors import CheckpointError

ADAPTER_PREFIX = "latent_moe_transition."
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_NEWER_PREFIXES = (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


def published_key(key: str) -> str:
    """The published name of a parameter, whatever version wrote it."""
    at = key.find(ADAPTER_PREFIX)
    if at >= 0:  # the official loader matches the substring, so wrappers' prefixes are allowed
        return key[at:]
    for newer, older in _NEWER_PREFIXES:
        if key.startswith(newer):
            return older + key[len(newer) :]
    return key


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of the index, or the single one.

    Raises:
        CheckpointError: none, or a shard of the index is missing; the message says which.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        content = read_json(index)
        weight_map = content.get("weight_map")
        shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not shards or any(not isinstance(n, str) or Path(n).name != n for n in shards):
            raise CheckpointError(f"{index}: no usable weight_map; download the file again")
        names = sorted(set(shards))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{directory}: shards named in {INDEX_FILE} are missing: {', '.join(missing)}; "
                "download them again"
            )
        return [directory / name for name in names]
    single = directory / SINGLE_FILE
    if single.is_file():
        return [single]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise CheckpointError(
            f"{directory}: only pickled weights found; this package reads safetensors only. "
            "Convert with model.save_pretrained(..., safe_serialization=True) in transformers"
        )
    raise CheckpointError(f"{directory}: no {SINGLE_FILE} and no {INDEX_FILE}")


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor, Path]]:
    """All tensors of safetensors files as ``(key, memory-mapped tensor, file)``.

    Raises:
        CheckpointError: a file is truncated or not safetensors.
    """
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118  not a mapping
                    yield key, handle.get_tensor(key), file
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: truncated or not a safetensors file ({error}); download it again"
            ) from None


def check_finite(key: str, tensor: torch.Tensor, file: Path) -> None:
    """Refuse weights with NaN or infinity.

    One sum reads the tensor once; only a suspicious sum is looked at element by element.

    Raises:
        CheckpointError: names the file and the tensor.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CheckpointError(
                f"{file}: {key} has {bad} NaN or infinite values; the checkpoint is damaged"
            )


def read_state(directory: Path) -> dict[str, torch.Tensor]:
    """State dict of a full checkpoint under published keys; tensors stay memory-mapped.

    Raises:
        CheckpointError: as ``weight_files``, ``read_tensors`` and ``check_finite``, or two
            tensors claim one name.
    """
    state: dict[str, torch.Tensor] = {}
    for key, tensor, file in read_tensors(weight_files(directory)):
        name = published_key(key)
        if name in state:
            raise CheckpointError(f"{file}: {key} occurs twice (as {name})")
        check_finite(key, tensor, file)
        state[name] = tensor
    return state


_RANK = real(1, 10**6)
_ALPHA = real(-(10**6), 10**6)
_LORA_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$"
)


def merge_lora(state: dict[str, torch.Tensor], directory: Path) -> None:
    """Merge a PEFT LoRA adapter into ``state``: ``W += scale · B A``, as PEFT merges.

    ``scale`` is ``alpha / r`` (``alpha / sqrt(r)`` with ``use_rslora``), with PEFT's
    ``rank_pattern`` and ``alpha_pattern``. Full tensors in the adapter (``modules_to_save``,
    embeddings, ``latent_moe_transition.*``, which the official code keeps in the adapter
    folder) replace those of the base.

    Raises:
        CheckpointError: not a plain LoRA, or a module that the base does not have.
    """
    path = directory / "adapter_config.json"
    config = read_json(path)
    unusual = config.get("use_dora") or config.get("fan_in_fan_out")
    if config.get("peft_type", "LORA") != "LORA" or unusual:
        raise CheckpointError(f"{directory}: only plain LoRA adapters can be merged")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor, file in read_tensors(sorted(directory.glob("*.safetensors"))):
        check_finite(key, tensor, file)
        match = _LORA_KEY.match(key)
        if match:
            pairs.setdefault(published_key(match["module"]), {})[match["side"]] = tensor
            continue
        name = published_key(
            key.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        )
        if name not in state and not name.startswith(ADAPTER_PREFIX):
            raise CheckpointError(f"{file}: {key} does not exist in the base checkpoint")
        state[name] = tensor
    if not pairs:
        raise CheckpointError(
            f"{directory}: adapter_config.json announces a LoRA, but no safetensors file holds "
            "one (pickled adapters are not read); save it with safe_serialization=True"
        )
    for module, pair in pairs.items():
        weight = state.get(f"{module}.weight")
        if weight is None or set(pair) != {"A", "B"}:
            raise CheckpointError(
                f"{directory}: LoRA for {module} does not fit the base checkpoint"
            )
        a, b = pair["A"].float(), pair["B"].float()
        if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"{directory}: LoRA for {module} has shapes {tuple(b.shape)} x {tuple(a.shape)}, "
                f"but the weight is {tuple(weight.shape)}"
            )
        rank = field(config, str(path), "r", _RANK, a.shape[0])
        rank = _pattern(config, path, "rank_pattern", _RANK, module, rank)
        alpha = field(config, str(path), "lora_alpha", _ALPHA, rank)
        alpha = _pattern(config, path, "alpha_pattern", _ALPHA, module, alpha)
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        state[f"{module}.weight"] = weight + ((b @ a) * scale).to(weight.dtype)


def _pattern(
    config: Mapping[str, Any], path: Path, name: str, rule: Rule, module: str, default: float
) -> float:
    """What PEFT's ``rank_pattern`` or ``alpha_pattern`` says of a module."""
    patterns = field(config, str(path), name, OBJECT) if config.get(name) else {}
    for pattern in patterns:
        if module == pattern or module.endswith("." + pattern):
            return float(field(patterns, f"{path}, {name}", pattern, rule))
    return default


def fit(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], source: Path
) -> list[str]:
    """Check a state dict against expected shapes; returns keys that are not expected.

    Raises:
        CheckpointError: missing keys or wrong shapes, with the first few named.
    """
    missing = [key for key in expected if key not in state]
    if missing:
        raise CheckpointError(
            f"{source}: {len(missing)} tensors are missing: {', '.join(missing[:4])}"
            + (" …" if len(missing) > 4 else "")
        )
    wrong = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(shape)}"
        for key, shape in expected.items()
        if state[key].shape != shape
    ]
    if wrong:
        raise CheckpointError(f"{source}: wrong shapes: {'; '.join(wrong[:4])}")
    return [key for key in state if key not in expected]


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def write_state(
    directory: Path, state: Mapping[str, torch.Tensor], max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write safetensors (one file, or shards with an index), each file atomically."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for key, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor.detach().cpu().contiguous()
        filled += size

    def save(name: str, shard: dict[str, torch.Tensor]) -> None:
        with replacing(directory / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})

    if len(shards) == 1:
        save(SINGLE_FILE, shards[0])
        (directory / INDEX_FILE).unlink(missing_ok=True)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save(name, shard)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(t.numel() * t.element_size() for t in state.values())
    write_json(
        directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    (directory / SINGLE_FILE).unlink(missing_ok=True)
