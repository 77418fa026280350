"""The LLaMA table against transformers' own modules: each axis found by perturbation, not by reading the table."""

import pytest
import torch
from helpers_oracle import random_model, tiny_config
from transformers import LlamaForCausalLM

from llmshearing.families import FAMILIES, table_for

VARIANTS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "head_dim apart": {"head_dim": 6, "hidden_size": 8},
}
IDS = torch.arange(8)[None]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_table_has_every_tensor_in_the_state_dict_s_names_and_shapes(changes):
    model = LlamaForCausalLM(tiny_config(**changes))
    table = table_for(model.config)
    table.check({name: tuple(value.shape) for name, value in model.state_dict().items()})
    assert {name for name, _, _ in table.instances()} == set(model.state_dict())


@pytest.mark.parametrize(("kind", "units"), [("intermediate", 10), ("head", 2)])
def test_a_unit_whose_writing_weights_are_zero_can_be_scrambled(kind, units):
    """What `o_proj` and `down_proj` ignore is exactly what the table says a unit owns."""
    config = tiny_config(num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    writer = {"intermediate": "mlp.down_proj.weight", "head": "self_attn.o_proj.weight"}[kind]
    table = table_for(config)
    for unit in range(units):
        model = random_model(config)
        state = dict(model.named_parameters())
        owned = {}
        for name, spec, layer in table.instances():
            for dim, axis_name in enumerate(spec.axes):
                axis = table.axes[axis_name]
                if layer == 1 and axis.kind == kind:
                    owned[name] = (dim, slice(unit * axis.per_unit, (unit + 1) * axis.per_unit))
        before = model(IDS).logits
        with torch.no_grad():
            dim, part = owned[f"model.layers.1.{writer}"]
            state[f"model.layers.1.{writer}"][:, part] = 0
            silenced = model(IDS).logits
            for name, (dim, part) in owned.items():
                if not name.endswith(writer):
                    state[name].movedim(dim, 0)[part] = 7.0
        assert not torch.equal(before, silenced)
        assert torch.equal(model(IDS).logits, silenced)


def test_families_are_named_by_model_type():
    assert LlamaForCausalLM.config_class.model_type in FAMILIES
