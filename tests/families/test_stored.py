"""Modules under the names of checkpoints, and configs that both versions read: beside transformers' own."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import VARIANTS, config_of
from transformers import AutoModelForCausalLM

from llmshearing.compat import EAGER_EXPERTS
from llmshearing.families import table_for
from llmshearing.families.portable import portable
from llmshearing.families.stored import as_stored

CASES = [
    ("mixtral", "grouped"), ("mixtral", "tied"), ("qwen3_moe", "grouped"), ("qwen3_moe", "tied"),
    ("qwen3_moe", "one dense"), ("gpt_neox", "parallel"), ("gpt_neox", "serial"), ("llama", "grouped"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_the_same_function_under_the_names_on_disk(family, variant, tmp_path):
    torch.manual_seed(0)
    config = config_of(family, variant)
    model = AutoModelForCausalLM.from_config(
        config, **(EAGER_EXPERTS if "num_experts_per_tok" in VARIANTS[family][variant] else {})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.randint(23, (2, 9))
    wanted = model(input_ids=ids, labels=ids)
    wanted.loss.backward()
    embedding = model.get_input_embeddings().weight.grad.clone()
    model.save_pretrained(tmp_path)
    assert as_stored(as_stored(model)) is model
    table, tensors = table_for(config), model.state_dict()
    table.check({name: tuple(value.shape) for name, value in tensors.items()})
    written = load_file(tmp_path / "model.safetensors")
    assert set(written) == {name for name, spec, _ in table.instances() if spec.alias is None}
    assert all(torch.equal(value, tensors[name]) for name, value in written.items())
    model.zero_grad()
    found = model(input_ids=ids, labels=ids)
    found.loss.backward()
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.get_input_embeddings().weight.grad, embedding, atol=1e-5, rtol=1e-4)
    assert model.get_output_embeddings().weight is dict(model.named_modules())[_head(table)].weight


def _head(table):
    return next(name for name in ("embed_out", "lm_head") if f"{name}.weight" in table.by_name)


SCALED = {"rope_type": "yarn", "factor": 4.0}
LONG = {"short_factor": [1.0], "long_factor": [2.0]}
NEW = [
    ("llama", {"rope_theta": 5.0, "rope_type": "default"}, {"rope_theta": 5.0, "rope_scaling": None}),
    ("llama", {"rope_theta": 5.0, **SCALED}, {"rope_theta": 5.0, "rope_scaling": SCALED}),
    ("mistral", {"rope_theta": 5.0, "rope_type": "default"}, {"rope_theta": 5.0}),
    ("phi3", {"rope_theta": 5.0, "rope_type": "longrope", "type": "longrope", "partial_rotary_factor": 1.0, **LONG},
     {"rope_theta": 5.0, "partial_rotary_factor": 1.0, "rope_scaling": {"type": "longrope", **LONG}}),
    ("gpt_neox", {"rope_theta": 5.0, "rope_type": "default", "partial_rotary_factor": 0.5},
     {"rope_theta": 5.0, "rotary_emb_base": 5.0, "partial_rotary_factor": 0.5, "rotary_pct": 0.5,
      "rope_scaling": None}),
    ("gemma3_text", {"full_attention": {"rope_theta": 5.0, **SCALED}, "sliding_attention": {"rope_theta": 3.0}},
     {"rope_theta": 5.0, "rope_local_base_freq": 3.0, "rope_scaling": SCALED}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "new", "old"), NEW)
def test_rotary_parameters_in_the_keys_of_4_57(family, new, old):
    found = portable({"model_type": family, "rope_parameters": new, "vocab_size": 3})
    assert found == {"model_type": family, "vocab_size": 3, **old}
    assert portable(found) == found


def test_experts_in_the_keys_of_4_57():
    qwen3 = {"model_type": "qwen3_moe"}
    assert portable({**qwen3, "num_local_experts": 3}) == {**qwen3, "num_experts": 3}
    assert portable({"model_type": "mixtral", "num_local_experts": 3})["num_local_experts"] == 3
