from __future__ import annotations

import io
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ume_models.embedders.plume_prompt import GENERATION_PROMPT, PlumePrompt
from ume_models.errors import ErrorKind, ItemError
from ume_models.processing import ImageConfig, Item, MediaRules, Processor, media

TENSORS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
CASES = [
    "text_blank_image",
    "image_square",
    "image_wide",
    "image_tall_large",
    "two_images",
    "video_4",
    "video_8",
    "text_only",
    "text_long",
]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decoded_prompt(processor: Processor, ids: torch.Tensor) -> str:
    text: str = processor.tokenizer.decode(ids.tolist())
    return text


@pytest.mark.compat
@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_recorded_inputs(
    make_processor: Any,
    recorded_dir: Path,
    recorded_cases: dict[str, Any],
    recorded_tensors: dict[str, torch.Tensor],
    name: str,
    as_bytes: bool,
) -> None:
    processor = make_processor(
        blank_image=False, multi_image="all", fetch_min_pixels=None, max_pixels=50176
    )
    case = recorded_cases[name]
    files = [file for medium in case["media"] for file in medium["files"]]
    sources: list[Any] = [(recorded_dir / f).read_bytes() for f in files] if as_bytes else files
    item: dict[str, Any] = {"text": case["text"]}
    if sources:
        item["video" if case["media"][0]["type"] == "video" else "images"] = sources

    (planned,) = processor.plan([item], base_dir=recorded_dir)
    prepared = processor.load(planned)

    assert torch.equal(prepared.input_ids, recorded_tensors[f"{name}.input_ids"])
    assert planned.num_tokens == len(prepared.input_ids) == case["prompt_tokens"]
    patches = 0
    for tensor in TENSORS:
        got, expected = getattr(prepared, tensor), recorded_tensors.get(f"{name}.{tensor}")
        if expected is None:
            assert got is None
            continue
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
        patches += len(expected) if tensor.startswith("pixel") else 0
    assert planned.num_patches == patches


@pytest.mark.compat
def test_text_only_items_get_the_blank_image(
    make_processor: Any,
    recorded_cases: dict[str, Any],
    recorded_tensors: dict[str, torch.Tensor],
) -> None:
    processor = make_processor(fetch_min_pixels=None, max_pixels=50176)
    (planned,) = processor.plan([{"text": recorded_cases["text_blank_image"]["text"]}])
    prepared = processor.load(planned)
    assert (planned.kind, planned.header, prepared.header) == ("text", "text", "text")
    assert torch.equal(prepared.input_ids, recorded_tensors["text_blank_image.input_ids"])
    for tensor in ("pixel_values", "image_grid_thw"):
        assert torch.equal(
            getattr(prepared, tensor), recorded_tensors[f"text_blank_image.{tensor}"]
        )


def test_blank_image_is_white_and_four_tokens_by_default(processor: Processor) -> None:
    # As the reference: a white 28 x 28 JPEG, which the fetch stage enlarges to 56 x 56.
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), (255, 255, 255)).save(buffer, "JPEG")
    blank, explicit = processor.plan(
        [{"text": "a"}, {"text": "a", "image": buffer.getvalue()}],
    )
    ours, theirs = processor.load(blank), processor.load(explicit)
    assert ours.image_grid_thw is not None
    assert ours.image_grid_thw.tolist() == [[1, 4, 4]]
    assert torch.equal(ours.pixel_values, theirs.pixel_values)  # type: ignore[arg-type]
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert (ours.header, theirs.header) == ("text", None)
    pad = processor.pad_ids["image"]
    assert int((ours.input_ids == pad).sum()) == 4


def test_header_is_a_constant_beginning(processor: Processor) -> None:
    first, second = (
        processor.load(planned).input_ids
        for planned in processor.plan([{"text": "alpha"}, {"text": "omega, and more"}])
    )
    end = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    length = first.tolist().index(end) + 1
    assert torch.equal(first[:length], second[:length])


def test_instruction_comes_first(processor: Processor, noise: Any) -> None:
    items = [
        {"instruction": "Find it:", "text": " <|image_pad|>a dog ", "image": noise(56, 56)},
        {"instruction": "Find it:", "image": noise(56, 56)},
        {"image": noise(56, 56)},
    ]
    prompts = [
        decoded_prompt(processor, processor.load(p).input_ids) for p in processor.plan(items)
    ]
    for prompt, text in zip(prompts, ("Find it:  a dog", "Find it:", ""), strict=True):
        assert f"<|vision_end|>{text}\n<disc_emb>\n{GENERATION_PROMPT}<|im_end|>" in prompt


def test_empty_item(make_processor: Any, processor: Processor) -> None:
    with pytest.raises(ItemError, match="item 1: is empty"):
        processor.plan([{"text": "a"}, {"text": ""}])
    with pytest.raises(ItemError, match="no text left"):
        processor.plan([{"text": "<|image_pad|> "}])
    reference = make_processor(empty="reference")
    prepared = [reference.load(p) for p in reference.plan([{}, {"text": " "}])]
    assert "user\n  \n<disc_emb>" in decoded_prompt(reference, prepared[0].input_ids)
    assert prepared[0].pixel_values is None
    # text that is there but blank goes the way of text: blank image, stripped
    assert "<|vision_end|>\n<disc_emb>" in decoded_prompt(reference, prepared[1].input_ids)
    assert prepared[1].header == "text"


def test_multi_image_must_be_chosen(make_processor: Any, processor: Processor, noise: Any) -> None:
    images = [noise(56, 56), noise(84, 56, seed=1)]
    with pytest.raises(ItemError, match=r"multi_image='all'.*multi_image='first'"):
        processor.plan([{"images": images}])
    (planned,) = make_processor(multi_image="all").plan([{"images": images}])
    assert planned.num_patches == 16 + 24


def test_multi_image_first_is_the_official_quirk(make_processor: Any, noise: Any) -> None:
    # The official collator joins all images, as JPEG, into one data URI; the first one survives.
    first = noise(56, 56)
    buffer = io.BytesIO()
    first.save(buffer, "JPEG")
    processor = make_processor(multi_image="first")
    quirk, through_jpeg, single = (
        processor.load(p)
        for p in processor.plan(
            [
                {"images": [first, noise(84, 84, seed=1)], "text": "a"},
                {"image": buffer.getvalue(), "text": "a"},
                {"images": [first], "text": "a"},
            ]
        )
    )
    assert torch.equal(quirk.pixel_values, through_jpeg.pixel_values)  # type: ignore[arg-type]
    assert torch.equal(quirk.input_ids, through_jpeg.input_ids)
    assert not torch.equal(quirk.pixel_values, single.pixel_values)  # type: ignore[arg-type]
    assert quirk.digest != single.digest


def test_odd_number_of_frames_repeats_the_last(processor: Processor, noise: Any) -> None:
    frames = [noise(84, 56, seed=i) for i in range(3)]
    odd, even = (
        processor.load(p)
        for p in processor.plan([{"video": frames}, {"video": [*frames, frames[-1]]}])
    )
    assert odd.video_grid_thw is not None
    assert odd.video_grid_thw.tolist() == [[2, 4, 6]]
    assert torch.equal(odd.pixel_values_videos, even.pixel_values_videos)  # type: ignore[arg-type]
    assert odd.pixel_values is None


def test_frames_of_one_fetched_size_only(processor: Processor, noise: Any) -> None:
    # 85 x 57 is rounded to the same 84 x 56
    (planned,) = processor.plan([{"video": [noise(84, 56), noise(85, 57)]}])
    assert processor.load(planned).pixel_values_videos is not None
    with pytest.raises(ItemError, match=r"video frame 1 .*112x56, not 84x56"):
        processor.plan([{"video": [noise(84, 56), noise(112, 56)]}])


def test_skip_keeps_places_and_reasons(processor: Processor, tmp_path: Path, noise: Any) -> None:
    noise(56, 56).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    items: list[Any] = [
        {"text": "a", "id": "x"},
        {"image": "absent.png", "id": "y"},
        {"image": "bad.png"},
        {"txt": "a"},
        {"image": "good.png"},
        {"video": ["good.png", "absent.png"]},
        {"text": "<|im_end|>"},
        {"image": noise(3, 3000)},
    ]
    planned = processor.plan(items, "skip", base_dir=tmp_path)
    assert [p.index for p in planned] == list(range(8))
    assert [p.id for p in planned[:3]] == ["x", "y", "2"]
    assert [p.error is None for p in planned] == [True, False, False, False, True] + [False] * 3
    reasons = [str(p.error) for p in planned]
    assert "item 1 (id 'y'): image '" in reasons[1]
    assert "absent.png' does not exist" in reasons[1]
    assert "bad.png' is not an image" in reasons[2]
    assert "unknown field" in reasons[3]
    assert "video frame 1 ('" in reasons[5]
    assert "<|im_end|>" in reasons[6]
    assert "200 times" in reasons[7]
    with pytest.raises(ItemError, match=r"absent\.png"):
        processor.load(planned[1])
    with pytest.raises(ItemError, match="item 11"):
        processor.plan(items[1:2], base_dir=tmp_path, start_index=11)


def test_truncated_image_is_found_when_loading(processor: Processor, noise: Any) -> None:
    data = png(noise(200, 200))
    (planned,) = processor.plan([{"image": data[: len(data) // 2], "id": "t"}])
    with pytest.raises(ItemError, match=r"item 0 \(id 't'\): image bytes object .* is truncated"):
        processor.load(planned)


def test_file_that_changes_size_in_between(
    processor: Processor, tmp_path: Path, noise: Any
) -> None:
    path = tmp_path / "a.png"
    noise(56, 56).save(path)
    (planned,) = processor.plan([{"image": path}])
    noise(560, 56).save(path)
    with pytest.raises(ItemError, match="has changed since it was planned"):
        processor.load(planned)


def test_digest(make_processor: Any, processor: Processor, tmp_path: Path, noise: Any) -> None:
    data = png(noise(56, 56))
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "b.png").write_bytes(data)
    base, same, *others = processor.plan(
        [
            {"text": "t", "image": tmp_path / "a.png", "id": "1"},
            {"text": "t ", "image": tmp_path / "b.png", "id": "2"},
            {"text": "u", "image": data},
            {"text": "t", "image": png(noise(56, 56, seed=1))},
            {"text": "t", "video": [data]},
            {"text": "t", "video": [data, data]},
            {"text": "t"},
        ]
    )
    assert base.digest == same.digest
    assert len({base.digest, *(o.digest for o in others)}) == 1 + len(others)
    other = make_processor(max_pixels=50176)
    assert other.plan([{"text": "t", "image": data}])[0].digest != base.digest


def test_each_file_is_read_once_per_plan_and_decoded_once_per_item(
    processor: Processor, tmp_path: Path, noise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(56, 56).save(tmp_path / "a.png")
    calls = {"read_header": 0, "decode_rgb": 0}

    def counted(name: str) -> Any:
        original = getattr(media, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return wrapper

    for name in calls:
        monkeypatch.setattr(media, name, counted(name))
    planned = processor.plan(
        [{"video": ["a.png"] * 4}, {"image": "a.png", "text": "b"}], base_dir=tmp_path
    )
    assert calls == {"read_header": 1, "decode_rgb": 0}
    prepared = processor.load(planned[0])
    assert calls["decode_rgb"] == 1
    assert prepared.video_grid_thw is not None
    assert prepared.video_grid_thw.tolist() == [[2, 4, 4]]


def deep(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 65536, (56, 56), np.uint16))


def test_what_a_viewer_shows_otherwise_is_named_once_per_kind(make_processor: Any) -> None:
    exif = Image.Exif()
    exif[0x112] = 3
    turned = io.BytesIO()
    deep(0).convert("RGB").save(turned, "PNG", exif=exif)
    items = [{"image": deep(0), "id": "x"}, {"image": deep(1)}, {"image": turned.getvalue()}]
    processor = make_processor()
    with pytest.warns(UserWarning, match="as_seen") as told:
        processor.plan(items * 2)
    assert [str(found.message).split(":")[0] for found in told] == [
        "item 0 (id 'x')",
        "item 2 (id '2')",
    ]
    seen = make_processor(pictures="as_seen")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = [seen.load(plan) for plan in seen.plan(items)]
        narrow = Image.fromarray((np.asarray(deep(0)) >> 8).astype(np.uint8))
        same = processor.load(processor.plan([{"image": narrow}])[0])
    assert torch.equal(prepared[0].pixel_values, same.pixel_values)
    assert processor.described() != seen.described()
    assert processor.convention != seen.convention


def test_a_text_that_cannot_fit_is_not_tokenised(
    make_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = make_processor()
    processor.max_tokens = 50
    fits = ["a" * 50, "e\u0301" * 20, " " * 60 + "b"]
    lengths = [len(processor.tokenizer(text)["input_ids"]) for text in fits]
    texts: list[str] = []
    encode = processor._tokens.encode
    monkeypatch.setattr(
        processor._tokens, "encode", lambda p: encode([x for x in p if not texts.append(x.text)])
    )
    long = ["a" * 10**7, "e\u0301" * 10**6, "\u1100\u1161\u11a8" * 10**6]
    plans = processor.plan([{"text": text} for text in [*long, *fits]], "skip")
    assert [plan.error is None for plan in plans] == [False] * 3 + [True] * 3
    assert {plan.error.kind for plan in plans if plan.error} == {ErrorKind.TOO_LONG}
    assert len(texts) == 3
    assert max(lengths) <= 60


def test_temporary_byte_buffers_are_not_confused(processor: Processor, noise: Any) -> None:
    # bytearrays are copied; a copy that is freed must not lend its identity to the next one
    good = [bytearray(png(noise(28 * n, 56, seed=n))) for n in range(2, 8)]
    items = []
    for data in good:
        items += [{"image": bytearray(b"bad" * 1000)}, {"image": data}]
    planned = processor.plan(items, "skip")
    assert [p.num_patches for p in planned[1::2]] == [8 * n for n in range(2, 8)]
    assert len({p.digest for p in planned[1::2]}) == 6


def test_pil_input_is_not_modified(processor: Processor, noise: Any) -> None:
    image = noise(100, 60).convert("P")
    before = (image.mode, image.size, image.tobytes())
    processor.load(processor.plan([{"image": image}])[0])
    assert (image.mode, image.size, image.tobytes()) == before


def test_pixel_limit_is_passed_on(tokenizer: Any, noise: Any) -> None:
    processor = Processor(
        tokenizer, PlumePrompt(tokenizer), ImageConfig(), MediaRules(), max_image_pixels=1000
    )
    with pytest.raises(ItemError, match="over the limit of 1000"):
        processor.plan([{"image": noise(100, 60)}])


def test_load_in_many_threads(processor: Processor, noise: Any) -> None:
    data = [png(noise(60 + 9 * i, 90, seed=i)) for i in range(6)]
    shared = noise(84, 84)
    items: list[Any] = [{"image": d, "text": str(i)} for i, d in enumerate(data)]
    items += [{"image": shared, "text": f"s{i}"} for i in range(6)]
    planned = processor.plan(items)
    expected = [processor.load(p) for p in planned]
    start = threading.Barrier(4)

    def load_all(_: int) -> list[Any]:
        start.wait()
        return [processor.load(p) for p in planned]

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(load_all, range(4)):
            for got, want in zip(results, expected, strict=True):
                assert torch.equal(got.input_ids, want.input_ids)
                assert torch.equal(got.pixel_values, want.pixel_values)


def test_wrong_arguments(make_processor: Any, processor: Processor) -> None:
    with pytest.raises(ValueError, match="multi_image"):
        make_processor(multi_image="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        make_processor(empty="skip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_error"):
        processor.plan([], on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="into a list"):
        processor.plan({"text": "a"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="into a list"):
        processor.plan(Item(text="a"))  # type: ignore[arg-type]
    assert processor.plan([]) == []


def test_memory_is_writable_and_contiguous(processor: Processor, noise: Any) -> None:
    prepared = processor.load(processor.plan([{"image": noise(56, 84)}])[0])
    assert prepared.pixel_values is not None
    assert prepared.pixel_values.is_contiguous()
    assert prepared.pixel_values.dtype == torch.float32
    assert prepared.input_ids.dtype == torch.int64
    assert np.isfinite(prepared.pixel_values.numpy()).all()
