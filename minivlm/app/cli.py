"""`minivlm VERB …`: picks the verb's module, parses its options, turns errors into one line and an exit code.

Exit codes: 0 done, 1 bad input (chat and batch: some lines of it; parity: also if the sides disagree), 2 wrong usage,
130 interrupted. Answers and tables go to stdout, everything else to stderr.
"""

import argparse
import importlib
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from minivlm import __version__
from minivlm.app import launch, terminal
from minivlm.app.options import UsageError
from minivlm.text.shown import suggestion

# in the order of the help; each is a module in `verbs`
VERBS = ("ask", "chat", "batch", "rank", "inspect", "explain", "demo", "quantize", "finetune", "merge", "parity")
ABOUT = "Idefics2, LLaVA-NeXT and IDEFICS: ask them about images, look inside them, compare them."
EXAMPLES = """\
minivlm ask photo.jpg "What is unusual here?" --model HuggingFaceM4/idefics2-8b
minivlm chat docs/shapes.png"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code; argparse itself exits with 2, or with 0 after `--help`."""
    terminal.prepare()
    try:
        failed = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader is gone, as in `minivlm ask … | head -c 1`
        terminal.drop_stdout()
        return 1
    except (ValueError, TypeError, OSError, MemoryError) as error:
        terminal.drop_stdout()
        launch.leave()
        return terminal.fail(error)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return terminal.fail(f"{str(error).split('. ')[0]}; try --dtype bfloat16, --no-split or --device cpu")
    return int(failed)


def _run(argv: list[str]) -> int | bool:
    verb, *rest = argv or [""]
    if verb in ("-V", "--version"):
        print(f"minivlm {__version__}")
        return 0
    if verb == "help" and rest:
        verb, rest = rest[0], ["--help"]
    if verb in ("", "help", "-h", "--help"):
        print(overview(), file=sys.stdout if verb else sys.stderr)
        return 0 if verb else 2
    module = _verb(verb)
    parser = parser_of(verb, module)
    arguments = parser.parse_intermixed_args(rest)  # options may stand between the images and the question
    if hasattr(module, "RUNS_ON_GPUS") and launch.wanted(arguments):
        return launch.start(arguments.gpus, argv)
    launch.join(arguments)
    try:
        failed = bool(module.run(arguments))
        launch.part()
        return failed
    except UsageError as error:
        parser.error(str(error))


def overview() -> str:
    """The help of `minivlm` without a verb: what each verb does."""
    verbs = terminal.columns([(f"  {verb}", _summary(_verb(verb))) for verb in VERBS])
    return "\n".join(
        [
            "usage: minivlm VERB …\n",
            f"{ABOUT}\n",
            *verbs,
            f"\nexamples:\n{_indented(EXAMPLES)}\n",
            "`minivlm help VERB` lists the options of a verb with examples; `minivlm -V` prints the version.",
        ]
    )


def parser_of(verb: str, module: ModuleType) -> argparse.ArgumentParser:
    """The parser of one verb."""
    parser = _Parser(
        prog=f"minivlm {verb}",
        description=_summary(module),
        epilog=f"examples:\n{_indented(module.EXAMPLES)}",
        formatter_class=_Help,
    )
    if hasattr(module, "USAGE"):
        parser.usage = f"%(prog)s {module.USAGE}"
    module.add_arguments(parser)
    return parser


def _verb(name: str) -> ModuleType:
    if name not in VERBS:
        _Parser(prog="minivlm").error(f"there is no verb {name!r}{suggestion(name, VERBS)}")
    return importlib.import_module(f"minivlm.app.verbs.{name}")


# ---- Help and errors


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds an option's default to its help, unless it is None or False or the help mentions it already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or action.default == [] or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which suggest the option that was meant. Names and paths cannot be empty."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", None, partial(_given, str))
        self.register("type", Path, partial(_given, Path))  # Path("") is the current folder

    def error(self, message: str) -> NoReturn:
        mistyped = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        close = suggestion(mistyped[1], self._option_string_actions) if mistyped else ""
        self.exit(2, f"minivlm: error: {message}{close}; see `{self.prog} --help`\n")


def _given(kind: type, text: str) -> Any:
    if not text:
        raise argparse.ArgumentTypeError("the value is empty (a shell variable that is not set?)")
    return kind(text)


def _summary(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0]


def _indented(lines: str) -> str:
    return "\n".join(f"  {line}" for line in lines.splitlines())


if __name__ == "__main__":
    sys.exit(main())
