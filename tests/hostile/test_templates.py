"""Hostile templates: stopped with one error, soon and in little memory; good ones render as in plain jinja2.

REFUSED are those that jinja2's own sandbox lets run out of time or memory, or that reach for what is not theirs;
HARMLESS ones look alike, but end within the limits; ODD ones are strange.
"""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minivlm.text import rendering, template_sandbox
from minivlm.text.template_sandbox import is_known, mentioned, render

ROOT = Path(__file__).parents[2]
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hello " * 50}]}]
NS = "{% set ns = namespace(x='ab', l=[1, 2], n=3) %}"
LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"
X = "{% set x = 'x' * 10**6 %}"
WORK = "(takes more than|writes more than|makes the interpreter fail)"

NAMED = "{% set ns = namespace(x='x' * 10**6) %}"
REFUSED = {
    # ---- what is printed from inside of something else
    NAMED + "{{ ([ns] * 2000) | string }}": WORK,
    NAMED + "{{ ([[ns]] * 2000) | join }}": WORK,
    NAMED + "{{ ([ns] * 2000,) }}": "may not print a Namespace",
    "{% set ns = namespace(l=[1]) %}"
    + "{% set ns.l = [ns.l, namespace(a=ns.l)] %}" * 40
    + "{{ [ns.l] }}": "a Namespace",
    NAMED + "{{ raise_exception([ns] * 2000) }}": "a list is not",
    "{{ [messages[0].items] }}": "may not print a builtin_function_or_method",
    "{{ [range] }}": "may not print a function",
    "{% set n = 10 ** 1000 %}" + LOOP + LOOP + "{{ n }}" + END + END: WORK,
    "{% set n = 10 ** 1000 %}{{ ([n] * 900000) | join | length }}": WORK,
    "{{ raise_exception('\x1b[2J\nx') }}": "fails on these messages:  .2J x$",
    # ---- arithmetic
    "{{ 9 ** (9 ** 9) }}": WORK,
    "{{ 10 ** (10 ** 8) }}": WORK,
    "{{ 2.0 ** 99999 }}": "out of range",
    "{{ (-8) ** 0.5 }}": "may not print a complex",
    "{{ 'a' * 10**10 }}": WORK,
    "{{ 10**9 * 'a' }}": WORK,
    "{{ [1] * 10**9 }}": WORK,
    "{{ (1, 2) * 10**9 }}": WORK,
    f"{NS}{LOOP}{{% set ns.n = ns.n * ns.n %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.n = ns.n + ns.n %}}{END}": WORK,
    f"{NS}{LOOP}{LOOP}{{% set ns.n = ns.n - -ns.n %}}{END}{END}": WORK,
    "{{ 1 / 0 }}": "division by zero",
    "{{ ('f' * 10**6) | int(0, 16) }}": "4300 digits",
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
    f"{X}{LOOP}{{% set y = x[1:] %}}{END}": WORK,
    f"{X}{{% set y %}}{LOOP}{{{{ x }}}}{END}{{% endset %}}": WORK,
    "{% set y %}" + LOOP + "data" * 1000 + END + "{% endset %}": WORK,
    "{% filter upper %}" + LOOP + "data" * 1000 + END + "{% endfilter %}": WORK,
    X + "{% macro f(n, x) %}{% if n %}{{ f(n - 1, x[1:]) }}{% endif %}{% endmacro %}{{ f(200, x) }}": "without end",
    "{{ '%1000000000d' % 1 }}": WORK,
    "{{ '%1000000000d' is odd }}": WORK,
    "{{ '%1000000000d' is divisibleby 3 }}": WORK,
    "{{ ['%1000000000d'] | select('even') | list }}": WORK,
    "{{ '%1000000000d' | format(1) }}": WORK,
    "{{ '{:>1000000000}'.format(1) }}": WORK,
    "{{ '{:>1000000000}'.format_map({}) }}": "out of range",
    "{{ 'a'.center(10**9) }}": WORK,
    "{{ 'a'.ljust(10**9) }}": WORK,
    "{{ 'a'.zfill(10**9) }}": WORK,
    "{{ '\t'.expandtabs(10**9) }}": WORK,
    "{{ 'a'.encode() }}": "may not print a bytes",
    "{{ (1).to_bytes(10**9) }}": WORK,
    "{{ 'a' | center(10**9) }}": WORK,
    "{{ 'a' | indent(10**9) }}": WORK,
    "{{ range(9) | batch(10**9, 'x') | list }}": WORK,
    "{{ range(9) | slice(10**9) | list }}": WORK,
    "{{ ('ab ' * 10**7) | title }}": WORK,
    "{{ ([1] * 9999) | tojson(separators=('x' * 10**6, '')) }}": WORK,
    "{{ lipsum(10**9) }}": "'lipsum' is undefined",
    "{{ joiner('x' * 10**9)() }}": WORK,
    # ---- lists that hold each other
    f"{NS}{LOOP}{{% set ns.l = ns.l + ns.l %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.l = [ns.l, ns.l] %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.l = (ns.l, ns.l) %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.l = {{'a': ns.l, 'b': ns.l}} %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.l = dict(a=ns.l, b=ns.l) %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.l = [ns.l] %}}{END}": WORK,
    f"{NS}{LOOP}{{% set ns.l = (ns.l,) %}}{END}{{{{ {{}}[ns.l] }}}}": WORK,
    "{% set d = {1: 2} %}{{ d.keys() - d.keys() }}": "may not print a set",
    "{% set r = range(99999) %}" + LOOP + "{% if 1.5 in r %}{% endif %}" + END: WORK,
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
    + "{% endcall %}" * 20: WORK,
    "{% for x in [messages] recursive %}{{ loop([messages, messages]) }}{% endfor %}": "calls itself without end",
    # ---- statements that are not here
    "{% include 'x' %}": "no loader",
    "{% import 'x' as y %}": "no loader",
    "{% from 'x' import y %}": "no loader",
    "{% extends 'x' %}": "no loader",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}": "calls itself without end",
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
    "{{ '{0.__class__.__mro__}'.format('') }}": "unsafe",
    "{{ raise_exception.__globals__.json }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ messages[0].clear() }}": "unsafe",
    "{{ messages[0].update({}) }}": "unsafe",
    "{{ dict.fromkeys(range(99999)) }}": "no attribute 'fromkeys'",
    "{{ messages() }}": "not callable",
    "{{ (messages | map('upper')).throw(1) }}": "BaseException",
    "{{ messages | map(' pay') | list | length }}": "No filter named ' pay'",
    "{{ raise_exception }}": "may not print a function",
    "{{ self }}": "may not print a TemplateReference",
    "{{ raise_exception('only cats') }}": "only cats",
    "{{ messages[5].role }}": "has no element 5",
    "{{ {}['x' * 10**6].y }}": "has no attribute.{0,600}$",
    "{{ raise_exception('x' * 10**6) }}": "fails on these messages: x{500}$",
    "{{ nope.nope }}": "'nope' is undefined",
}

HARMLESS = {
    "{{ '" + "9" * 5000 + "' | int }}": "0",
    f"{X}{{{{ x.strip(x) }}}}": "",
    f"{X}{{{{ x.rsplit('b' + x) }}}}": str(["x" * 10**6]),
    f"{X}{{{{ x.rsplit(sep='b' + x) }}}}": str(["x" * 10**6]),
    f"{X}{{{{ x.split('x') | length }}}}": "1000001",
    f"{X}{LOOP}{{% if x == x + '' %}}{{% endif %}}{END}": "",
    "{{ 1.5 | round(10**9) }}": "1.5",
    "{{ [['\x01' * 10**6]] }}{{ [['\x01' * 10**6]] }}": str([["\x01" * 10**6]]) * 2,
    "{{ 'x' | tojson(indent=10**9) }}": '"x"',
    "{{ ([1] * 10**6) | tojson }}": str([1] * 10**6),
    "{{ [messages] * 10**5 == [messages] * 10**5 }}": "True",
    "{{ messages * 10**4 in [messages * 10**4] }}": "True",
    "{{ range(99999) | list | string | length }}" * 20: "688883" * 20,
    "{% set d = {1: [0] * 10**5} %}" + "{% if d.items() == d.items() %}{% endif %}" * 99: "",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}": "&lt;",
    "{{ ('' | attr('__class__')) }}": "",
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


def run(template: str) -> str:
    return render(template, [{"messages": MESSAGES, "bos_token": "<s>"}])[0]


@pytest.fixture
def hasty(monkeypatch):
    """A twentieth of the time, to save some, where it is the time or the memory that ends a template."""
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.1)


@pytest.mark.parametrize("template", REFUSED, ids=lambda template: template[:60])
def test_refused(template, request):
    if REFUSED[template] == WORK:
        request.getfixturevalue("hasty")
    begin = time.monotonic()
    with pytest.raises(ValueError, match=re.compile(f"the chat template .*({REFUSED[template]})", re.DOTALL)) as error:
        run(template)
    assert len(str(error.value)) < 700
    assert time.monotonic() - begin < template_sandbox.PATIENCE + template_sandbox.START


@pytest.mark.parametrize("template", HARMLESS | ODD, ids=lambda template: template[:60])
def test_harmless_and_odd(template):
    assert run(template) == (HARMLESS | ODD)[template]


def test_strangers_run_elsewhere_and_ours_here():
    """Known by what they say, wherever they come from."""
    for template in stored_templates().values():
        assert is_known(template)
        assert not is_known(template + " ")
    for path in (ROOT / "minivlm" / "text" / "templates").glob("*.jinja"):
        assert is_known(path.read_text(encoding="utf-8"))
    assert not any(map(is_known, [*REFUSED, *HARMLESS, *ODD]))


# ---- the child


def child_pid() -> int:
    run("{{ 1 }}")
    return template_sandbox._CHILD._process.pid


def test_one_child_serves_many_prompts():
    """Milliseconds for each after the first: here within fifty, on a machine that does other things."""
    pid = child_pid()
    begin = time.monotonic()
    for number in range(100):
        assert run(f"{{{{ {number} }}}}") == str(number)
    assert time.monotonic() - begin < 100 * 0.05
    with pytest.raises(ValueError, match="only cats"):
        run("{{ raise_exception('only cats') }}")
    assert child_pid() == pid


@pytest.mark.usefixtures("hasty")
def test_after_a_template_that_was_stopped_there_is_a_new_child():
    for template in (LOOP * 3 + END * 3, "{{ 'a' * 10**10 }}"):
        before = child_pid()
        with pytest.raises(ValueError, match=WORK):
            run(template)
        assert not Path(f"/proc/{before}").exists()  # no zombie
        assert child_pid() != before


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_child_that_died_is_replaced(sign):
    before = child_pid()
    os.kill(before, sign)
    time.sleep(0.1)
    assert run("{{ 2 }}") == "2"
    assert not Path(f"/proc/{before}").exists()


def test_ctrl_c_is_not_for_the_child():
    before = child_pid()
    os.kill(before, signal.SIGINT)
    assert child_pid() == before


def test_an_interrupted_prompt_does_not_answer_the_next(monkeypatch):
    class Interrupted(BaseException):
        pass

    child_pid()
    stdout = template_sandbox._CHILD._process.stdout

    class Once:
        def readline(self) -> bytes:
            raise Interrupted

        def close(self) -> None:
            stdout.close()

    template_sandbox._CHILD._process.stdout = Once()
    with pytest.raises(Interrupted):
        run("{{ 'the first' }}")
    assert run("{{ 'the second' }}") == "the second"


def test_threads_take_turns():
    found: list[str] = []

    def work(number: int) -> None:
        for _ in range(20):
            found.append((number, run(f"{{% set x = {number} %}}{{{{ x }}}}")))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 160
    assert all(str(number) == text for number, text in found)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> tuple[str, int]:
        return run(f"{{{{ {number} }}}}"), child_pid()


def test_workers_that_were_forked_have_children_of_their_own():
    mine = child_pid()
    loader = torch.utils.data.DataLoader(Rows(), num_workers=2, batch_size=1, multiprocessing_context="fork")
    found = list(loader)
    assert [texts[0] for texts, _ in found] == [str(number) for number in range(12)]
    children = {pids.item() for _, pids in found}
    assert mine not in children
    assert len(children) == 2
    del loader
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert child_pid() == mine


def test_a_fork_while_another_thread_asks():
    """The lock of a thread that is not in the new process does not stop it."""
    busy = threading.Thread(target=lambda: [run("{% for i in range(20000) %}x{% endfor %}") for _ in range(20)])
    busy.start()
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        process = context.Process(target=run, args=("{{ 1 }}",))
        process.start()
        process.join(30)
        assert process.exitcode == 0
    busy.join()
    assert run("{{ 3 }}") == "3"


def script(code: str, folder: Path, **options: Any) -> subprocess.CompletedProcess:
    code = "from minivlm.text import template_sandbox\nfrom minivlm.text.template_sandbox import render\n" + code
    paths = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "SECRET_TOKEN": "hf_secret"}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=folder, **options)


def test_the_child_ends_with_its_parent(tmp_path):
    code = "render('{{ 1 }}', [{}]); print(template_sandbox._CHILD._process.pid, flush=True)\n"
    for end in ("", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"):
        done = script(code + end, tmp_path)
        pid, until = int(done.stdout), time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists(), end


@pytest.mark.parametrize("hidden", ["resource", "resource, signal.setitimer"])
def test_without_the_limits_of_unix_the_clock_ends_a_template(tmp_path, hidden):
    """As on Windows: `resource` cannot be imported, and there is no timer of processor time."""
    (tmp_path / "resource.py").write_text("raise ImportError('not here')")
    if "signal" in hidden:
        (tmp_path / "sitecustomize.py").write_text("import signal\ndel signal.setitimer, signal.ITIMER_PROF")
    code = (
        "template_sandbox.PATIENCE, template_sandbox.SECONDS = 1.0, 0.5\n"
        "assert template_sandbox.resource is None\n"
        "assert render('{{ 7 }}', [{}]) == ['7']\n"
        f"loop = {LOOP * 4 + END * 4!r}\n"
        "try: render(loop, [{}])\n"
        "except ValueError as error: print(error)\n"
        "print(render('{{ 8 }}', [{}]))"
    )
    done = script(code, tmp_path)
    assert re.search(r"takes more than.*\n\['8'\]", done.stdout), (done.stdout, done.stderr)


def test_what_is_in_the_current_folder_is_not_imported(tmp_path):
    """People start programs in folders that they have downloaded."""
    for name in ("jinja2", "json", "minivlm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken over')")
    folders = [str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)]
    code = f"import sys; sys.path[:] = {folders!r}; from minivlm.text.template_sandbox import render"
    code += "; print(render('{{ 1 }}', [{}]))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stdout == "['1']\n", done.stderr


def test_no_process_can_be_started(monkeypatch):
    template_sandbox._CHILD.stop()
    for executable in ("/nowhere/python", "/bin/false"):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(ValueError, match="process for chat templates"):
            run("{{ 1 }}")
    monkeypatch.undo()
    assert run("{{ 1 }}") == "1"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads what Linux says of a process")
def test_the_child_has_neither_tokens_nor_room(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    template_sandbox._CHILD.stop()
    process = Path(f"/proc/{child_pid()}")
    assert b"hf_secret" not in (process / "environ").read_bytes()
    limits = (process / "limits").read_text()
    room = int(re.search(r"Max address space +(\d+)", limits)[1])
    assert room < template_sandbox.MEMORY + 2**28  # what Python takes when it starts
    assert re.search(r"Max open files +3 +3 ", limits)


def test_mentioned_variables():
    assert mentioned("{{ a }}{% set b = c %}{{ b }}{% for d in e %}{{ d }}{% endfor %}{{ raise_exception(f) }}") == {
        *("a", "c", "e", "f")
    }
    with pytest.raises(ValueError, match="not valid jinja"):
        mentioned("{% for %}")
    for template in stored_templates().values():
        assert mentioned(template) <= {"messages", "add_generation_prompt", "bos_token", "eos_token"}


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
    stranger = template + "{# a stranger's #}"
    expected = plain.from_string(stranger).render(messages=turns, **variables)
    assert render(stranger, [{"messages": turns, **variables}]) == [expected]


def test_a_long_conversation_is_well_within_the_limits(monkeypatch):
    """A million characters, a hundred thousand words: in a tenth of the time, in the child too."""
    monkeypatch.setattr(template_sandbox, "SECONDS", template_sandbox.SECONDS / 10)
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello word" * 1000}]}] * 100
    for template in stored_templates().values():
        (prompt,) = render(template + "{# a stranger's #}", [{"messages": messages}])
        assert prompt == render(template, [{"messages": messages}])[0]
        assert len(prompt) > 10**6


def test_the_tables_are_long_enough():
    assert len(REFUSED) >= 30
