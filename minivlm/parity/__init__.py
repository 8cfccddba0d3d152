"""Runs two models on the same question and finds the first stage at which they disagree.

    from minivlm.parity import Question, Side, compare, drawn_image

    a, b = Side("shapes-idefics2", "transformers"), Side("shapes-idefics2", attn="eager")
    report = compare(a, b, Question((drawn_image(),), "what is this?"))
    print(report.table())

`stages` lists what is compared, `sides` loads and runs, `recording` stores, `difference` measures, `findings` judges.
"""

from minivlm.parity.compare import against, compare, record
from minivlm.parity.question import Question, drawn_image
from minivlm.parity.recording import Recording
from minivlm.parity.report import Report, check_plot, plot
from minivlm.parity.sides import Side

__all__ = [
    "Question",
    "Recording",
    "Report",
    "Side",
    "against",
    "check_plot",
    "compare",
    "drawn_image",
    "plot",
    "record",
]
