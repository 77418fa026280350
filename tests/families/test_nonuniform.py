"""Models whose layers differ in size: loaded by transformers' Auto classes, counted, padded, refused where wrong."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers_prune import calibration_of, config_of
from transformers import AutoConfig, AutoModelForCausalLM

from llmshearing.checkpoints.hf_read import hf_to_checkpoint
from llmshearing.compat import FIVE
from llmshearing.errors import ShearingError
from llmshearing.families import FAMILIES, UNIFORM, table_for
from llmshearing.families import UNIFORM as BASES
from llmshearing.families.nonuniform.table import TYPE, per_layer
from llmshearing.masks.l0 import L0Masks
from llmshearing.prune.pad import main as pad

SIZES = {
    "num_attention_heads": [4, 2, 4, 3],
    "num_key_value_heads": [2, 1, 2, 1],
    "intermediate_size": [10, 3, 7, 1],
}
IDS = calibration_of(2).select


def model_of(family="llama", **changes):
    values = {**config_of(family, head_dim=4).to_dict(), "layer_sizes": SIZES, "model_type": TYPE + family, **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_table_is_the_state_dict_s(family, tied):
    model = model_of(family, tie_word_embeddings=tied)
    for mode in ("group", "query"):
        table = table_for(model.config, mode)
        table.check({name: tuple(value.shape) for name, value in model.state_dict().items()})
        assert table.count() == sum(parameter.numel() for parameter in model.parameters())
        inside = [p.numel() for name, p in model.model.layers.named_parameters() if "norm" not in name]
        assert table.count(counted_only=True) == sum(inside)
    assert [layer.self_attn.num_key_value_groups for layer in model.model.layers] == [2, 2, 2, 3]


def test_every_family_with_a_table_has_a_non_uniform_form():
    assert set(BASES) == set(UNIFORM)
    assert set(FAMILIES) == {*BASES, *(TYPE + base for base in BASES)}


@pytest.mark.parametrize("first", ["llmshearing", "transformers", "AutoModelForCausalLM"])
def test_it_loads_in_another_process_whichever_is_imported_first(tmp_path, root, first):
    model = model_of()
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "logits.pt")
    imports = {
        "llmshearing": "import llmshearing; assert not {'torch', 'transformers'} & set(__import__('sys').modules)",
        "transformers": "import transformers, llmshearing",
        "AutoModelForCausalLM": "from transformers import AutoModelForCausalLM; import llmshearing",
    }
    code = f"""{imports[first]}
import torch
from transformers import AutoModelForCausalLM
model, report = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, output_loading_info=True)
assert not any(report.values()), report
with torch.no_grad():
    found = model(input_ids=torch.tensor({IDS.tolist()}), use_cache=False).logits
assert torch.equal(found, torch.load({str(tmp_path / "logits.pt")!r}))
assert model.generate(input_ids=torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape[1] <= 5
"""
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_a_cache_generates_what_whole_forward_passes_do():
    model = model_of()
    ids = IDS[:1, :4]
    made = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


def test_layers_follow_the_model_s_config_and_copies_are_their_own():
    model = model_of()
    before, twin = logits(model), copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    assert twin.model.layers[1].self_attn.config._attn_implementation == "eager"
    assert model.model.layers[1].self_attn.config._attn_implementation == "sdpa"
    assert torch.allclose(logits(twin), before, atol=1e-4)


def test_it_is_a_checkpoint_too_and_can_be_padded_but_not_masked(tmp_path, caplog):
    model = model_of()
    model.save_pretrained(tmp_path / "hf")
    hf_to_checkpoint(tmp_path / "hf", tmp_path / "model.pt")
    assert pad(["--model", str(tmp_path / "hf"), "--output", str(tmp_path / "plain")]) == 0
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(report.values()) and plain.config.model_type == "llama"
    assert (plain.config.num_attention_heads, plain.config.num_key_value_heads) == (6, 2)  # 2 groups of 3
    assert torch.allclose(logits(plain), logits(model), atol=1e-4)
    assert pad(["--model", str(tmp_path / "plain"), "--output", str(tmp_path / "again")]) == 1
    assert "layers of one size already" in caplog.records[-1].getMessage()
    with pytest.raises(ShearingError, match="layers of one size: pad"):
        L0Masks(table_for(model.config), ["head"], {"head": 1})


def test_sizes_of_another_number_of_layers_are_refused():
    with pytest.raises(ShearingError, match="layer_sizes of intermediate_size: must list 4 sizes"):
        model_of(layer_sizes={"intermediate_size": [3, 4]})


def test_transformers_5_s_form_is_written_too_and_enough_to_build_from(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    each = [{key: sizes[layer] for key, sizes in SIZES.items()} for layer in range(4)]
    assert stored["per_layer_config"] == {str(layer): sizes for layer, sizes in enumerate(each)}
    del stored["layer_sizes"]
    del stored["per_layer_config"]["0"]["intermediate_size"]  # as in the rest of the config
    (tmp_path / "config.json").write_text(json.dumps(stored))
    read, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and torch.equal(logits(read), logits(model))
    assert read.config.layer_sizes == SIZES
    assert [layer.num_key_value_heads for layer in read.config.per_layer_config] == SIZES["num_key_value_heads"]


def test_a_static_cache_has_the_heads_of_each_layer():
    model, options = model_of(), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(input_ids=IDS[:1, :4], **options)
    fixed = model.generate(input_ids=IDS[:1, :4], cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(fixed, wanted)


@pytest.mark.skipif(not FIVE, reason="transformers 4.57 has no per-layer configs")
def test_transformers_5_reads_the_sizes_of_each_layer():
    """Its own class of config does, from the same values (LLaMA's refuses heads); its own model is not built yet."""
    values = {key: value for key, value in model_of("mistral").config.to_dict().items() if key != "layer_sizes"}
    theirs = AutoConfig.for_model(**{**values, "model_type": "mistral"})
    assert theirs.is_heterogeneous
    for key, sizes in SIZES.items():
        assert [getattr(layer, key) for layer in theirs.per_layer_config] == sizes
    with pytest.raises(RuntimeError, match="per-layer attribute"):  # when this fails, write the family's own type
        AutoModelForCausalLM.from_config(theirs)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ShearingError, match="per_layer_config of layer 4: there are layers 0 to 3"):
        model_of(layer_sizes=None, per_layer_config={"4": {"intermediate_size": 3}})


def test_numbers_of_layers_sort():
    assert list(per_layer({"a": list(range(11))}))[:2] == ["00", "01"] and per_layer({}) == {}
