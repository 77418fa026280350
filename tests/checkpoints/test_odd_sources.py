"""Sources as others leave them: odd generation settings, two versions of the weights, a dtype that no config tells."""

import json
import logging
import shutil

import pytest
import torch
from helpers_prune import model_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from llmshearing.checkpoints.generation import writable
from llmshearing.checkpoints.hf_read import hf_to_checkpoint
from llmshearing.checkpoints.hf_write import checkpoint_to_hf
from llmshearing.errors import ShearingError
from llmshearing.prune import prune
from llmshearing.storage import open_weights
from llmshearing.storage.dtypes import cast, main_dtype

ODD = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.7, 1.0, "hot"]),
        "top_p": st.floats(0.1, 2),
        "top_k": st.integers(-1, 60),
        "do_sample": st.sampled_from([True, False, None]),
        "num_beams": st.integers(1, 4),
        "early_stopping": st.sampled_from([True, False, "never", "maybe"]),
        "pad_token_id": st.sampled_from([-1, 0, None]),
        "eos_token_id": st.sampled_from([2, [2, 3], None]),
        "length_penalty": st.floats(0, 2),
        "num_return_sequences": st.integers(0, 3),
        "use_cache": st.booleans(),
        "of_my_own": st.just(3),
    },
)


@given(ODD)
def test_whatever_the_settings_they_can_be_written_and_good_ones_stay(tmp_path_factory, given_settings):
    folder = tmp_path_factory.mktemp("settings")
    found = writable(given_settings, LlamaConfig())
    found.save_pretrained(folder)
    again = GenerationConfig.from_pretrained(folder)
    try:
        own = GenerationConfig.from_dict(dict(given_settings))
        own.validate(strict=True)
    except Exception:
        return
    assert again.to_diff_dict() == own.to_diff_dict()  # nothing is left out of settings that transformers would write


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, ("temperature = 0.9", "top_p = 0.6")),
        ({"pad_token_id": -1}, ("pad_token_id = -1",)),
    ],
)
def test_one_warning_names_what_is_left_out(settings, named, caplog, tmp_path):
    source = tmp_path / "source"
    model_of("llama").save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({**settings, "max_length": 77}))
    with caplog.at_level(logging.WARNING):
        out = prune("depth", source, tmp_path / "out", {"drop_layers": [1]})
    warnings = [record.getMessage() for record in caplog.records if "generation settings" in record.getMessage()]
    assert len(warnings) == 1 and all(name in warnings[0] for name in named)
    assert json.loads((out.path / "generation_config.json").read_text())["max_length"] == 77
    checkpoint_to_hf(hf_to_checkpoint(source, tmp_path / "a.pt"), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["max_length"] == 77


@pytest.mark.parametrize("shards_stayed", [True, False])
def test_a_single_file_is_taken_before_the_index_of_earlier_shards(shards_stayed, tmp_path, caplog):
    both = tmp_path / "both"
    model_of("llama", seed=1).save_pretrained(both, max_shard_size="2KB")
    model_of("llama", seed=2).save_pretrained(tmp_path / "newer")
    shutil.copy(tmp_path / "newer" / "model.safetensors", both)
    shards = sorted(both.glob("model-0*"))
    assert len(shards) > 1 and (both / "model.safetensors.index.json").is_file()
    for shard in () if shards_stayed else shards:
        shard.unlink()
    with caplog.at_level(logging.WARNING):
        entries = open_weights(both).entries
    loaded = AutoModelForCausalLM.from_pretrained(both).state_dict()
    assert all(torch.equal(tensor.make(), loaded[name]) for name, tensor in entries.items())
    assert "left aside" in caplog.text and "model.safetensors.index.json" in caplog.text


def test_the_stored_dtype_is_kept_whatever_the_config_says(tmp_path):
    source = tmp_path / "source"
    model_of("llama", torch.bfloat16).save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = 1e5  # more than float16 holds
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    for stated in ("float16", None):
        (source / "config.json").write_text(json.dumps({**config, "dtype": stated, "torch_dtype": stated}))
        out = prune("depth", source, tmp_path / f"out {stated}", {"drop_layers": [1]})
        written = load_file(out.path / "model.safetensors")
        assert written["model.norm.weight"].dtype == torch.float32
        assert {value.dtype for name, value in written.items() if "model.norm" not in name} == {torch.bfloat16}
        stored, found = weights["model.layers.2.mlp.down_proj.weight"], written["model.layers.1.mlp.down_proj.weight"]
        assert torch.equal(stored, found)
    hf_to_checkpoint(source, tmp_path / "a.pt")
    with pytest.raises(ShearingError, match="down_proj.weight: 1 finite values would become infinite in torch.float16"):
        checkpoint_to_hf(tmp_path / "a.pt", tmp_path / "half", {"dtype": "float16"})
    assert not (tmp_path / "half").exists()


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_a_cast_keeps_what_a_value_is_or_says_which_does_not(values):
    tensor = torch.tensor(values)
    fits = all(abs(value) < 65520 or value != value or abs(value) == float("inf") for value in values)
    if fits:
        assert torch.equal(cast("x", tensor, torch.float16).isfinite(), tensor.isfinite())
    else:
        with pytest.raises(ShearingError, match="^x: "):
            cast("x", tensor, torch.float16)
    assert main_dtype({"a": torch.int64, "b": torch.bfloat16}) == torch.bfloat16 and main_dtype({}) == torch.float32
