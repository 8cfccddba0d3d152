"""Hostile templates: refused with one error, soon and in little memory; good ones render as in plain jinja2.

They run in a child process with a limit on CPU time and memory. REFUSED are those that jinja2's own sandbox lets run
out of time or memory, or that reach for what is not theirs; ODD ones are strange and harmless.
"""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from guarded import Child
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minivlm.text import rendering, template_sandbox
from minivlm.text.template_sandbox import FILTERS_HERE, METHODS, TESTS_HERE, render

ROOT = Path(__file__).parents[2]
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hello " * 50}]}]
NS = "{% set ns = namespace(x='ab', l=[1, 2], n=3) %}"
LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"
X = "{% set x = 'x' * 10**6 %}"
WORK = r"(does the work of|takes longer than)"  # the second on a very busy machine

NAMED = "{% set ns = namespace(x='x' * 10**6) %}"
REFUSED = {
    # ---- what is printed from inside of something else
    NAMED + "{{ ([ns] * 2000) | string }}": "may not print a Namespace",
    NAMED + "{{ ([[ns]] * 2000) | join }}": "may not print a Namespace",
    NAMED + "{{ ([ns] * 2000,) }}": "may not print a Namespace",
    "{% set ns = namespace(l=[1]) %}"
    + "{% set ns.l = [ns.l, namespace(a=ns.l)] %}" * 40
    + "{{ [ns.l] }}": "a Namespace",
    NAMED + "{{ raise_exception([ns] * 2000) }}": "a list is no message",
    "{{ [messages[0].items] }}": "may not print a builtin_function_or_method",
    "{{ [range] }}": "may not print a function",
    "{% set n = 10 ** 1000 %}" + LOOP + LOOP + "{{ n }}" + END + END: WORK,
    "{% set n = 10 ** 1000 %}{{ ([n] * 90000) | join | length }}": WORK,
    "{{ raise_exception('\x1b[2J\nx') }}": "fails on these messages:  .2J x$",
    # ---- arithmetic
    "{{ 9 ** (9 ** 9) }}": "may not compute",
    "{{ 10 ** (10 ** 8) }}": "may not compute",
    "{{ 2.0 ** 99999 }}": "out of range",
    "{{ (-8) ** 0.5 }}": "may not print a complex",
    "{{ 'a' * 10**10 }}": WORK,
    "{{ 10**9 * 'a' }}": WORK,
    "{{ [1] * 10**9 }}": WORK,
    "{{ (1, 2) * 10**9 }}": WORK,
    f"{NS}{LOOP}{{% set ns.n = ns.n * ns.n %}}{END}": "may not compute",
    f"{NS}{LOOP}{{% set ns.n = ns.n + ns.n %}}{END}": "may not compute",
    f"{NS}{LOOP}{LOOP}{{% set ns.n = ns.n - -ns.n %}}{END}{END}": "may not compute",
    "{{ 1 / 0 }}": "division by zero",
    "{{ '" + "9" * 5000 + "' | int }}": "may not read a number of 5,000 digits",
    "{{ ('f' * 10**6) | int(0, 16) }}": "may not read a number",
    "{{ " + "9" * 5000 + " }}": "4300 digits",
    # ---- texts
    f"{NS}{LOOP}{{% set ns.x = ns.x ~ ns.x %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.x = ns.x + ns.x %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.x = [ns.x, ns.x] | join %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.x = ns.x.replace('b', 'bb') %}}{END}{{{{ ns.x }}}}": WORK,
    f"{X}{{{{ x.replace('x', x) }}}}": WORK,
    f"{X}{{{{ x | replace('', x) }}}}": WORK,
    f"{X}{{{{ x.join(x) }}}}": WORK,
    f"{X}{{{{ x | list | join(x) }}}}": WORK,
    f"{X}{{{{ x.strip(x) }}}}": f"may not strip 1,000,000 characters|{WORK}",
    f"{X}{{{{ x.rsplit('b' + x) }}}}": f"may not rsplit 1,000,001 characters|{WORK}",
    f"{X}{{{{ x.rsplit(sep='b' + x) }}}}": f"may not rsplit 1,000,001 characters|{WORK}",
    f"{X}{{{{ x.split('x') | length }}}}": WORK,
    f"{X}{LOOP}{{% if x == x + '' %}}{{% endif %}}{END}": WORK,
    f"{X}{LOOP}{{% set y = x[1:] %}}{END}": WORK,
    f"{X}{{% set y %}}{LOOP}{{{{ x }}}}{END}{{% endset %}}": WORK,
    "{% set y %}" + LOOP + "data" * 1000 + END + "{% endset %}": WORK,
    "{% filter upper %}" + LOOP + "data" * 1000 + END + "{% endfilter %}": WORK,
    X + "{% macro f(n, x) %}{% if n %}{{ f(n - 1, x[1:]) }}{% endif %}{% endmacro %}{{ f(200, x) }}": WORK,
    "{{ '%1000000000d' % 1 }}": "may not compute str % int",
    "{{ '%1000000000d' is odd }}": "is no question about a str",
    "{{ '%1000000000d' is divisibleby 3 }}": "is no question about a str",
    "{{ ['%1000000000d'] | select('even') | list }}": "is no question about a str",
    "{{ '%1000000000d' | format(1) }}": "No filter named 'format'",
    "{{ '{:>1000000000}'.format(1) }}": "may not call str.format",
    "{{ '{:>1000000000}'.format_map({}) }}": "may not call str.format_map",
    "{{ 'a'.center(10**9) }}": "may not call str.center",
    "{{ 'a'.ljust(10**9) }}": "may not call str.ljust",
    "{{ 'a'.zfill(10**9) }}": "may not call str.zfill",
    "{{ '\t'.expandtabs(10**9) }}": "may not call str.expandtabs",
    "{{ 'a'.encode() }}": "may not call str.encode",
    "{{ (1).to_bytes(10**9) }}": "may not call int.to_bytes",
    "{{ 'a' | center(10**9) }}": "No filter named 'center'",
    "{{ 'a' | indent(10**9) }}": "No filter named 'indent'",
    "{{ range(9) | batch(10**9, 'x') | list }}": "No filter named 'batch'",
    "{{ range(9) | slice(10**9) | list }}": "No filter named 'slice'",
    "{{ 1.5 | round(10**9) }}": "No filter named 'round'",
    "{{ ('ab ' * 10**6) | title }}": WORK,
    "{{ [['\x01' * 10**6]] }}{{ [['\x01' * 10**6]] }}": WORK,
    "{{ 'x' | tojson(indent=10**9) }}": "indent is a whole number",
    "{{ ([1] * 10**6) | tojson }}": WORK,
    "{{ ([1] * 9999) | tojson(separators=('x' * 10**6, '')) }}": WORK,
    "{{ lipsum(10**9) }}": "'lipsum' is undefined",
    "{{ joiner('x' * 10**9)() }}": WORK,
    # ---- lists that hold each other
    f"{NS}{LOOP}{{% set ns.l = ns.l + ns.l %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.l = [ns.l, ns.l] %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.l = (ns.l, ns.l) %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.l = {{'a': ns.l, 'b': ns.l}} %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.l = dict(a=ns.l, b=ns.l) %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.l = [ns.l] %}}{END}": f"nested too deeply|{WORK}",
    f"{NS}{LOOP}{{% set ns.l = (ns.l,) %}}{END}{{{{ {{}}[ns.l] }}}}": f"nested too deeply|{WORK}",
    "{{ [messages] * 10**5 == [messages] * 10**5 }}": WORK,
    "{{ messages * 10**4 in [messages * 10**4] }}": WORK,
    "{{ range(99999) | list | string | length }}" * 20: WORK,
    "{% set d = {1: 2} %}{{ d.keys() - d.keys() }}": "may not compute dict_keys - dict_keys",
    "{% set d = {1: [0] * 10**5} %}" + "{% if d.items() == d.items() %}{% endif %}" * 99: WORK,
    "{% set r = range(99999) %}" + "{% if 1.5 in r %}{% endif %}" * 99: WORK,
    "{% set x = [0] * 10**5 %}{% macro f() %}{{ f(*x) }}{{ varargs | length }}{% endmacro %}{{ f() }}": WORK,
    # ---- loops
    "{{ range(10**9) | list }}": "Range too big",
    LOOP * 4 + "x" + END * 4: WORK,
    LOOP + "{% for j in range(99999) if false %}{% endfor %}" + END: WORK,
    LOOP + LOOP + "{{ loop.length }}" + END + END: WORK,
    LOOP + "{{ range(99999) | list | length }}" + END: WORK,
    LOOP + "{{ range(99999) | map('string') | select | length }}" + END: WORK + "|no len",
    f"{NS}{LOOP}{{% set ns.g = ns.l | select %}}{{% set ns.l = ns.g %}}{END}{LOOP}{END * 1}" * 30: WORK,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself without end",
    "{% macro f(a=f()) %}{% endmacro %}{{ f() }}": "calls itself without end",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": WORK,
    "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 20
    + "xxx"
    + "{% endcall %}" * 20: WORK + "|nested",
    "{% for x in [messages] recursive %}{{ loop([messages, messages]) }}{% endfor %}": "calls itself without end",
    # ---- statements that are not here
    "{% include 'x' %}": "may not use include",
    "{% import 'x' as y %}": "may not use import",
    "{% from 'x' import y %}": "may not use fromimport",
    "{% extends 'x' %}": "may not use extends",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}": "may not use block",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}": "may not use scope",
    "{% do messages %}": "unknown tag 'do'",
    # ---- what breaks parsers
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "nested too deeply",
    "{{ " + "[" * 5000 + "]" * 5000 + " }}": "nested too deeply",
    "{{ " + "-" * 9000 + "1 }}": "nested too deeply",
    "{{ 1" + " + 1" * 9000 + " }}": "nested too deeply",
    "{{ x" + ".a" * 9000 + " }}": "nested too deeply",
    "{{ x" + "|list" * 9000 + " }}": "nested too deeply",
    "{% if 1 %}" * 900 + "{% endif %}" * 900: "nested too deeply",
    "{% for i in '' %}" * 25 + END * 25: "too many statically nested",
    "x" * 70_000: "has 70,000 characters",
    "{% for %}": "not valid jinja: line 1",
    "{{ 'a": "not valid jinja",
    "{% endfor %}": "unknown tag 'endfor'",
    # ---- reaching for what is not theirs
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.popen('id') }}": "unsafe",
    "{{ self._TemplateReference__context.x }}": "unsafe",
    "{{ '{0.__class__.__mro__}'.format('') }}": "may not call",
    "{{ ('' | attr('__class__')) }}": "No filter named 'attr'",
    "{{ raise_exception.__globals__.json }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ messages[0].clear() }}": "unsafe",
    "{{ messages[0].update({}) }}": "unsafe",
    "{{ dict.fromkeys(range(99999)) }}": "may not call dict.fromkeys",
    "{{ messages() }}": "may not call list",
    "{{ (messages | map('upper')).throw(1) }}": "has no attribute 'throw'",
    "{{ raise_exception }}": "may not print a function",
    "{{ self }}": "may not print a TemplateReference",
    "{{ raise_exception('only cats') }}": "only cats",
    "{{ messages[5].role }}": "has no element 5",
    "{{ {}['x' * 10**6].y }}": "has no attribute.{0,600}$",
    "{{ raise_exception('x' * 10**6) }}": "fails on these messages: x{500}$",
    "{{ nope.nope }}": "'nope' is undefined",
}

ODD = {
    "": "",
    "\0{{ 1 }}": "\x001",
    "\ud800{{ 'é' }}": "\ud800é",
    "{{ 9 ** 9 }}": "387420489",
    "{{ 2 ** -1 }}": "0.5",
    "{{ '=' * 10 }}": "==========",
    "{{ range(5) | list }}": "[0, 1, 2, 3, 4]",
    "{{ nope }}": "",
    "{{ ' budget' ~ budget }}": " budget",
    "{{ ''['__class__'] }}{{ namespace.__init__ }}": "",
    "{{ {}[[]] }}": "",
    "{{ messages | map(' pay') | list | length }}": "1",
    "{{ 'a b'.split() }}{{ 'a,b'.split(',', 1)[1] }}{{ ' a '.strip() }}": "['a', 'b']ba",
    "{{ 'x' in 'xyz' }}{{ 1 < 2 < 3 }}{{ [1] == [1] }}": "TrueTrueTrue",
    "{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{{ loop.last }}{% endfor %}": "x1True",
    "{% for m in messages recursive %}{{ m.role }}{% endfor %}": "user",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{% endmacro %}{{ f(1) }}{{ f(1, 3, 4) }}": "12()13(4,)",
    "{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}x{% endcall %}": "<x>",
    "{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}": "3",
    "{% for i in range(9) if i is odd %}{% if i > 5 %}{% break %}{% endif %}{{ i }}{% endfor %}": "135",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}": "aba",
    "{{ messages | tojson(indent=1) | length > 9 }}{{ {'a': '<é>'} | tojson }}": 'True{"a": "<é>"}',
    "{% with a = 1 %}{{ a }}{% endwith %}{% filter upper %}b{% endfilter %}{% set x %}c{% endset %}{{ x }}": "1Bc",
    "{{ 'a' if false }}{{ 'b' if true else 'c' }}{{ nope | default('d') }}": "bd",
    "{{ [3, 1] | reverse | list }}{{ 'ab' | reverse }}{{ [1, 2] | first }}{{ [1, 2] | last }}": "[1, 3]ba12",
    "{{ 'hello world' | title }}{{ 'aXb' | replace('X', '-') }}{{ '7' | int + 1 }}": "Hello Worlda-b8",
    "{% generation %}x{% endgeneration %}{%- raw %} {{ y }}{% endraw %}": "x {{ y }}",
}


@pytest.fixture(scope="module")
def child():
    child = Child(seconds=4, memory=2**28)
    yield child
    child.close()


def run(template: str) -> str:
    return render(template, [{"messages": MESSAGES, "bos_token": "<s>"}])[0]


def run_in(budget: int, template: str) -> str:
    template_sandbox.BUDGET = budget
    return run(template)


@pytest.mark.parametrize("template", REFUSED, ids=lambda template: template[:60])
def test_refused(child, template):
    """With a quarter of the budget, to save time; the next test takes all of it."""
    how, found = child.run(run_in, 2**22, template)
    assert how == "raised", (how, found[:99])
    assert re.match(f"ValueError: the chat template .*({REFUSED[template]})", found, re.DOTALL), found


def test_the_whole_budget_is_spent_in_seconds(child):
    """The costliest ways to spend it that were found: turns of loops, printing numbers, comparing lists."""
    for body in ("", "{{ i }}", "{% if [1] == [1] %}{% endif %}", "{% set y = [[[]]] | string %}"):
        how, found = child.run(run_in, 2**24, f"{LOOP}{LOOP}{body}{END}{END}")
        assert how == "raised"
        assert re.search(WORK, found)


@pytest.mark.parametrize("template", ODD)
def test_odd(child, template):
    assert child.run(run, template) == ("returned", ODD[template])


# ---- whatever is allowed costs its price


HEAVY = ("x", "' x'", "('x' * 9, x)", "[x]", "{x: [x]}", "range(9999)", "messages", "1", "none", "nope")
CALLS = [
    *(f"x.{name}({{}})" for name in sorted(METHODS[str])),
    *(f"messages[0].{name}({{}})" for name in sorted(METHODS[dict])),
    *(f"([x] * 99).{name}({{}})" for name in sorted(METHODS[list])),
    *(f"x | {name}" for name in sorted(FILTERS_HERE) if name[0] != " "),
    *(f"{{}} | {name}(x)" for name in sorted(FILTERS_HERE) if name[0] != " "),
    *(f"x is {name} {{}}" for name in sorted(TESTS_HERE) if name.isalpha()),
]


def spend(call: str) -> str:
    """With a small budget: a call on heavy values, again and again."""
    template_sandbox.BUDGET = 2**20
    ended = []
    for heavy in HEAVY if "{}" in call else ("",):
        body = f"{{% set y = {call.replace('{}', heavy)} %}}"
        try:
            run(f"{{% set x = 'x' * 10**4 %}}{{% for i in range(9999) %}}{body}{{% endfor %}}")
        except ValueError as error:
            ended.append(str(error))
    return "\n".join(ended)


@pytest.mark.parametrize("call", CALLS)
def test_whatever_is_allowed_is_paid_for(call):
    """In the work of 2**20 characters nothing takes a second or 128 MiB, and nothing fails but by a ValueError."""
    child = paying
    how, found = child.run(spend, call)
    assert how == "returned", found


paying = Child(seconds=3, memory=2**27)


@pytest.fixture(autouse=True, scope="module")
def _end_of_paying():
    yield
    paying.close()


# ---- good templates


def stored_templates() -> dict[str, str]:
    """Every template of a released or shipped checkpoint that is stored here."""
    found = {str(path.parent.name): path.read_text() for path in (ROOT / "minivlm").glob("builtin/*/*.jinja")}
    for path in sorted((ROOT / "tests" / "data" / "hub").glob("*/*/*.json")):
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and "chat_template" in config:
            found[path.parent.name] = config["chat_template"]
    return found


@pytest.mark.parametrize("name", stored_templates())
@pytest.mark.parametrize("add", [False, True])
def test_good_templates_render_as_in_plain_jinja(name, add):
    turns = [
        {"role": "system", "content": [{"type": "text", "text": " Be brief.\n"}]},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "<b> {{ x }} & é\n"}, {"type": "image"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "And?"}]},
    ]
    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, template_sandbox._Generation]
    )
    template = stored_templates()[name]
    variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": add}
    for messages in (turns, turns[1:], turns[1:2], turns[1:3] * 50):
        expected = plain.from_string(template).render(messages=messages, **variables)
        assert render(template, [{"messages": messages, **variables}]) == [expected]
    assert jinja2.__version__ >= "3.1.6"
    assert rendering.render is render


def test_a_long_conversation_is_well_within_the_budget():
    """A million characters: a hundred thousand words."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello word" * 1000}]}] * 100
    for template in stored_templates().values():
        budget = template_sandbox._Budget()
        compiled = template_sandbox._compile(template)
        compiled.render(messages=messages, **{template_sandbox.BUDGET_KEY: budget})
        assert budget.left > template_sandbox.BUDGET / 2


def test_the_tables_are_long_enough():
    assert len(REFUSED) >= 30
