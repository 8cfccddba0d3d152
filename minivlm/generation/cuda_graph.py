"""A decode step that a CUDA graph can repeat: fixed shapes, fixed addresses, no decisions on the host.

A GPU runs the few hundred kernels of a step faster than Python launches them. A graph launches them all at once, but
exactly as captured. So the new token and its position are copied into tensors with fixed addresses, and the number of
filled cache slots is counted on the device:

    token (B,), position (B,) ──copy──► self.token, self.position ──► model ──► self.logits ──clone──► (B, V)
                                         StaticCache.filled: + 1 ◄──────┘
                                        └──────────────── in the graph ────────────┘
"""

import warnings
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.generation.steps import forward
from minivlm.modules.cache import KVCache

_compared: WeakSet[Any] = WeakSet()  # models of which a graph gave what a plain step gives


class StaticCache:
    """The view of a KVCache that a captured decode step uses.

    All slots are always in view, and the slot of the new token is counted on the device: during the step `filled` is
    `length` + 1 of the cache it was made from. Attention masks every slot that is not filled.
    """

    def __init__(self, cache: KVCache) -> None:
        self.data = cache.data
        self.data[..., cache.length :, :] = 0  # masked slots have weights of 0, but 0 · NaN would be NaN
        self.batch, self.length = cache.batch, cache.slots - 1  # for the host, the new token is always the last
        self.cross, self.cross_seen = cache.cross, cache.cross_seen
        self.filled = torch.tensor(cache.length + 1, dtype=torch.int32, device=cache.data.device)
        self._slot = torch.tensor([cache.length], device=cache.data.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, K, 1, D) after the filled slots of `layer`; return views (B, K, S, D) of all slots."""
        keys, values = self.data[0, layer], self.data[1, layer]
        return keys.index_copy_(2, self._slot, k), values.index_copy_(2, self._slot, v)

    def advance(self, tokens: int) -> None:
        """Count the new token as filled, on the device."""
        self.filled += tokens
        self._slot += tokens


class CapturedStep:
    """A decode step for the rows of one cache: on CUDA its first call runs, its second is captured.

    A model's first graph is compared with a plain step; if it differs, one warning says so and no graph is used.

        step = CapturedStep(model, cache, attention_mask)
        logits = step(token, position)      # (B,), (B,) → (B, V) float32

    attention_mask: (B, any number of slots), True = real token; later slots are real.
    Between two calls the cache may be reordered but not cropped; after the last call it is an ordinary cache.
    On a CPU the same code runs without a graph, so tests can compare it with the plain step.
    """

    def __init__(self, model: Any, cache: KVCache, attention_mask: Tensor | None = None) -> None:
        device = cache.data.device
        self.model, self.cache, self.static = model, cache, StaticCache(cache)
        self.mask = attention_mask
        if attention_mask is not None:
            self.mask = F.pad(attention_mask, (0, cache.slots - attention_mask.shape[1]), value=True)
        self.token = torch.zeros(cache.batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros_like(self.token)
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captures = device.type == "cuda"

    def __call__(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits after one more token at `position`. Raises ValueError if the cache is full."""
        if self.cache.length >= self.cache.slots:
            raise ValueError(f"the cache holds {self.cache.slots} tokens per row and is full")
        self.token.copy_(token[:, None])
        self.position.copy_(position[:, None])
        if self.captures and self.graph is None and self.logits is not None:
            self._capture()  # in the second call: the first compiles kernels and fills caches
        if self.graph is None:
            self.logits = self._run()
        elif self.model in _compared:
            self.graph.replay()
        else:
            self._compare()
        self.cache.advance(1)
        return self.logits.clone()  # the next call writes into the same memory

    def _run(self) -> Tensor:
        output = forward(self.model, self.token, self.static, self.mask, self.position)
        return output.logits[:, -1].float()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device_of(self.token), torch.cuda.graph(graph):
                self.logits = self._run()
        except RuntimeError as error:
            raise RuntimeError(
                "a decode step of this model cannot be captured in a CUDA graph: a layer, or a hook, waits for the "
                "device or copies from the host; pass disable_compile=True to generate without one"
            ) from error
        self.graph = graph

    def _compare(self) -> None:
        """Replay the graph, then run the same step without it: the step that counts, should they differ."""
        counters = (self.static.filled, self.static._slot)
        before = [counter.clone() for counter in counters]
        self.graph.replay()
        found, counted = self.logits.clone(), [counter.clone() for counter in counters]
        for counter, value in zip(counters, before, strict=True):
            counter.copy_(value)
        expected = self._run()
        # A graph may add in another order, which each layer's roundings carry on.
        slack = (len(self.static.data[0]) + 2) * torch.finfo(self.static.data.dtype).eps * expected.abs().max()
        same = all(torch.equal(*pair) for pair in zip(counters, counted, strict=True))
        if same and bool(((found - expected).abs() <= slack).all()):
            _compared.add(self.model)
            return
        text = "the captured decode step gives other numbers than a plain one, so no CUDA graph is used"
        warnings.warn(f"{text}; please report your GPU, driver and torch version", RuntimeWarning, stacklevel=3)
        self.graph, self.captures, self.logits = None, False, expected
