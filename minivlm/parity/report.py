"""The report of a comparison: as a table of 100 columns, as JSON, as a plot."""

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from minivlm.parity.findings import Finding
from minivlm.parity.operations import Blame

COLUMNS = ("stage", "shape", "max |Δ|", "mean |Δ|", "relative", "1 - cos", "allowed", "excess", "largest at")
WIDTHS = (21, 14, 7, 8, 8, 7, 7, 6, 12)  # with blanks between and a mark at the end: 100 columns
WIDTH = 100
LEGEND = "excess: ratio to the allowed; above 1 a stage diverges (!). largest at: image/row, position, channel"


@dataclass(frozen=True)
class Report:
    """a, b: descriptions of the sides.  findings: in data-flow order.  skipped: stages without a module on one side.
    operations: inside the first stage that diverges, if requested and known."""

    a: str
    b: str
    findings: list[Finding]
    skipped: tuple[str, ...] = ()
    operations: Blame | None = None

    @property
    def first(self) -> Finding | None:
        """The first stage that diverges; None if none does."""
        return next((finding for finding in self.findings if finding.diverges), None)

    def verdict(self) -> str:
        """The first divergence, its size, and the code responsible."""
        found = self.first
        if found is None:
            ties = [finding.note for finding in self.findings if finding.note]
            return "\n".join([f"no stage diverges ({len(self.findings)} compared)", *ties, *self._left_out()])
        why = found.note or f"differs at {found.where}, where both must be equal"
        if found.allowed:
            times = f"{found.excess:.1f}" if found.excess < 10 else f"{found.excess:,.0f}"
            why = f"{times} times what is allowed; max |Δ| {found.largest:.2g}, at {found.where}"
        count = sum(finding.diverges for finding in self.findings)
        code = f"made by {found.path}: {found.code}".replace(", in ", "\nin ").split("\n")
        inside = self.operations.words() if self.operations else []
        lines = [why, *code, *inside, f"{count} of {len(self.findings)} stages diverge", *self._left_out()]
        folded = (wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ") for line in lines)
        return "\n".join([f"first divergence: {found.stage}", *(part for parts in folded for part in parts)])

    def _left_out(self) -> list[str]:
        return [f"skipped, since one side has no such module: {', '.join(self.skipped)}"] if self.skipped else []

    def table(self) -> str:
        """Both sides, one line for each stage, the verdict."""
        head = [f"a: {self.a}", f"b: {self.b}", "", _line(COLUMNS), _line(["-" * width for width in WIDTHS])]
        lines = [*head, *map(_row, self.findings), LEGEND, "", self.verdict()]
        return "\n".join(line.rstrip() for line in lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None."""
        findings = [
            {name: _finite(value) for name, value in asdict(finding).items()} | {"diverges": finding.diverges}
            for finding in self.findings
        ]
        first = None if self.first is None else self.first.stage
        found = {"a": self.a, "b": self.b, "first_divergence": first, "stages": findings, "skipped": list(self.skipped)}
        return found if self.operations is None else {**found, "operations": self.operations.words()}


def _row(finding: Finding) -> str:
    shape = "x".join(map(str, finding.shape))
    mark = " !" if finding.diverges else ""
    if math.isnan(finding.largest):
        note = finding.note or "equal"
        room = sum(WIDTHS[2:]) + len(WIDTHS) - 3
        return _line([_name(finding), shape, note if len(note) <= room else note[: room - 1] + "…"]) + mark
    numbers = [finding.largest, finding.mean, finding.relative, 1 - finding.cosine, finding.allowed]
    largest_at = ",".join(re.findall(r"\d+", finding.where))
    return _line([_name(finding), shape, *map(_short, numbers), _times(finding.excess), largest_at]) + mark


def _name(finding: Finding) -> str:
    """A stage's name; of a part only its own, because its layer follows below."""
    _, comma, part = finding.stage.partition(", ")
    name = f"  {part}" if comma else finding.stage
    return name if len(name) <= WIDTHS[0] else name[: WIDTHS[0] - 1] + "…"


def _line(cells: Sequence[str]) -> str:
    """Cells side by side: words left-aligned, numbers right-aligned."""
    words = {0, 1, len(WIDTHS) - 1} if len(cells) == len(WIDTHS) else range(len(cells))
    padded = [
        cell.ljust(width) if index in words else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, WIDTHS, strict=False))
    ]
    return " ".join(padded)


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _times(excess: float) -> str:
    """An excess in few characters: 0.31, 12, 3e+05, inf."""
    return f"{excess:.2f}" if excess < 10 else f"{excess:.0f}" if excess < 1000 else f"{excess:.0e}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_plot(path: str | Path) -> None:
    """OSError, before an hour's work, if matplotlib is not installed or the plot's folder does not exist."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OSError("a plot needs matplotlib: pip install 'minivlm[plot]'")
    if Path(path).suffix not in (".png", ".pdf", ".svg") or not Path(path).absolute().parent.is_dir():
        raise OSError(f"{path} cannot be drawn: name a .png, .pdf or .svg in an existing folder")


def plot(reports: dict[str, Report], path: str | Path) -> None:
    """Error by depth, on a logarithmic scale: ‖Δ‖/‖a‖ of the stages of each report, by its dtype, and as a dashed line
    the allowed error. Stages without any difference have a triangle at the bottom, diverging stages a ring.

    Raises what `check_plot` does.
    """
    check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (dtype, report) in enumerate(reports.items()):
        shown = [finding for finding in report.findings if finding.allowed_relative]
        error = [finding.relative or math.nan for finding in shown]
        bad = [finding.relative if finding.diverges else math.nan for finding in shown]
        equal = [index for index, finding in enumerate(shown) if finding.relative == 0]
        (line,) = axes.semilogy(error, marker=".", label=dtype)
        axes.semilogy(bad, "o", markersize=9, markerfacecolor="none", color=line.get_color())
        axes.semilogy([finding.allowed_relative for finding in shown], "--", linewidth=1, color=line.get_color())
        height = [0.02 + 0.04 * number] * len(equal)  # in parts of the axis
        axes.plot(equal, height, "v", transform=axes.get_xaxis_transform(), color=line.get_color())
        axes.set_xticks(range(len(shown)), [finding.stage for finding in shown], rotation=90, fontsize=7)
        titles = [f"{name}: {words.replace(f', {dtype}', '')}" for name, words in (("a", report.a), ("b", report.b))]
        axes.set_title("\n".join(titles))
    axes.set_ylabel("‖Δ‖ / ‖a‖")
    axes.grid(alpha=0.3)
    handles, _ = axes.get_legend_handles_labels()
    handles += [
        Line2D([], [], color="grey", linestyle="--", linewidth=1, label="allowed"),
        Line2D([], [], color="grey", linestyle="", marker="v", label="no difference (0)"),
        Line2D([], [], color="grey", linestyle="", marker="o", fillstyle="none", markersize=9, label="diverges"),
    ]
    axes.legend(handles=handles, fontsize=8)
    figure.savefig(path, dpi=150)
