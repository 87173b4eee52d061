"""The GPU session on a CPU: its steps run at tiny sizes, and what they write is no measurement."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Plain `pytest` leaves the root, where benchmarks/ is, out of the path.
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_session  # noqa: E402
from benchmarks.gpu import adapter, ceilings, rollout, sweep  # noqa: E402
from benchmarks.gpu.figures import Recorder, collect, line, read  # noqa: E402
from benchmarks.gpu.prefilled import plan_of, prefill, prompts  # noqa: E402
from benchmarks.gpu.sizes import DRY  # noqa: E402
from benchmarks.gpu.timing import Timing  # noqa: E402
from benchmarks.rivals.official_adapter import OfficialStyleAdapter  # noqa: E402
from benchmarks.rivals.official_loop import OfficialRollout  # noqa: E402
from benchmarks.rivals.static_cache import StaticCacheRollout  # noqa: E402
from benchmarks.shaped import shaped_model  # noqa: E402
from ume_kernels import MoETransition, tuning  # noqa: E402
from ume_models.cli.bench.reading import read_results  # noqa: E402
from ume_models.cli.bench.report import refuse_try  # noqa: E402
from ume_models.cli.bench.tables import markdown, session_table  # noqa: E402
from ume_models.errors import DataError  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return shaped_model("tiny", torch.float32)


def test_steps_write_figures_of_one_schema(tmp_path):
    steps = {"ceilings": ceilings.run, "adapter": adapter.run, "short": rollout.short}
    for name, step in steps.items():
        step(DRY, Recorder(tmp_path, name, dry_run=True))
    results = collect(tmp_path, [{"name": "ceilings", "status": "ok"}], dry_run=True)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"date", "dry_run", "machine", "versions", "steps", "figures"}
    assert results["dry_run"] is True
    names = [figure["name"] for figure in results["figures"]]
    assert len(set(names)) == len(names) >= 9
    for figure in results["figures"]:
        assert figure["dry_run"] is True
        assert "missed" not in figure, figure
        assert {"step", "name", "value", "unit", "floor", "ratio_to", "nvml"} <= set(figure)
        assert figure["value"] > 0
    [whole] = [f for f in results["figures"] if f["name"] == "rollout, 1 row, 20-token prefix"]
    assert set(whole["ratio_to"]) == {
        "without graphs", "the official loop", "the compiled static-cache rollout"
    }  # fmt: skip
    # 2 layers of 64 x (2 heads of everything) and a feed-forward of 96, eight passes, 4 bytes
    layer = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 96
    assert whole["bytes"] == 8 * 2 * layer * 4


def test_a_dry_run_is_refused_by_the_report(tmp_path):
    Recorder(tmp_path, "x", dry_run=True).add("a", Timing(1.0, 1.0, 1.0, 1, None))
    results = collect(tmp_path, [], dry_run=False)
    assert results["dry_run"], "one dry figure makes all of them dry"
    with pytest.raises(DataError, match="dry run"):
        refuse_try(read_results(tmp_path / "results.json"))


def test_the_report_of_a_session(tmp_path):
    record = Recorder(tmp_path, "x", dry_run=False)
    state = {"sm_mhz": 1980.0, "power_w": 512.0}
    timing = Timing(2e-5, 2e-5, 2e-5, 9, state)
    record.add("adapter", timing, ratio_to={"the official module": 4e-4})
    record.rate("copy bandwidth", 4.3e12, "B/s", Timing(1, 1, 1, 9, state))
    record.missed("rival", "it did not compile")
    results = collect(tmp_path, [], dry_run=False)
    results["machine"]["gpu"] = {"name": "NVIDIA H200", "driver": "580"}
    table = markdown(session_table(results))
    assert "| adapter | 20.0 µs | – | – | 20.0× the official module | 1980 MHz" in table
    assert "| copy bandwidth | 4.3 TB/s |" in table
    assert "Not measured: rival (it did not compile)." in table
    assert read_results(tmp_path / "results.json").kept["figures"] == results["figures"]
    assert "not measured" in line(read(tmp_path)[-1])


def test_a_session_survives_a_step_that_hangs_or_fails(tmp_path, monkeypatch):
    python = [sys.executable, "-c"]
    commands = {
        "hangs": [*python, "import time; time.sleep(60)"],
        "fails": [*python, "raise SystemExit('broken')"],
        "works": [*python, "print('done')"],
    }
    steps = tuple(gpu_session.Step(name, 1, 6, 6) for name in commands)
    monkeypatch.setattr(gpu_session, "STEPS", steps)
    monkeypatch.setattr(gpu_session, "command_of", lambda step, *_: commands[step.name])
    assert gpu_session.session(tmp_path, True, 1.0, None) == 1
    written = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert [(s["name"], s["status"]) for s in written] == [
        ("hangs", "cut"), ("fails", "failed"), ("works", "ok")
    ]  # fmt: skip
    assert written[1]["note"] == "broken"
    # with no time left nothing is started
    assert gpu_session.session(tmp_path, True, 0.0, None) == 0
    assert {s["status"] for s in json.loads((tmp_path / "results.json").read_text())["steps"]} == {
        "skipped"
    }


def test_the_steps_fit_into_their_time():
    assert sum(step.least for step in gpu_session.STEPS) <= 9.5 * 60
    assert len({step.name for step in gpu_session.STEPS}) == len(gpu_session.STEPS)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 9])
def test_the_official_style_adapter_computes_the_same(rows):
    torch.manual_seed(rows)
    module = MoETransition(48, excluded_expert_indices=(2,)).eval()
    z, context = torch.randn(2, rows, 48).unbind(0)
    got, aux = OfficialStyleAdapter(module)(z, 5, context)
    want, expected = module(z, 5, context)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(aux[name], value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_the_rivals_compute_the_same_rollout(model, rows):
    model.options = model.options.replaced({"max_new_tokens": 0})
    model.refresh()
    plan, batch = plan_of(model, steps=3), prompts(model, rows, 14, seed=rows)
    before = prefill(model, batch, plan)
    engine = before.roll().clone()
    official = OfficialRollout(model, batch[0], plan)
    for _ in range(2):  # prepare() really starts anew
        torch.testing.assert_close(official(), engine[0], rtol=1e-4, atol=1e-5)
        official.prepare()
    rival = StaticCacheRollout(
        model.config, model.model, model.latent_moe_transition, plan.suffix_ids, plan.steps, rows,
        capacity=40, compiled=False,
    )  # fmt: skip
    rival.load(before.cache[:, :, :, :, :14])
    got = rival(before.states, before.states, 14)
    torch.testing.assert_close(got, engine, rtol=1e-4, atol=1e-5)


def test_a_proposed_table_is_a_valid_one(tmp_path):
    small = {"gemm": "triton", "BLOCK_N": 8, "num_warps": 4}
    best = {"qkv": {1: small, 64: {"gemm": "cublas"}, 8: small}}
    path = sweep.write_proposal(tmp_path, "decode", best, dry_run=True)
    assert path is not None
    table = json.loads(path.read_text())
    assert table["measured"] is False
    entries = table["kernels"]["qkv"]
    assert entries[0] == {"max_rows": 8, **small}, "equal neighbours become one entry"
    assert entries[1] == {"max_rows": 64, "gemm": "cublas"}
    assert entries[-1]["max_rows"] is None
    bounds = [entry["max_rows"] for entry in entries[:-1]]
    assert bounds == sorted(set(bounds))


def test_a_forced_configuration_is_used_and_taken_back():
    device = torch.device("cpu")
    before = tuning.config("decode", "qkv", 1, device)
    with sweep.configured("decode", "qkv", {"gemm": "cublas"}):
        assert tuning.config("decode", "qkv", 1, device) == {"gemm": "cublas"}
        assert tuning.config("decode", "down", 1, device) != {"gemm": "cublas"}
    assert tuning.config("decode", "qkv", 1, device) == before


def test_neighbours_differ_in_one_number():
    entry = {"BLOCK_M": 16, "BLOCK_K": 128, "STAGES": 3, "DOT": True, "num_warps": 4, "gemm": "x"}
    for other in sweep.neighbours(entry):
        changed = [key for key in entry if entry[key] != other[key]]
        assert len(changed) == 1
        assert changed[0] in ("BLOCK_K", "STAGES", "num_warps")
