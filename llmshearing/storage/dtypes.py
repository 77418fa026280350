"""What dtype tensors are stored in, and casts that keep what a value is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.storage.lazy import LazyTensor


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype.

    Raises:
        ShearingError: a finite value would become infinite; the tensor, the value and the dtype's range are named.
    """
    if tensor.dtype == dtype:
        return tensor
    out = tensor.to(dtype)
    lost = tensor.isfinite() & ~out.isfinite()
    if bool(lost.any()):
        value = tensor[lost].abs().max().item()
        raise ShearingError(
            f"{name}: {int(lost.sum())} finite values would become infinite in {dtype}, whose largest is "
            f"{torch.finfo(dtype).max:g}; the largest of them is {value:g}. Take bfloat16 or float32"
        )
    return out


def cast_lazily(name: str, tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """:func:`cast`, when the tensor is made."""
    if dtype == tensor.dtype:
        return tensor
    return LazyTensor(tensor.shape, dtype, lambda: cast(name, tensor.make(), dtype))


def main_dtype(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The floating dtype of most tensors; float32 where there is none."""
    counted = Counter(dtype for dtype in dtypes.values() if dtype.is_floating_point)
    return counted.most_common(1)[0][0] if counted else torch.float32
