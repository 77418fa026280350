"""FLOPs as torch counts them while a model runs: a check of the closed form (`families.cost`), and all there is of a
model without a table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from llmshearing.errors import ShearingError


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    """Of scaled dot products, shapes [B, heads, T, width]: 2 for q k and 2 for p v; keys may have fewer heads."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


# torch has no formula for the kernel that it takes on a CPU.
FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@torch.no_grad()
def counted_flops(model: PreTrainedModel, length: int) -> int:
    """FLOPs of a forward pass of one sequence of so many tokens, without those of rotary angles.

    Raises:
        ShearingError: the model cannot run.
    """
    ids = torch.zeros(1, length, dtype=torch.int64, device=model.device)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        try:
            model(input_ids=ids, use_cache=False)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError) as error:
            raise ShearingError(f"the model cannot run: {type(error).__name__}: {error}; see its config") from error
    angles = [path for path in counter.get_flop_counts() if path.rpartition(".")[2].startswith("rotary_emb")]
    counts = counter.get_flop_counts()
    return counter.get_total_flops() - sum(sum(counts[path].values()) for path in angles)


def close(one: float, other: float) -> bool:
    """Whether two counts agree within a percent; small models have other small terms."""
    return math.isclose(one, other, rel_tol=0.01)
