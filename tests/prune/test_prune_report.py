"""What the closing table counts, against torch's own counts at full length and sums over parameters."""

import pytest
import torch
from helpers_prune import model_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmshearing.prune.report import CONTEXT, measure


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "opt"])
def test_flops_and_bytes(family):
    model = model_of(family, max_position_embeddings=CONTEXT)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(input_ids=torch.ones(1, CONTEXT, dtype=torch.int64), use_cache=False)
    found = measure(model, torch.bfloat16, None)
    assert found.flops_per_token == pytest.approx(counter.get_total_flops() / CONTEXT, rel=1e-9)
    assert found.bytes == 2 * found.parameters == 2 * sum(p.numel() for p in model.parameters())
    assert found.perplexity is None
