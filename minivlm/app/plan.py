"""`minivlm inspect MODEL --gpus N`: what each device would hold, before anything is downloaded.

Counted on a meta-device model that `devices.parallel` has cut for each rank: the same shapes that loading would fill.
"""

from typing import Any

from minivlm import auto
from minivlm.app.inspection import known_config
from minivlm.app.terminal import memory
from minivlm.devices import parallel
from minivlm.modules.config import text_config
from minivlm.quantization import apply
from minivlm.quantization.formats import DTYPES

CARDS = (24, 48, 80, 141)  # GB of common GPUs
SPARE = 0.9  # of a card's memory that can be planned with
READ = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second, as their data sheets say
SUM = {1: 0.0, 2: 10e-6, 4: 12e-6, 8: 16e-6}  # seconds of one small sum by NVLink: assumed, not measured


def plan(name: str, gpus: int, dtype: str, quantization: Any, context: int, rows: int) -> dict[str, Any]:
    """Bytes of each rank: weights and cache; and the shortest time of a token. ValueError if `gpus` does not fit.

    quantization: a configuration as for `from_pretrained`, or None.  context, rows: of the cache, tokens and rows.
    """
    config = known_config(name)
    parallel.check_size(config, gpus)
    block = 1 if quantization is None else parallel.block_of(quantization.format)
    weights = [_weights(config, rank, gpus, dtype, quantization, block) for rank in range(gpus)]
    text = text_config(config)
    heads = max(1, text.num_key_value_heads // gpus)
    cache = 2 * text.num_hidden_layers * heads * text.head_dim * DTYPES[dtype].itemsize
    cache *= context * rows
    worst = max(total for total, _ in weights)
    sums = sum(1 for _ in parallel.connected(auto.skeleton(config))) + 1  # two a block, and one gathers the logits
    return {
        "gpus": gpus,
        "weights": [total for total, _ in weights],
        "cache": cache,
        "fits": [card for card in CARDS if worst + cache < SPARE * card * 1e9],
        "reads": max(read for _, read in weights),
        "sums": sums,
        "seconds": {card: max(read for _, read in weights) / rate for card, rate in READ.items()},
        "collectives": sums * SUM[gpus] if gpus in SUM else None,
    }


def _weights(config: Any, rank: int, gpus: int, dtype: str, quantization: Any, block: int) -> tuple[int, int]:
    """Bytes of a rank's weights, and of those that a decode step reads: decoder, gated blocks and head."""
    model = auto.skeleton(config)
    parallel.cut(model, rank, gpus, block)
    asked = () if quantization is None else (quantization.skip_modules, quantization.quantize_head)
    quantised = set(apply.selected(model, *asked)) if asked else set()
    total = read = 0
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner in quantised and leaf == "weight":
            size = quantization.format.nbytes(tuple(parameter.shape))
        else:
            size = parameter.numel() * DTYPES[dtype].itemsize
        total += size
        read += size if any(part in f".{name}" for part in (*parallel.PARTS, ".lm_head.")) else 0
    return total, read


def table(found: dict[str, Any], context: int, rows: int) -> str:
    """The plan in lines."""
    n, weights = found["gpus"], found["weights"]
    spread = memory(max(weights)) if len(set(weights)) == 1 else f"{memory(min(weights))} to {memory(max(weights))}"
    fits = ", ".join(f"{card} GB" for card in found["fits"]) or f"none of {', '.join(f'{card} GB' for card in CARDS)}"
    lines = [
        f"{n} device{'s' if n > 1 else ''}: weights {spread} each, cache {memory(found['cache'])} each "
        f"({rows:,} row{'s' if rows > 1 else ''} of {context:,} tokens); fits {fits} (10 % of a card left free)",
        f"a token reads {memory(found['reads'])} on each device: at least "
        + ", ".join(f"{1e3 * seconds:.2f} ms on {card}" for card, seconds in found["seconds"].items()),
    ]
    if n > 1 and found["collectives"] is not None:
        bound = "; they bound it" if found["collectives"] > min(found["seconds"].values()) else ""
        lines.append(
            f"{found['sums']} collectives a token take {1e3 * found['collectives']:.2f} ms if each takes "
            f"{1e6 * SUM[n]:.0f} µs (assumed, NVLink){bound}"
        )
    return "\n".join(lines)
