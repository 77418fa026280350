"""Turned == source on every family that allows it; the others are refused; what norms count, against a slow oracle."""

import copy

import pytest
import torch
from helpers_oracle import hidden_sizes, random_model, tiny_config, widen_norms
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.nonuniform.config import config_of
from llmshearing.families.stored import as_stored
from llmshearing.fold.fold import fold, folded_config
from llmshearing.fold.gating import attach, detach
from llmshearing.fold.selection import Selection, Units
from llmshearing.fold.turn import turn
from llmshearing.masks.l0 import selection_from_gates

IDS = torch.arange(14).view(2, 7)
SIZES = {
    "vocab_size": 23, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 10,
    "num_hidden_layers": 3, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2}
TURNABLE = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 6},
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 6, "mlp_only_layers": [1], "head_dim": 4, **EXPERTS},
}
REFUSED = {
    "gpt_neox": "subtract the mean",
    "opt": "subtract the mean",
    "gpt2": "subtract the mean",
    "gemma2": "behind a branch",
    "gemma3_text": "behind a branch",
    "olmo2": "behind a branch",
}


def model_of(family, seed=0, **changes):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **changes}))
    model = as_stored(model).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * values if "norm" in name else 0.3 * values)
    return widen_norms(model)


def random_basis(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", TURNABLE)
def test_the_turned_model_computes_the_same(family):
    model = model_of(family, tie_word_embeddings=False, **TURNABLE[family])
    turned = copy.deepcopy(model)
    turned.load_state_dict(turn(model.state_dict(), table_for(model.config), random_basis(16)), strict=True)
    before, after = logits(model), logits(widen_norms(turned))
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()
    changed = [n for n, p in turned.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    kept = {n for n, _ in turned.named_parameters()} - set(changed)
    assert not any("embed" in n or "layernorm" in n for n in kept)  # the turn did something
    assert all("q_norm" in n or "k_norm" in n or n.endswith(("bias", "layers.1.mlp.x")) for n in kept), kept


@pytest.mark.parametrize(("family", "says"), REFUSED.items())
def test_families_that_cannot_be_turned_are_refused_by_name(family, says):
    table = table_for(AutoConfig.for_model(family))
    with pytest.raises(ShearingError, match=f"{family} family cannot be turned.*{says}"):
        turn({}, table, random_basis(16))


def test_a_tied_head_is_parted_only_when_asked_and_then_exactly():
    model = random_model(tiny_config(tie_word_embeddings=True))
    table, basis = table_for(model.config), random_basis(12)
    with pytest.raises(ShearingError, match="lm_head.weight is model.embed_tokens.weight.*23 x 12 parameters.*--untie"):
        turn(model.state_dict(), table, basis)
    apart = random_model(tiny_config(tie_word_embeddings=False))
    apart.load_state_dict(turn(model.state_dict(), table, basis, untie=True), strict=True)
    torch.testing.assert_close(logits(widen_norms(apart)), logits(widen_norms(model)), rtol=1e-10, atol=1e-10)


def test_a_basis_that_is_not_orthogonal_is_refused():
    model = random_model(tiny_config())
    with pytest.raises(ShearingError, match="not orthogonal"):
        turn(model.state_dict(), table_for(model.config), torch.ones(12, 12))


# What a norm counts ----------------------------------------------------------------------------------------------


def shares_of(table, seed):
    generator = torch.Generator().manual_seed(seed)
    names = [n for n, spec, _ in table.instances() if spec.module.form == "rms_norm" and spec.axes == ("hidden",)]
    drawn = {name: torch.rand(table.axes["hidden"].length, generator=generator, dtype=torch.float64) for name in names}
    return {name: share / share.sum() for name, share in drawn.items()}


class Counting(torch.nn.Module):
    """A norm over the whole width that divides by the mean square as the rule says, from the maths alone."""

    def __init__(self, norm, kept, share):
        super().__init__()
        self.norm, self.kept = norm, kept
        self.number = len(share) * share[kept].sum()  # n(S)

    def forward(self, x):
        mask = torch.zeros(x.shape[-1], dtype=x.dtype).index_fill(0, self.kept, 1.0)
        # eps scales with the count, so that the folded model, whose config has one eps, is the same function
        mean = (x * mask).square().sum(-1, keepdim=True) / self.number
        eps = self.norm.variance_epsilon * len(self.kept) / self.number
        return self.norm.weight * x * mask / (mean + eps).sqrt()


@given(st.integers(0, 10**6), st.sampled_from(hidden_sizes(4, 11)), st.booleans())
def test_norms_count_the_energy_that_is_left(seed, number, tied):
    """Gated == folded == full-width model with masked writes and counting norms."""
    config = tiny_config(tie_word_embeddings=tied)
    model, table = widen_norms(random_model(config, seed % 97)), table_for(config)
    kept = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:number].sort().values
    selection = Selection({"hidden": (Units(kept),)}, energy=shares_of(table, seed))

    small = AutoModelForCausalLM.from_config(config_of(folded_config(config.to_dict(), table, selection))).double()
    small.load_state_dict(fold(model.state_dict(), table, selection), strict=True)
    folded = logits(widen_norms(small.eval()))

    gated_model = random_model(config, seed % 97)
    gating = attach(gated_model, table)
    gating.set(selection)
    gated = logits(gated_model)
    detach(gated_model)

    oracle = copy.deepcopy(model)
    mask = torch.zeros(12, dtype=torch.float64).index_fill(0, kept, 1.0)
    for name in selection.energy:
        path = name.removesuffix(".weight")
        parent, _, child = path.rpartition(".")
        setattr(oracle.get_submodule(parent), child, Counting(model.get_submodule(path), kept, selection.energy[name]))
    oracle.model.embed_tokens.register_forward_hook(lambda m, a, out: out * mask)
    for layer in oracle.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.register_forward_hook(lambda m, a, out: out * mask)
    slow = logits(oracle)
    assert (gated - folded).abs().max() <= 1e-10 * folded.abs().max().clamp(min=1)
    assert (slow - folded).abs().max() <= 1e-10 * folded.abs().max().clamp(min=1)


@given(st.integers(0, 10**6))
def test_equal_shares_are_the_count_of_units(seed):
    config = tiny_config()
    model, table = random_model(config, seed % 97), table_for(config)
    kept = Units(torch.tensor([0, 3, 4, 9]))
    equal = {name: torch.full_like(share, 1 / 12) for name, share in shares_of(table, 0).items()}
    plain = fold(model.state_dict(), table, Selection({"hidden": (kept,)}))
    counted = fold(model.state_dict(), table, Selection({"hidden": (kept,)}, energy=equal))
    assert all(torch.allclose(plain[name], counted[name], rtol=1e-14, atol=0) for name in plain)


def test_padding_is_neither_counted_nor_energy():
    config = tiny_config()
    table, energy = table_for(config), shares_of(table_for(config), 3)
    gates = {"hidden": torch.tensor([1.0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)}
    outputs = []
    for round_to in (1, 8):
        model = random_model(config)
        selection = selection_from_gates(table, gates, round_to)
        attach(model, table).set(Selection(selection.units, energy=energy))
        outputs.append(logits(model))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)


def test_energy_of_another_model_is_refused_and_files_keep_it(tmp_path):
    from llmshearing.fold.selection import load_selection, save_selection

    config = tiny_config()
    model, table = random_model(config), table_for(config)
    units = {"hidden": (Units(torch.tensor([1, 2])),)}
    with pytest.raises(ShearingError, match="energy of model.norm.weight: .7. shares"):
        fold(model.state_dict(), table, Selection(units, energy={"model.norm.weight": torch.ones(7)}))
    selection = Selection(units, energy=shares_of(table, 1))
    again, _ = load_selection(save_selection(tmp_path / "s.safetensors", selection))
    assert all(torch.equal(again.energy[name], share) for name, share in selection.energy.items())
