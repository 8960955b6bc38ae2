"""Properties and functions that answer a question change no state; tests read the source code."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator

import pytest

import pipe

QUESTION = re.compile(r"_?(is|are|has|was|may|can|needs|lists|suits)(_|$)")
ACTIONS = frozenset({
    "add", "append", "appendleft", "cancel", "clear", "close", "cut", "discard", "end", "extend",
    "insert", "notify", "notify_all", "pop", "popleft", "put", "release", "remove", "send", "set",
    "setdefault", "start", "stop", "terminate", "update", "wait", "wait_for", "wake", "write",
})  # fmt: skip
LEVELS = frozenset({"debug", "info", "warning", "error", "exception", "log"})

Function = ast.FunctionDef | ast.AsyncFunctionDef
TREE = ast.parse(inspect.getsource(pipe))


def is_question(function: Function) -> bool:
    decorators = [ast.unparse(each) for each in function.decorator_list]
    is_property = any(each.rpartition(".")[2].endswith("property") for each in decorators)
    return is_property or bool(QUESTION.match(function.name))


def questions() -> list[tuple[str, Function]]:
    """All functions of pipe.py that answer a question, with the names of their classes."""
    found: list[tuple[str, Function]] = []
    for node in ast.walk(TREE):
        if not isinstance(node, ast.ClassDef | ast.Module):
            continue
        owner = node.name if isinstance(node, ast.ClassDef) else "pipe"
        functions = [each for each in node.body if isinstance(each, ast.FunctionDef)]
        found += [(owner, function) for function in functions if is_question(function)]
    return found


def root_of(node: ast.expr) -> str:
    """The variable at the start of an expression, such as `a` in `a.b[0].c`."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def actions_of(function: Function) -> Iterator[str]:
    """The expressions that change anything except local variables, or write to the log."""
    own = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)
           and isinstance(node.ctx, ast.Store)}  # fmt: skip
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute | ast.Subscript):
            is_changed = not isinstance(node.ctx, ast.Load)
            if is_changed and root_of(node) not in own:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            root, verb = root_of(node.func), node.func.attr.lstrip("_")
            if (verb in ACTIONS and root not in own) or (root == "log" and verb in LEVELS):
                yield ast.unparse(node)


@pytest.mark.parametrize(
    "function", [pytest.param(each, id=f"{owner}.{each.name}") for owner, each in questions()]
)
def test_question_changes_nothing(function: Function) -> None:
    assert list(actions_of(function)) == []
