"""``ume eval`` and its commands."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperOption

from ume_models.cli.eval.check import check
from ume_models.cli.eval.compare import compare
from ume_models.cli.eval.list import list_tasks
from ume_models.cli.eval.report import report
from ume_models.cli.eval.run import run
from ume_models.cli.options import Command, Group


class _Eval(Group):
    """Takes the options of its commands itself, too, as before it had commands.

    ``ume eval --data ROOT -o DIR`` is ``run``; ``--list``, ``--check`` and ``--compare A B`` name
    another one. What that one does not take is ignored, as it was.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        known = {
            option.name: option
            for command in self.commands.values()
            for option in command.params
            if isinstance(option, TyperOption)
        }
        own = {param.name for param in self.params}
        self._old = [copy(option) for name, option in known.items() if name not in own]
        for option in self._old:
            option.hidden = True
        self.params.extend(self._old)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        ctx.meta["old"] = {option.name: ctx.params.pop(option.name) for option in self._old}
        return rest


app = typer.Typer(
    name="eval",
    cls=_Eval,
    help="Evaluate on MMEB-v2, MMEB-V1 or M-BEIR. Without a command: run.",
    invoke_without_command=True,
    no_args_is_help=True,
)


@app.callback()
def _without_command(
    ctx: typer.Context,
    show_list: Annotated[bool, typer.Option("--list", hidden=True)] = False,
    do_check: Annotated[bool, typer.Option("--check", hidden=True)] = False,
    to_compare: Annotated[tuple[Path, Path] | None, typer.Option("--compare", hidden=True)] = None,
) -> None:
    given = ctx.meta["old"]
    if ctx.invoked_subcommand is not None:
        sources = {name: ctx.get_parameter_source(name) for name in given}
        early = [name for name, source in sources.items() if source and source.name != "DEFAULT"]
        if early:
            told = ", ".join("--" + name.replace("_", "-") for name in early)
            raise typer.BadParameter(f"{told}: give options after {ctx.invoked_subcommand}")
        return
    name = "compare" if to_compare else "list" if show_list else "check" if do_check else "run"
    command: Any = ctx.command
    given["one"], given["other"] = to_compare or (None, None)
    chosen = command.commands[name]
    chosen.callback(**{param.name: given[param.name] for param in chosen.params})


for _name, _command in (
    ("run", run), ("check", check), ("list", list_tasks), ("compare", compare), ("report", report),
):  # fmt: skip
    app.command(_name, cls=Command)(_command)
