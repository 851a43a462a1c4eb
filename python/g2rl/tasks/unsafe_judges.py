"""Which judges of reasoning-gym evaluate answers as code: read from their source, so that it holds for any version."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

_EVALUATE = frozenset({"eval", "exec", "compile", "__import__"})
_DELEGATE = "score_answer"  # of another data set, as `composite` calls it


def evaluates(data_set: type) -> frozenset[str]:
    """Return what a data set's `score_answer` may hand text to that evaluates it, by name; empty where nothing.

    Followed are functions, methods and classes of reasoning-gym, from `score_answer` on. Counted are Python's own
    evaluation, whatever is called of sympy, which takes text for expressions nearly everywhere, and judges of other
    data sets. What is reached through values, such as a method of an object that a function returned, is not followed.
    """
    found: set[str] = set()
    seen: set[Any] = set()
    waiting = [_plain(getattr(data_set, _DELEGATE))]
    while waiting:
        function = waiting.pop()
        # Methods that a dataclass or a named tuple writes itself have no source, and evaluate nothing.
        if function is None or function in seen or function.__code__.co_filename.startswith("<"):
            continue
        seen.add(function)
        for name, called in _calls(function, data_set):
            if name.rpartition(".")[2] in _EVALUATE and (called is None or called is getattr(builtins, name, None)):
                found.add(name)
            elif _of(called, "sympy") or (name.endswith(f".{_DELEGATE}") and called is None):
                found.add(name)
            elif _of(called, "reasoning_gym"):
                waiting += _functions(called)
    return frozenset(found)


def _of(value: Any, package: str) -> bool:
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return isinstance(module, str) and module.partition(".")[0] == package


def _plain(value: Any) -> FunctionType | None:
    value = inspect.unwrap(value.__func__ if inspect.ismethod(value) else value)
    return value if isinstance(value, FunctionType) else None


def _functions(value: Any) -> list[FunctionType | None]:
    return [_plain(f) for _, f in inspect.getmembers(value, callable)] if inspect.isclass(value) else [_plain(value)]


def _calls(function: FunctionType, data_set: type) -> Iterator[tuple[str, Any]]:
    """Yield every call in `function`: as it is written, and what it is, None where the source does not say."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    names = {"self": data_set, "cls": data_set, **vars(builtins), **function.__globals__, **_imports(tree, function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            written = ast.unparse(node.func)
            if written.startswith("super()."):
                attribute = written.partition(".")[2]
                yield from ((written, getattr(b, attribute)) for b in data_set.__mro__[1:] if hasattr(b, attribute))
            else:
                yield written, _resolve(node.func, names)


def _imports(tree: ast.AST, function: FunctionType) -> dict[str, Any]:
    """What the statements inside a function import."""
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module, top = importlib.import_module(alias.name), alias.name.partition(".")[0]
                names[alias.asname or top] = module if alias.asname else importlib.import_module(top)
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            module = importlib.import_module(relative, function.__globals__["__package__"])
            names |= {alias.asname or alias.name: getattr(module, alias.name, None) for alias in node.names}
    return names


def _resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolve(node.value, names)
        return None if owner is None else getattr(owner, node.attr, None)
    return None
