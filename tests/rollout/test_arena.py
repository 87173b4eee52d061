"""The arena and the header cache: exact sizes, reuse, and no leak between batches."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ume_models.backbone.config import read_config
from ume_models.rollout.arena import CAPACITY_STEP, KVArena
from ume_models.rollout.headers import Headers
from ume_models.rollout.sequence import Visual, build_sequence


@pytest.fixture(scope="module")
def config(checkpoint_dir):
    return read_config(checkpoint_dir)


def test_arena_is_reused_and_grows(config):
    arena = KVArena(config, torch.float32, torch.device("cpu"))
    cache = arena.begin([5, 9], 4)
    assert cache.shape == (3, 2, 2, 2, CAPACITY_STEP, 32)
    assert arena.nbytes == arena.bytes_for(2, 13) == cache.nbytes
    where = cache.data_ptr()
    assert arena.begin([60], 4).data_ptr() == where
    assert arena.begin([CAPACITY_STEP], 1).shape[4] == 2 * CAPACITY_STEP
    arena.release()
    assert arena.nbytes == 0


def test_nothing_stale_is_left_behind_a_row(config):
    arena = KVArena(config, torch.float32, torch.device("cpu"))
    arena.begin([30, 30], 4).fill_(float("nan"))
    cache = arena.begin([7, 20], 4)
    assert torch.isfinite(cache[:, :, 0, :, 7:]).all()
    assert torch.isfinite(cache[:, :, 1, :, 20:]).all()


def test_a_poisoned_arena_does_not_change_embeddings(load_recorded, recorded):
    model = load_recorded(engine="fast")
    batch = recorded.batch(recorded.names, "right", pad_id=0)
    expected = model.embed(**batch)
    storage = model.rollout.arena._storage
    storage.fill_(float("nan"))
    assert torch.equal(model.embed(**batch), expected)
    storage.normal_(0, 1e3)
    alone = model.embed(**recorded.inputs("text_only"))[0]
    row = recorded.names.index("text_only")
    assert float((alone - expected[row]).abs().max()) <= 2e-6


def test_arena_stops_growing(load_recorded, recorded):
    model = load_recorded(engine="fast")
    batch = recorded.batch(recorded.names, "right", pad_id=0)
    model.embed(**batch)
    held = model.rollout.arena.nbytes
    for name in recorded.names:
        model.embed(**recorded.inputs(name))
    assert model.rollout.arena.nbytes == held


def sequence(config, ids, patches=None):
    visuals = [] if patches is None else [Visual(patches, (1, 2, 2))]
    return build_sequence(np.array(ids), config, visuals)


def test_longest_shared_beginning_wins(config):
    image, start = config.image_token_id, list(range(1, 11))
    blank = torch.ones(4, config.vision.patch_dim)
    computed = []

    def compute(prompt):
        computed.append(len(prompt))
        return torch.zeros(1)

    batch = [
        sequence(config, [*start, image, *start, 30, 31], blank),
        sequence(config, [*start, image, *start, 40, 41], blank.clone()),
        sequence(config, [*start, image, *start, 50, 51], blank * 2),
        sequence(config, [2, 2, 7]),
    ]
    headers = Headers(config, batch[:3], [22, 22, 22])
    found = [headers.match(prompt, 22, compute) for prompt in batch[:3]]
    lengths = [len(header.sequence) for header in found]
    assert lengths == [21, 21, 10], "another image does not match"
    assert headers.match(batch[3], 2, compute) is None
    assert headers.match(batch[0], 12, compute) is found[2], "what is read lies behind it"
    assert computed == [21, 10], "each header is computed once"
    assert len(Headers(config, batch[:2], [1, 22])) == 0, "one reads near its beginning"


def test_headers_save_work_and_do_not_change_the_embedding(load_recorded, recorded, monkeypatch):
    model = load_recorded(engine="fast")
    items = [{"text": "sales by month"}, {"text": "a red circle"}, {"text": "x"}]
    seen = []
    prefill = model.model.prefill

    def counting(embeds, *rest):
        seen.append(len(embeds))
        return prefill(embeds, *rest)

    monkeypatch.setattr(model.model, "prefill", counting)
    with_header = model.encode(items)
    shared, rest = seen
    monkeypatch.setattr(Headers, "match", lambda *_: None)
    without = model.encode(items)
    assert shared >= 10
    assert rest == seen[2] - 3 * shared
    assert float((with_header - without).abs().max()) <= 2e-6


def test_changed_weights_are_noticed(checkpoint_dir):
    import ume_models

    model = ume_models.load(checkpoint_dir)
    before = model.encode([{"text": "hello"}])
    print_before = model.fingerprint
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    after = model.encode([{"text": "hello"}])
    assert not torch.allclose(before, after, atol=1e-3)
    assert model.fingerprint != print_before
    official = ume_models.load(checkpoint_dir, engine="reference", max_new_tokens=0)
    official.encode([{"text": "hello"}])
    official.load_state_dict(model.state_dict(), assign=True)
    assert float((official.encode([{"text": "hello"}]) - after).abs().max()) <= 1e-5


def test_moving_the_model_refreshes_by_itself(checkpoint_dir):
    import ume_models

    model = ume_models.load(checkpoint_dir)
    exact = model.encode([{"text": "hello"}])
    model.to(torch.float64)
    assert float((model.encode([{"text": "hello"}]) - exact).abs().max()) <= 1e-5


def test_threads_and_copies_do_not_share_an_arena(load_recorded, recorded):
    model = load_recorded(engine="fast")
    expected = {n: model.embed(**recorded.inputs(n)) for n in recorded.names}
    twin = copy.deepcopy(model)
    assert twin.rollout.arena is not model.rollout.arena

    def work(name):
        return name, model.embed(**recorded.inputs(name)), twin.embed(**recorded.inputs(name))

    with ThreadPoolExecutor(8) as pool:
        for name, got, copied in pool.map(work, recorded.names * 3):
            assert float((got - expected[name]).abs().max()) <= 2e-6, name
            assert float((copied - expected[name]).abs().max()) <= 2e-6, name


def test_the_callers_modes_do_not_leak_in(checkpoint_dir, recorded):
    import ume_models

    model = ume_models.load(checkpoint_dir)
    inputs = recorded.inputs("image_wide")
    with torch.inference_mode():
        first = model.embed(**inputs).clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.embed(**inputs), first)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            second = model.embed(**inputs)
            encoded = model.encode([{"text": "a"}])
    finally:
        torch.set_default_dtype(torch.float32)
    assert float((first - recorded.expected("image_wide", "disc_k8")).abs().max()) <= 1e-5
    assert torch.equal(first, second)
    assert second.dtype == encoded.dtype == torch.float32
    head = torch.nn.Linear(second.shape[1], 1)
    head(model.embed(**inputs)).sum().backward()  # embeddings are ordinary tensors
