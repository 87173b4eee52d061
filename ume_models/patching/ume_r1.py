"""UME-R1's evaluation, ``src/eval/VLM2Vec/eval_twomode.py`` of XMUDeepLIT/UME-R1.

Mode ``disc`` reads the hidden state at ``<disc_emb>`` of one forward call. Mode ``gen`` lets the
model write its reasoning and reads the hidden state at the ``<gen_emb>`` it generates. The same two
calls are in the ``eval.py`` that PLUME bundles.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ume_models.patching.recipes import Recipe, Target
from ume_models.patching.report import Entry
from ume_models.patching.single_pass import single_pass


def with_single_pass(look_up: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes of ``encode_embeddings(model, loader, …)`` one that computes the states it reads.

    Args:
        look_up: the script's function that finds the token to read in mode ``disc``.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def encode_embeddings(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            read = None
            if given.get("mode") == "disc":
                find = original.__globals__[look_up]
                token = given["processor"].tokenizer.convert_tokens_to_ids("<disc_emb>")

                def read(ids: torch.Tensor) -> Sequence[int]:
                    found: Sequence[int] = find(ids.tolist(), token)
                    return found

            with single_pass(given["model"], read):
                return original(*args, **kwargs)

        return encode_embeddings

    return make


def on_lists(original: Callable[..., Any]) -> Callable[..., Any]:
    """Which token of each row is read, looked up in lists.

    The original compares element by element of a tensor: on a GPU each is a synchronisation.
    """

    @functools.wraps(original)
    def embedding_idx(generated_ids_trimmed: Any, *args: Any, **kwargs: Any) -> Any:
        rows = [r.tolist() if isinstance(r, torch.Tensor) else r for r in generated_ids_trimmed]
        return original(rows, *args, **kwargs)

    return embedding_idx


PLUME_MARKS = ("_latent_reasoning_generate_rep", "_get_backbone_model")
UME_R1_MARKS = ("get_disc_embedding_idx", "get_gen_embedding_idx")

_ENCODE_PARAMETERS = (
    "model",
    "loader",
    "training_args",
    "model_args",
    "full_dataset",
    "encode_side",
    "description",
    "processor",
)


def _encode(*further: str, modes: str) -> Target:
    return Target(
        "encode_embeddings",
        (*_ENCODE_PARAMETERS, *further),
        make=with_single_pass(UME_R1_MARKS[0]),
        by="the same loop within ume_models.patching.single_pass",
        reason=f"{modes}; the layers of the model are patched as ume_models.accelerate does, "
        "while it runs",
    )


def _lookup(name: str) -> Target:
    return Target(
        name,
        ("generated_ids_trimmed", "EMBEDDING_TOKEN_ID"),
        make=on_lists,
        by="the same look-up in lists",
        reason="one copy from the device instead of one for each token",
    )


_DISC = (
    "disc: no logits, no cache, no list of all layers' states; without padding and up to the "
    "token read where the engine knows the model"
)
_GEN = "gen: the model's own generate"

_GENERATION = Entry(
    "model.generate",
    "left alone",
    reason="generation, sampling and the left-padded batch are transformers' own, so that the "
    "same tokens come out",
)

_UME_R1 = {  # XMUDeepLIT/UME-R1 55e5512
    "encode_embeddings": "520e085d36a8004e",
    "get_disc_embedding_idx": "a755de0f553dff51",
    "get_gen_embedding_idx": "3528cf670b770ad4",
    "normalize_reps": "5a03482cacad89da",
}
_BUNDLED = {  # VLM2Vec/eval.py of PLUME 942c2fa and 18db7e4
    "encode_embeddings": "d100473c2916cb5c",
    "get_embedding_idx": "6a4cbf1e2ad8179c",
    "normalize_reps": "5a03482cacad89da",
}

RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="ume-r1",
        modules=("eval_twomode", "__main__"),
        marks=UME_R1_MARKS,
        without=PLUME_MARKS,
        known=_UME_R1,
        targets=(
            _encode("mode", modes=f"{_DISC}; {_GEN}"),
            *map(_lookup, UME_R1_MARKS),
        ),
        left_alone=(_GENERATION,),
    ),
    Recipe(
        name="vlm2vec",
        modules=("eval", "__main__"),
        marks=("encode_embeddings", "get_embedding_idx"),
        without=(*PLUME_MARKS, *UME_R1_MARKS),
        known=_BUNDLED,
        targets=(_encode(modes=_GEN), _lookup("get_embedding_idx")),
        left_alone=(_GENERATION,),
    ),
)
