"""The model card of a checkpoint trained by ``tiny``, from its ``evaluation.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TEMPLATE = """\
# A small trained PLUME model

The default of `ume_models.load()`: a Qwen2-VL-shaped model of {parameters:.1f} million parameters
with the PLUME tokens and the latent transition adapter (4 experts, top-2, one shared), trained from
scratch in this repository by

    python -m tests.support.bundled.tiny -o DIR

({steps} steps of {workers} × {batch_size} pairs, seed {seed}, {minutes:.0f} minutes on {workers} \
CPU threads). Inputs run
through the whole generative path: official prompt, `<think><bot>`, {num_latents} latent steps with
the `<disc_emb>` context, `<eot></think>\\n<gen_emb>`.

## What it is

A model small enough to ship and to run in a moment anywhere, with which every part of the engine
can be tried on real work: it finds pictures, clips and pages it has never seen. It was trained on
handwritten digits (scikit-learn's bundled copy of the UCI digits), on drawn scenes of coloured
shapes, on bar and line charts, on title pages set in Pillow's bundled font, and on clips of four
frames.

## What it is not

A general embedder. It knows about {vocabulary} words, seven colours, six shapes and one font;
photographs, other languages, other fonts and free text are outside of what it has seen, and its
embeddings of them mean nothing. Its quality says nothing about the published PLUME models, and
theirs nothing about it.

## Held-out quality

Combinations (of shapes, colours, words, categories, motions) and handwritten digits that training
never sees; every query has exactly one relevant candidate. Figures from `evaluation.json`. They
were watched while the length of the run and the mix of tasks were chosen, so they are a little
flattering; with 100 queries a task's hit@1 is known to about ±7 points.

| task | kind | candidates | hit@1 | hit@5 | MRR | chance hit@1 |
|---|---|---|---|---|---|---|
{rows}
| **mean** | | | **{mean_hit1:.1%}** | **{mean_hit5:.1%}** | **{mean_mrr:.3f}** | |

Mean hit@1 by latent steps: {by_steps}; at the anchor `<disc_emb>` alone: {disc:.1%}.
Two points of difference between these are noise. The tasks need no thinking, so do not expect
latent steps to gain anything here: they are trained and used, not shown to help.
Inputs after whose `<gen_emb>` the model would go on generating: {not_stopping} of {inputs}.
"""


def model_card(evaluation: dict[str, Any], vocabulary: int) -> str:
    """Markdown model card.

    Args:
        evaluation: content of ``evaluation.json``.
        vocabulary: about how many words the training texts use.
    """
    tasks = evaluation["tasks"]
    rows = [
        f"| {name} | {task['kind']} | {task['candidates']} | {task['hit@1']:.1%} | "
        f"{task['hit@5']:.1%} | {task['mrr']:.3f} | {task['chance_hit@1']:.1%} |"
        for name, task in tasks.items()
    ]
    steps = evaluation["hit@1_by_num_latents"]
    training, mean = evaluation["training"], evaluation["mean"]
    return _TEMPLATE.format(
        **{key: training[key] for key in ("steps", "workers", "batch_size", "seed", "minutes")},
        parameters=training["parameters"] / 1e6,
        num_latents=evaluation["num_latents"],
        vocabulary=vocabulary,
        rows="\n".join(rows),
        mean_hit1=mean["hit@1"],
        mean_hit5=mean["hit@5"],
        mean_mrr=mean["mrr"],
        by_steps=", ".join(f"K={k} {value:.1%}" for k, value in steps.items()),
        disc=evaluation["hit@1_disc"],
        not_stopping=evaluation["not_stopping"],
        inputs=sum(task["queries"] + task["candidates"] for task in tasks.values()),
    )


def write_card(directory: Path, vocabulary: int) -> None:
    """Write ``README.md`` next to the ``evaluation.json`` in ``directory``."""
    evaluation = json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))
    text = model_card(evaluation, vocabulary)
    (directory / "README.md").write_text(text, encoding="utf-8")
