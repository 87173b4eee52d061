"""Patching one model instance: what would be replaced in it, part by part, and taking it off."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ume_kernels import dispatch
from ume_kernels.dispatch import Backend
from ume_models.errors import PatchError
from ume_models.patching import adapter, forwards
from ume_models.patching import anatomy as anatomy_room
from ume_models.patching.anatomy import Anatomy, Problem
from ume_models.patching.changes import Change, InstanceForward
from ume_models.patching.report import Entry
from ume_models.patching.unwrap import lineage, named_parts, part, unwrap

__all__ = ["plan", "survey", "unpatch", "unwrap"]

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_AGAIN = "accelerate again after moving or converting the model"
_REPAIRED = (
    "concerns only calls on a cache whose mask of ones covers the new tokens alone, as PLUME's do: "
    "it means no padding, as under flash-attention. The original fails under sdpa and eager "
    "(transformers up to 4.52) or silently hides most of the cache (4.53 and later)"
)


@dataclass
class Plan:
    """What would be done to one model.

    Attributes:
        changes: to be committed.
        entries: lines of the report.
        problems: why parts of it cannot be patched.
    """

    changes: list[Change] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def plan(
    model: torch.nn.Module, *, logits: bool = True, strict: bool = True
) -> tuple[list[Change], list[Entry]]:
    """What patching a model instance would change; sets nothing.

    Args:
        model: transformers' Qwen2-VL or Qwen2.5-VL, bare or wrapped, or VLM2Vec's ``MMEBModel``.
        logits: False where the model is used as an embedder only: its head returns ``[..., 0]``.
        strict: a part that is missing, not as expected or already replaced by another library is
            an error; else it is listed and the rest is patched.

    Raises:
        PatchError: names the part and the remedy.
    """
    if not isinstance(model, nn.Module):
        raise PatchError(
            f"{type(model).__name__} is not a model; pass the torch.nn.Module itself, for a "
            "checkpoint use ume_models.load(path)"
        )
    root = unwrap(model)
    changes: list[Change] = []
    entries: list[Entry] = []
    prefix = ""
    if "MMEBModel" in lineage(root):
        from ume_models.patching import vlm2vec

        changes, entries = vlm2vec.plan_instance(root, strict)
        if not entries:
            told = "already replaced by this package"
            entries.append(Entry("encode_input, forward", "left alone", reason=told))
        encoder = root._modules.get("encoder")
        if not isinstance(encoder, nn.Module):
            raise PatchError("MMEBModel.encoder does not exist; is this VLM2Vec's MMEBModel?")
        root, prefix = unwrap(encoder), "encoder."
    found = survey(root, logits=logits, prefix=prefix)
    if strict and found.problems:
        raise PatchError(_told(type(root).__name__, found.problems))
    entries.extend(found.entries)
    entries.extend(_listed(problem, prefix) for problem in found.problems)
    return [*changes, *found.changes], entries


def unpatch(model: nn.Module) -> None:
    """Take every replacement of this package off a model and its parts, copies included."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, InstanceForward):
                del vars(module)[name]


def survey(
    root: nn.Module,
    *,
    logits: bool = True,
    prefix: str = "",
    device: torch.device | None = None,
) -> Plan:
    """Everything that could be done to an unwrapped model, and everything in the way.

    Args:
        root: a model without wrappers.
        logits: as for ``plan``.
        prefix: stands before the names of parts in the report.
        device: where the weights will be; for a model on the meta device, which holds none.

    Raises:
        PatchError: not a model known here.
    """
    found = anatomy_room.dissect(root)
    result = Plan(problems=[*_unsupported(root, device), *anatomy_room.problems(found)])
    broken = [problem.target for problem in result.problems if problem.target]
    groups = _Groups(prefix)
    for path, module, choice in _choices(found, logits, device):
        if choice.forward is None:
            groups.leave(choice, path)
            continue
        if choice.inner and any(name == path or name.startswith(f"{path}.") for name in broken):
            continue  # has a line of its own
        present = vars(module).get(choice.attribute)
        if isinstance(present, forwards.NoLogits):
            told = "accelerated with logits=False before; revert that to have logits"
            groups.leave(Choice(choice.what, told), path)
            continue
        # The head without logits takes the place of a faster head, and gives it back.
        if isinstance(present, InstanceForward) and choice is not _NO_LOGITS:
            kind = type(present).__name__
            groups.leave(Choice(choice.what, f"already replaced by this package ({kind})"), path)
            continue
        problem = anatomy_room.foreign(module, path, choice.inner)
        if problem is not None and not isinstance(present, InstanceForward):
            result.problems.append(problem)
            continue
        groups.add(choice, path, module)
    result.changes, result.entries = groups.result()
    return result


@dataclass(frozen=True)
class Choice:
    """What is done with one module.

    Attributes:
        what: the kind of module, in the plural.
        reason: of the entry.
        forward: class of the replacement; None to leave the module alone.
        by, action: of the entry.
        inner: whether it needs the module's parts to be as expected.
        attribute: what of the module is replaced.
    """

    what: str
    reason: str
    forward: type[InstanceForward] | None = None
    by: str = ""
    action: Any = "replaced"
    inner: bool = True
    attribute: str = "forward"


def _choices(
    found: Anatomy, logits: bool, device: torch.device | None
) -> Iterator[tuple[str, nn.Module, Choice]]:
    """Every module that something is decided about, with its name and the decision."""
    outer = None if found.multimodal_path is None else part(found.root, found.multimodal_path)
    towers = tuple(
        f"{path}.".lstrip(".")
        for path in (
            f"{found.text_path}.layers",
            *((found.visual_path,) if found.visual is not None else ()),
        )
    )
    yield "", found.root, _REPLICAS
    for path, module in named_parts(found.root):
        names = lineage(module)
        if module is found.text:
            yield path, module, _mask(found.text)
        elif module is outer:
            yield path, module, _OUTER_MASK
        elif path == "lm_head" and not logits:
            if type(module).__name__ not in ("FullyShardedDataParallel", "OptimizedModule"):
                yield path, module, _NO_LOGITS
                yield "", found.root, _NO_LABELS
                yield "", found.root, _NO_GENERATION
        elif names & anatomy_room.NORMS:
            yield path, module, _norm(module, device)
        elif names & anatomy_room.GATED:
            yield path, module, _gated(module, device)
        elif names & anatomy_room.PATCHES:
            yield path, module, _patches(module)
        elif names & anatomy_room.ADAPTERS:
            yield path, module, _adapter(module)
        elif path.startswith(towers) or path == "lm_head":
            if isinstance(module, nn.Linear):
                yield path, module, _linear(module, device)
            elif path.endswith((".self_attn", ".attn")):
                yield path, module, _ATTENTION
        elif "Embedding" in type(module).__name__ and "Rotary" in type(module).__name__:
            yield path, module, _ROTARY


_OUTER_MASK = Choice(
    "decoders",
    "the same repair for the positions that this module derives from the mask",
    forwards.SuffixMaskForward,
    "the attention mask of flash-attention",
    "repaired",
    inner=False,
)
_NO_LOGITS = Choice(
    "language-model head",
    "logits=False: nobody reads the logits, so they are [B, S, 0]",
    forwards.NoLogits,
    "no product",
    inner=False,
)
_NO_LABELS = Choice(
    "models",
    "logits=False: a call with labels is an error that says so",
    forwards.RefuseLabels,
    "a check",
    inner=False,
)
_NO_GENERATION = Choice(
    "generation",
    "logits=False: an error that says so",
    forwards.RefuseGeneration,
    "a check",
    inner=False,
    attribute="generate",
)
_REPLICAS = Choice(
    "nn.DataParallel",
    "an error that says so: its replicas would share the forwards of the first; DDP is fine",
    forwards.RefuseReplicas,
    "a check",
    inner=False,
    attribute="_replicate_for_data_parallel",
)
_ATTENTION = Choice(
    "attention modules",
    "they run the attention the model was loaded with; "
    "ume_models.patching.apply('transformers', attention=True) offers another",
)
_ROTARY = Choice("rotary embeddings", "computed once per call; nothing to gain")


def _mask(text: nn.Module) -> Choice:
    attention = getattr(getattr(text, "config", None), "_attn_implementation", None)
    return Choice(
        "decoders",
        f"{_REPAIRED}; this model runs {attention}" if attention else _REPAIRED,
        forwards.SuffixMaskForward,
        "the attention mask of flash-attention",
        "repaired",
        inner=False,
    )


def _norm(module: Any, device: torch.device | None) -> Choice:
    weight = module.weight
    backend, why = _now("rms_norm", weight, device, (1, 8), (8,))
    if backend in (None, Backend.TORCH):
        return Choice("RMSNorm", why)
    return Choice(
        "RMSNorm", "without a gradient; else the original", forwards.RMSNormForward,
        f"ume_kernels.prefill.rms_norm ({backend})",
    )  # fmt: skip


def _gated(module: nn.Module, device: torch.device | None) -> Choice:
    weight = getattr(part(module, "gate_proj"), "weight", None)
    if not anatomy_room.silu(module._modules.get("act_fn")) or weight is None:
        return Choice("gated MLPs", "the activation is not SiLU")
    backend, why = _now("silu_mul", weight, device, (1, 8), (1, 8))
    if backend is None:
        return Choice("gated MLPs", why)
    return Choice(
        "gated MLPs",
        "without a gradient the product is written over the gate instead of into new memory",
        forwards.SwiGLUForward,
        f"ume_kernels.prefill.silu_mul_ ({backend})",
    )


def _patches(module: nn.Module) -> Choice:
    proj = part(module, "proj")
    if (
        type(proj) is not nn.Conv3d
        or proj.kernel_size != proj.stride
        or proj.groups != 1
        or set(proj.dilation) != {1}
        or proj.padding != (0, 0, 0)
    ):
        return Choice("patch embeddings", "its convolution overlaps or is not torch.nn.Conv3d")
    return Choice(
        "patch embeddings",
        "stride equals kernel, so the Conv3d is one matrix product; with gradients too",
        forwards.PatchEmbedForward,
        "torch.nn.functional.linear",
    )


def _adapter(module: nn.Module) -> Choice:
    obstacle = adapter.unknown(type(module)) or adapter.obstacle(module)
    if obstacle is not None:
        return Choice("latent adapter", obstacle)
    return Choice(
        "latent adapter", adapter.KEPT, adapter.AdapterForward, "ume_kernels.moe_transition"
    )


def _linear(module: nn.Linear, device: torch.device | None) -> Choice:
    if type(module) is not nn.Linear:
        kind = type(module)
        return Choice(
            "other linear layers",
            f"{kind.__module__.split('.')[0]}'s {kind.__name__} has its own product",
        )
    if type(module.weight) not in (torch.Tensor, nn.Parameter) and not _is_sharded(module.weight):
        return Choice("quantised linear layers", f"weights are {type(module.weight).__name__}")
    backend, why = _now("linear", module.weight, device, (1, 8), (8, 8), None)
    if backend in (None, Backend.TORCH):
        return Choice("linear layers", why)
    return Choice(
        "linear layers", "few rows without a gradient; else the original",
        forwards.LinearForward, f"ume_kernels.linear ({backend})",
    )  # fmt: skip


def _is_sharded(weight: object) -> bool:
    return type(weight).__name__ == "DTensor"


def _now(
    op: str, weight: torch.Tensor, device: torch.device | None, *shapes: tuple[int, ...] | None
) -> tuple[Backend | None, str]:
    """The backend an operation would use for operands like a weight, and why not a better one.

    None where there is nothing for their device or number format.
    """
    where = device or weight.device
    if where.type not in DEVICES or weight.dtype not in DTYPES:
        return None, f"no kernel for {weight.dtype} on {where.type}; {_AGAIN}"
    operands = [
        None if shape is None else torch.empty(shape, device=where, dtype=weight.dtype)
        for shape in shapes
    ]
    report = dispatch.explain(op, *operands)
    return report.backend, f"PyTorch's own runs here ({report.reason}); {_AGAIN}"


def _unsupported(root: nn.Module, device: torch.device | None) -> Iterator[Problem]:
    """Devices and number formats this package has nothing for."""
    where = {parameter.device.type for parameter in root.parameters()} if device is None else set()
    if "meta" in where:
        away = next((p for p in named_parts(root) if "_hf_hook" in vars(p[1])), None)
        if away is not None:
            where.discard("meta")
            yield anatomy_room.offloaded(away[1], away[0])
    for kind in sorted(where.difference(DEVICES)):
        remedy = "load the weights first" if kind == "meta" else "move it to the CPU or to CUDA"
        yield Problem("", f"parameters are on {kind}", remedy, looked_for=False)
    for dtype in sorted({p.dtype for p in root.parameters()}.difference(DTYPES), key=str):
        quantised = not dtype.is_floating_point or dtype.itemsize < 2
        yield Problem(
            "",
            f"parameters are {dtype}" + ", so the model is quantised" * quantised,
            "load it in bfloat16, float16 or float32",
            looked_for=False,
        )


def _told(kind: str, problems: list[Problem]) -> str:
    first = problems[0]
    where = f"{kind}.{first.target}" if first.target else kind
    more = f" ({len(problems) - 1} more parts are like that)" if len(problems) > 1 else ""
    return (
        f"{where}: {first.reason}{more}; {first.remedy}. strict=False patches what is as expected "
        "and lists the rest"
    )


def _listed(problem: Problem, prefix: str) -> Entry:
    action: Any = "missing" if problem.looked_for else "left alone"
    target = f"{prefix}{problem.target}" or "the model"
    return Entry(target.rstrip("."), action, reason=f"{problem.reason}; {problem.remedy}")


class _Groups:
    """Changes of like modules, told in one line: ``model.layers.*.mlp.gate_proj (28)``."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.done: dict[tuple[str, Choice], list[nn.Module]] = {}
        self.left: dict[Choice, int] = {}

    def add(self, choice: Choice, path: str, module: nn.Module) -> None:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", f"{self.prefix}{path}").rstrip(".")
        self.done.setdefault((name or "the model", choice), []).append(module)

    def leave(self, choice: Choice, path: str) -> None:
        self.left[choice] = self.left.get(choice, 0) + 1

    def result(self) -> tuple[list[Change], list[Entry]]:
        changes: list[Change] = []
        entries: list[Entry] = []
        for (name, choice), modules in self.done.items():
            target = f"{name} ({len(modules)})" if "*" in name else name
            if choice.attribute != "forward":
                target = f"{target}.{choice.attribute}"
            entry = Entry(target, choice.action, choice.by, choice.reason)
            entries.append(entry)
            assert choice.forward is not None
            changes.extend(Change(m, choice.attribute, choice.forward(m), entry) for m in modules)
        for choice, count in self.left.items():
            entries.append(Entry(f"{choice.what} ({count})", "left alone", reason=choice.reason))
        return changes, entries
