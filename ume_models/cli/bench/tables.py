"""Tables of results: one per section, the bars that are set, and a GPU session's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ume_models.cli.bench.figures import Figure, Results, best, groups


@dataclass(frozen=True)
class Table:
    """Cells as text; ``strong`` names the rows that this package's figures stand in.

    Attributes:
        title: what is compared.
        columns: headings.
        rows: cells, as many as headings.
        strong: row numbers of this package.
        note: a line below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()
    note: str = ""


TITLES = {
    "operation": "Per operation",
    "rollout": "Per rollout",
    "input class": "Per input class",
    "end to end": "End to end: items to embeddings to ranking",
    "preprocessing": "Preprocessing",
    "start-up": "Start-up: a fresh process to its first embedding",
    "ranking": "Ranking",
    "similarity": "Search and contrastive loss",
    "training": "Training",
    "scripts": "Unmodified evaluation script",
}


def duration(seconds: float) -> str:
    """Seconds with a unit that keeps three or four digits."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds:.3g} s"


def _size(number: float) -> str:
    return f"{number / 1e6:,.0f} MB" if number < 1e9 else f"{number / 1e9:.2f} GB"


def _memory(figure: Figure) -> str | None:
    info = figure.details
    if "extra_bytes" in info:
        return _size(info["extra_bytes"])
    if {"peak_bytes", "weight_bytes", "arena_bytes"} <= set(info) and figure.role == "ours":
        return _size(max(info["peak_bytes"] - info["weight_bytes"] - info["arena_bytes"], 0))
    return None


def _share(figure: Figure) -> str | None:
    return None if figure.of_floor is None else f"{figure.of_floor:.0%}"


def _energy(figure: Figure) -> str | None:
    joules = figure.details.get("energy_joules")
    if joules is None:
        return None
    return f"{joules:.3g} J" if joules >= 0.1 else f"{joules * 1e3:.3g} mJ"


def _state(figure: Figure) -> str | None:
    state = figure.details.get("nvml")
    if not state:
        return None
    known = (("sm_mhz", "MHz"), ("power_w", "W"), ("temperature_c", "°C"))
    return ", ".join(f"{state[key]:.0f} {unit}" for key, unit in known if key in state)


_STAGES = (("plan_seconds", "plan"), ("wait_seconds", "media"), ("model_seconds", "model"))


def _stages(figure: Figure) -> str | None:
    """Shares of the time that planning, waiting for media and the model took."""
    info = figure.details
    if not all(key in info for key, _ in _STAGES):
        return None
    whole = sum(info[key] for key, _ in _STAGES) or 1.0
    return ", ".join(f"{name} {info[key] / whole:.0%}" for key, name in _STAGES)


def _number(key: str, form: str) -> Callable[[Figure], str | None]:
    return lambda figure: format(figure.details[key], form) if key in figure.details else None


_OPTIONAL: tuple[tuple[str, Callable[[Figure], str | None]], ...] = (
    ("prompt tokens", _number("prompt_tokens", ".0f")),
    ("stages", _stages),
    ("of the roofline", _share),
    ("more memory at the peak", _memory),
    ("recall", _number("recall", ".4f")),
    ("hit@1", _number("hit@1", ".3f")),
    ("energy per sample", _energy),
    ("GPU", _state),
    ("note", lambda figure: figure.details.get("note")),
)


def section_table(section: str, figures: Sequence[Figure]) -> Table:
    """Every engine of every group: times, throughput, how many times slower than ours, extras.

    Throughput and ratios are those of the best rounds.
    """
    extras = [(title, cell) for title, cell in _OPTIONAL if any(cell(figure) for figure in figures)]
    many = any(figure.samples != 1 for figure in figures)
    columns = ["case", "engine", "best round", "median", "rounds"]
    columns += ["samples", "per sample", "samples/s"] * many
    columns += ["ours is faster by", *(title for title, _ in extras)]
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    for name, members in groups(figures).items():
        ours = [figure for figure in members if figure.role == "ours"]
        for number, figure in enumerate(members):
            engine = figure.engine + " (ablation)" * (figure.role == "ablation")
            cells = [
                name if number == 0 else "",
                engine,
                duration(figure.seconds),
                "–" if figure.median is None else duration(figure.median),
                "–" if figure.rounds is None else str(figure.rounds),
            ]
            if many:
                rate = f"{figure.rate:,.3g}" if figure.rate < 1000 else f"{figure.rate:,.0f}"
                cells += [f"{figure.samples:,}", duration(figure.per_sample), rate]
            cells.append(_ratios(figure, ours))
            cells += [cell(figure) or "–" for _, cell in extras]
            if figure.role == "ours":
                strong.add(len(rows))
            rows.append(tuple(cells))
    return Table(TITLES.get(section, section), tuple(columns), tuple(rows), frozenset(strong))


def _ratios(figure: Figure, ours: Sequence[Figure]) -> str:
    if figure.role == "ours" or not ours:
        return "–"
    if len(ours) == 1:
        return f"{figure.per_sample / ours[0].per_sample:.2f}×"
    return ", ".join(f"{figure.per_sample / mine.per_sample:.2f}× {mine.engine}" for mine in ours)


def bars_table(figures: Sequence[Figure]) -> Table | None:
    """What is asked of this package and what was measured; None where nothing is asked."""
    rows = []
    for name, members in groups(figures).items():
        reference = best(members, "reference")
        for figure in members:
            what = f"{name}: {figure.engine}"
            if figure.bar is not None and reference is not None:
                ratio = reference.per_sample / figure.per_sample
                rows.append(
                    (what, f"≥ {figure.bar:g}× {reference.engine}", f"{ratio:.2f}×",
                     "met" if ratio >= figure.bar else "MISSED")
                )  # fmt: skip
            if figure.bar_seconds is not None:
                rows.append(
                    (what, f"< {figure.bar_seconds:g} s", duration(figure.seconds),
                     "met" if figure.seconds < figure.bar_seconds else "MISSED")
                )  # fmt: skip
    if not rows:
        return None
    return Table("What is asked for", ("case", "asked", "measured", ""), tuple(rows))


def session_table(session: Mapping[str, Any]) -> Table:
    """The figures of a GPU session with their floors, ratios, clock and power."""
    rows = []
    for figure in session["figures"]:
        if "missed" in figure or figure["name"].startswith("sweep "):
            continue
        state = figure["nvml"] or {}
        now = f"{state.get('sm_mhz', 0):.0f} MHz, {state.get('power_w', 0):.0f} W" if state else "–"
        if figure["unit"] != "s":
            value = f"{figure['value'] / 1e12:.3g} T{figure['unit']}"
            rows.append((figure["name"], value, "–", "–", "–", now, "–"))
            continue
        floor, share = "–", "–"
        if figure["floor"] is not None:
            floor, share = duration(figure["floor"]), f"{figure['of_floor']:.0%}"
        ratios = "; ".join(f"{r:.1f}× {name}" for name, r in figure["ratio_to"].items())
        rows.append(
            (figure["name"], duration(figure["value"]), floor, share, ratios or "–", now,
             str(figure.get("rounds", "–")))
        )  # fmt: skip
    missed = [figure for figure in session["figures"] if "missed" in figure]
    note = "Seconds per call, median; floor: bytes that must be read at the data sheet's bandwidth."
    if missed:
        listed = "; ".join(f"{figure['name']} ({figure['missed'][:80]})" for figure in missed)
        note += f" Not measured: {listed}."
    columns = ("measured", "time", "floor", "of the floor", "ratio", "SM clock, power", "rounds")
    return Table("GPU session", columns, tuple(rows), note=note)


def tables(results: Results) -> list[Table]:
    """All tables of a file: what is asked for first, then section by section."""
    if results.session is not None:
        return [session_table(results.session)]
    asked = bars_table(results.figures)
    parts = [section_table(name, figures) for name, figures in results.sections().items()]
    return ([asked] if asked else []) + parts


def origin(results: Results) -> str:
    """Machine, versions and date in one line."""
    machine, gpu = results.machine, results.machine.get("gpu")
    parts = []
    if gpu:
        parts.append(f"{gpu['name']}, driver {gpu.get('driver')}")
    if "cpu" in machine:
        cores = f", {machine['cores']} cores" if "cores" in machine else ""
        parts.append(f"{machine['cpu']}{cores}, {machine.get('threads', '?')} threads")
    if machine.get("native_isa"):
        parts.append(str(machine["native_isa"]))
    parts += [f"{name} {value}" for name, value in results.versions.items() if value]
    statistic = "Best round" if results.session is None else "Median round"
    return f"{statistic}; {', '.join(parts)}, {results.date[:10]}."


def markdown(table: Table) -> str:
    """A table in Markdown; this package's rows with their engine in bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    body = []
    for number, row in enumerate(table.rows):
        cells = list(row)
        if number in table.strong:
            cells[1] = f"**{cells[1]}**"
        body.append(line(cells))
    rule = "|" + "---|" * len(table.columns)
    text = [f"## {table.title}", "", line(table.columns), rule, *body]
    return "\n".join([*text, *(["", table.note] if table.note else [])])
