"""Refitting against ridge regressions written out on recorded activations; what it leaves; what it refuses."""

import copy

import pytest
import torch
from helpers_prune import calibration_of, model_of
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
)

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.nonuniform.config import config_of
from llmshearing.families.stored import as_stored
from llmshearing.fold.fold import fold, folded_config
from llmshearing.fold.selection import Selection, Units, layer_gates
from llmshearing.prune.methods.decoder import batch_loss
from llmshearing.prune.refit import Refit, check_refittable, refit
from llmshearing.prune.run import prune

RIDGE = 0.1


def cut(model, table, selection):
    config = config_of(folded_config(model.config.to_dict(), table, selection))
    small = as_stored(AutoModelForCausalLM.from_config(config)).eval()
    small.load_state_dict(fold(model.state_dict(), table, selection), strict=True)
    return small


def io_of(model, ids, names):
    """Module name -> (input, output), rows of tokens, float64."""
    seen, hooks = {}, []
    for name in names:

        def keep(module, inputs, output, name=name):
            out = output[0] if isinstance(output, tuple) else output
            seen[name] = [v.flatten(0, -2).double() for v in (inputs[0], out)]

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def ridge_step(weight, read, residual):
    """argmin |residual - read D^T|^2 + lambda |D|^2 as one least-squares problem with further rows."""
    lam = RIDGE * read.square().sum(0).mean()
    size = read.shape[1]
    rows = torch.cat([read, lam.sqrt() * torch.eye(size, dtype=torch.float64)])
    wanted = torch.cat([residual, torch.zeros(size, residual.shape[1], dtype=torch.float64)])
    return weight.double() + torch.linalg.lstsq(rows, wanted).solution.T


def slow(source, small, selection, ids):
    """The same front to back, with whole forward passes for every tensor."""
    hidden = selection.units["hidden"][0].index
    kept = selection.kept_layers(source.config.num_hidden_layers)
    ends = [following - 1 for following in (*kept[1:], source.config.num_hidden_layers)]
    heads, width = selection.units["head"], selection.units["intermediate"]
    size, repeat = small.config.head_dim, source.config.num_attention_heads // source.config.num_key_value_heads
    for j, (k, end) in enumerate(zip(kept, ends, strict=True)):
        groups = heads[k].index
        kv = (groups[:, None] * size + torch.arange(size)).flatten()
        query = (groups[:, None] * size * repeat + torch.arange(size * repeat)).flatten()
        own, theirs = f"model.layers.{j}.", f"model.layers.{k}."
        rows = {"self_attn.q_proj": query, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
        for part in (rows, None, {"mlp.gate_proj": width[k].index, "mlp.up_proj": width[k].index}, "last"):
            if isinstance(part, dict):
                s = io_of(source, ids, [theirs + name for name in part])
                o = io_of(small, ids, [own + name for name in part])
                for name, index in part.items():
                    module = small.get_submodule(own + name)
                    read, said = o[own + name]
                    module.weight.data = ridge_step(module.weight, read, s[theirs + name][1][:, index] - said).float()
                continue
            writer = "self_attn.o_proj" if part is None else "mlp.down_proj"
            norm = "input_layernorm" if part is None else "post_attention_layernorm"
            o = io_of(small, ids, [own + writer, own + norm])
            if part is None:
                wanted = io_of(source, ids, [theirs + "post_attention_layernorm"])[theirs + "post_attention_layernorm"][
                    0
                ]
            else:
                wanted = io_of(source, ids, [f"model.layers.{end}"])[f"model.layers.{end}"][1]
            module = small.get_submodule(own + writer)
            read, said = o[own + writer]
            residual, length = wanted[:, hidden] - o[own + norm][0] - said, wanted[:, hidden].norm(dim=1, keepdim=True)
            module.weight.data = ridge_step(module.weight, read / length, residual / length).float()
    if not source.config.tie_word_embeddings:
        read, wanted = (io_of(m, ids, ["lm_head"])["lm_head"][0] for m in (small, source))
        start = torch.zeros(source.config.hidden_size, len(hidden), dtype=torch.float64)
        start[hidden, torch.arange(len(hidden))] = 1.0
        bridge = ridge_step(start, read, wanted - read @ start.T)
        small.lm_head.weight.data = (source.lm_head.weight.double() @ bridge).float()


def some_selection(table):
    generator = torch.Generator().manual_seed(5)
    pick = lambda size, number: Units(torch.randperm(size, generator=generator)[:number].sort().values)  # noqa: E731
    layers = table.layers
    return Selection(
        {
            "hidden": (pick(table.axes["hidden"].length, table.axes["hidden"].length // 2),),
            "head": tuple(pick(2, 1) for _ in range(layers)),
            "intermediate": tuple(pick(table.axes["intermediate"].length, 5) for _ in range(layers)),
        },
        layer_gates(layers, [1]),
    )


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("qwen2", {}), ("llama", {"tie_word_embeddings": True}), ("qwen3", {})]
)
def test_it_is_the_ridge_regression_written_out(family, changes):
    model = model_of(family, num_key_value_heads=2, **changes).eval()
    table, data = table_for(model.config), calibration_of(10)
    selection = some_selection(table)
    fitted = cut(model, table, selection)
    by_hand = copy.deepcopy(fitted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Refit, "kept", True)  # the tensors are compared, better or not
        result = refit(model, fitted, table, selection, data, RIDGE)
    judged = [7]
    slow(model, by_hand, selection, data.select[[i for i in range(10) if i not in judged]])
    for name, value in fitted.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=2e-3, atol=2e-4, msg=name)
    held_out = data.select[judged]
    found = batch_loss(by_hand, held_out)
    assert result.after == pytest.approx(found, abs=2e-4)
    assert result.before == pytest.approx(batch_loss(cut(model, table, selection), held_out), abs=1e-6)


@pytest.mark.parametrize("config", [OPTConfig, GPTNeoXConfig])
def test_norms_with_biases_and_joined_batches_are_taken(config):
    """Families with LayerNorm, an output head of their own and, in OPT, batch and tokens in one dimension."""
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    own = {"ffn_dim": 10, "word_embed_proj_dim": 16, "pad_token_id": 0, "dropout": 0.0}
    more = own if config is OPTConfig else {"intermediate_size": 10, "use_parallel_residual": False}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(**sizes, **more, tie_word_embeddings=False, max_position_embeddings=32)
    )
    model = as_stored(model).eval()
    table, selection, data = table_for(model.config), Selection({}, layer_gates(3, [1])), calibration_of(16)
    small = cut(model, table, selection)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Refit, "kept", True)
        refit(model, small, table, selection, data)
    last = table.layers_path + ".1"
    ends = [io_of(m, data.select, [path])[path][1] for m, path in ((model, table.layers_path + ".2"), (small, last))]
    distance = (ends[0] - ends[1]).norm()
    small.load_state_dict(before)
    assert distance < (ends[0] - io_of(small, data.select, [last])[last][1]).norm()


def test_an_uncut_model_stays(tmp_path):
    model = model_of("llama", num_key_value_heads=2).eval()
    table = table_for(model.config)
    same = copy.deepcopy(model)
    refit(model, same, table, Selection(), calibration_of(9))
    for name, value in same.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_what_would_be_worse_is_undone(monkeypatch):
    """More is taken back than given where the sums are wrong on purpose."""
    from llmshearing.prune import refit as module

    model = model_of("llama", num_key_value_heads=2).eval()
    table = table_for(model.config)
    selection = some_selection(table)
    small = cut(model, table, selection)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    right = module._Fit.solution
    monkeypatch.setattr(module._Fit, "solution", lambda self, ridge: -40 * right(self, ridge))
    result = refit(model, small, table, selection, calibration_of(9))
    assert not result.kept
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (MixtralConfig, "which expert reads a token is chosen"),
        (Gemma2Config, "stands between"),
        (Olmo2Config, "stands"),
    ],
)
def test_families_that_cannot_are_refused(config, why):
    with pytest.raises(ShearingError, match=f"the {config.model_type} family cannot be refitted: .*{why}"):
        check_refittable(table_for(config(num_hidden_layers=2)))


def test_layers_that_add_their_branches_otherwise_are_refused():
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 3}
    config = GraniteConfig(**sizes, num_attention_heads=4, residual_multiplier=0.3, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ShearingError, match="do not add what a branch says"):
        refit(model, copy.deepcopy(model), table_for(config), Selection(), calibration_of(4))


def test_bad_input_is_refused(tmp_path):
    model = model_of("llama").eval()
    table = table_for(model.config)
    with pytest.raises(ShearingError, match="refitting needs at least two sequences"):
        refit(model, model, table, Selection(), calibration_of(1))
    with pytest.raises(ShearingError, match="refit_ridge = 0"):
        refit(model, model, table, Selection(), calibration_of(4), 0.0)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ShearingError, match="refit needs sequences to fit to"):
        prune("random", tmp_path / "m", tmp_path / "out", {"intermediate_size": 4}, refit=True)
    with pytest.raises(ShearingError, match="method vocabulary cuts no units"):
        prune("vocabulary", tmp_path / "m", tmp_path / "out", {"vocab_size": 20}, refit=True)
    assert not (tmp_path / "out").exists()
