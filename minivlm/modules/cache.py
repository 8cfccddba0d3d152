"""The keys and values of earlier tokens, in one preallocated tensor: every decode step has the same shapes.

L layers, B batch, K key/value heads, S slots, D head width.
"""

import copy

import torch
from torch import Tensor


class KVCache:
    """Keys (after rotation) and values, (L, B, K, S, D) each; `length` of the S slots are filled.

    A layer writes its new keys with `update`; the decoder calls `advance` once after its last layer, so all layers of
    one forward pass use the same `length`:

        cache = KVCache(layers=2, batch=1, heads=8, slots=100, width=128)
        keys, values = cache.update(0, k, v)     # k, v (B, K, T, D) → views of the first length + T slots
        cache.advance(T)
    """

    filled: Tensor | None = None  # only of a `StaticCache`
    grows: bool = False  # doubles its slots, at least, when full

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        slots: int,
        width: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.data = torch.empty(2, layers, batch, heads, slots, width, device=device, dtype=dtype)
        self.length = 0
        # Cross-attention (IDEFICS) leaves these at prefill: keys and values of the M images that new tokens attend to,
        # (B, H, M·Q, D) each, one pair for each gated block, and which of them each row attends to, (B, 1, M).
        self.cross: list[tuple[Tensor, Tensor]] = []
        self.cross_seen: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.data.shape[4]

    @property
    def batch(self) -> int:
        return self.data.shape[2]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, K, T, D) after the filled slots of `layer`; return views (B, K, length + T, D) of both."""
        end = self.length + k.shape[2]
        if self.grows and end > self.slots:
            self.data = self.expand(1, 2 * end).data
        if end > self.slots or k.shape[0] != self.batch:
            found = f"{k.shape[0]} rows of {self.length} + {k.shape[2]} do not fit"
            raise ValueError(f"the cache holds {self.batch} rows of {self.slots} tokens; {found}")
        self.data[0, layer, :, :, self.length : end] = k
        self.data[1, layer, :, :, self.length : end] = v
        return self.data[0, layer, :, :, :end], self.data[1, layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` slots as filled, after every layer has written them."""
        self.length += tokens

    def crop(self, length: int) -> None:
        """Keep only the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} tokens to {length}")
        self.length = length

    def expand(self, times: int, slots: int) -> "KVCache":
        """A copy with `slots` slots and each row repeated `times` times; this cache is unchanged."""
        wide = copy.copy(self)
        pair, layers, batch, heads, _, width = self.data.shape
        wide.data = self.data.new_empty(pair, layers, batch * times, heads, slots, width)
        split = wide.data.unflatten(2, (self.batch, times))  # (2, L, B, times, K, slots, D)
        split[..., : self.length, :] = self.data[:, :, :, None, :, : self.length]
        wide._move_images(torch.arange(self.batch, device=self.data.device).repeat_interleave(times))
        return wide

    def reorder(self, rows: Tensor, shared: int = 0) -> None:
        """Row i becomes a copy of the former row rows[i] (beam search): rows (B,) int64. Only filled slots move.

        The first `shared` tokens of rows[i] are those of row i, and so are its images: these stay where they are.
        """
        moved, rows = self.data[..., shared : self.length, :], rows.to(self.data.device)
        moved.copy_(moved.index_select(2, rows))
        if not shared:
            self._move_images(rows)

    def _move_images(self, rows: Tensor) -> None:
        """Row i gets the images of row rows[i]."""
        self.cross = [(k[rows], v[rows]) for k, v in self.cross]
        self.cross_seen = None if self.cross_seen is None else self.cross_seen[rows]
