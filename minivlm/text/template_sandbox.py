"""jinja2's immutable sandbox, with a budget: a template pays for what it makes, compares and prints.

Templates are other people's programs. The sandbox keeps them from Python's insides and from changing what they are
given, but not from `'x' * 10**12`, from doubling a text in a loop or from comparing lists that hold each other a
thousand times over. Here, therefore:

- only what is listed in this file exists: kinds of statements, operators, filters, tests, methods and functions;
- every value has a price: a character costs 1, all else ITEM, and what lies inside something is paid as often as it is
  reached, for so often a comparison or a printout would visit it. Who makes, compares or prints a value pays its price
  first, every turn of a loop and every call pays too, and a prompt has BUDGET in all (and TIME_LIMIT);
- what could cost more than its price is bounded by itself: whole numbers have at most MAX_BITS bits, and there is no
  `'%9d' % x`, no `str.center`, no `str.format`.

So memory and time are bounded by BUDGET, whatever the template does. The released ones spend one to
three units per character of a prompt and notice nothing.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2 import meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from minivlm.text.shown import printable

MAX_SOURCE = 2**16  # characters of a template; the released ones have under 2**10
BUDGET = 2**24  # of one prompt; 2**20 characters of text, which no model has positions for, spend a fifth of it
ITEM = 16  # what a number or a place in a list costs
PIECE = 4 * ITEM  # what a new text costs beside its characters: nearly its bytes in memory
TIME_LIMIT = 5.0  # seconds for one prompt; the released templates take well under a millisecond
MAX_BITS = 4096  # of a whole number
MAX_NEEDLE = 64  # characters that `strip` and `rsplit` may look for: they try all of them everywhere
DEAR = 4096  # whoever pays so much at once is shown the clock
PRINTABLE = str | int | float | list | tuple | dict | Undefined | None
VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
GENERATION = ("generation_begins", "generation_ends")  # variables that are written around {% generation %} blocks
BUDGET_KEY = " budget"  # of the budget among a template's variables; with a blank, so that no template can name it


def render(template: str, calls: Sequence[dict[str, Any]]) -> list[str]:
    """What a template writes, for each set of variables. ValueError for one that is broken, refuses or is refused."""
    compiled = _compiled(template)
    try:
        return ["".join(compiled.generate(variables | {BUDGET_KEY: _Budget()})) for variables in calls]
    except Exception as error:  # a template can fail like any program
        raise ValueError(f"the chat template fails on these messages: {_reason(error)}") from error


@lru_cache(maxsize=16)
def mentioned(template: str) -> frozenset[str]:
    """Names of the variables that a template mentions and does not set itself."""
    environment = _compiled(template).environment
    names = meta.find_undeclared_variables(environment.parse(template))
    return frozenset(names - environment.globals.keys() - {*GENERATION})


def _compiled(template: str) -> jinja2.Template:
    try:
        return _compile(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid jinja: line {error.lineno}: {_reason(error)}") from error
    except Exception as error:
        raise ValueError(f"the chat template cannot be used: {_reason(error)}") from error


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    if len(template) > MAX_SOURCE:
        raise ValueError(f"it has {len(template):,} characters, and at most {MAX_SOURCE:,} are read")
    return _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]).from_string(template)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or calls itself without end"
    return printable(str(error), 500) or type(error).__name__


class _Budget:
    """What is left for one prompt."""

    __slots__ = ("deadline", "left")

    def __init__(self) -> None:
        self.left, self.deadline = BUDGET, time.monotonic() + TIME_LIMIT

    def pay(self, price: int) -> None:
        self.left -= price
        if self.left < 0:
            raise SecurityError(f"it does the work of more than {BUDGET:,} characters; are the messages so long?")
        if price > DEAR:
            self.look_at_the_clock()

    def turn(self, text: int = 0) -> None:
        """Pay for a turn of a loop or a call, and for the plain text in it."""
        self.pay(ITEM + text)
        self.look_at_the_clock()

    def look_at_the_clock(self) -> None:
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes longer than {TIME_LIMIT:g} seconds")

    def pay_for(self, value: Any, times: int = 1, kinds: Any = object) -> None:
        """Pay for a value and all that is in it. SecurityError for what is not of these kinds, and so has no print."""
        if isinstance(value, str):
            self.pay(len(value) * times)
            return
        if not isinstance(value, kinds):
            raise SecurityError(f"a chat template may not print a {type(value).__name__}")
        self.pay((ITEM * (len(value) if isinstance(value, range) else 1) + _digits(value)) * times)
        if isinstance(value, (list, tuple, dict, *VIEWS)):
            for item in value:
                self.pay_for(item, times, kinds)
        if isinstance(value, dict):
            for item in value.values():
                self.pay_for(item, times, kinds)


def _digits(value: Any) -> int:
    return value.bit_length() // 3 if isinstance(value, int) else 0


def _budget(context: Context) -> _Budget:
    return context.parent[BUDGET_KEY]


# ---- What may be written, and where paying is put in

NODES = frozenset(
    getattr(nodes, name)
    for name in (
        *("Template", "Output", "TemplateData", "For", "If", "Macro", "CallBlock", "FilterBlock", "With", "Assign"),
        *("AssignBlock", "ExprStmt", "Break", "Continue", "Name", "NSRef", "Const", "Tuple", "List", "Dict", "Pair"),
        *("Keyword", "CondExpr", "Filter", "Test", "Call", "Getitem", "Getattr", "Slice", "Concat", "Compare"),
        *("Operand", "Mul", "Div", "FloorDiv", "Add", "Sub", "Mod", "Pow", "And", "Or", "Not", "Neg", "Pos"),
    )
)


class _Pay(NodeTransformer):
    """Puts paying around what Python would do by itself, by filters whose names, with a blank, no template can write.

    Refuses what is not among NODES.
    """

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if type(node) not in NODES:
            raise SecurityError(f"line {node.lineno}: a chat template may not use {type(node).__name__.lower()}")
        return super().visit(node, *args, **kwargs)

    def visit_Macro(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        """Each turn of a loop and each call of a macro pays first, for the plain text in it as well."""
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(text), " turn"), lineno=node.lineno))
        return node

    visit_CallBlock = visit_Macro

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.visit_Macro(node)
        if node.test is not None:  # for … if …: what is left out has cost a turn as well
            node.test = nodes.And(_filter(nodes.Const(0), " turn"), node.test, lineno=node.lineno)
        return node

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Expr:
        return _filter(self.generic_visit(node), " pay")

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(node, " pay") if node.ctx == "load" else node  # else a target: for a, b in …

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        first, *others = self.generic_visit(node).nodes
        return _filter(first, " concat", others)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        self.generic_visit(node)
        for side in (node, *node.ops):
            side.expr = _paid(side.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filter(node, " copy")
        node.arg = _paid(node.arg)  # a key is read as a whole to be found
        return node


def _filter(node: nodes.Expr, name: str, arguments: list[nodes.Expr] | None = None) -> nodes.Filter:
    return nodes.Filter(node, name, arguments or [], [], None, None, lineno=node.lineno)


def _paid(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filter(node, " pay")


@pass_context
def _pay(context: Context, value: Any) -> Any:
    _budget(context).pay_for(value)
    return value


@pass_context
def _copy(context: Context, value: Any) -> Any:
    """Pay for a slice, whose items are shared."""
    if isinstance(value, str | list | tuple):
        _budget(context).pay(len(value) if isinstance(value, str) else ITEM * len(value))
    return value


@pass_context
def _turn(context: Context, text: int) -> bool:
    _budget(context).turn(text)
    return True


@pass_context
def _text(context: Context, value: Any) -> str:
    """A value as it is printed. In a list a text is written with escapes, ten characters at most for one."""
    _budget(context).pay_for(value, 1 if isinstance(value, str) else 10, PRINTABLE)
    return str(value)


@pass_context
def _concat(context: Context, *values: Any) -> str:
    return "".join([_text(context, value) for value in values])


# ---- Operators and calls


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks an assistant's words for training: see GENERATION."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(name, "load", lineno=line)], lineno=line) for name in GENERATION)
        return [begin, *body, end]


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox with only what is listed here."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)  # all of them

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_text, **options)
        self.filters, self.tests, self.globals = FILTERS_HERE, TESTS_HERE, FUNCTIONS

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Pay().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget, kinds = _budget(context), (type(left), type(right))
        if kinds == (str, str) and operator == "+":
            budget.pay(len(left) + len(right))
        elif isinstance(left, int | float) and isinstance(right, int | float):
            _check_size(operator, left, right)
        elif operator == "+":
            budget.pay_for([left, right])
        elif operator == "*" and int in kinds:
            number, value = (left, right) if kinds[0] is int else (right, left)
            budget.pay_for(value, max(number, 0))
        elif not isinstance(left, Undefined):  # that one says by itself what is missing
            raise SecurityError(f"a chat template may not compute {kinds[0].__name__} {operator} {kinds[1].__name__}")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.turn()
        if isinstance(function, Macro | Undefined):
            budget.pay(ITEM * (len(args) + len(kwargs)))  # f(*x) copies x
            return super().call(context, function, *args, **kwargs)
        budget.pay_for(args)
        kind = type(getattr(function, "__self__", None))
        if isinstance(function, BuiltinMethodType) and function.__name__ in METHODS.get(kind, ()):
            named = {name: value for name, value in kwargs.items() if not name.startswith("_")}  # jinja2 adds its own
            return (_call_text if kind is str else _call)(context, function, *args, **named)
        of_loops = isinstance(function, MethodType) and kind in (LoopContext, Cycler)  # loop.cycle, loop.changed
        if of_loops or isinstance(function, LoopContext | Joiner) or function in FUNCTIONS.values():
            return _pay(context, super().call(context, function, *args, **kwargs))
        name = getattr(function, "__qualname__", type(function).__name__)
        raise SecurityError(f"a chat template may not call {name}")


def _check_size(operator: str, left: float, right: float) -> None:
    """Whole numbers stay short."""
    bits = [value.bit_length() if isinstance(value, int) else 0 for value in (left, right)]
    grown = {"*": sum(bits), "**": bits[0] * right if all(bits) else 0}.get(operator, max(bits))
    if grown > MAX_BITS:
        raise SecurityError(f"a chat template may not compute numbers of more than {MAX_BITS} bits")


def _call(context: Context, method: Callable, *args: Any, **kwargs: Any) -> Any:
    _budget(context).pay_for(list(kwargs.values()))
    if isinstance(method.__self__, list | tuple):  # index and count compare
        _budget(context).pay_for(method.__self__)
    return method(*args, **kwargs)


def _call_text(context: Context, method: Callable, *args: Any, **kwargs: Any) -> Any:
    """A method of str. Of one character it makes three at most (ΐ in upper case), but for those looked after here."""
    text, name, budget = method.__self__, method.__name__, _budget(context)
    budget.pay(ITEM + 3 * len(text))
    if name == "join":
        return _join(context, *args, text)
    if name in ("split", "rsplit"):
        return _split(budget, method, *args, **kwargs)
    if name in ("strip", "lstrip", "rstrip") and args:
        _check_needle(name, args[0])
    if name == "replace" and len(args) > 1:
        budget.pay(text.count(args[0]) * len(args[1]))
    return method(*args, **kwargs)


def _check_needle(name: str, needle: str | None) -> None:
    if isinstance(needle, str) and len(needle) > MAX_NEEDLE:
        raise SecurityError(f"a chat template may not {name} {len(needle):,} characters, only up to {MAX_NEEDLE}")


def _split(budget: _Budget, method: Callable, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    if method.__name__ == "rsplit":
        _check_needle("rsplit", sep)
    affordable = budget.left // PIECE + 1
    pieces = method(sep, affordable if maxsplit < 0 else min(maxsplit, affordable))
    budget.pay(PIECE * len(pieces))
    return pieces


METHODS = {
    str: {
        *("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdecimal", "isdigit", "islower"),
        *("isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "removeprefix", "removesuffix", "replace"),
        *("rsplit", "rstrip", "split", "startswith", "strip", "title", "upper"),
    },
    dict: {"get", "items", "keys", "values"},
    list: {"count", "index"},
    tuple: {"count", "index"},
}


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message if isinstance(message, str) else f"a {type(message).__name__} is no message")


FUNCTIONS = {
    "range": safe_range,  # of at most 100,000 numbers
    "dict": dict,
    "namespace": Namespace,
    "cycler": Cycler,
    "joiner": Joiner,
    "raise_exception": _raise_exception,
}


# ---- Filters and tests


@pass_context
def _join(context: Context, values: Iterable[Any], separator: Any = "", attribute: str | int | None = None) -> str:
    parts, separator = [], _text(context, separator)
    for value in values if attribute is None else FILTERS_HERE["map"](context, values, attribute=attribute):
        _budget(context).pay(PIECE + len(separator))
        parts.append(_text(context, value))
    return separator.join(parts)


@pass_context
def _list(context: Context, values: Iterable[Any]) -> list[Any]:
    found = []
    pay = _budget(context).pay
    for value in values:
        pay(ITEM)
        found.append(value)
    return found


@pass_context
def _reverse(context: Context, values: Any) -> Any:
    return _copy(context, values[::-1]) if isinstance(values, str) else iter(_list(context, values)[::-1])


@pass_context
def _int(context: Context, value: Any, default: Any = 0, base: int = 10) -> Any:
    if isinstance(value, str) and len(value) > MAX_BITS // 4:
        raise SecurityError(f"a chat template may not read a number of {len(value):,} digits")
    return FILTERS["int"](value, default, base)


@pass_context
def _replace(context: Context, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    texts = [_text(context, each) for each in (value, old, new)]
    return _call_text(context, texts[0].replace, *texts[1:], -1 if count is None else count)


@pass_context
def _title(context: Context, value: Any) -> str:
    text = _text(context, value)
    _budget(context).pay(PIECE * len(text))  # it takes the text to pieces
    return FILTERS["title"](text)


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, as transformers has it; jinja2's own writes <, > and & as escapes, for web pages."""
    if indent is not None and (type(indent) is not int or not 0 <= indent <= ITEM):
        raise SecurityError(f"indent is a whole number from 0 to {ITEM}, found {indent!r:.20}")
    budget = _budget(context)
    budget.pay_for(value, 6)  # \u0000 for a control character
    parts = []
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    for part in encoder.iterencode(value):
        budget.pay(PIECE + len(part))
        parts.append(part)
    return "".join(parts)


def _method(name: str) -> Callable:
    """A method of str as a filter."""

    @pass_context
    def call(context: Context, value: Any, *args: Any) -> Any:
        _budget(context).pay_for(args)
        return _call_text(context, getattr(_text(context, value), name), *args)

    return call


def _at_once(name: str) -> Callable:
    """A filter of jinja2's that goes through a list, done at once: no generators of generators of generators."""

    @pass_context
    def call(context: Context, values: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        _budget(context).pay_for([*args, *kwargs.values()], ITEM)
        return iter(list(FILTERS[name](context, _list(context, values or ()), *args, **kwargs)))

    return call


def _comparing(name: str, kinds: type | tuple[type, ...] = object) -> Callable:
    """A test that reads the whole of what it is given; values of other kinds are refused."""

    @pass_context
    def call(context: Context, *values: Any) -> bool:
        budget = _budget(context)
        for value in values:
            if not isinstance(value, kinds):
                raise SecurityError(f"'is {name}' is no question about a {type(value).__name__}")
            budget.pay_for(value)
        return TESTS[name](*values)

    return call


# those in the first lines look at no more than one item
FILTERS_HERE = {name: FILTERS[name] for name in ("count", "d", "default", "first", "items", "last", "length")}
FILTERS_HERE |= {name: _at_once(name) for name in ("map", "reject", "rejectattr", "select", "selectattr")}
FILTERS_HERE |= {name: _method(name) for name in ("capitalize", "lower", "upper")} | {"trim": _method("strip")}
FILTERS_HERE |= {"int": _int, "join": _join, "list": _list, "replace": _replace, "reverse": _reverse, "safe": _text}
FILTERS_HERE |= {"string": _text, "title": _title, "tojson": _tojson}
FILTERS_HERE |= {" concat": _concat, " copy": _copy, " pay": _pay, " turn": _turn}

_KINDS = ("boolean", "callable", "false", "float", "integer", "iterable", "mapping", "none", "number", "sequence")
TESTS_HERE = {name: TESTS[name] for name in (*_KINDS, "defined", "sameas", "string", "true", "undefined")}
_SIGNS = (
    *("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le"),
    *("lessthan", "lt", "ne"),
)
TESTS_HERE |= {name: _comparing(name) for name in _SIGNS}
TESTS_HERE |= {name: _comparing(name, (int, float)) for name in ("divisibleby", "even", "odd")}
TESTS_HERE |= {name: _comparing(name, str) for name in ("lower", "upper")}
