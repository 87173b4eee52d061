"""``ume doctor MODEL``: what could be accelerated in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Ume = Callable[..., Any]


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_checkpoint_of_ours(ume: Ume, checkpoint_dir: Path) -> None:
    result = ume("doctor", checkpoint_dir, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["family"] == "qwen2_vl"
    assert told["dtype"] == "float32"
    assert told["can_be_accelerated"] is True
    assert told["problems"] == []
    assert told["suits"] == ["plume-eval", "plume-train"]
    assert told["fast_engine"] == {
        "loads": True,
        "reason": "",
        "embedder": "plume",
        "profile": "official",
    }
    actions = {entry["target"]: entry["action"] for entry in told["entries"]}
    assert actions["latent_moe_transition"] == "replaced"
    assert actions["model.visual.patch_embed"] == "replaced"
    assert actions["model.language_model"] == "repaired"
    assert "left alone" in actions.values()


def test_the_report_is_that_of_the_loaded_model(
    ume: Ume, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ume_models.embedders.loading as loading
    from ume_models.backbone.checkpoint import read_state
    from ume_models.backbone.config import read_config
    from ume_models.backbone.transformers_model import build_transformers_model
    from ume_models.patching.models import plan

    monkeypatch.setattr(loading, "pick_device", lambda device: torch.device("cpu"))
    config = read_config(checkpoint_dir)
    state = read_state(checkpoint_dir)
    rows = state["model.embed_tokens.weight"].shape[0]
    _, entries = plan(build_transformers_model(config, state, rows))
    told = json.loads(ume("doctor", checkpoint_dir, "--json").stdout)["entries"]
    assert [e["target"] for e in told] == [*[e.target for e in entries], "latent_moe_transition"]
    assert [e["reason"] for e in told][:-1] == [e.reason for e in entries]


@pytest.mark.parametrize(("version", "ok"), [("19.0.1", True), ("", None)])
def test_pyarrow_is_told_like_other_optional_packages(
    monkeypatch: pytest.MonkeyPatch, version: str, ok: bool | None
) -> None:
    from ume_models.cli import doctor

    real = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: version if name == "pyarrow" else real(name)
    )
    (found,) = [finding for finding in doctor.examine().versions if finding.name == "pyarrow"]
    assert found.ok is ok
    assert version in found.value
    assert ("pip install pyarrow" in found.remedy) is not bool(version)


def test_table(ume: Ume, checkpoint_dir: Path) -> None:
    result = ume("doctor", checkpoint_dir)
    assert result.exit_code == 0
    assert "takes it: the fast engine embeds with it" in result.stdout
    assert "VLM2Vec/eval_twomode.py" in result.stdout
    assert "repaired" in result.stdout
    assert "\x1b" not in result.stdout


def test_weights_are_not_read(ume: Ume, copied_checkpoint: Path) -> None:
    file = copied_checkpoint / "model.safetensors"
    state = {key: torch.full_like(value, float("nan")) for key, value in load_file(file).items()}
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    assert ume("doctor", copied_checkpoint).exit_code == 0


def test_type_of_the_weights_decides(ume: Ume, copied_checkpoint: Path) -> None:
    file = copied_checkpoint / "model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    told = json.loads(ume("doctor", copied_checkpoint, "--json").stdout)
    assert told["dtype"] == "bfloat16"
    save_file({key: value.double() for key, value in load_file(file).items()}, file)
    result = ume("doctor", copied_checkpoint, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["can_be_accelerated"] is False
    assert "float64" in told["problems"][0]


def test_why_the_fast_engine_does_not_take_it(ume: Ume, copied_checkpoint: Path) -> None:
    file = copied_checkpoint / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if "latent_moe" not in k}
    save_file(state, file)
    told = json.loads(ume("doctor", copied_checkpoint, "--family", "plume", "--json").stdout)
    assert told["can_be_accelerated"] is True
    assert told["fast_engine"]["loads"] is False
    assert "no latent_moe_transition.* tensors" in told["fast_engine"]["reason"]
    assert told["suits"] == ["ume-r1", "plume-train"]
    # A family that it is surely not, and no word on one where several fit.
    assert ume("doctor", copied_checkpoint, "--family", "plume").exit_code == 1
    unclear = ume("doctor", copied_checkpoint, "--json")
    assert unclear.exit_code == 1
    assert "--family" in json.loads(unclear.stdout)["fast_engine"]["reason"]
    file.unlink()  # as of a hub id: what is missing is no refusal
    result = ume("doctor", copied_checkpoint, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["can_be_accelerated"] is True
    assert "no model.safetensors" in told["fast_engine"]["reason"]


def test_a_family_without_a_model_asks_about_the_bundled_one(ume: Ume) -> None:
    assert ume("doctor", "--family", "plume").exit_code == 0
    refused = ume("doctor", "--family", "gme", "--json")
    assert refused.exit_code == 1
    assert "plume" in json.loads(refused.stdout)["fast_engine"]["reason"]


def test_quantised_checkpoint(ume: Ume, copied_checkpoint: Path) -> None:
    edit(copied_checkpoint, quantization_config={"quant_method": "awq"})
    result = ume("doctor", copied_checkpoint)
    assert result.exit_code == 1
    assert "quantised" in result.stdout
    assert "cannot be accelerated" in result.stdout


def test_bad_paths_and_other_models_end_with_a_message(
    ume: Ume, copied_checkpoint: Path, tmp_path: Path
) -> None:
    def message(target: Path) -> str:
        result = ume("doctor", target)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        return result.stderr

    assert "no such directory" in message(tmp_path / "absent" / "model")
    assert "is a file" in message(copied_checkpoint / "config.json")
    (tmp_path / "empty").mkdir()
    assert "config.json: file not found" in message(tmp_path / "empty")
    edit(copied_checkpoint, model_type="llama")
    assert "model_type is 'llama'; known here are qwen2_vl and qwen2_5_vl" in message(
        copied_checkpoint
    )
    edit(copied_checkpoint, model_type="qwen2_vl", hidden_size="wide")
    assert "config.json" in message(copied_checkpoint)
