"""Which versions of other repositories' functions are known: they were read and compared with ours.

A function is known by the digest of its normalised syntax tree. Left out of the tree: formatting,
comments, docstrings, annotations, and what Python's own versions add to it. Everything else counts,
names of local variables and texts of messages too, and so do the values of the plain constants
(strings, numbers, None) that the function reads from its module.

What a function calls decides what it computes, so its helpers must be known as well: functions and
classes of the same module that it names, and methods that it calls on itself. What it imports from
other modules is taken for known; replacements call nothing of that kind.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

ORIGINAL = "__ume_original__"
"""Attribute of a replacement that holds what it replaced."""

_IGNORED = frozenset(
    ("annotation", "returns", "type_comment", "type_params", "kind", "ctx", "simple")
)


def unknown(
    function: Any, owner: Any, module: ModuleType, known: Mapping[str, str], apart: frozenset[str]
) -> str | None:
    """Name of the function, or of the first helper, whose version is not known; None if all are.

    Args:
        function: as it stands in its owner.
        owner: the module, or the class whose method it is.
        module: where it was written.
        known: digests by qualified name, separated by spaces.
        apart: qualified names that are judged on their own.
    """
    queue, seen = [function], set[str]()
    while queue:
        part = plain(queue.pop())
        name = part.__qualname__
        if name in seen or (seen and name in apart):
            continue
        seen.add(name)
        tree = _tree(part)
        if tree is None or _digest(tree, part, module) not in known.get(name, "").split():
            return name
        queue.extend(_helpers(tree, owner, module))
    return None


def digests(function: Any, owner: Any, module: ModuleType) -> dict[str, str]:
    """Digests of a function and its helpers by qualified name: what to enter for a new version."""
    found: dict[str, str] = {}
    queue = [function]
    while queue:
        part = plain(queue.pop())
        tree = _tree(part)
        if part.__qualname__ not in found and tree is not None:
            found[part.__qualname__] = _digest(tree, part, module)
            queue.extend(_helpers(tree, owner, module))
    return found


MODELLING = frozenset(
    (
        "2f35a0a277eff806",  # qwen2_vl: VLM2Vec 6ac33bb on, PLUME 942c2fa on
        "bcc2a791e78a5c11",  # qwen2_vl: VLM2Vec 418e3f1 to 6e1e1d4
        "e656e6d16c1ba56a",  # qwen2_5_vl: VLM2Vec 6ac33bb on, PLUME 942c2fa on
        "33408e9681f6474b",  # qwen2_5_vl: VLM2Vec 418e3f1 to 6e1e1d4
    )
)
"""Digests of the checked versions of modelling files that repositories bring along."""


@functools.lru_cache
def modelling_known(name: str) -> bool:
    """Whether the classes of an imported module are those of transformers, or of a known copy."""
    if name.split(".")[0] in ("transformers", "torch", "peft", "ume_models"):
        return True
    try:
        return modelling_digest(inspect.getsource(sys.modules[name])) in MODELLING
    except (KeyError, OSError, TypeError, SyntaxError):
        return False


def modelling_digest(source: str) -> str:
    """Digest of a whole module."""
    return _hashed(_normal(ast.parse(source)))


def plain(value: Any) -> Any:
    """A function behind methods, properties and this package's replacements."""
    while True:
        if isinstance(value, FunctionType) and ORIGINAL in vars(value):
            value = vars(value)[ORIGINAL]
        elif isinstance(value, staticmethod | classmethod):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        else:
            return value


def _tree(part: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None


def _digest(tree: ast.AST, part: Any, module: ModuleType) -> str:
    names = sorted(_names(tree))
    values = vars(module)
    constants = [
        f"{name}={values[name]!r}"
        for name in names
        if type(values.get(name, ...)) in (str, int, float, bool, type(None))
        and not name.startswith("__")
    ]
    text = "\n".join((part.__qualname__, _normal(tree), *constants))
    return _hashed(text)


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _normal(node: Any) -> str:
    if isinstance(node, list):
        return f"[{','.join(map(_normal, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list):
            value = [one for one in value if not _is_text(one)]
        if name not in _IGNORED and value not in (None, []):
            fields.append(f"{name}={_normal(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _is_text(statement: ast.AST) -> bool:
    """Docstrings, and other strings that stand alone."""
    return isinstance(statement, ast.Expr) and (
        isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
    )


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in _walk(tree) if isinstance(node, ast.Name)}


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but annotations."""
    yield node
    for name, value in ast.iter_fields(node):
        if name not in _IGNORED:
            for child in value if isinstance(value, list) else (value,):
                if isinstance(child, ast.AST):
                    yield from _walk(child)


def _helpers(tree: ast.AST, owner: Any, module: ModuleType) -> Iterator[Any]:
    """Functions and classes of the module that a function names, and its own class's methods."""
    for name in sorted(_names(tree)):
        value = plain(vars(module).get(name))
        if isinstance(value, FunctionType | type) and value.__module__ == module.__name__:
            yield value
    if isinstance(owner, type):
        for node in _walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                method = inspect.getattr_static(owner, node.attr, None)
                if node.value.id in ("self", "cls") and isinstance(plain(method), FunctionType):
                    yield method
