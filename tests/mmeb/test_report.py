"""The report of a run: the three forms agree, say what is missing, and stand alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ume_models.mmeb.metrics import Ranking
from ume_models.mmeb.mmeb_v2 import MMEB_V2
from ume_models.mmeb.report import markdown, numbers, page, terminal
from ume_models.mmeb.report.facts import model_name, setting_facts
from ume_models.mmeb.report.outline import outline, reason
from ume_models.mmeb.report.remarks import summary_remarks
from ume_models.mmeb.results import score_task
from ume_models.mmeb.summary import Missing, Summary, summarise
from ume_models.mmeb.tasks import Task

SETTINGS: Mapping[str, Any] = {
    "model": "someone/PLUME-2B",
    "fingerprint": "b3f1c09a",
    "benchmark": "MMEB-v2",
    "package_version": "1.2.3",
    "latent_steps": 8,
    "dtype": "bfloat16",
    "labels": "fixed",
    "instructions": "vlm2vec",
    "limit": None,
    "images": {"min_pixels": 3136},
}
EVIL = '<script>alert("x")</script> | `a` _b_'
# One group is gone altogether, one in part.
MISSING = {"QVHighlight": "no table", "Charades-STA": EVIL, "MomentSeeker": "x", "K700": "torn"}
TASKS = {task.name: task for task in MMEB_V2}


def rankings(task: Task, right: int, queries: int = 8, *, ties: int = 0) -> list[Ranking]:
    """So many queries with the right answer in front, the others with it in the second place."""
    graded = None if task.metric == "hit@1" else (2.0,)
    return [
        Ranking(
            f"q{row}",
            ("good", "bad") if row < right else ("bad", "good"),
            (0.5, 0.5) if row < ties else (0.5, 0.25),
            ("good",),
            graded,
        )
        for row in range(queries)
    ]


def summary_of(
    right: Mapping[str, int],
    missing: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] = SETTINGS,
    *,
    ties: int = 0,
    legacy: bool = False,
) -> Summary:
    """The summary of tasks with so many right queries of eight each."""
    missing = missing or {}
    chosen = [task for task in MMEB_V2 if task.name in right or task.name in missing]
    scores, values = {}, {}
    for task in chosen:
        if task.name in right:
            found = rankings(task, right[task.name], ties=ties)
            scores[task.name] = score_task(task, found, 1234, legacy=legacy)
            # The second of two has gain 1 / log2(3); a hit counts in the first place only.
            low = 0.0 if task.metric == "hit@1" else 1 / np.log2(3)
            values[task.name] = np.array([1.0 if n < right[task.name] else low for n in range(8)])
    return summarise(chosen, scores, values, missing, settings)


@pytest.fixture(scope="module")
def summary() -> Summary:
    ran = [task.name for task in MMEB_V2 if task.name not in MISSING]
    return summary_of({name: 1 + place % 7 for place, name in enumerate(ran)}, MISSING)


def plain(renderable: Any, width: int) -> str:
    console = Console(width=width, highlight=False, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


class Page(HTMLParser):
    """Checks that tags are balanced; collects texts, addresses, ids, rows of tables, styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.styles: list[str] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "wbr", "image", "use"):
            self.open.append(tag)
        given = {name: value or "" for name, value in attrs}
        self.addresses += [given[name] for name in ("href", "src") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        self.styles += [given["style"]] if "style" in given else []
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)
        if ("th" in self.open or "td" in self.open) and self.rows:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        (found,) = [row for row in self.rows if row[0] == name and len(row) == 8]
        return [" ".join(cell.split()) for cell in found]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def cells_of(text: str, name: str) -> list[str]:
    """Cells of the row of a Markdown table that begins with a name."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip().strip("*") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_numbers() -> None:
    assert numbers.points(0.61449) == "61.4"
    assert numbers.points(1.0) == "100.0"
    assert numbers.points(None) == numbers.points(float("nan")) == "–"
    assert numbers.interval((0.609, 0.618)) == "60.9–61.8"
    assert [numbers.signed(v) for v in (0.012, -0.003, 0.0, -1e-9)] == [
        "+1.2",
        "−0.3",
        "0.0",
        "0.0",
    ]
    assert numbers.signed_interval((-0.004, 0.011)) == "−0.4 … +1.1"
    # No width: nothing is known, however equal values look after resampling.
    for known in (0.0, 0.1 + 0.2, 1.0):
        assert numbers.interval((known, known + 1e-16)) == "–"
        assert numbers.signed_interval((known, known + 1e-16)) == "–"
    assert numbers.interval((0.61401, 0.61404)) == "61.4–61.4"
    assert numbers.interval(None) == numbers.signed_interval((0.0, float("nan"))) == "–"
    assert numbers.count(12043) == "12,043"
    assert [numbers.probability(p) for p in (1.0, 0.0126, 0.0001)] == ["1.000", "0.013", "<0.001"]
    assert numbers.similarity(0.99543) == "0.9954"
    assert numbers.similarity(1 - 3e-7) == "1 − 3e-7"
    assert numbers.similarity(1.0) == numbers.similarity(1 + 1e-16) == "1"
    assert numbers.similarity(-0.25) == "−0.2500"
    assert numbers.ran(18, 18) == "18" and numbers.ran(16, 18) == "16 of 18"
    assert (
        numbers.plural(1, "query") == "1 query" and numbers.plural(1000, "query") == "1,000 queries"
    )
    assert numbers.some(["a", "b", "c"], 2) == "a, b and 1 more"


def test_every_task_has_its_place(summary: Summary) -> None:
    parts = outline(summary)
    assert [(part.code, part.of) for part in parts] == [
        ("image", 36),
        ("video", 18),
        ("visdoc", 24),
    ]
    groups = {group.code: group for part in parts for group in part.groups}
    assert list(groups) == list(dict.fromkeys(task.group for task in MMEB_V2))
    assert groups["V-MRET"].mean is None and groups["V-MRET"].of == 3
    assert groups["V-CLS"].mean is not None and groups["V-CLS"].mean.tasks == 4
    told = [score.task for group in groups.values() for score in group.scores]
    assert told == [task.name for task in MMEB_V2 if task.name not in MISSING]


def test_the_three_forms_agree(summary: Summary) -> None:
    shown, written = plain(terminal.summary_table(summary), 110), markdown.summary_markdown(summary)
    html = Page(page.summary_page(summary))
    for score in summary.tasks:
        low, high = score.interval
        expected = [f"{100 * score.score:.1f}", f"{100 * low:.1f}–{100 * high:.1f}"]
        assert cells_of(written, markdown.escaped(score.task))[3:5] == expected
        row = html.row(score.task)
        assert row[1:3] == expected and row[4:] == [score.metric, "8", "1,234", "0"]
        line = next(line for line in shown.splitlines() if line.split()[:1] == [score.task])
        assert line.split()[1:3] == expected
    assert summary.overall is not None
    overall = numbers.points(summary.overall.value)
    # Not the mean over 78 with zeros for what is missing.
    assert summary.overall.value == pytest.approx(np.mean([s.score for s in summary.tasks]))
    interval = numbers.interval(summary.overall.interval)
    assert cells_of(written, "**All tasks**")[1:] == [overall, interval, "74 of 78"]
    assert re.search(rf"All tasks +{overall} .* 74 of 78", shown)
    assert f"All tasks {overall} 95 % {interval}" in html.words
    assert "mean of 74 of 78 tasks" in html.words


def test_what_is_missing_is_told_everywhere(summary: Summary) -> None:
    shown, written = plain(terminal.summary_table(summary), 110), markdown.summary_markdown(summary)
    html = Page(page.summary_page(summary))
    for text in (shown, html.words, written):
        assert "4 tasks of 78 did not run" in text
        for name in MISSING:
            assert name in text
    assert EVIL in html.words and EVIL in " ".join(shown.split())
    assert cells_of(written, "Charades-STA")[1] == markdown.escaped(EVIL)
    assert "0 of 3 tasks" in html.words
    assert re.search(r"Moment retrieval +– +– +0 of 3", shown)
    assert not [row for row in html.rows if row[0] in MISSING and len(row) == 8]


def test_the_page_stands_alone(summary: Summary) -> None:
    html = page.summary_page(summary)
    parsed = Page(html)
    assert "<script" not in html
    assert not re.search(r"https?://|url\(|@import", html)
    assert parsed.addresses == []
    assert len(parsed.ids) == len(set(parsed.ids))
    for name, value in setting_facts(SETTINGS):
        assert f"{name} {value}" in parsed.words


def test_bars_are_as_long_as_the_means(summary: Summary) -> None:
    parsed = Page(page.summary_page(summary))
    means = [
        mean
        for part in outline(summary)
        for mean in (part.mean, *(group.mean for group in part.groups))
        if mean is not None
    ]
    # The axis comes first, in whole numbers.
    bars = [style for style in parsed.styles if re.fullmatch(r"--at:\d+\.\d\d", style)]
    assert bars[: len(means)] == [f"--at:{100 * mean.value:.2f}" for mean in means]
    reaches = [style for style in parsed.styles if style.startswith("--low")]
    low, high = means[0].interval
    assert reaches[0] == f"--low:{100 * low:.2f};--high:{100 * high:.2f}"
    dots = bars[len(means) :]
    assert dots == [f"--at:{100 * score.score:.2f}" for score in summary.tasks]


@pytest.mark.parametrize("width", [80, 110])
def test_the_terminal_is_not_overrun(summary: Summary, width: int) -> None:
    lines = plain(terminal.summary_table(summary), width).splitlines()
    assert max(map(len, lines)) <= width
    assert any("InfographicsVQA" in line for line in lines)


def test_without_a_single_score() -> None:
    summary = summary_of({}, {"ImageNet-1K": "no table", "VATEX": "no frames"})
    assert "All tasks" in plain(terminal.summary_table(summary), 80)
    assert cells_of(markdown.summary_markdown(summary), "**All tasks**")[1:] == ["–", "–", "0 of 2"]
    assert "none of 2 tasks ran" in Page(page.summary_page(summary)).words


@pytest.mark.parametrize("right", [0, 8])
def test_equal_values_have_no_interval(right: int) -> None:
    summary = summary_of({"GQA": right, "TextVQA": right, "CIRR": 4})
    shown, written = plain(terminal.summary_table(summary), 110), markdown.summary_markdown(summary)
    made = page.summary_page(summary)
    html = Page(made)
    score = numbers.points(right / 8)
    assert html.row("GQA")[1:3] == cells_of(written, "GQA")[3:5] == [score, "–"]
    assert re.search(rf"GQA +{score} +– ", shown)
    # The mean of a group of such tasks is no more certain.
    group = "Visual question answering"
    assert cells_of(written, rf"{group} (I-QA)")[1:3] == [score, "–"]
    assert re.search(rf"{group} +{score} +– +2 ", shown)
    assert f"{group} I-QA {score} – 2 tasks" in html.words
    assert made.count('class="reach"') == 2 + 3  # images, their retrieval; each task
    for text in (html.words, written, " ".join(shown.split())):
        assert numbers.NO_INTERVAL in text
    assert list(summary.to_json()["tasks"][0]["interval"]) == [right / 8] * 2


def test_the_terminal_tells_of_dashes_only_where_there_are_any() -> None:
    assert numbers.NO_INTERVAL not in plain(terminal.summary_table(summary_of({"GQA": 4})), 300)


def test_reasons_do_not_repeat_the_name_beside_them() -> None:
    missing = {"VATEX": "VATEX: no table: VATEX is absent", "MSVD": "was not run"}
    summary = summary_of({"GQA": 4}, missing)
    written, made = markdown.summary_markdown(summary), Page(page.summary_page(summary))
    assert cells_of(written, "VATEX")[1] == "no table: VATEX is absent"
    assert ["VATEX", "Video retrieval", "no table: VATEX is absent"] in made.rows
    assert re.search("VATEX +no table: VATEX is", plain(terminal.summary_table(summary), 110))
    twice = "a lists it as missing: VATEX: torn; b lists it as missing: VATEX: gone"
    assert reason(Missing("VATEX", twice)) == "a lists it as missing: torn; b lists it as " \
        "missing: gone"


def test_many_missing_tasks_are_folded() -> None:
    few = {task.name: "no table" for task in MMEB_V2[:10]}
    for missing, folded in ((few, 0), ({**few, "VATEX": "no table"}, 1)):
        made = page.summary_page(summary_of({"MSVD": 4}, missing))
        assert made.count('<details class="rows">') == folded
        assert f"<b>{len(missing)} tasks</b>" in made or not folded
        assert sum(row[0] in missing for row in Page(made).rows) == len(missing)


def remarks(
    names: Sequence[str], *, ties: int = 0, legacy: bool = False, **settings: Any
) -> list[str]:
    right = dict.fromkeys(names, 4)
    return summary_remarks(
        summary_of(right, None, {**SETTINGS, **settings}, ties=ties, legacy=legacy)
    )


def test_remarks_say_what_is_not_comparable() -> None:
    (subset,) = remarks(["GQA", "VATEX"])
    assert subset.startswith("2 of the 78 tasks of MMEB-v2 were asked for")
    for labels, word in (("legacy", "published first, many of which are wrong"), ("fixed", "2025")):
        _, remark = remarks(["GQA", "ViDoSeek-page"], labels=labels)
        assert remark.startswith("ViDoSeek-page: ") and word in remark
    _, limit = remarks(["GQA"], limit=8)
    assert "Only the first 8 queries of each task" in limit
    assert len(remarks(["GQA"], limit=9)) == 1  # the task has eight: all of them were used
    _, leak = remarks(["MomentSeeker"], momentseeker_leak=True)
    assert leak.startswith("MomentSeeker: ")
    assert len(remarks(["GQA"], momentseeker_leak=True)) == 1
    _, words = remarks(["ViDoRe_docvqa", "VisRAG_PlotQA"], instructions="plume")
    assert words.startswith("ViDoRe-v1: instructions as in the evaluation of PLUME")
    _, pairing = remarks(["VisRAG_PlotQA"], legacy=True)
    assert "PYTHONHASHSEED" in pairing
    _, ties = remarks(["GQA", "VATEX"], ties=3)
    assert ties.startswith("Equal scores decide 6 queries of 2 tasks (most in GQA: 3 of 8).")
    everything = dict.fromkeys(TASKS, 4)
    assert len(summary_remarks(summary_of(everything))) == 1  # of the corrected labels


def test_settings_are_all_told() -> None:
    facts = setting_facts({**SETTINGS, "new_one": [1, 2], "off": False})
    assert facts[:2] == [("model", "someone/PLUME-2B"), ("model fingerprint", "b3f1c09a")]
    told = dict(facts)
    assert told["latent steps K"] == "8" and told["queries per task"] == "all"
    assert told["images: min pixels"] == "3136"
    assert told["new one"] == "1, 2" and told["off"] == "no"
    assert len(facts) == len(SETTINGS) + 2
    names = ("someone/PLUME-2B", "/models/x/PLUME-2B/", "./PLUME-2B", "PLUME-2B")
    assert [model_name({"model": name}) for name in names] == [
        "someone/PLUME-2B",
        *["PLUME-2B"] * 3,
    ]
