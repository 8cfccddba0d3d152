"""The logit lens (nostalgebraist 2020): what the model would answer if its layers ended earlier.

L layers, R rows, N new tokens (one for each pass), K runners-up, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivlm.inside.watch import Seen


@dataclass(frozen=True)
class Lens:
    """layers: their names.  tokens: (R, N) the tokens that were chosen, or asked about.  probability: (L, R, N) theirs.
    top_ids, top: (L, R, N, K), the likeliest tokens of each layer and their probabilities."""

    layers: list[str]
    tokens: Tensor
    probability: Tensor
    top_ids: Tensor
    top: Tensor


@torch.no_grad()
def logit_lens(
    model: Any, seen: Seen, tokens: Tensor | None = None, *, ends: list[int] | None = None, top: int = 5
) -> Lens:
    """The probabilities of the answer's tokens after every decoder layer that was watched.

        with watch(model, "decoder layer *") as seen:
            model.generate(**inputs, max_new_tokens=8)
        logit_lens(model, seen).probability      # (L, R, N)

    Every layer's output at the end of each pass goes through the model's own final norm and head. tokens: (R, N), whose
    probability; by default what was chosen: the next token of the text, the last one by the last layer. ends: which of
    the tokens watched, if not the last one of each pass.
    """
    names = [name for name in seen if name.startswith("decoder layer") and "," not in name]
    if not names:
        raise ValueError('watch "decoder layer *": the lens looks at what the layers put out')
    if ends is None:
        ends = [*[step - 1 for step in seen.steps[1:]], len(seen.positions) - 1]
    found = []
    for name in names:
        states = seen[name][:, ends].to(device=model.device, dtype=model.dtype)  # (R, N, C)
        found.append(model.head(model.decoder.norm(states)).float().softmax(-1))
    if tokens is None:
        after = [seen.positions[end] + 1 for end in ends[:-1]]
        tokens = torch.cat([seen.tokens[:, after].to(model.device), found[-1][:, -1:].argmax(-1)], dim=1)
    elif tokens.shape[1] != len(ends):
        raise ValueError(f"the lens looks at {len(ends)} positions, found {tokens.shape[1]} tokens")
    tokens = tokens.to(model.device)
    likeliest = [each.topk(min(top, each.shape[-1])) for each in found]
    return Lens(
        layers=names,
        tokens=tokens,
        probability=torch.stack([each.gather(-1, tokens[..., None])[..., 0] for each in found]),
        top_ids=torch.stack([each.indices for each in likeliest]),
        top=torch.stack([each.values for each in likeliest]),
    )
