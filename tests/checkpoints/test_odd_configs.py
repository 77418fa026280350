"""Directories and checkpoints as others leave them: odd but legal is what its plain form is, the rest one error."""

import json
import logging

import pytest
import torch
from helpers_prune import calibration_of, config_of, model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from llmshearing.checkpoints.checkpoint import CheckpointInfo, load_masks, read_checkpoint, save_checkpoint
from llmshearing.checkpoints.hf_config import read_config
from llmshearing.checkpoints.hf_read import hf_to_checkpoint, load_hf_model, load_hf_weights
from llmshearing.checkpoints.hf_write import checkpoint_to_hf
from llmshearing.compat import TIES_WHAT_IS_ABSENT
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.masks.l0 import L0Masks
from llmshearing.prune import prune
from llmshearing.storage import open_weights

WEIGHTS = "model.safetensors"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
# Nothing here decides what the model computes.
LEGAL = {
    "dtype": st.sampled_from([None, "float16", "bfloat16", "auto", "torch.bfloat16", "floaty", 3]),
    "torch_dtype": st.sampled_from([None, "float16", "torch.float32"]),
    "architectures": st.sampled_from([None, [], ["LlamaModel"], ["MyOwnForCausalLM"], ["AutoConfig"]]),
    "quantization_config": st.sampled_from([None, {}]),
    "_attn_implementation": st.just("flash_attention_2"),
    "attn_implementation": st.just("flash_attention_2"),
    "return_dict": st.booleans(),
    "torchscript": st.booleans(),
    "output_hidden_states": st.booleans(),
    "use_cache": st.booleans(),
    "temperature": st.sampled_from([0.0, 0.7]),
    "early_stopping": st.sampled_from(["maybe", "never", True]),
    "max_new_tokens": st.integers(-1, 3),
    "num_return_sequences": st.integers(1, 3),
    "transformers_version": st.sampled_from(["4.31.0", "99.0", 4]),
    "auto_map": st.just({"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}),
    "of_my_own": JSON,
}
SETTINGS = st.sampled_from(
    [None, b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 20000, b'{"early_stopping": "maybe", "max_length": 9}',
     b'{"max_new_tokens": -1}', b'{"watermarking_config": {"foo": 3}}', b'{"compile_config": {"foo": 3}}',
     b'{"a": ' + b"9" * 5000 + b"}", b'{"cache_implementation": "foo"}']
)  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    model_of("llama").save_pretrained(folder)
    return folder


def log_probabilities(model):
    with torch.no_grad():
        return model.eval()(input_ids=calibration_of(2).select, use_cache=False).logits.log_softmax(-1)


def copy_of(plain, folder, **changes):
    folder.mkdir(exist_ok=True)
    config = {**json.loads((plain / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes((plain / WEIGHTS).read_bytes())
    return folder


@settings(max_examples=20)
@given(odd=st.fixed_dictionaries({}, optional=LEGAL), generation=SETTINGS, leave=st.booleans())
def test_an_odd_directory_is_its_plain_form(plain, tmp_path_factory, odd, generation, leave):
    folder = copy_of(plain, tmp_path_factory.mktemp("odd"), **odd)
    if leave:  # two of something, and keys in another order
        stale = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
        (folder / "pytorch_model.bin").write_bytes(b"")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    if generation is not None:
        (folder / "generation_config.json").write_bytes(generation)
    wanted = AutoModelForCausalLM.from_pretrained(plain)
    assert torch.equal(log_probabilities(load_hf_model(folder, torch.float32)), log_probabilities(wanted))
    weights, config = load_hf_weights(folder)
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in weights.items())
    assert table_for(config).shape() == table_for(wanted.config).shape()
    out = checkpoint_to_hf(hf_to_checkpoint(folder, folder / "a.pt"), folder / "out")
    written = load_file(out / WEIGHTS)
    assert written.keys() == load_file(plain / WEIGHTS).keys()
    assert all(torch.equal(value, written[name]) for name, value in load_file(plain / WEIGHTS).items())


SIZES = ["hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers"]


@given(wrong=st.dictionaries(st.sampled_from(SIZES), JSON, min_size=1, max_size=2))
def test_whatever_stands_for_a_size_is_taken_or_one_error(plain, tmp_path_factory, wrong):
    folder = copy_of(plain, tmp_path_factory.mktemp("sizes"), **wrong)
    for read in (load_hf_weights, lambda path: prune("depth", path, path / "out", {"drop_layers": [1]})):
        try:
            read(folder)
        except ShearingError:
            assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": "4"}, "config.json of .*: num_hidden_layers = '4': must be a number, without quotes: 4"),
        ({"num_hidden_layers": 4.0}, "num_hidden_layers = 4.0: must be a whole number from 1|expected int, got float"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4: must be a multiple of num_key_value_heads = 3"),
        (
            {"intermediate_size": None},
            "intermediate_size = None: must be a whole number from 1|loaded: TypeError: Field 'intermediate_size' exp",
        ),
        ({"hidden_size": 0}, "hidden_size = 0: must be a whole number from 1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantized"),
        ({"model_type": "foo"}, "config of .* cannot be loaded: .*foo"),
        ({"model_type": ["llama"]}, "config of .* cannot be loaded"),
        ({"rms_norm_eps": "1e-5"}, "config.json of .*source: rms_norm_eps = '1e-5': must be a number.*: 1e-5"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small': must be a number, without quotes$"),
        ({"head_dim": "4", "rope_theta": "1e4"}, "head_dim = '4': must.*\\n.*rope_theta = '1e4': must be a number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling.factor = '2': must be a number"),
    ],
)
def test_a_config_that_no_model_can_have(plain, tmp_path, changes, message):
    folder = copy_of(plain, tmp_path / "source", **changes)
    with pytest.raises(ShearingError, match=message):
        prune("depth", folder, tmp_path / "out", {"drop_layers": [1]})
    assert not (tmp_path / "out").exists()


def test_text_for_numbers_is_found_under_each_familys_own_keys(tmp_path):
    """And under the names that transformers takes for them; what is text by right stays."""
    values = {**GPT2Config().to_dict(), "layer_norm_epsilon": "1e-5", "activation_function": "gelu", "of_my_own": "3"}
    (tmp_path / "config.json").write_text(json.dumps({**values, "hidden_size": "768"}))
    with pytest.raises(ShearingError) as error:
        read_config(tmp_path)
    said = [line.removeprefix(f"config.json of {tmp_path}: ") for line in str(error.value).splitlines()]
    assert said == [f"{key}: must be a number, without quotes: {right}" for key, right in [
        ("layer_norm_epsilon = '1e-5'", "1e-5"), ("hidden_size = '768'", "768")
    ]]  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**values, "layer_norm_epsilon": 1e-5}))
    assert read_config(tmp_path).of_my_own == "3"


def test_a_config_that_is_none_is_one_error(plain, tmp_path):
    folder = copy_of(plain, tmp_path / "source")
    for content in (b"", b"{", b"[]", b"null", b"3", b"\xff", b"[" * 20000, b'{"a": ' + b"9" * 5000 + b"}"):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(ShearingError, match="the config of .* cannot be loaded"):
            read_config(folder)


def test_names_and_buffers_of_earlier_versions_are_taken_as_transformers_takes_them(tmp_path):
    """GPT-2 as its makers published it: names of the bare decoder, and masks as buffers."""
    config = GPT2Config(vocab_size=23, n_embd=16, n_layer=3, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "source")
    stored = load_file(tmp_path / "source" / WEIGHTS)
    bare = {name.removeprefix("transformer."): value.bfloat16() for name, value in stored.items()}
    bare |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in range(3)}
    save_file(bare, tmp_path / "source" / WEIGHTS, metadata={"format": "pt"})
    out = checkpoint_to_hf(hf_to_checkpoint(tmp_path / "source", tmp_path / "a.pt"), tmp_path / "out")
    both = (tmp_path / "source", out)
    wanted, found = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in both)
    assert torch.equal(log_probabilities(wanted), log_probabilities(found))
    cut = prune("depth", tmp_path / "source", tmp_path / "cut", {"drop_layers": [1]})
    assert {value.dtype for value in load_file(cut.path / WEIGHTS).values()} == {torch.bfloat16}


def test_tied_tensors_that_differ_are_what_transformers_takes_and_said(tmp_path, caplog):
    source = tmp_path / "source"
    model_of("llama", tie_word_embeddings=True).save_pretrained(source)
    stored = load_file(source / WEIGHTS)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1
    save_file(stored, source / WEIGHTS, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        out = checkpoint_to_hf(hf_to_checkpoint(source, tmp_path / "a.pt"), tmp_path / "out")
        cut = prune("random", source, tmp_path / "cut", {"intermediate_size": 6}).path
    wanted, found = load_hf_model(source), AutoModelForCausalLM.from_pretrained(out)
    if not TIES_WHAT_IS_ABSENT:  # transformers 5 would load an untied model against its config
        wanted = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(log_probabilities(wanted), log_probabilities(found))
    assert "lm_head.weight to model.embed_tokens.weight, but they differ" in caplog.text
    assert torch.equal(load_file(cut / WEIGHTS)["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])


def test_a_tied_tensor_that_is_stored_under_the_other_name_is_refused(tmp_path):
    source = tmp_path / "source"
    model_of("llama", tie_word_embeddings=True).save_pretrained(source)
    stored = load_file(source / WEIGHTS)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, source / WEIGHTS, metadata={"format": "pt"})
    if TIES_WHAT_IS_ABSENT:
        assert torch.equal(load_hf_model(source).state_dict()["model.embed_tokens.weight"], stored["lm_head.weight"])
    else:
        with pytest.raises(ShearingError, match=r"there is no .*model\.embed_tokens\.weight"):
            load_hf_model(source)
    with pytest.raises(ShearingError, match=r"model\.embed_tokens\.weight"):
        load_hf_weights(source)


def test_a_tensor_that_no_index_lists_is_left_aside(tmp_path):
    model_of("llama").save_pretrained(tmp_path, max_shard_size="2KB")
    shard = sorted(tmp_path.glob("model-0*"))[0]
    save_file({**load_file(shard), "of_my_own": torch.ones(3)}, shard, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert open_weights(tmp_path).keys() == loaded.keys()


# What an index must not be.
@given(
    weight_map=JSON | st.dictionaries(st.sampled_from(["a", "b"]), JSON, max_size=2),
    rest=st.dictionaries(st.text(max_size=3), JSON),
)
def test_an_index_of_another_structure(tmp_path_factory, weight_map, rest):
    folder = tmp_path_factory.mktemp("index")
    (folder / "model.safetensors.index.json").write_text(json.dumps({**rest, "weight_map": weight_map}))
    with pytest.raises(ShearingError, match="index|missing"):
        open_weights(folder)


def test_an_index_nested_without_end_and_weights_of_old_torch(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[" * 20000)
    with pytest.raises(ShearingError, match="is no index of weights: RecursionError"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ShearingError, match="format of torch before 1.6; load it with torch and save it again"):
        open_weights(tmp_path)


KEYS = ["masks", "run_config", "tokenizer", "history", "generation_config", "evaluation", "hf_config", "of_my_own"]


@given(told=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3), number=st.integers(0, 10**9))
def test_whatever_a_checkpoint_tells_of_itself_is_taken_or_one_error(tmp_path_factory, told, number):
    folder = tmp_path_factory.mktemp("told")
    model = model_of("llama")
    masks = L0Masks(table_for(model.config), ["hidden"], {"hidden": 8}, None, None, 0) if "masks" in told else None
    info = CheckpointInfo(model.config.to_dict(), run_config="a: 1", history=["one"])
    path = save_checkpoint(folder / "a.pt", model.state_dict(), info, masks.state_dict() if masks else None)
    state = torch.load(path, weights_only=True)
    state["state"]["callbacks"]["CheckpointInfo"].update(told)
    torch.save(state, path)
    for use in (lambda: load_masks(read_checkpoint(path)), lambda: checkpoint_to_hf(path, folder / "out")):
        try:
            use()
        except ShearingError:
            assert not (folder / "out").exists()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_generation_settings_of_a_checkpoint_stop_nothing(family, tmp_path):
    model = AutoModelForCausalLM.from_config(config_of(family))
    values = {**model.config.to_dict(), "early_stopping": "maybe", "max_new_tokens": -1}
    info = CheckpointInfo(values, generation_config={"early_stopping": "maybe", "max_length": 9})
    out = checkpoint_to_hf(save_checkpoint(tmp_path / "a.pt", model.state_dict(), info), tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text())["max_length"] == 9
    assert AutoConfig.from_pretrained(out).layer_types == model.config.layer_types
