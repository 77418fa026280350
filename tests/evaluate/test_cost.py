"""FLOPs in closed form: equal to torch's counter for every family, and to a hand-written formula."""

import pytest
import torch
from tiny import VARIANTS
from transformers import AutoConfig, AutoModelForCausalLM

from llmshearing.families import table_for
from llmshearing.families.cost import cost_of
from llmshearing.families.stored import as_stored
from llmshearing.prune.flops import counted_flops

CASES = [(family, name) for family, variants in VARIANTS.items() for name in variants]


def model_of(family: str, name: str):
    torch.manual_seed(0)
    return as_stored(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **VARIANTS[family][name])).eval())


@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{family}-{name}" for family, name in CASES])
def test_closed_form_is_torchs_count(family: str, name: str) -> None:
    model = model_of(family, name)
    assert cost_of(table_for(model.config)).sequence(7) == counted_flops(model, 7)


@pytest.mark.parametrize(("groups", "heads"), [(4, 4), (2, 4)], ids=["MHA", "GQA"])
def test_closed_form_by_hand(groups: int, heads: int) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=100, head_dim=8,
    )  # fmt: skip
    found = cost_of(table_for(config))
    attention = 32 * 8 * (heads + groups + groups + heads)
    assert found.per_token == 2 * (3 * (attention + 3 * 32 * 80) + 32 * 100)
    assert found.sequence(7) == 7 * found.per_token + 3 * 2 * 2 * 7 * 7 * heads * 8
    assert found.kv_elements == 3 * 2 * groups * 8


def test_experts_by_hand() -> None:
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, num_local_experts=5, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    found = cost_of(table_for(config))
    attention = 32 * 8 * (4 + 2 + 2 + 4)
    assert found.per_token == 2 * (2 * (attention + 32 * 5 + 2 * 3 * 32 * 40) + 32 * 100)


@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{family}-{name}" for family, name in CASES])
def test_cache_holds_what_is_told(family: str, name: str) -> None:
    model = model_of(family, name)
    with torch.no_grad():
        cache = model(torch.zeros(1, 3, dtype=torch.int64), use_cache=True).past_key_values
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert elements == 3 * cost_of(table_for(model.config)).kv_elements


def test_fused_attention_of_the_cpu_is_counted() -> None:
    """Without the mapping torch counts nothing for it."""
    from torch.utils.flop_counter import FlopCounterMode

    model = model_of("llama", "grouped")
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        model(torch.zeros(1, 6, dtype=torch.int64), use_cache=False)
    cost = cost_of(table_for(model.config))
    assert plain.get_total_flops() < cost.sequence(6) and counted_flops(model, 6) == cost.sequence(6)
