"""Triton's interpreter, without work that changes no result.

It rewrites its whole language again at each call of a function; here it does so once a launch. At each sum, difference
and product of integers it works out whether that overflows, for an assertion that it has only when debugging. And it
makes its table of types again whenever it looks one up.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

try:
    from triton.runtime import interpreter
except ImportError:  # no triton, and so no kernels
    interpreter = None


def once_a_launch(rewrite: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`rewrite(fn)` changes the modules that fn mentions, and returns what restores them when a launch has ended."""
    done: set[int] = set()

    def changes(fn: Any) -> Any:
        if id(fn.__globals__) in done:  # a function called by a kernel of the same file: its caller has changed them
            return None
        done.add(id(fn.__globals__))
        scope = rewrite(fn)
        restore = scope.restore
        scope.restore = lambda: (done.clear(), restore())
        return scope

    return changes


def once_a_type(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`find(kind)` is numpy's type of the elements of a type of Triton, the same for all shapes and all pointers."""
    found: dict[str, Any] = {}

    def of(kind: Any) -> Any:
        element = kind.scalar
        name = "pointer" if element.is_ptr() else element.name
        if name not in found:
            found[name] = find(kind)
        return found[name]

    return of


if hasattr(interpreter, "_LangPatchScope"):
    interpreter._patch_lang = once_a_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = once_a_type(interpreter._get_np_dtype)
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
