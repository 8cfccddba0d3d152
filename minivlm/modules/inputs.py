"""What a processor returns and a model takes: `model(**inputs)`."""

from typing import Any

import numpy as np
import torch


class Inputs(dict[str, torch.Tensor]):  # or arrays or lists, as the caller wants them
    """A dict of model inputs whose keys are also attributes: `inputs["input_ids"]` is `inputs.input_ids`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here; there are {', '.join(self) or 'no inputs'}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to(
        self, device: str | int | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> "Inputs":
        """Move the tensors, in place: `.to("cuda")`, `.to("cuda", torch.float16)`, `.to(torch.bfloat16)`.

        `dtype` changes floating tensors only: ids and masks stay whole numbers. What is not a tensor stays as it is.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        return self

    def convert(self, return_tensors: str | None) -> "Inputs":
        """Every value as the caller wants it: "pt" tensors, "np" arrays, or untouched for None."""
        if return_tensors is None:
            return self
        if return_tensors not in ("pt", "np"):
            raise ValueError(f'return_tensors is "pt", "np" or None, found {return_tensors!r}')
        for name, value in self.items():
            try:
                array = value if isinstance(value, np.ndarray) else np.array(value, np.int64)
            except ValueError as error:
                raise ValueError(
                    f"the rows of {name} have different lengths ({sorted({len(row) for row in value})}) and so are "
                    "not one tensor; pass padding=True"
                ) from error
            self[name] = torch.from_numpy(array) if return_tensors == "pt" else array
        return self
