"""benchmarks.roofline: counts against real modules, plain loops and published figures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import datasheets, limits
from benchmarks import floor as cpu_floor
from benchmarks.cost import (
    Adapter,
    Decoder,
    Vision,
    Work,
    contrastive_loss,
    rollout,
    similarity_topk,
)
from benchmarks.datasheets import H200, Gpu
from benchmarks.gpu.figures import Recorder
from benchmarks.gpu.timing import Timing
from benchmarks.roofline import MODELS, Operation, load, main
from benchmarks.scale import VARIABLE
from ume_kernels import MoETransition
from ume_kernels.moe_transition.composed import moe_transition_composed
from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.text import TextModel
from ume_models.backbone.vision import VisionModel
from ume_models.errors import CheckpointError


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def products(module: nn.Module) -> int:
    """Weights of the linear layers."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def total(parts: Iterable[Work]) -> Work:
    parts = list(parts)
    return Work(sum(p.bytes for p in parts), sum(p.operations for p in parts))


@pytest.fixture(params=MODELS)
def config(request: pytest.FixtureRequest) -> BackboneConfig:
    return load(request.param)


def test_decoder_parameters(config: BackboneConfig) -> None:
    with torch.device("meta"):
        model = TextModel(config)
    decoder = Decoder(config)
    assert decoder.parameters == count(model) - count(model.embed_tokens)
    assert decoder.layer_parameters == count(model.layers[0])
    assert decoder.layer_products == products(model.layers[0])


def test_vision_parameters_and_operations(config: BackboneConfig) -> None:
    with torch.device("meta"):
        model = VisionModel(config.vision)
        patches = torch.zeros(2 * 1024, config.vision.patch_dim)
    vision = Vision(config.vision)
    assert vision.parameters == count(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(patches, [(1, 32, 32), (1, 32, 32)])
    assert total(vision.work(2, 256)).operations == counter.get_total_flops()


@pytest.mark.parametrize("rows", [1, 3])
def test_adapter_operations(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UME_BACKEND", "linear:torch")  # what is native is not counted
    torch.manual_seed(0)
    module = MoETransition(32).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        moe_transition_composed(torch.randn(rows, 32), None, 0, module.weights(), 2)
    assert Adapter().work(32, rows).operations == counter.get_total_flops()


def test_adapter_parameters() -> None:
    with torch.device("meta"):
        module = MoETransition(1536)
    adapter = Adapter()
    assert module.shared_expert is not None
    assert adapter.expert_parameters(1536) == count(module.shared_expert)
    # All of them but the other rows of the step embedding, and three states of 64 rows.
    unused = 31 * 1536
    assert adapter.work(1536, 64).bytes == 2 * (count(module) - unused + 3 * 64 * 1536)
    # Two rows can hit four experts, one row only two.
    assert adapter.work(1536, 2).bytes - adapter.work(1536, 1).bytes == 2 * (
        2 * adapter.expert_parameters(1536) + 3 * 1536
    )


def test_attention_against_a_plain_loop() -> None:
    config = load("2b")
    decoder = Decoder(config)
    rows, new, cached = 3, 5, 11
    pairs = sum(1 for _ in range(rows) for query in range(new) for _ in range(cached + query + 1))
    linear = 2 * rows * new * decoder.layer_products
    # a score and its share of the sum: 128 multiplications and additions each, in 12 heads
    assert decoder.layer(rows, new, cached).operations == linear + pairs * 12 * 2 * 2 * 128
    # the keys and values that were there are read, the new ones written
    moved = decoder.layer(rows, new, cached).bytes - decoder.layer(rows, new, 0).bytes
    assert moved == rows * cached * 2 * 2 * 128 * 2


def test_rollout_is_k_passes() -> None:
    decoder, adapter = Decoder(load("2b")), Adapter()
    parts = rollout(decoder, adapter, rows=2, prefix=100, steps=3, suffix=5)
    transition = adapter.work(1536, 2)
    expected: list[Work] = []
    for new, cached in ((1, 100), (1, 101), (6, 102)):
        expected += [transition] + [decoder.layer(2, new, cached)] * 28
    assert list(parts) == expected
    assert rollout(decoder, adapter, 2, 100, 0, 5) == (decoder.layer(2, 5, 100),) * 28


def test_prefill_leaves_out_the_last_output() -> None:
    decoder = Decoder(load("2b"))
    full, least = total(decoder.step(4, 50, 10)), total(decoder.prefill(4, 50, 10))
    assert full.bytes == least.bytes
    layer = decoder.layer(4, 50, 10).operations
    assert full.operations - least.operations == layer - 2 * 200 * 1536 * 512


# Counted by hand from the published shapes of Qwen2-VL-2B.
def test_published_figures() -> None:
    decoder, vision, adapter = Decoder(load("2b")), Vision(load("2b").vision), Adapter()
    assert decoder.parameters == pytest.approx(1.310e9, rel=5e-4)
    assert decoder.layer_parameters == pytest.approx(46.8e6, rel=1e-3)
    assert 28 * decoder.kv_bytes == 28_672
    assert 2 * decoder.parameters == pytest.approx(2.62e9, rel=1e-3)
    step = Operation("step", decoder.step(1, 1, 0))
    assert step.floor(H200) == pytest.approx(0.546e-3, rel=2e-3)
    assert step.binds(H200) == "bytes"
    assert 2 * 28 * decoder.layer_products == pytest.approx(2.62e9, rel=1e-3)  # per token
    assert 4 * 2 * 32 * vision.block_products == pytest.approx(5.03e9, rel=1e-3)  # per token
    assert adapter.expert_parameters(1536) == pytest.approx(9.44e6, rel=1e-3)
    assert adapter.work(1536, 1).bytes == pytest.approx(57e6, rel=1e-2)
    assert adapter.work(1536, 64).bytes == pytest.approx(94.5e6, rel=1e-2)
    kv = total(decoder.step(64, 1, 1100)).bytes - total(decoder.step(64, 1, 0)).bytes
    assert kv == pytest.approx(2.0e9, rel=2e-2)
    # eight steps and the suffix, one row: 8 × 0.546 ms and 8 × 0.012 ms of adapter, a few keys
    whole = Operation("rollout", rollout(decoder, adapter, 1, 300, 8, 5))
    assert whole.floor(H200) == pytest.approx(8 * (0.546e-3 + 0.0118e-3), rel=5e-3)


def test_loss_and_search() -> None:
    n, m, width = 8, 4, 3
    product = sum(2 for _ in range(n) for _ in range(m) for _ in range(width))
    forward, both = (contrastive_loss(n, m, width, backward) for backward in (False, True))
    assert forward == Work(2 * (n + m) * width, product)
    # read, read again, two gradients written: the logits twice and two products with them
    assert both == Work(3 * forward.bytes, 4 * product)
    assert similarity_topk(n, m, width, 2) == Work(2 * (n + m) * width + n * 2 * 12, product)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("NVIDIA H200", (989e12, 4.8e12)),
        ("NVIDIA H100 80GB HBM3", (989e12, 3.35e12)),
        ("NVIDIA H100 PCIe", (756e12, 2.0e12)),
        ("NVIDIA H100 NVL", (835e12, 3.9e12)),
        ("NVIDIA A100-SXM4-80GB", (312e12, 2.039e12)),
        ("NVIDIA A100 80GB PCIe", (312e12, 1.935e12)),
        ("NVIDIA A100-SXM4-40GB", (312e12, 1.555e12)),
        # names that hold the name of another
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H20", None),
    ],
)
def test_data_sheets_go_by_the_whole_name(
    name: str,
    rates: tuple[float, float] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = datasheets.this_gpu()
    assert (gpu and (gpu.operations, gpu.bandwidth)) == rates
    # Both that use them: the limits of pytest's benchmarks, and a session's figures.
    monkeypatch.setenv(VARIABLE, "small")
    found = limits.machine.__wrapped__()
    assert (found and (found.flops, found.bandwidth)) == rates
    figure = Recorder(tmp_path, "x", dry_run=True).add(
        "a", Timing(1.0, 1.0, 1.0, 1, None), bytes_read=1e12
    )
    assert figure["floor"] == (rates and 1e12 / rates[1])


def test_without_a_gpu_there_is_no_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert datasheets.this_gpu() is None


def test_the_floor_on_a_cpu_counts_the_same_model() -> None:
    # Qwen2-VL-2B by hand: 28 layers of q, o (1536²), k, v (1536 × 256) and three of 1536 × 8960;
    # 32 blocks of 4 × 1280² and 2 × 1280 × 5120, four patches to a visual token
    text = 28 * (2 * 1536**2 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    tower = 32 * (4 * 1280**2 + 2 * 1280 * 5120)
    machine = cpu_floor.Machine(flops=2e9, bandwidth=1e9)
    got = cpu_floor.floor(load("2b"), machine, prompt=100, cached=20, visual=10, batch=1)
    passes = 7 * max(text / 1e9, 2 * text / 1e9) + max(6 * text / 1e9, 2 * text / 1e9)
    assert got == pytest.approx(4 * 10 * tower / 1e9 + 80 * text / 1e9 + passes)


def test_floor_adds_up_the_slower_half_of_each_part() -> None:
    gpu = Gpu("toy", operations=10.0, bandwidth=2.0)
    moving, computing = Work(bytes=8, operations=1), Work(bytes=2, operations=30)
    assert Operation("a", (moving,)).floor(gpu) == 4
    assert Operation("a", (moving,)).binds(gpu) == "bytes"
    assert Operation("b", (computing,)).floor(gpu) == 3
    assert Operation("b", (computing,)).binds(gpu) == "operations"
    both = Operation("both", (moving, computing), target=0.7)
    assert both.floor(gpu) == 7
    assert both.binds(gpu) == "bytes"
    assert both.target_time(gpu) == pytest.approx(10)
    assert Operation("b", (computing, computing, moving)).binds(gpu) == "operations"


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--batch", "2", "--prefix", "300", "--steps", "4"]
    main(arguments)
    printed = capsys.readouterr().out
    assert "rollout of 4 + suffix, 2 × 300 tokens" in printed
    assert not list(tmp_path.iterdir()), "no file unless asked"
    main([*arguments, "--json", "out.json"])
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["measured"] is False
    row = next(r for r in results["operations"] if r["name"].startswith("rollout"))
    expected = Operation("", rollout(Decoder(load("2b")), Adapter(), 2, 300, 4, 5))
    assert row["gpus"]["H200"]["floor_s"] == expected.floor(H200)
    assert row["gpus"]["H200"]["target_s"] == pytest.approx(expected.floor(H200) / 0.6)
    assert {r["samples"] for r in results["embeddings"]} == {64}


def test_a_checkpoint_directory(checkpoint_dir: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = TextModel(load(str(checkpoint_dir)))
    parameters = Decoder(load(str(checkpoint_dir))).parameters
    assert parameters == count(model) - count(model.embed_tokens)
    with pytest.raises(CheckpointError, match="file not found"):
        load(str(tmp_path))


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--prefix", "-1"], ["--steps", "-1"]])
def test_bad_numbers(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--batch must be at least 1" in capsys.readouterr().err
