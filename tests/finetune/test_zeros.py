"""Zeroed models: the function of the folded one, zeros that no step undoes, with LoRA too, and the fold after it."""

import json

import pytest
import torch
from conformance import random_model
from helpers_prune import model_of
from safetensors.torch import load_file
from tiny import VARIANTS, config_of
from transformers import AutoModelForCausalLM

from llmshearing.checkpoints.hf_read import build_model
from llmshearing.cli import main
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.fold import fold, folded_config
from llmshearing.fold.selection import Selection, Units, load_selection
from llmshearing.fold.zeros import check_zeroable, check_zeros, kept_elements, zeroed
from llmshearing.prune.run import prune

TARGET = {"num_key_value_heads": 1, "num_attention_heads": 2, "intermediate_size": 6, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def zeros(place):
    """The source pruned at random: zeroed, and cut."""
    for name, zero in (("zeroed", True), ("cut", False)):
        prune("random", place / "source", place / name, TARGET, zero=zero, seed=1)
    return place / "zeroed"


def logits(directory, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory).double().eval()(ids).logits.log_softmax(-1)


IDS = torch.randint(424, (3, 12), generator=torch.Generator().manual_seed(0))


def closed_parts(tensors, selection):
    """What must be 0, by the names and layout of the LLaMA family, written out."""
    width = 4
    for layer in range(4):
        name = f"model.layers.{layer}"
        kept_mlp = set(selection.units["intermediate"][layer].index.tolist())
        kept_groups = set(selection.units["head"][layer].index.tolist())
        closed = not selection.layer_is_open(layer)
        for unit in range(10):
            if closed or unit not in kept_mlp:
                yield tensors[f"{name}.mlp.down_proj.weight"][:, unit]
                yield tensors[f"{name}.mlp.up_proj.weight"][unit]
                yield tensors[f"{name}.mlp.gate_proj.weight"][unit]
        for group in range(2):
            if closed or group not in kept_groups:
                yield tensors[f"{name}.self_attn.o_proj.weight"][:, group * 2 * width : (group + 1) * 2 * width]
                yield tensors[f"{name}.self_attn.q_proj.weight"][group * 2 * width : (group + 1) * 2 * width]
                yield tensors[f"{name}.self_attn.k_proj.weight"][group * width : (group + 1) * width]


def test_zeroed_is_the_source_s_shape_and_the_cut_model_s_function(place, zeros):
    torch.testing.assert_close(logits(zeros, IDS), logits(place / "cut", IDS), atol=1e-10, rtol=0)
    assert torch.isfinite(logits(zeros, IDS)).all()
    config = json.loads((zeros / "config.json").read_text())
    assert config["intermediate_size"] == 10 and config["num_hidden_layers"] == 4
    selection, about = load_selection(zeros / "selection.safetensors")
    assert about["zeroed"] is True
    parts = list(closed_parts(load_file(zeros / "model.safetensors"), selection))
    assert len(parts) > 30 and not any(part.any() for part in parts)


@pytest.mark.parametrize("lora", [False, True])
def test_zeros_stay_through_every_step_and_the_fold_is_the_same_function(place, zeros, tmp_path, lora):
    if lora:
        pytest.importorskip("peft")
    words = ["finetune", zeros, place / "chats.jsonl", "--weight_decay", 0.1, "--learning_rate", 0.02, "--epochs", 4]
    words += ["--batch_size", 4, "--device", "cpu", *(["--lora", "--rank", 3] if lora else [])]
    for name, more in (("sparse", ["--keep_shape"]), ("folded", [])):
        assert main([str(word) for word in [*words, "--output", tmp_path / name, *more]]) == 0
    trained = load_file(tmp_path / "sparse" / "model.safetensors")
    selection, _ = load_selection(tmp_path / "sparse" / "selection.safetensors")
    assert not any(part.any() for part in closed_parts(trained, selection))
    before = load_file(zeros / "model.safetensors")
    kept_layer = selection.kept_layers(4)[0]
    name = f"model.layers.{kept_layer}.mlp.down_proj.weight"
    assert (trained[name] != before[name]).sum() == len(trained[name]) * 6  # all that is open has moved
    one, other = logits(tmp_path / "sparse", IDS), logits(tmp_path / "folded", IDS)
    torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
    assert (one - logits(zeros, IDS)).abs().max() > 1e-2
    assert json.loads((tmp_path / "folded" / "config.json").read_text())["num_hidden_layers"] == 3


def test_a_zeroed_directory_folds_without_data(place, zeros, tmp_path):
    assert main(["finetune", str(zeros), "--output", str(tmp_path / "out")]) == 0
    cut, folded = (load_file(path / "model.safetensors") for path in (place / "cut", tmp_path / "out"))
    assert cut.keys() == folded.keys() and all(torch.equal(cut[name], folded[name]) for name in cut)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi3", "gemma2", "mixtral", "opt", "gpt_neox"])
def test_every_sort_of_tensor(family):
    """Fused, transposed, biased, offset, of experts: what is zeroed computes what is folded, to 1e-10."""
    model = random_model(config_of(family, next(iter(VARIANTS[family]))))
    table = table_for(model.config)
    coupled = {axis for coupling in table.couplings for axis in (coupling.one, coupling.other)}
    kinds = ["intermediate", *(["head"] if "query" not in coupled else [])]
    units = {}
    for kind in kinds:
        of = table.kinds[kind]
        # every row keeps its first and last unit, with a gate that has to be multiplied in
        index = torch.tensor([row * of.size + unit for row in range(of.rows or 1) for unit in {0, of.size - 1}]).sort()
        gate = torch.linspace(0.5, 1.0, len(index.values), dtype=torch.float64)
        units[kind] = (Units(index.values, gate),) * table.layers
    selection = Selection(units)
    weights = model.state_dict()
    sparse = zeroed(weights, table, selection)
    check_zeros(sparse, table, selection)
    closed = sum(int((~mask).sum()) for _, mask in kept_elements(table, selection))
    assert closed > 100
    values = folded_config(model.config.to_dict(), table, selection)
    small = build_model(fold(weights, table, selection), type(model.config).from_dict(values))
    large = build_model(sparse, type(model.config).from_dict(model.config.to_dict()))  # the same kernels
    ids = torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (each(ids).logits.log_softmax(-1) for each in (small, large))
    torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("units", "said"),
    [
        ({"hidden": (Units(torch.arange(8)),)}, "cannot be zeroed, only cut: hidden: norms count hidden units"),
        ({"intermediate": (Units(torch.arange(10)),) * 4}, "closes nothing"),
    ],
)
def test_what_cannot_be_zeroed_is_named(units, said):
    table = table_for(model_of("llama").config)
    with pytest.raises(ShearingError, match=said):
        check_zeroable(table, Selection(units))


def test_hidden_units_are_refused_by_the_command(place, tmp_path, caplog):
    words = ["prune", "random", "--model", place / "source", "--output", tmp_path / "o", "--target", "hidden_size=8"]
    assert main([str(word) for word in [*words, "--zero"]]) == 1
    assert "cannot be zeroed, only cut: hidden_size: norms count hidden units" in caplog.text
    assert not (tmp_path / "o").exists()
    assert main([str(word) for word in [*words, "--zero", "--pad"]]) == 1


def test_zeros_that_are_none_are_named(zeros):
    tensors = load_file(zeros / "model.safetensors")
    selection, _ = load_selection(zeros / "selection.safetensors")
    table = table_for(AutoModelForCausalLM.from_pretrained(zeros).config)
    check_zeros(tensors, table, selection)
    tensors["model.layers.0.mlp.up_proj.weight"] += 1
    with pytest.raises(ShearingError, match="is not 0 in model.layers.0.mlp.up_proj.weight"):
        check_zeros(tensors, table, selection)
