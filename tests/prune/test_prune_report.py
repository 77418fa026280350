"""What the closing table counts, against the closed form at full length and sums over parameters."""

import pytest
import torch
from helpers_prune import model_of

from llmshearing.families import table_for
from llmshearing.families.cost import cost_of
from llmshearing.prune.report import CONTEXT, measure


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "opt"])
def test_flops_and_bytes(family):
    model = model_of(family, max_position_embeddings=CONTEXT)
    closed = cost_of(table_for(model.config)).sequence(CONTEXT)
    found = measure(model, torch.bfloat16, None)
    assert found.flops_per_token == pytest.approx(closed / CONTEXT, rel=1e-9)
    assert found.bytes == 2 * found.parameters == 2 * sum(p.numel() for p in model.parameters())
    assert found.perplexity is None
