"""Triton's interpreter rewrites its whole language again at each call of a function; here it does so once a launch."""

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


if hasattr(interpreter, "_LangPatchScope"):
    interpreter._patch_lang = once_a_launch(interpreter._patch_lang)
