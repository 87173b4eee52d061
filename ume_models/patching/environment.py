"""What known repositories import, and this environment does not have.

They are written for one version of transformers and for a GPU with flash-attn. Names that are gone
since then are supplied: by what took their place, where something did, else by a class that says
so when it is made. The parts of the scripts that are used here need none of the latter.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

from ume_models.errors import PatchError
from ume_models.patching.report import Entry

# Imported by PLUME's and UME-R1's scripts themselves, and not used.
_SCRIPT_NAMES = {
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl": {"apply_rotary_pos_emb_flashatt": ""}
}
_NAMES = {
    "flash_attn.bert_padding": {"index_first_axis": "", "pad_input": "", "unpad_input": ""},
    "flash_attn.flash_attn_interface": {"flash_attn_varlen_qkvpacked_func": ""},
    "transformers": {"AutoModelForVision2Seq": "transformers.AutoModelForImageTextToText"},
    "transformers.cache_utils": {"HybridCache": "", "SlidingWindowCache": ""},
    "transformers.image_utils": {
        "VideoInput": "transformers.video_utils.VideoInput",
        "make_batched_videos": "transformers.video_utils.make_batched_videos",
    },
    "transformers.modeling_attn_mask_utils": {
        "AttentionMaskConverter": "",
        "_prepare_4d_causal_attention_mask": "",
    },
    "transformers.modeling_utils": {
        "apply_chunking_to_forward": "transformers.pytorch_utils.apply_chunking_to_forward",
        "find_pruneable_heads_and_indices": "",
        "prune_linear_layer": "transformers.pytorch_utils.prune_linear_layer",
    },
    "transformers.processing_utils": {"_validate_images_text_input_order": ""},
    "transformers.tokenization_utils": {
        "_is_control": "",
        "_is_punctuation": "",
        "_is_whitespace": "",
    },
}
"""Module, name, and where it is now; of the bundled backbones that the scripts import."""


def supply() -> list[Entry]:
    """Supply all of it; what was not there, for the report. Twice supplies nothing more."""
    return [*_supply(_NAMES), *_supply(_SCRIPT_NAMES), *_without_flash_attention()]


def supply_for_scripts() -> list[Entry]:
    """Supply what scripts import before any module of their repository."""
    return _supply(_SCRIPT_NAMES)


def _supply(table: dict[str, dict[str, str]]) -> list[Entry]:
    entries = []
    for place, names in table.items():
        try:
            module = importlib.import_module(place)
        except ImportError:
            # Not the package itself: others ask whether there is a flash_attn, and there is none.
            module = sys.modules[place] = ModuleType(place, "Supplied by ume_models.")
        for name, now in names.items():
            if not hasattr(module, name):
                setattr(module, name, _found(now) or _gone(f"{place}.{name}"))
                told = f"not in this environment; {now or 'an error where it is called'}"
                entries.append(Entry(f"{place}.{name}", "replaced", "a stand-in", told))
    return entries


def _found(path: str) -> Any:
    place, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(place), name, None) if place else None
    except ImportError:
        return None


def _gone(name: str) -> type:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise PatchError(
            f"{name} is not in this environment, and this part of the script needs it: install "
            "what the repository asks for"
        )

    return type(name.rpartition(".")[2], (), {"__init__": __init__, "__module__": __name__})


def _without_flash_attention() -> list[Entry]:
    """``flash_attention_2``, which the scripts insist on, means sdpa where it cannot be had."""
    if not _found("transformers.modeling_utils.PreTrainedModel"):
        return []
    from transformers import PreTrainedModel
    from transformers.utils import is_flash_attn_2_available

    load: Any = vars(PreTrainedModel)["from_pretrained"]
    if is_flash_attn_2_available() or hasattr(load, "__ume__"):
        return []

    @functools.wraps(load.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("attn_implementation") == "flash_attention_2":
            kwargs["attn_implementation"] = "sdpa"
        for config in _configurations(kwargs.get("config")):
            if getattr(config, "_attn_implementation", None) == "flash_attention_2":
                config._attn_implementation = "sdpa"
        return load.__func__(cls, *args, **kwargs)

    method: Any = classmethod(from_pretrained)
    method.__ume__ = True
    PreTrainedModel.from_pretrained = method
    told = "flash_attention_2 cannot be had here, so the models are loaded with sdpa"
    return [Entry("attn_implementation", "replaced", "sdpa", told)]


def _configurations(config: Any) -> list[Any]:
    parts = [getattr(config, name, None) for name in ("text_config", "vision_config")]
    return [part for part in (config, *parts) if part is not None]


# -- the repositories' own processors under transformers 5 -----------------------------------------


def adapt_processors(package: str) -> list[Entry]:
    """Let processors that a repository brings along for Qwen2-VL work under transformers 5.

    Args:
        package: what their modules' names begin with, once they are imported.
    """
    from transformers import __version__

    entries = []
    for name, module in list(sys.modules.items()):
        adapt = _ADAPTATIONS.get(name.rpartition(".")[2]) if name.startswith(package) else None
        if adapt is not None and int(__version__.split(".")[0]) >= 5:
            told = adapt(module)
            entries.append(Entry(name, "repaired", reason=f"under transformers 5: {told}"))
    return entries


def _adapt_processor(module: Any) -> str:
    kind = module.Qwen2VLProcessor
    theirs = kind.get_possibly_dynamic_module

    def get_possibly_dynamic_module(name: str) -> Any:
        try:
            return theirs(name)
        except NotImplementedError:
            return super(kind, kind).get_possibly_dynamic_module(name)

    kind.get_possibly_dynamic_module = staticmethod(get_possibly_dynamic_module)
    return "base classes are found as well"


def _adapt_tokenizer(module: Any) -> str:
    kind = module.Qwen2TokenizerFast

    def convert_to_native_format(cls: Any, **kwargs: Any) -> Any:
        return super(kind, cls).convert_to_native_format(**{**kwargs, "trust_remote_code": True})

    kind.convert_to_native_format = classmethod(convert_to_native_format)
    return "tokenizer.json is read as it is, with its pre-tokenizer"


def _adapt_images(module: Any) -> str:
    from PIL import Image

    kind, to_rgb = module.Qwen2VLImageProcessor, module.convert_to_rgb
    preprocess = kind.preprocess
    known = inspect.signature(preprocess).parameters

    @functools.wraps(preprocess)
    def with_known_options(*args: Any, **kwargs: Any) -> Any:
        return preprocess(*args, **{name: kwargs[name] for name in kwargs if name in known})

    kind.preprocess = with_known_options
    module.convert_to_rgb = lambda image: to_rgb(image) if isinstance(image, Image.Image) else image
    return "options and pictures of kinds that transformers 4 lets through"


_ADAPTATIONS = {
    "processing_qwen2_vl": _adapt_processor,
    "tokenization_qwen2_fast": _adapt_tokenizer,
    "image_processing_qwen2_vl": _adapt_images,
}
