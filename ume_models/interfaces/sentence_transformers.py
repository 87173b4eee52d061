"""PLUME as a sentence-transformers model.

``SentenceTransformer(folder, trust_remote_code=True)`` imports :class:`PlumeModule` for folders
with our ``modules.json``; :func:`sentence_transformer` makes the same of any checkpoint or model.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ume_models.atomic import write_atomically
from ume_models.backbone.checkpoint import write_json
from ume_models.backbone.config import read_json
from ume_models.embedders.library_files import SENTENCE_CONFIG
from ume_models.embedders.loading import load
from ume_models.embedders.plume import Mode, PlumeForEmbedding
from ume_models.embedders.rows import PROCESSOR_INPUTS
from ume_models.errors import ItemError, UmeError
from ume_models.interfaces.batches import prepare_batch, prompt_limit
from ume_models.interfaces.inputs import describe_input, make_item
from ume_models.interfaces.locate import checkpoint_folder
from ume_models.processing.items import Item

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

OPTIONS_FILE = "sentence_plume_config.json"


class PlumeModule(nn.Module):
    """The only module of a sentence-transformers pipeline around a PLUME model.

    Inputs are strings, PIL images, image files and item dictionaries ``{"text", "image" |
    "images" | "video", "instruction"}``; a prompt is put in front of the text. Embeddings equal
    those of ``PlumeForEmbedding.encode``: unit-norm float32.

    ``encode(..., mode=…, latent_steps=…, context=…, exclude_experts=…, verify_eos=…)`` are passed
    on to ``PlumeForEmbedding.embed``.

    Args:
        model: a loaded model.
        mode: default of ``encode``: ``"gen"``, ``"disc"`` or ``"last"``.
        max_seq_length: longest prompt in tokens, template and visual tokens included. Longer ones
            raise ``ItemError``: nothing is truncated. Default: what the model's positions hold.
    """

    # Looked up by sentence-transformers.
    save_in_root = True
    forward_kwargs = frozenset({"mode", "latent_steps", "context", "exclude_experts", "verify_eos"})
    modalities = ("text", "image", "video", ("image", "text"), ("text", "video"), "message")

    def __init__(
        self, model: PlumeForEmbedding, mode: Mode = "gen", max_seq_length: int | None = None
    ) -> None:
        super().__init__()
        if mode not in ("gen", "disc", "last"):
            raise ValueError(f"mode must be 'gen', 'disc' or 'last', got {mode!r}")
        self.plume = model
        self.mode: Mode = mode
        self._limit: int | None = None
        self.max_seq_length = max_seq_length
        self.eval()

    # -- what sentence-transformers asks a module -------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.plume.tokenizer

    @property
    def processor(self) -> Any:
        """The processor of items."""
        return self.plume.processor

    @property
    def max_seq_length(self) -> int | None:
        """Longest prompt in tokens; a longer one is an error."""
        return prompt_limit(self.plume) if self._limit is None else self._limit

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"max_seq_length must be an integer or None, got {value!r}")
        if value is not None and not 0 < value <= prompt_limit(self.plume):
            raise ValueError(
                f"max_seq_length must be 1 … {prompt_limit(self.plume)}, the prompt tokens the "
                f"model holds, got {value}"
            )
        self._limit = value

    def get_embedding_dimension(self) -> int:
        """Width of an embedding."""
        return self.plume.hidden_size

    def get_sentence_embedding_dimension(self) -> int:
        """Width of an embedding."""
        return self.plume.hidden_size

    def tokenize(self, texts: Sequence[Any], **options: Any) -> dict[str, torch.Tensor]:
        """:meth:`preprocess` under its older name."""
        return self.preprocess(texts, **options)

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        task: str | None = None,
        processing_kwargs: Mapping[str, Any] | None = None,
        **forward_options: Any,
    ) -> dict[str, torch.Tensor]:
        """A padded batch in processor layout, see ``interfaces.batches.prepare_batch``.

        ``task`` and ``forward_options`` change nothing here.

        Raises:
            ItemError: an input cannot be embedded. Its position is unknown, since
                sentence-transformers sorts inputs by length, so the error shows the input.
        """
        if processing_kwargs:
            raise ValueError(
                "processing_kwargs are not used; give min_pixels and max_pixels when the model is "
                "loaded"
            )
        try:
            items = [
                make_item(value, number, prompt or "", paths=True)
                for number, value in enumerate(inputs)
            ]
            return prepare_batch(self.plume, items, self._limit)
        except ItemError as error:
            if error.index is None:
                raise
            value = inputs[error.index]
            given = value.id if isinstance(value, Item) else None
            given = value.get("id") if isinstance(value, Mapping) else given
            reason = f"{error.reason} — the item is {describe_input(value)}"
            raise ItemError(reason, None, None if given is None else str(given)) from error

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` float32 ``[B, D]`` to the features.

        Raises:
            UmeError: in training mode with gradients on; there are none.
        """
        if self.training and torch.is_grad_enabled():
            raise UmeError(
                "this module computes no gradients: call model.eval() to embed; "
                "ume_models.training has the training step"
            )
        inputs = {name: features[name] for name in PROCESSOR_INPUTS if name in features}
        embeddings = self.plume.embed(**inputs, **{"mode": self.mode, **options})
        return {**features, "sentence_embedding": embeddings}

    # -- files ------------------------------------------------------------------------------

    def save(
        self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Write the official checkpoint layout and, beside it, this module's options."""
        if not safe_serialization:
            raise ValueError("only safetensors are written; leave safe_serialization at True")
        target = Path(output_path)
        # sentence-transformers has just written its prompts; ours are those of the old folder
        prompts = target / SENTENCE_CONFIG
        written = prompts.read_bytes() if prompts.is_file() else None
        self.plume.save_pretrained(target)
        if written is not None:
            write_atomically(prompts, written)
        write_json(target / OPTIONS_FILE, self.options())

    def options(self) -> dict[str, Any]:
        """What makes this module give other embeddings than ``load(folder)`` would."""
        settings, processor = self.plume.settings, self.plume.processor
        found = {
            "mode": self.mode,
            "max_seq_length": self._limit,
            "latent_steps": settings.latent_steps,
            "context": settings.context,
            "max_new_tokens": settings.max_new_tokens,
            "disc_offset": settings.disc_offset,
            "multi_image": processor.multi_image,
            "empty": processor.empty,
            "min_pixels": processor.config.min_pixels,
            "max_pixels": processor.config.max_pixels,
        }
        adapter = self.plume.latent_moe_transition
        if adapter is not None:
            found["top_k"] = adapter.top_k
        return found

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> PlumeModule:
        """Called by ``SentenceTransformer(folder)``.

        ``model_kwargs``, ``processor_kwargs`` and ``config_kwargs`` take ``mode``,
        ``max_seq_length`` and the options of ``ume_models.load``; ``torch_dtype`` counts as
        ``dtype``.

        Raises:
            CheckpointError: the checkpoint does not load.
            ValueError: an option does not exist.
        """
        if backend != "torch":
            raise ValueError(f"backend={backend!r} is not supported; only 'torch' is")
        if tokenizer_kwargs and tokenizer_kwargs is not processor_kwargs:
            raise ValueError(f"tokenizer_kwargs are not used, got {sorted(tokenizer_kwargs)}")
        folder = checkpoint_folder(
            model_name_or_path,
            subfolder,
            token=token,
            cache_dir=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        saved = folder / OPTIONS_FILE
        options: dict[str, Any] = dict(read_json(saved)) if saved.is_file() else {}
        for given in (config_kwargs, processor_kwargs, model_kwargs):
            options.update(given or {})
        if "torch_dtype" in options:
            options.setdefault("dtype", options.pop("torch_dtype"))
        if options.get("dtype", "auto") is None:
            options.pop("dtype")
        mode, limit = options.pop("mode", "gen"), options.pop("max_seq_length", None)
        # sentence-transformers moves the model itself
        options.setdefault("device", "cpu")
        unknown = sorted(set(options) - set(inspect.signature(load).parameters))
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: no such option; there are mode, max_seq_length and the "
                "options of ume_models.load"
            )
        return cls(load(folder, **options), mode, limit)


def sentence_transformer(
    model: PlumeForEmbedding | str | Path | None = None,
    *,
    mode: Mode = "gen",
    max_seq_length: int | None = None,
    prompts: Mapping[str, str] | None = None,
    default_prompt_name: str | None = None,
    truncate_dim: int | None = None,
    **load_options: Any,
) -> SentenceTransformer:
    """A ``SentenceTransformer`` around a checkpoint in the official layout or a loaded model.

    Args:
        model: folder, hub id, a loaded model (it is used, not copied), or None for the bundled one.
        mode, max_seq_length: see :class:`PlumeModule`.
        prompts, default_prompt_name, truncate_dim: as in ``SentenceTransformer``. Without
            ``prompts`` those saved beside the checkpoint are used.
        load_options: options of ``ume_models.load``.

    Raises:
        ImportError: sentence-transformers 5.4 or newer is not installed.
        CheckpointError: the checkpoint does not load.
    """
    library = _library()
    if isinstance(model, PlumeForEmbedding):
        if load_options:
            raise TypeError(f"a loaded model takes no load options, got {sorted(load_options)}")
    else:
        model = load(model, **load_options)
    if prompts is None:
        prompts, saved_default = _saved_prompts(model.sources)
        default_prompt_name = default_prompt_name or saved_default
    return library.SentenceTransformer(
        modules=[PlumeModule(model, mode, max_seq_length)],
        device=str(model.device),
        prompts=dict(prompts),
        default_prompt_name=default_prompt_name,
        similarity_fn_name="cosine",
        truncate_dim=truncate_dim,
    )


def _library() -> Any:
    try:
        import sentence_transformers
    except ImportError as error:
        raise ImportError(
            "this needs sentence-transformers: pip install 'sentence-transformers>=5.4'"
        ) from error
    major, minor = sentence_transformers.__version__.split(".")[:2]
    if (int(major), int(minor)) < (5, 4):
        raise ImportError(
            f"sentence-transformers {sentence_transformers.__version__} is too old: "
            "pip install 'sentence-transformers>=5.4'"
        )
    return sentence_transformers


def _saved_prompts(sources: Sequence[Path]) -> tuple[dict[str, str], str | None]:
    for source in sources:
        path = source / SENTENCE_CONFIG
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            return dict(content.get("prompts") or {}), content.get("default_prompt_name")
    return {}, None
