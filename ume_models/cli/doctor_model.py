"""``ume doctor MODEL``: what could be accelerated in a checkpoint, without reading its weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ume_models.cli.terminal import ExitCode, results

if TYPE_CHECKING:
    import torch

    from ume_models.patching.report import PatchReport

_SCRIPTS = {
    "plume-eval": "the official PLUME evaluation (VLM2Vec/eval_twomode.py)",
    "plume-train": "the official PLUME training (plume/train/)",
    "ume-r1": "UME-R1's evaluation (src/eval/VLM2Vec/eval_twomode.py)",
    "vlm2vec": "VLM2Vec's training and evaluation",
}


def run(model: str | None, as_json: bool, family: str | None, profile: str | None) -> None:
    """Print the report; exits with 1 when the checkpoint cannot be accelerated or is refused."""
    found, report = examine(model, family, profile)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show(found, report)
    passed = found["can_be_accelerated"] and not found["refused"]
    raise typer.Exit(ExitCode.OK if passed else ExitCode.FAILED)


def examine(
    model: str | None, family: str | None, profile: str | None
) -> tuple[dict[str, Any], PatchReport]:
    """Look at the files of a checkpoint, None for the bundled one; of the weights only headers.

    ``family`` and ``profile`` are those with which it would be loaded.

    Returns:
        What is known, as JSON has it, and what would be replaced in the transformers model.
        "family" is its ``model_type``, "dtype" and "device" are those it would have on this
        machine, "problems" why it cannot be accelerated, "suits" names repositories whose scripts
        run it, "fast_engine" what ``ume_models.load`` makes of it: "loads", and "embedder" and
        "profile" or the "reason". "refused": it does not load, although there are weights.

    Raises:
        CheckpointError: no such checkpoint, or not one of the architectures known here.
    """
    from ume_models.backbone.fields import read_json
    from ume_models.backbone.transformers_model import empty_transformers_model
    from ume_models.embedders.loading import pick_device, resolve
    from ume_models.patching.adapter import KEPT
    from ume_models.patching.models import survey
    from ume_models.patching.report import Entry, PatchReport

    directory = resolve(model, weights=False)
    home = _with_config(directory)
    raw = read_json(home / "config.json")
    module = empty_transformers_model(raw, str(home / "config.json"))
    names = _tensors(directory, home)
    dtype = _dtype(raw, names.values())
    device = pick_device("auto")
    plan = survey(module.to(dtype), device=device)
    adapter = any("latent_moe_transition." in name for name in names)
    entries = [*plan.entries]
    if adapter:
        kernel = "ume_kernels.moe_transition"
        entries.append(Entry("latent_moe_transition", "replaced", kernel, KEPT))
    problems = [f"{problem.reason}; {problem.remedy}" for problem in plan.problems]
    if raw.get("quantization_config"):
        problems.append("its weights are quantised; use a checkpoint in bfloat16 or float32")
    fast_engine, refused = _loaded(directory, family, profile)
    found = {
        "checkpoint": str(directory),
        "family": str(raw["model_type"]),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "problems": problems,
        "suits": _suited(directory, home, adapter),
        "fast_engine": fast_engine,
        "refused": refused,
        "can_be_accelerated": not problems,
        "entries": [asdict(entry) for entry in entries],
    }
    return found, PatchReport(type(module).__name__, "this checkpoint", entries, planned=True)


def _with_config(directory: Path) -> Path:
    """The folder that holds the configuration: a LoRA's is its base's."""
    from ume_models.embedders.loading import base_named, resolve

    adapter = directory / "adapter_config.json"
    if (directory / "config.json").is_file() or not adapter.is_file():
        return directory
    return resolve(base_named(directory), weights=False)


def _tensors(*directories: Path) -> dict[str, torch.dtype]:
    """Names and types of the tensors in the headers of the weight files that are here."""
    from ume_models.backbone.checkpoint import read_tensors

    files = {file for directory in directories for file in directory.glob("*.safetensors")}
    return {key: tensor.dtype for key, tensor, _ in read_tensors(sorted(files))}


def _dtype(raw: dict[str, Any], found: Iterable[torch.dtype]) -> torch.dtype:
    """The type most tensors have; without weights the one the configuration names."""
    import torch

    floating = [dtype for dtype in found if dtype.is_floating_point]
    if floating:
        return max(floating, key=floating.count)
    named = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype")), None)
    return named if isinstance(named, torch.dtype) else torch.float32


def _suited(directory: Path, home: Path, adapter: bool) -> tuple[str, ...]:
    """Names of the repositories whose scripts run such a checkpoint."""
    if adapter:
        return ("plume-eval", "plume-train")
    if (directory / "adapter_config.json").is_file():
        return ("vlm2vec",)
    texts = [
        text.read_text(encoding="utf-8", errors="replace")
        for folder in (directory, home)
        for name in ("added_tokens.json", "tokenizer.json")
        if (text := folder / name).is_file()
    ]
    reasons = any("<gen_emb>" in text for text in texts)
    return ("ume-r1" if reasons else "vlm2vec", "plume-train")


def _loaded(
    directory: Path, family: str | None, profile: str | None
) -> tuple[dict[str, Any], bool]:
    """What ``load`` makes of it, and whether it refuses what is here; weights may be elsewhere."""
    from ume_models.backbone.checkpoint import weight_files
    from ume_models.embedders.loading import examine
    from ume_models.errors import UmeError

    complete = False
    try:
        if not (directory / "adapter_config.json").is_file():
            weight_files(directory)
        complete = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what load says while it loads
            model = examine(directory, family, profile)
    except UmeError as error:
        return {"loads": False, "reason": str(error)}, complete
    told = {"embedder": model.family, "profile": model.profile.name}
    return {"loads": True, "reason": "", **told}, False


def _show(found: dict[str, Any], report: PatchReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    console, fast = results(), found["fast_engine"]["reason"]
    if not fast:
        named = "family {embedder}, profile {profile}".format(**found["fast_engine"])
        fast = f"takes it: the fast engine embeds with it ({named})"
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (
        ("checkpoint", found["checkpoint"]),
        ("architecture", f"{found['family']}, {found['dtype']}"),
        ("device here", found["device"]),
        ("scripts", "\n".join(f"{name}: {_SCRIPTS[name]}" for name in found["suits"])),
        ("ume_models.load", fast),
    ):
        table.add_row(name, escape(value))
    console.print(table)
    console.print()
    console.print(report)
    console.print()
    for problem in found["problems"]:
        console.print(f"[red]{escape(problem)}[/]")
    if found["problems"]:
        console.print("[red]cannot be accelerated[/]")
    else:
        console.print(
            "ume_models.accelerate(model) does this to the loaded model; scripts: "
            "UME_ACCELERATE=1 python …"
        )
