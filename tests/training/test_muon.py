"""Muon against its formula written out in float64, an SVD, families' modules, and itself after a resume."""

import copy
import math

import numpy as np
import pytest
import torch
from composer import Callback
from composer.core import Event
from helpers_runs import configured, trainer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmshearing.checkpoints.checkpoint import read_checkpoint
from llmshearing.errors import ShearingError
from llmshearing.families import UNIFORM, table_for
from llmshearing.train import train
from llmshearing.training import muon
from llmshearing.training.muon import Layout, Muon, layout_of, muon_groups, newton_schulz, orthogonal
from llmshearing.training.optimizer import FusedDecoupledAdamW

PLAIN = {"dim": -2, "runs": 1}
SIZES = {
    "vocab_size": 23, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip
OTHER_NAMES = {
    "gpt2": {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 16, "vocab_size": 23},
    "opt": {**SIZES, "ffn_dim": 12, "word_embed_proj_dim": 16},
    "mixtral": {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {**SIZES, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "head_dim": 4},
}


def model_of(family):
    config = CONFIG_MAPPING[family](**OTHER_NAMES.get(family, SIZES))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config), table_for(config)


# The formula -----------------------------------------------------------------------------------------------------


def slow_orthogonal(u):
    """One matrix, as the module's head writes it."""
    if not np.any(u):
        return u
    x = u / math.sqrt((u * u).sum())
    if x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    x = x.T if u.shape[0] > u.shape[1] else x
    return 0.2 * math.sqrt(max(u.shape)) * x


class Slow:
    """The optimizer written out. parts: (rows, columns) of every matrix of a tensor, as lists of indices."""

    def __init__(self, weights, parts, peak, momentum, decay, relative):
        self.relative = relative
        self.weights, self.parts, self.peak = [weight.copy() for weight in weights], parts, peak
        self.momentum, self.decay = momentum, decay
        self.buffers = [np.zeros_like(weight) for weight in weights]

    def step(self, gradients, rate):
        for weight, buffer, parts, gradient in zip(self.weights, self.buffers, self.parts, gradients, strict=True):
            buffer[:] = self.momentum * buffer + (1 - self.momentum) * gradient
            update = (1 - self.momentum) * gradient + self.momentum * buffer
            if not np.any(gradient):
                update[:] = 0
            old = weight.copy()
            weight *= 1 - rate / self.peak * self.decay
            for rows, columns in parts:
                where = np.ix_(rows, columns)
                size = math.sqrt(np.mean(old[where] ** 2)) / 0.2 if self.relative else 1.0
                weight[where] -= rate * size * slow_orthogonal(update[where])


def both(shapes, layout, parts, momentum=0.95, decay=1e-2, steps=6, closed=(), relative=False):
    """(weights of Muon, of the slow one) after some steps with a schedule; no gradient for tensor 0 in ``closed``."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]  # noqa: E731
    weights = [value.requires_grad_() for value in draw()]
    slow = Slow([weight.detach().numpy().copy() for weight in weights], parts, 0.3, momentum, decay, relative)
    group = {"params": weights, "lr": 0.3, "momentum": momentum, "weight_decay": decay, "relative": relative, **layout}
    optimizer = Muon([{"params": []}, group], lr=0.1)
    for step in range(steps):
        rate = optimizer.param_groups[1]["lr"] = 0.3 * min(1.0, step / 2) * 0.9**step
        gradients = draw()
        if step in closed:
            gradients[0].zero_()
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        slow.step([gradient.numpy() for gradient in gradients], rate)
    return [weight.detach() for weight in weights], [torch.from_numpy(weight) for weight in slow.weights]


def assert_close(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([0.0, 0.5, 0.95]),
    st.sampled_from([0.0, 0.1]), st.sets(st.integers(0, 5), max_size=3), st.booleans(),
)  # fmt: skip
def test_steps_are_the_formula_s(rows, columns, momentum, decay, closed, relative):
    shapes = [(rows, number) for number in columns]
    parts = [[(range(rows), range(number))] for number in columns]
    assert_close(*both(shapes, {**PLAIN, "sizes": (rows,)}, parts, momentum, decay, closed=closed, relative=relative))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=3), st.integers(1, 3), st.integers(1, 6), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_fused_segments_are_matrices_of_their_own(sizes, runs, other, by_columns, relative):
    length, indices = runs * sum(sizes), [[] for _ in sizes]
    for run in range(runs):
        for number, size in enumerate(sizes):
            first = run * sum(sizes) + sum(sizes[:number])
            indices[number] += range(first, first + size)
    parts = [(range(other), part) if by_columns else (part, range(other)) for part in indices]
    shape = (other, length) if by_columns else (length, other)
    layout = {"dim": -1 if by_columns else -2, "runs": runs, "sizes": tuple(sizes)}
    assert_close(*both([shape] * 2, layout, [parts] * 2, relative=relative))


def test_a_stack_of_experts_is_as_many_matrices(monkeypatch):
    updates = torch.randn(3, 5, 4, dtype=torch.float64)
    [stack] = orthogonal([updates], Layout(-2, 1, (5,)))
    for update, got in zip(updates, stack, strict=True):
        torch.testing.assert_close(got, torch.from_numpy(slow_orthogonal(update.numpy())), rtol=1e-11, atol=1e-11)
    # what is worked at together changes nothing
    many = [torch.randn(5, 4, dtype=torch.float64) for _ in range(5)]
    together = list(orthogonal(many, Layout(-2, 1, (5,))))
    monkeypatch.setattr(muon, "BATCH", 41)
    for got, want in zip(orthogonal(many, Layout(-2, 1, (5,))), together, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "half"), [(torch.float64, True), (torch.float32, False), (torch.float32, True)])
@pytest.mark.parametrize("shape", [(48, 48), (64, 24), (24, 64)])
def test_singular_values_come_near_1_and_vectors_stay(dtype, half, shape, monkeypatch):
    monkeypatch.setattr(muon, "has_bfloat16", lambda device: half)
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=dtype)
    result = newton_schulz(matrix[None])[0].double()
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    inner = left.mT @ result @ right.mT
    values = inner.diagonal()
    # the quintic leaves [0.68, 1.14]; a square matrix has singular values too small for five steps
    assert values.max() < 1.25 and values.median() > 0.65 and (values > 0.6).float().mean() >= 0.9
    assert values.min() > (0.6 if shape[0] != shape[1] else 0)
    rounding = 5e-2 if half and dtype == torch.float32 else 1e-5
    assert (inner - torch.diag(values)).abs().max() < rounding


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_the_gradient_s_scale_does_not_matter(scale):
    matrix = torch.randn(1, 6, 5)
    torch.testing.assert_close(newton_schulz(matrix * scale), newton_schulz(matrix), rtol=2e-2, atol=2e-2)
    assert not newton_schulz(torch.zeros(1, 3, 2)).any()


# Which tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", UNIFORM)
def test_matrices_inside_layers_are_those_of_linear_modules(family):
    model, table = model_of(family)
    [layers] = [module for name, module in model.named_modules() if name == table.layers_path]
    linear = [
        module.weight for module in layers.modules() if type(module).__name__ in ("Linear", "Conv1D")
    ]  # not of the embedding, position table or output head
    others, *matrices = muon_groups(model, table, 0.1, 0.9)
    found = [parameter for group in matrices for parameter in group["params"]]
    assert {id(p) for p in found} == {id(p) for p in linear} and len(found) == len(linear) > 0
    assert {id(p) for p in (*found, *others["params"])} == {id(p) for p in model.parameters()}
    for group in matrices:
        for parameter in group["params"]:
            assert parameter.shape[group["dim"]] == group["runs"] * sum(group["sizes"])


@pytest.mark.parametrize(
    ("family", "name", "pieces"),
    [
        # queries 4 heads of 4, keys and values 2: one after another
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight", [range(16), range(16, 24), range(24, 32)]),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight", [range(12), range(12, 24)]),
        # by head: 4 rows of queries, 4 of keys, 4 of values
        (
            "gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight",
            [[12 * head + 4 * part + row for head in range(4) for row in range(4)] for part in range(3)],
        ),
    ],
)  # fmt: skip
def test_rows_of_fused_projections(family, name, pieces):
    _, table = model_of(family)
    layout = layout_of(table, *table.by_name[name])
    rows = torch.arange(sum(map(len, pieces)))[:, None].expand(-1, 3)
    found = [layout.matrix(segment)[:, 0].tolist() for segment in layout.split(rows)]
    assert found == [list(piece) for piece in pieces]


def test_conv1d_has_its_segments_in_columns():
    _, table = model_of("gpt2")
    layout = layout_of(table, *table.by_name["transformer.h.0.attn.c_attn.weight"])
    assert layout == Layout(-1, 1, (16, 16, 16))


# The optimizer as a whole ----------------------------------------------------------------------------------------


def with_gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_all_else_is_adamw_s():
    model, table = model_of("llama")
    twin = copy.deepcopy(model)
    options = {"lr": 3e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 7e-4}
    ours, theirs = (
        Muon(muon_groups(model, table, 0.1, 0.95), **options),
        FusedDecoupledAdamW(twin.parameters(), **options),
    )
    before = copy.deepcopy(model.state_dict())
    for step in range(4):
        for optimizer, side in ((ours, model), (theirs, twin)):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * 0.9**step
            with_gradients(side.parameters(), step)
            optimizer.step()
    wanted = twin.state_dict()
    for name, value in model.state_dict().items():
        inside = layout_of(table, *table.by_name[name]) is not None
        assert torch.equal(value, wanted[name]) == (not inside), name
        assert not torch.equal(value, before[name]), name
    assert {len(state) for state in ours.state.values()} == {2, 3}


def test_state_goes_on_to_the_same_bits():
    model, table = model_of("phi3")
    optimizer = Muon(muon_groups(model, table, 0.1, 0.95), lr=0.1)
    for step in range(3):
        with_gradients(model.parameters(), step)
        optimizer.step()
    other = copy.deepcopy(model)
    again = Muon(muon_groups(other, table, 0.5, 0.1), lr=0.7)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for side, chosen in ((model, optimizer), (other, again)):
        with_gradients(side.parameters(), 3)
        chosen.step()
    for got, want in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want)


def test_a_closed_layer_stays():
    """Its momentum fades, and scaled to norm 1 would move it on."""
    weights = [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    optimizer = Muon([{"params": weights, "lr": 0.1, "momentum": 0.95, **PLAIN, "sizes": (4,)}], lr=0.1, weight_decay=0)
    with_gradients(weights, 0)
    optimizer.step()
    before = [weight.detach().clone() for weight in weights]
    with_gradients(weights, 1)
    weights[0].grad.zero_()
    optimizer.step()
    assert torch.equal(weights[0], before[0]) and not torch.equal(weights[1], before[1])


# In a run --------------------------------------------------------------------------------------------------------

MUON = {"optimizer__name": "muon", "optimizer__muon_lr": 2e-3}
MONITORS = {"callbacks__optimizer_monitor": {"batch_log_interval": 4}, "callbacks__lr_monitor": {}}


@pytest.mark.parametrize("masked", [True, False])
def test_a_resumed_run_ends_in_the_same_bits(masked, lab, tmp_path):
    changes = {**MUON, **MONITORS, **({} if masked else {"model__l0_module": None}), "autoresume": True}
    trainer, memory = trainer_of(configured(lab, tmp_path / "whole", **changes))
    trainer.fit()
    trainer.close()
    assert memory.data["l2_norm/moment/model.model.layers.0.self_attn.q_proj.weight"]
    names = [group["name"] for group in trainer.state.optimizers[0].param_groups]
    assert names[:2] == ["weights", "matrices"] and set(names[2:]) == {"matrices", *(["masks", "multipliers"] * masked)}
    rates = [memory.data[f"lr-Muon/group{number}"][-1][1] for number in (0, 1)]
    assert rates[1] == pytest.approx(2 * rates[0]) and rates[0] < 1e-3  # both follow the schedule

    class Stop(Callback):
        def run_event(self, event, state, logger):
            if event == Event.BATCH_CHECKPOINT and state.timestamp.batch.value == 6:
                raise KeyboardInterrupt

    broken, _ = trainer_of(configured(lab, tmp_path / "parts", **changes))
    broken.state.callbacks.append(Stop())
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    broken.close()
    train(configured(lab, tmp_path / "parts", **changes))
    whole, parts = (read_checkpoint(tmp_path / name / "run" / "latest-rank0.pt") for name in ("whole", "parts"))
    for kind in ("weights", "masks"):
        found, wanted = dict(getattr(parts, kind)), dict(getattr(whole, kind))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_going_on_with_another_optimizer_is_refused(lab, tmp_path):
    changes = {"autoresume": True, "save_interval": "2ba", "max_duration": "2ba", "model__l0_module": None}
    train(configured(lab, tmp_path, **changes))
    with pytest.raises(ShearingError, match="optimizer.name = muon.*FusedDecoupledAdamW"):
        train(configured(lab, tmp_path, **changes, **MUON))
