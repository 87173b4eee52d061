"""``ume doctor``: what is installed, what would run, what is missing and how to get it."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import Annotated

import typer

import ume_models
from ume_models import machine
from ume_models.cli.options import FamilyOption, ProfileOption
from ume_models.cli.terminal import ExitCode, results

_REQUIRED = {
    **{name: name for name in ("torch", "transformers", "tokenizers", "safetensors", "numpy")},
    "pillow": "PIL", "jinja2": "jinja2", "rich": "rich", "typer": "typer",
}  # fmt: skip
# Distributions that have it, what needs it, and the remedy.
_OPTIONAL = {
    "triton": (("triton",), "GPUs use", ""),
    "faiss": (
        ("faiss-cpu", "faiss-gpu", "faiss"), "`--index-type faiss` needs", "pip install faiss-cpu"
    ),
    "pyarrow": (
        ("pyarrow",), "`ume eval` on parquet and arrow tables needs", "pip install pyarrow"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        value: what was found.
        ok: False where something needed is missing; None where it is optional and absent.
        remedy: the command or action that mends it, else empty.
    """

    name: str
    value: str
    ok: bool | None = True
    remedy: str = ""


@dataclass
class Report:
    """Everything ``ume doctor`` tells, in the order it is shown."""

    versions: list[Finding] = field(default_factory=list)
    devices: list[Finding] = field(default_factory=list)
    operations: list[Finding] = field(default_factory=list)
    checks: list[Finding] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether nothing that is needed is missing."""
        return all(finding.ok is not False for finding in self.all())

    def all(self) -> list[Finding]:
        """Every finding."""
        return [*self.versions, *self.devices, *self.operations, *self.checks]


def examine() -> Report:
    """Look at the installation and the machine; starts no work on a device."""
    return Report(
        versions=[*_packages(), _compiler()],
        devices=_devices(),
        operations=_operations(),
        checks=[_bundled_checkpoint()],
    )


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Checkpoint folder or hub id: what could be accelerated in it, instead.",
        ),
    ] = None,
    family: FamilyOption = None,
    profile: ProfileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable report.")] = False,
) -> None:
    """Show versions, devices, what would run here and why, and what is missing.

    Ends with 0 when the package can be used, else with 1.

    With MODEL: what ume_models.accelerate would replace in that checkpoint on this machine, which
    repositories' scripts it suits, and whether ume_models.load takes it. The weights are not read.
    Ends with 1 when it cannot be accelerated, or load refuses it. --family or --profile without
    MODEL ask about the bundled one.

    [bold]Examples[/]

        ume doctor

        ume doctor PLUME-2B --json
    """
    if model or family or profile:
        from ume_models.cli import doctor_model

        doctor_model.run(model, as_json, family, profile)
        return
    report = examine()
    if as_json:
        print(json.dumps({"usable": report.usable, **asdict(report)}, indent=1))
    else:
        _show(report)
    raise typer.Exit(ExitCode.OK if report.usable else ExitCode.FAILED)


def _packages() -> list[Finding]:
    import platform

    found = [
        Finding("ume", ume_models.__version__),
        Finding("python", f"{platform.python_version()} ({sys.executable})"),
    ]
    for name, module in _REQUIRED.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken binary package may raise anything on import
            reason = f"cannot be imported: {error}"
            found.append(Finding(name, reason, False, f"pip install --upgrade {name}"))
        else:
            found.append(Finding(name, _version(name) or "unknown version"))
    for name, (distributions, needs, remedy) in _OPTIONAL.items():
        version = next(filter(None, map(_version, distributions)), "")
        absent = Finding(name, f"absent (only {needs} it)", None, remedy)
        found.append(Finding(name, version) if version else absent)
    return found


def _compiler() -> Finding:
    import re
    import shutil
    import subprocess

    path = shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    )
    if path is None:
        return Finding("nvcc", "absent (only building the CUDA kernels needs it)", None)
    try:
        output = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("nvcc", f"{path} does not run: {error}", None)
    release = re.search(r"release ([\d.]+)", output)
    return Finding("nvcc", f"{release.group(1) if release else 'unknown version'} ({path})")


def _devices() -> list[Finding]:
    memory = machine.memory_gib()
    about = [machine.cpu_name(), f"{machine.usable_cores()} usable cores"]
    about += [f"{memory:.0f} GiB memory"] if memory else []
    found = [
        Finding("cpu", ", ".join(about)),
        Finding("cpu features", " ".join(machine.cpu_features()) or "not told by the system"),
    ]
    try:
        import torch
    except Exception:  # already reported among the packages
        return found
    found.append(Finding("torch threads", str(torch.get_num_threads())))
    if torch.version.cuda is None and torch.version.hip is None:
        return [*found, Finding("gpu", "none: this build of torch is for the CPU", None)]
    if not torch.cuda.is_available():
        built = f"none (torch is built for CUDA {torch.version.cuda})"
        return [*found, Finding("gpu", built, None)]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        value = (
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, "
            f"compute capability {card.major}.{card.minor}"
        )
        found.append(Finding(f"cuda:{index}", value))
    return found


def _operations() -> list[Finding]:
    try:
        from ume_kernels.dispatch import explain

        reports = explain()
    except Exception as error:  # the rest of the report helps to find out why
        asked = os.environ.get("UME_BACKEND")
        remedy = "unset UME_BACKEND" if asked else "install the package again: pip install ."
        return [Finding("kernels", f"cannot be examined: {error}", False, remedy)]
    return [
        Finding(
            report.op, f"{report.backend.value}: {report.reason}",
            None if report.missing else True, report.remedy or "",
        )
        for report in reports
    ]


def _bundled_checkpoint() -> Finding:
    try:
        from ume_models.assets import tiny_checkpoint

        return Finding("bundled checkpoint", str(tiny_checkpoint()))
    except Exception as error:  # as above
        remedy = "install the package again: pip install --force-reinstall --no-deps ."
        return Finding("bundled checkpoint", f"cannot be found: {error}", False, remedy)


def _version(distribution: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


_SIGNS = {True: "[green]ok[/]", None: "[yellow]--[/]", False: "[red]NO[/]"}


def _show(report: Report) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = results()
    groups = {
        "Versions": report.versions,
        "Devices": report.devices,
        "Operations (what would run here)": report.operations,
        "Checks": report.checks,
    }
    for title, findings in groups.items():
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            table.add_row(_SIGNS[finding.ok], finding.name, escape(finding.value))
        console.print(f"[bold]{title}[/]")
        console.print(table)
        console.print()
    remedies = [finding for finding in report.all() if finding.remedy]
    if remedies:
        console.print("[bold]What can be added[/]")
        for finding in remedies:
            console.print(f"  {escape(finding.name)}: {escape(finding.remedy)}")
        console.print()
    console.print("ready to use" if report.usable else "[red]not usable: see NO above[/]")
