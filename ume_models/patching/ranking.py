"""Ranking of the evaluation scripts: all candidates of each query, in order, block by block.

The scripts of PLUME, UME-R1 and VLM2Vec rank inside of ``main``::

    cosine_scores = np.dot(qry_embeds, cand_embeds.T)
    ranked_candids = np.argsort(-cosine_scores, axis=1)

There is no function to replace, so the name ``np`` of the script is: by a stand-in that forwards
everything to NumPy, except that these two calls wait until rows are asked for. NumPy itself, and
every other module that uses it, is untouched.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from ume_models.errors import PatchError
from ume_models.patching.ranked import RankedRows
from ume_models.patching.recipes import Recipe, Target
from ume_models.patching.report import Entry


class _Deferred(NDArrayOperatorsMixin):
    """Becomes the array it stands for as soon as anything else is done with it than waiting."""

    def __init__(self, shape: tuple[int, int], dtype: type) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.ndim, self.size = 2, shape[0] * shape[1]
        self.array: np.ndarray | None = None

    def compute(self) -> np.ndarray:
        raise NotImplementedError

    def value(self) -> np.ndarray:
        """The array; always the same object, since it may be written to."""
        if self.array is None:
            self.array = self.compute()
        return self.array

    # isinstance(scores, np.ndarray) holds, as it would in the script without us. What needs
    # NumPy's memory layout itself (torch.from_numpy) still says that this is not one.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return np.ndarray

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.value()
        return array.astype(dtype or array.dtype, copy=bool(copy))

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if "out" in options:
            options["out"] = tuple(map(_plain, options["out"]))
        return getattr(ufunc, method)(*map(_plain, inputs), **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy, pickle and NumPy look for
            raise AttributeError(name)
        return getattr(self.value(), name)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.value())

    def __getitem__(self, key: Any) -> Any:
        return self.value()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.value()[key] = value

    def __contains__(self, item: Any) -> bool:
        return item in self.value()

    def __bool__(self) -> bool:
        return bool(self.value())

    def __copy__(self) -> np.ndarray:
        return self.value().copy()

    def __deepcopy__(self, memo: Any) -> np.ndarray:
        return self.value().copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return repr(self.value())


def _plain(value: Any) -> Any:
    # type() and not isinstance: these objects say that they are arrays.
    return value.value() if issubclass(type(value), _Deferred) else value


class Product(_Deferred):
    """``np.dot(queries, candidates)``, or its negative, not computed yet."""

    def __init__(self, queries: np.ndarray, candidates: np.ndarray, negative: bool = False) -> None:
        super().__init__((queries.shape[0], candidates.shape[1]), np.float32)
        self.queries, self.candidates, self.negative = queries, candidates, negative

    def compute(self) -> np.ndarray:
        product: np.ndarray = np.dot(self.queries, self.candidates)
        return -product if self.negative else product

    def __neg__(self) -> Any:
        if self.array is not None:
            return -self.array
        return Product(self.queries, self.candidates, not self.negative)


class Ranking(_Deferred):
    """``np.argsort(-product, axis=1)``, whose rows are found as they are asked for."""

    def __init__(self, product: Product) -> None:
        super().__init__(product.shape, np.int64)
        self.rows = RankedRows(product.queries, product.candidates)

    def compute(self) -> np.ndarray:
        return self.rows.whole()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows) if self.array is None else iter(self.array)

    def __getitem__(self, key: Any) -> Any:
        simple = isinstance(key, int | np.integer) and -len(self) <= key < len(self)
        if simple and self.array is None:
            return self.rows.row(int(key) % len(self))
        return self.value()[key]

    def tolist(self) -> list[list[int]]:
        return [row.tolist() for row in self]


class NumpyWithRanking(ModuleType):
    """NumPy, of which a script's ``dot`` and ``argsort`` wait for the rows to be asked for."""

    def __init__(self, numpy: ModuleType) -> None:
        super().__init__(numpy.__name__, numpy.__doc__)
        vars(self)["_numpy"] = numpy
        for name in ("__file__", "__loader__", "__package__", "__path__", "__spec__"):
            vars(self)[name] = getattr(numpy, name, None)

    def dot(self, a: Any, b: Any, out: Any = None) -> Any:
        """``numpy.dot``; of two float32 matrices, when its values are needed."""
        if out is None and _is_matrix(a) and _is_matrix(b) and a.shape[1] == b.shape[0]:
            return Product(a, b)
        return self._numpy.dot(a, b, out=out)

    def argsort(self, a: Any, axis: Any = -1, kind: Any = None, **options: Any) -> Any:
        """``numpy.argsort``; of a waiting product's negative, row by row, ties in order."""
        waiting = type(a) is Product and a.negative and a.array is None
        if waiting and axis in (1, -1) and kind in _KINDS and not options:
            return Ranking(a)
        return self._numpy.argsort(_plain(a), axis, kind, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._numpy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._numpy, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._numpy, name)

    def __dir__(self) -> list[str]:
        return dir(self._numpy)

    def __repr__(self) -> str:
        return f"{self._numpy!r} with ranking by ume_models"

    def __reduce__(self) -> Any:
        # What is sent to other processes uses NumPy there.
        return importlib.import_module, ("numpy",)


_KINDS = (None, "quicksort", "heapsort", "mergesort", "stable")


def _is_matrix(value: Any) -> bool:
    plain = type(value) is np.ndarray and value.ndim == 2 and value.dtype == np.float32
    return plain and value.size > 0


def _with_ranking(original: Any) -> NumpyWithRanking:
    if original is not np:
        raise PatchError(
            f"the script's np is {original!r}, not NumPy: somebody else replaced it; take that "
            "back first"
        )
    return NumpyWithRanking(original)


PLUME_MARKS = ("_latent_reasoning_generate_rep",)
UME_R1_MARKS = ("get_disc_embedding_idx", "get_gen_embedding_idx")
SCRIPT_MARKS = ("encode_embeddings", "RankingMetrics")


def _recipe(name: str, module: str, marks: tuple[str, ...], without: tuple[str, ...]) -> Recipe:
    return Recipe(
        name=name,
        modules=(module, "__main__"),
        marks=marks,
        without=without,
        targets=(
            Target(
                "np",
                (),
                make=_with_ranking,
                by="NumPy, with dot and argsort that rank block by block",
                reason="in this script only; all candidates of each query, in order, on all "
                "threads and without the matrix of scores; ties go to the lowest index, which "
                "NumPy leaves open",
            ),
        ),
        left_alone=(
            Entry(
                "processor.score",
                "left alone",
                reason="late-interaction scores (3-D embeddings) and the short candidate lists of "
                "local ranking are ranked as before",
            ),
        ),
    )


RECIPES: tuple[Recipe, ...] = (
    _recipe("plume-eval", "eval_twomode", PLUME_MARKS, ()),
    _recipe("ume-r1", "eval_twomode", UME_R1_MARKS[:1], PLUME_MARKS),
    _recipe("vlm2vec", "eval", SCRIPT_MARKS, (*PLUME_MARKS, *UME_R1_MARKS)),
)
