"""Compares the ratios of a new run with those of docs/speed.md, and names the rows that fell.

    python scripts/bench/generate.py --family idefics2 | tee now.md
    python scripts/bench/check.py now.md --kind "Zen 4" [--table docs/speed.md] [--slack 0.1]

A row is found by the family and dtype of its table and its own name. --kind: words of the heading over the tables of
this kind of processor. Below the stored ratio by more than `slack` of it, or below 1.0 where the stored one is not,
is a regression, and the exit code is 1. Absolute times are not compared: they are those of another day.
"""

import argparse
import re
import sys
from pathlib import Path

Ratios = dict[tuple[str, str, str], float]  # (family, dtype or format, row) → reference / ours


def measured(text: str) -> Ratios:
    """The ratios that `generate.py` has printed."""
    family = column = ""
    found: Ratios = {}
    for line in text.splitlines():
        if match := re.match(r"(\w+): [\d,]+ M parameters", line):
            family = match[1]
        cells = _cells(line)
        if cells and cells[-1] == "ratio":
            column = cells[0] + (f" / {cells[2].partition(', ')[2]}" if "," in cells[2] else "")
        elif len(cells) == 4 and _number(cells[3]) is not None:
            found[family, column, cells[0]] = _number(cells[3])
    return found


def stored(text: str, kind: str) -> Ratios:
    """The ratios of the tables under the heading that has `kind` in it. A table begins with its family and dtypes."""
    found: Ratios = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        if kind not in section.partition("\n")[0]:
            continue
        columns: list[str] = []
        for line in section.splitlines():
            cells = _cells(line)
            if len(cells) < 2:
                columns = []
            elif not columns:
                columns = [_family(cells[0]), *cells[1:]]
            elif not set(line) <= set("|-: "):
                numbers = zip(columns[1:], map(_number, cells[1:]), strict=False)
                found |= {(columns[0], column, cells[0]): value for column, value in numbers if value is not None}
    return found


def _family(title: str) -> str:
    """LLaVA-NeXT, 186 M → llava_next."""
    return re.sub(r"[ -]", "_", title.partition(",")[0].lower())


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []


def _number(text: str) -> float | None:
    match = re.fullmatch(r"\*{0,2}(\d+\.\d+)\*{0,2}", text)
    return float(match[1]) if match else None


def fallen(now: Ratios, before: Ratios, slack: float) -> list[str]:
    """A line for each row that fell."""
    lines = []
    for row in sorted(now.keys() & before.keys()):
        least = before[row] * (1 - slack)
        if now[row] < least or now[row] < 1 <= before[row]:
            lines.append(f"{', '.join(row)}: {now[row]:.2f}, stored {before[row]:.2f}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="what generate.py printed")
    parser.add_argument("--kind", required=True, help="words of a heading of the table")
    parser.add_argument("--table", type=Path, default=Path(__file__).parents[2] / "docs" / "speed.md")
    parser.add_argument("--slack", type=float, default=0.1)
    arguments = parser.parse_args()
    now = measured(arguments.run.read_text(encoding="utf-8"))
    before = stored(arguments.table.read_text(encoding="utf-8"), arguments.kind)
    if not now.keys() & before.keys():
        raise SystemExit(f"no row in common: {len(now)} measured, {len(before)} stored under {arguments.kind!r}")
    lines = fallen(now, before, arguments.slack)
    print(f"{len(now.keys() & before.keys())} rows compared, {len(lines)} fell", *lines, sep="\n")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
