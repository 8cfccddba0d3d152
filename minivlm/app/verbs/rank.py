"""Rank given answers by their likelihood."""

import argparse
import json
from typing import Any

from minivlm.app import options, terminal
from minivlm.app.options import UsageError

USAGE = "[IMAGE…] QUESTION --answers A B … [options]"
RUNS_ON_GPUS = True  # --gpus: see `minivlm.app.launch`
EXAMPLES = """\
minivlm rank docs/shapes.png "What number is written?" --answers 46. 47. 48.
minivlm rank photo.jpg "Is it day or night? One word." --answers Day Night --model HuggingFaceM4/idefics2-8b --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_words(parser)
    parser.add_argument(
        "--answers", nargs="+", required=True, type=terminal.typed, metavar="ANSWER", help="two or more, quoted"
    )
    mean = "compare answers by the mean over their tokens, not the sum: for answers of different lengths"
    parser.add_argument("--mean", action="store_true", help=mean)
    parser.add_argument("--system", type=terminal.typed, metavar="TEXT", help="the system message, before the question")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print every answer with its share of the likelihood, the likeliest first."""
    names, question = options.images_and_question(arguments.words)
    if len(set(arguments.answers)) < 2:
        raise UsageError("--answers takes at least two different ones")
    if not all(answer.strip() for answer in arguments.answers):
        raise UsageError("one of the --answers is empty")
    session = options.prepared(arguments, names)

    from minivlm.generation.ranking import rank

    prompt, candidates = _encoded(session, question, arguments.system, arguments.answers)
    scores = rank(session.model(), prompt, candidates, mean=arguments.mean)[0]
    found = sorted(zip(scores.softmax(-1).tolist(), scores.tolist(), arguments.answers, strict=True), reverse=True)
    if arguments.json:
        answers = [{"answer": answer, "share": share, "log_probability": score} for share, score, answer in found]
        print(json.dumps({"model": session.name, "answers": answers}))
        return
    for share, score, answer in found:
        print(f"{share:7.2%}  {score:9.3f}  {answer}")


def _encoded(
    session: options.Session, question: str, system: str | None, answers: list[str]
) -> tuple[dict[str, Any], list[list[int]]]:
    """The prompt, and each answer's ids with the mark that ends it, as the chat template writes them."""
    from minivlm.app.answer import encoded
    from minivlm.text.messages import make_message

    messages = [] if system is None else [make_message("system", system)]
    messages.append(make_message("user", question, session.images))
    found = []
    for answer in answers:
        whole = [*messages, make_message("assistant", answer)]
        inputs = encoded(session.processor, whole, answered=True, return_assistant_tokens_mask=True)
        found.append(inputs["input_ids"][0][inputs["assistant_masks"][0].bool()].tolist())
    return dict(encoded(session.processor, messages)), found
