"""Any model as one of sentence-transformers.

``SentenceTransformer(folder, trust_remote_code=True)`` imports :class:`EmbedderModule` for folders
with our ``modules.json``; :func:`sentence_transformer` makes the same of any checkpoint or model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ume_models.atomic import write_atomically
from ume_models.backbone.checkpoint import write_json
from ume_models.backbone.fields import read_json
from ume_models.embedders.library_files import SENTENCE_CONFIG
from ume_models.embedders.loading import resolve
from ume_models.embedders.rows import PROCESSOR_INPUTS
from ume_models.errors import ItemError, UmeError
from ume_models.interfaces.batches import prepare_batch
from ume_models.interfaces.inputs import describe_input, make_item
from ume_models.interfaces.models import Source, load_options, open_model, prompt_limit
from ume_models.processing.items import Item

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

OPTIONS_FILE = "sentence_plume_config.json"


class EmbedderModule(nn.Module):
    """The only module of a sentence-transformers pipeline around a model of any family.

    Inputs are strings, PIL images, image files and item dictionaries ``{"text", "image" |
    "images" | "video", "instruction"}``; a prompt is put in front of the text. Embeddings equal
    those of ``model.encode``: unit-norm float32. ``encode(..., **options)`` passes the family's
    options on.

    Args:
        model, options: see ``interfaces.models.open_model``.
        max_seq_length: longest prompt in tokens, template and visual tokens included. Longer ones
            raise ``ItemError``: nothing is truncated. Default: what the model's positions hold.
    """

    # Looked up by sentence-transformers.
    save_in_root = True
    modalities = ("text", "image", "video", ("image", "text"), ("text", "video"), "message")

    def __init__(
        self, model: Source = None, *, max_seq_length: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.embedder, self.embed_options = open_model(model, options)
        self.max_seq_length = max_seq_length
        self.eval()

    # -- what sentence-transformers asks a module -------------------------------------------

    @property
    def forward_kwargs(self) -> frozenset[str]:
        """Options of ``encode`` that reach :meth:`forward`."""
        return frozenset(self.embedder.Options.names())

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.embedder.tokenizer

    @property
    def processor(self) -> Any:
        """The processor of items."""
        return self.embedder.processor

    @property
    def max_seq_length(self) -> int:
        """Longest prompt in tokens; a longer one is an error."""
        return self._most() if self._limit is None else self._limit

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"max_seq_length must be an integer or None, got {value!r}")
        if value is not None and not 0 < value <= self._most():
            raise ValueError(
                f"max_seq_length must be 1 … {self._most()}, the prompt tokens the model holds, "
                f"got {value}"
            )
        self._limit: int | None = value

    def _most(self) -> int:
        return prompt_limit(self.embedder, self.embed_options)

    def get_embedding_dimension(self) -> int:
        """Width of an embedding."""
        return self.embedder.hidden_size

    def get_sentence_embedding_dimension(self) -> int:
        """Width of an embedding."""
        return self.embedder.hidden_size

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
            return prepare_batch(self.processor, items, self.max_seq_length)
        except ItemError as error:
            if error.index is None:
                raise
            value = inputs[error.index]
            given = value.id if isinstance(value, Item) else None
            given = value.get("id") if isinstance(value, Mapping) else given
            reason = f"{error.reason} — the item is {describe_input(value)}"
            raise error.at(None, None if given is None else str(given), reason) from error

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` float32 ``[B, D]`` to the features.

        Raises:
            UmeError: in training mode with gradients on; there are none.
        """
        if self.training and torch.is_grad_enabled():
            raise UmeError(
                "this module computes no gradients: call model.eval() to embed"
            )
        inputs = {name: features[name] for name in PROCESSOR_INPUTS if name in features}
        chosen = vars(self.embed_options.replaced(options))
        embeddings = self.embedder.embed(**inputs, **chosen)
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
        self.embedder.save_pretrained(target)
        if written is not None:
            write_atomically(prompts, written)
        write_json(target / OPTIONS_FILE, self.options())

    def options(self) -> dict[str, Any]:
        """What :meth:`load` needs beside the checkpoint to make this module again."""
        found = load_options(self.embedder, self.embed_options)
        return {**found, "max_seq_length": self._limit}

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
    ) -> EmbedderModule:
        """Called by ``SentenceTransformer(folder)``.

        ``model_kwargs``, ``processor_kwargs`` and ``config_kwargs`` take ``max_seq_length`` and
        the options of ``ume_models.load``; ``torch_dtype`` counts as ``dtype``.

        Raises:
            CheckpointError: the checkpoint does not load.
            TypeError, ValueError: an option does not exist, or is not supported.
        """
        if backend != "torch":
            raise ValueError(f"backend={backend!r} is not supported; only 'torch' is")
        if tokenizer_kwargs and tokenizer_kwargs is not processor_kwargs:
            raise ValueError(f"tokenizer_kwargs are not used, got {sorted(tokenizer_kwargs)}")
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_folder, "revision": revision}
        hub["local_files_only"] = local_files_only
        folder = resolve(model_name_or_path, **hub) / subfolder
        saved = folder / OPTIONS_FILE
        options: dict[str, Any] = dict(read_json(saved)) if saved.is_file() else {}
        for given in (config_kwargs, processor_kwargs, model_kwargs):
            options.update(given or {})
        if "torch_dtype" in options:
            options.setdefault("dtype", options.pop("torch_dtype"))
        if options.get("dtype", "auto") is None:
            options.pop("dtype")
        # sentence-transformers moves the model itself
        options.setdefault("device", "cpu")
        return cls(folder, **options)


PlumeModule = EmbedderModule  # the name in folders written before there were families


def sentence_transformer(
    model: Source = None,
    *,
    max_seq_length: int | None = None,
    prompts: Mapping[str, str] | None = None,
    default_prompt_name: str | None = None,
    truncate_dim: int | None = None,
    **options: Any,
) -> SentenceTransformer:
    """A ``SentenceTransformer`` around a checkpoint in the official layout or a loaded model.

    Args:
        model, options: see ``interfaces.models.open_model``.
        max_seq_length: see :class:`EmbedderModule`.
        prompts, default_prompt_name, truncate_dim: as in ``SentenceTransformer``. Without
            ``prompts`` those saved beside the checkpoint are used.

    Raises:
        ImportError: sentence-transformers 5.4 or newer is not installed.
        CheckpointError: the checkpoint does not load.
    """
    library = _library()
    module = EmbedderModule(model, max_seq_length=max_seq_length, **options)
    if prompts is None:
        prompts, saved_default = _saved_prompts(module.embedder.sources)
        default_prompt_name = default_prompt_name or saved_default
    return library.SentenceTransformer(
        modules=[module],
        device=str(module.embedder.device),
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
            content = read_json(path)
            return dict(content.get("prompts") or {}), content.get("default_prompt_name")
    return {}, None
