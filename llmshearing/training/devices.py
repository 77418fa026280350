"""What the device of a run computes quickly."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

CPU_FLAGS = ("amx_bf16", "avx512_bf16")
"""Linux's names of the instructions that multiply bfloat16."""


@cache
def has_bfloat16(device: str) -> bool:
    """Whether bfloat16 products are made by the hardware. device: its type, as cpu or cuda."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    flags = Path("/proc/cpuinfo")
    return not flags.is_file() or any(flag in flags.read_text() for flag in CPU_FLAGS)
