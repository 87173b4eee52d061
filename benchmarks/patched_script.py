"""An official-style evaluation script as it is, and with ``UME_ACCELERATE=1``.

    python -m benchmarks.patched_script small
    python -m benchmarks.patched_script qwen2-vl-2b

The script is the tests' stand-in of PLUME's ``eval_twomode.py``. Each run is a process of its own
on the same checkpoint of random weights; what is compared is the time it says it took to encode,
without imports and loading. As it is, the script gets ``--ported True``: without flash-attention
the official suffix mask is an error or wrong.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks.machine import describe
from benchmarks.shaped import TEMPLATE, shaped_model, text_items
from ume_models.atomic import write_atomically

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "patching" / "standins" / "plume" / "VLM2Vec" / "eval_twomode.py"
DTYPES = {"tiny": "float32", "small": "float32", "qwen2-vl-2b": "bfloat16"}
COUNTS = {"tiny": 4, "small": 32, "qwen2-vl-2b": 16}
"""Queries, and as many candidates."""

MODES: dict[str, dict[str, str]] = {
    "as it is": {},
    "accelerated": {"UME_ACCELERATE": "1"},
    "accelerated, sample by sample": {"UME_ACCELERATE": "1", "UME_LOOK_AHEAD": "1"},
}


def make_checkpoint(shape: str, target: Path, layers: int | None = None) -> None:
    """Save random weights of a published shape in the official layout.

    They stop as trained ones do: the word after ``<gen_emb>`` ends the sequence.
    """
    model = shaped_model(shape, getattr(torch, DTYPES[shape]), layers)
    weight = model.model.embed_tokens.weight
    tokenizer = _filled(model.tokenizer, weight.shape[0])
    # The head is the embedding, and states at <gen_emb> point roughly the same way for all texts.
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    weight[end] = 10 * model.encode(text_items(2, seed=1)).mean(dim=0).to(weight)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    (target / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def _filled(tokenizer: PreTrainedTokenizerFast, rows: int) -> PreTrainedTokenizerFast:
    """The tokenizer with words that do not occur, so that it has as many as the embedding rows."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    first, missing = len(vocabulary), rows - len(tokenizer)
    vocabulary.update({f"filler {i}": first + i for i in range(missing)})
    for token in content["added_tokens"]:
        if token["id"] >= first:
            token["id"] += missing
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    assert len(made) == rows
    return made


def make_data(target: Path, count: int) -> None:
    """``count`` text queries and candidates."""
    texts = [item["text"] for item in text_items(2 * count)]
    names = [f"c{i}" for i in range(count)]
    queries = [{"text": t, "label": n} for t, n in zip(texts[:count], names, strict=True)]
    corpus = [{"text": t, "name": n} for t, n in zip(texts[count:], names, strict=True)]
    for name, lines in (("queries", queries), ("corpus", corpus)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (target / f"{name}.jsonl").write_text(text)
    task = {
        "dataset_parser": "jsonl", "data_path": "queries.jsonl", "corpus_path": "corpus.jsonl",
    }  # fmt: skip
    (target / "tasks.yaml").write_text(yaml.safe_dump({"text": task}))


def encode_seconds(shape: str, checkpoint: Path, data: Path, mode: str) -> float:
    """Seconds that one run of the script took to encode.

    Raises:
        RuntimeError: the script failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch)
        (site / "sitecustomize.py").write_text(_startup_line() + "\n")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("UME_")}
        paths = [str(site), str(SCRIPT.parent), str(ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        given = {
            "model_name": checkpoint,
            "dataset_config": data / "tasks.yaml",
            "data_basedir": data,
            "encode_output_path": site / "out",
            "attn_implementation": "sdpa",
            "torch_dtype": DTYPES[shape],
            "use_coconut_latent_reasoning": True,
            "use_coconut_latent_moe": True,
            "coconut_latent_moe_context_type": "disc",
            "coconut_latent_steps": 8,
            "coconut_forced_suffix_text": "<eot></think>\\n<gen_emb>",
            "max_new_tokens": 8,  # the first one ends the sequence
            "ported": not MODES[mode],
        }
        arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments],
            cwd=SCRIPT.parent,
            env={**environment, **MODES[mode]},
            capture_output=True,
            text=True,
            check=False,
        )
    found = re.search(r"encode seconds: ([\d.]+)", done.stderr)
    if done.returncode or found is None:
        raise RuntimeError(done.stderr[-3000:])
    if "the original runs" in done.stderr:
        raise RuntimeError("the original ran for some samples: nothing was compared")
    return float(found[1])


def _startup_line() -> str:
    """What the installed package puts into every Python process."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STARTUP_LINE":
            return str(ast.literal_eval(node.value))
    raise RuntimeError("setup.py has no STARTUP_LINE")


def main() -> None:
    """Run every mode in turn, and print how many times faster each is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="keep the random weights here")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch)
        checkpoint = options.checkpoint or data / "checkpoint"
        make_data(data, COUNTS[options.shape])
        if not (checkpoint / "config.json").exists():
            make_checkpoint(options.shape, checkpoint)
        best = dict.fromkeys(MODES, float("inf"))
        for _ in range(options.rounds):
            for mode in MODES:
                seconds = encode_seconds(options.shape, checkpoint, data, mode)
                best[mode] = min(best[mode], seconds)
    samples = 2 * COUNTS[options.shape]
    for mode, seconds in best.items():
        ratio = best["as it is"] / seconds
        print(f"{options.shape}, {mode}: {seconds / samples:.4f} s per sample, {ratio:.2f}x")
    if options.json is not None:
        known = json.loads(options.json.read_text()) if options.json.exists() else []
        figures = {mode: round(seconds / samples, 4) for mode, seconds in best.items()}
        about = {
            "shape": options.shape, "dtype": DTYPES[options.shape], "samples": samples,
            "rounds": options.rounds,
        }  # fmt: skip
        known.append({**describe(), **about, "seconds_per_sample": figures})
        write_atomically(options.json, (json.dumps(known, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
