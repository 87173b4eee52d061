"""Names, keywords and flags that programs and scripts of users rely on; more are always welcome."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import typer

import ume_models
import ume_models.encode
from ume_models import interfaces, patching
from ume_models.cli import app

FLAGS = {
    "demo": "--engine --html --model --queries",
    "embed": "--batch-tokens --context --device --dtype --engine --latent-steps --mode --model "
    "--multi-image --on-error --output --overwrite --shard-size --workers -o items",
    "search": "--device --html --index --index-type --json --model --queries --workers -k",
    "doctor": "--json model",
    "eval": "--batch-tokens --benchmark --check --compare --context --data --device --disc-offset "
    "--download --dtype --embeddings --engine --gallery --instructions --labels --latent-steps "
    "--legacy-ndcg --limit --list --modality --mode --model --momentseeker-leak --multi-image "
    "--on-error --output --overwrite --tasks --top --workers -o",
    "bench report": "--keep --output -o files",
}


@pytest.fixture(scope="module")
def model():
    return ume_models.load(
        path_or_id=None,
        device="cpu",
        dtype="float32",
        latent_steps=2,
        context="disc",
        engine="fast",
        base=None,
        adapter=True,
        top_k=2,
        min_pixels=784,
        max_pixels=100_000,
        multi_image="all",
        empty="error",
        max_new_tokens=1,
        disc_offset=0,
    )


@pytest.mark.parametrize("name", FLAGS)
def test_commands_have_their_flags(name: str) -> None:
    command = typer.main.get_command(app)
    for part in name.split():
        command = command.commands[part]
    there = {flag for option in command.params for flag in option.opts}
    assert {*FLAGS[name].split()} <= there


def test_names_are_there(model) -> None:
    assert callable(ume_models.accelerate)
    assert callable(ume_models.encode.encode)
    assert isinstance(model, ume_models.PlumeForEmbedding)
    assert {
        "MtebEncoder",
        "UmeEmbeddings",
        "register_auto_classes",
        "save_for_auto",
        "sentence_transformer",
    } <= {*interfaces.__all__}
    keywords = {
        ume_models.accelerate: {"model", "logits", "strict"},
        patching.apply: {"target", "strict"},
        patching.revert: {"done"},
    }
    for function, names in keywords.items():
        assert names <= {*inspect.signature(function).parameters}
    assert {"Entry", "PatchError", "PatchReport"} <= {*patching.__all__}


def test_families_and_profiles_are_listed() -> None:
    assert "plume" in ume_models.families()
    for family in ume_models.families():
        # TRACE's prompts are not published as a whole
        assert {"trace": "reconstructed"}.get(family, "official") in ume_models.profiles(family)
    assert "before-profiles" in ume_models.profiles("plume")
    with pytest.raises(ValueError, match="nobody"):
        ume_models.profiles("nobody")


def test_encoding_takes_its_keywords(model, tmp_path: Path) -> None:
    plume = {
        "mode": "gen",
        "latent_steps": 1,
        "context": "none",
        "exclude_experts": (3,),
        "verify_eos": False,
    }
    shared = {"batch_tokens": 64, "workers": 0, "progress": False, "on_error": "raise"}
    items = [{"text": "a red square"}]
    rows = model.encode(items, **plume, **shared, base_dir=tmp_path)
    same = ume_models.encode.encode(model, items, **plume)
    found = ume_models.encode.encode_detailed(model, items, **plume)
    assert torch.equal(rows, same)
    assert torch.equal(rows, found.embeddings)
    assert model.encode(items).shape == (1, model.hidden_size)

    plan = model.processor.load(model.processor.plan(items)[0])
    inputs = {
        "input_ids": plan.input_ids[None],
        "attention_mask": None,
        "pixel_values": plan.pixel_values,
        "image_grid_thw": plan.image_grid_thw,
        "pixel_values_videos": None,
        "video_grid_thw": None,
        "mm_token_type_ids": None,
    }
    embeddings, trace = model.embed(**inputs, **plume, return_trace=True)
    torch.testing.assert_close(embeddings, rows)
    assert len(trace.latents) == 1
    torch.testing.assert_close(model.embed(**inputs, **plume, return_trace=False), rows)


def test_a_saved_model_is_loaded_again(model, tmp_path: Path) -> None:
    model.save_pretrained(directory=tmp_path, max_shard_bytes=200_000)
    again = ume_models.load(tmp_path, device="cpu", latent_steps=2, max_pixels=100_000)
    items = [{"text": "a red square"}]
    assert torch.equal(again.encode(items), model.encode(items))
