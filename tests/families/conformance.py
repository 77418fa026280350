"""Checks that hold for every family. Each takes a table that claims to be a model's, and fails where it is not.

The oracle of activations (:func:`oracle_logits`) hooks transformers' own full-size modules. It knows of a family what
the rows of the table say and nothing else: no tensor is cut, and nothing of `llmshearing.fold` runs.
"""

import contextlib
import copy
import re

import torch
from helpers_oracle import wide_softmax
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llmshearing.compat import EAGER_EXPERTS
from llmshearing.families import family_of
from llmshearing.families.names import ATTENTION, BLOCK_MASKS, MLP
from llmshearing.families.stored import as_stored
from llmshearing.families.table import EXPERT, axes_of
from llmshearing.fold.fold import fold, folded_config
from llmshearing.fold.gating import attach
from llmshearing.masks.l0 import expected_parameters, selection_from_gates

TOLERANCE = 1e-10
KEPT = {"hidden": 12, "head": {1: 1, 2: 1, 4: 3}, EXPERT: 3}
CLOSED_LAYER = 1


# Models ------------------------------------------------------------------------------------------------------------


def build(config, attention="eager", dtype=torch.float32):
    """transformers' own model of a config."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval().to(dtype)
    as_stored(model)
    for module in model.modules():
        if dtype == torch.float64 and hasattr(module, "embed_scale"):  # the root of the hidden size, as float32
            module.embed_scale.copy_(torch.tensor(config.hidden_size, dtype=dtype).sqrt())
    return model


def implementations(config):
    """How transformers can compute the attention of a family: eager, and mostly sdpa."""
    own = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return ["eager", "sdpa"] if own._supports_sdpa else ["eager"]


def random_model(config, seed=0, attention="eager"):
    """transformers' own model in float64; biases and norms random too, weights large enough to matter."""
    model = build(config, attention, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = re.search(r"norm|\.ln_", name) and name.endswith("weight")
            parameter.copy_(1 + 0.3 * values if is_norm else 0.4 * values)
    return model


def ids_of(config, tokens=9, batch=2, seed=1):
    return torch.randint(config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


# Gates -------------------------------------------------------------------------------------------------------------


def kinds_of(table):
    """Every mask kind that a table has."""
    return [kind for kind in (*table.kinds, *BLOCK_MASKS) if kind != "vocab"]


def units_kept(table, kind):
    """Units of each row that the suite's cut keeps."""
    if kind == "hidden" and table.couplings:  # as many as elements of the heads
        head = table.kinds["head"]
        return units_kept(table, "head") * head.rows * table.axes["query"].per_unit
    keep = KEPT.get(kind, table.kinds[kind].size * 2 // 3)
    return keep[table.kinds[kind].size] if isinstance(keep, dict) else keep


def uniform_gates(table, kinds, seed=0, closed_layers=(CLOSED_LAYER,)):
    """Soft gates that close the same number of units in each row, and whole layers."""
    generator = torch.Generator().manual_seed(seed)

    def soft(*shape):
        return 0.3 + 0.7 * torch.rand(shape, generator=generator, dtype=torch.float64)

    gates = {}
    for kind in kinds:
        if kind in BLOCK_MASKS:
            gates[kind] = soft(table.layers)
            if kind == "layer":
                gates[kind][list(closed_layers)] = 0
            continue
        shape, size = table.kinds[kind].shape(table.layers), table.kinds[kind].size
        keep = units_kept(table, kind)
        rank = torch.rand(shape, generator=generator).unflatten(-1, (-1, size)).argsort(-1).argsort(-1)
        gates[kind] = soft(*shape) * (rank < keep).flatten(-2).reshape(shape)
    return gates


def ragged_gates(table, kinds, seed=0):
    """Soft gates that close units as chance has it: rows, layers and groups of one layer differ."""
    generator = torch.Generator().manual_seed(seed)
    gates = uniform_gates(table, kinds, seed)
    for kind in (kind for kind in kinds if kind in table.kinds and kind != EXPERT):
        if table.kinds[kind].rows not in (None, 1) and "query" in normed_axes(table):
            continue  # groups of one layer are filled up with closed heads, which a norm over heads would count
        soft = 0.3 + 0.7 * torch.rand(gates[kind].shape, generator=generator, dtype=torch.float64)
        gates[kind] = soft * (torch.rand(soft.shape, generator=generator) > 0.4)
        gates[kind][..., 0] = 0.5  # no norm without units
    return gates


def normed_axes(table):
    return {spec.axes[0] for spec in table.tensors if spec.module.form.endswith("norm")}


def fresh(gates):
    return {kind: gate.clone().requires_grad_() for kind, gate in gates.items()}


# The oracle --------------------------------------------------------------------------------------------------------


class _Oracle:
    """Gates as full-size vectors along the dimensions of rows."""

    def __init__(self, table, gates):
        self.table, self.gates = table, gates

    def vector(self, axis_name, layer, expert):
        """Gate of every element of an axis."""
        axis = self.table.axes[axis_name]
        if axis.kind not in self.gates:
            return torch.ones(axis.length, dtype=torch.float64)
        gate = self.gates[axis.kind]
        gate = gate if self.table.kinds[axis.kind].rows is None else gate[layer]
        if axis.of_expert:
            size = self.table.kinds[axis.kind].size
            gate = gate[expert * size : (expert + 1) * size]
        return gate.repeat_interleave(axis.per_unit)

    def along(self, dimension, spec, layer):
        """Gate along a dimension, where the row multiplies it in; None where it does not."""
        if not isinstance(dimension, str) or dimension not in spec.gates or dimension == EXPERT:
            return None
        return self.vector(dimension, layer, spec.expert)

    def scale(self, spec, layer):
        """Gates of the branch and of the expert."""
        value = torch.ones((), dtype=torch.float64)
        for kind, blocks in BLOCK_MASKS.items():
            if spec.scaled and spec.block in blocks and kind in self.gates:
                value = value * self.gates[kind][layer]
        if EXPERT in spec.gates and spec.expert is not None and EXPERT in self.gates:
            value = value * self.gates[EXPERT][layer][spec.expert]
        return value

    def norm(self, module, spec, layer):
        """A forward pass of the norm by its formula: statistics over the open elements."""
        axis = spec.axes[0]
        gate = self.vector(axis, layer, spec.expert)
        is_open = (gate != 0).double()
        out_gate = (gate if axis in spec.gates else 1.0) * self.scale(spec, layer)

        def mean(x):
            return (x * is_open).sum(-1, keepdim=True) / is_open.sum()

        def forward(x):
            x = x - mean(x) if spec.module.form == "layer_norm" else x
            x = x * torch.rsqrt(mean(x.square()) + getattr(module, spec.module.eps))
            out = x * (module.weight + spec.module.offset)
            out = out if getattr(module, "bias", None) is None else out + module.bias
            return out * out_gate

        return forward


@contextlib.contextmanager
def hooked(model, table, gates):
    """The model's own modules, with activations multiplied by gates as the rows of their weights say."""
    oracle, handles, norms = _Oracle(table, gates), [], []
    for name, spec, layer in table.instances():
        path, _, parameter = name.rpartition(".")
        if parameter != "weight":
            continue
        module = model.get_submodule(path)
        if spec.module.form.endswith("norm"):
            module.forward = oracle.norm(module, spec, layer)
            norms.append(module)
            continue
        into = oracle.along(spec.read(), spec, layer)
        if into is not None and spec.module.form != "embedding":
            handles.append(module.register_forward_pre_hook(lambda _, args, g=into: (args[0] * g, *args[1:])))
        out, scale = oracle.along(spec.written(), spec, layer), oracle.scale(spec, layer)
        factor = scale if out is None else out * scale
        handles.append(module.register_forward_hook(lambda _, args, y, f=factor: y * f))
        if spec.written() == EXPERT and EXPERT in gates:
            closed = gates[EXPERT][layer] == 0
            handles.append(module.register_forward_hook(lambda _, args, y, c=closed: y.masked_fill(c, float("-inf"))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in norms:
            module.__dict__.pop("forward", None)


def oracle_logits(model, table, gates, ids):
    """Logits of the full-size model under gates."""
    with hooked(model, table, gates), wide_softmax():
        return logits_of(model, ids)


def gated_logits(model, table, gates, ids):
    """Logits of the gated model; the model is left gated."""
    gating = attach(model, table)
    gating.set(selection_from_gates(table, gates))
    with wide_softmax():
        return logits_of(model, ids)


def small_config(config, table, selection):
    values = folded_config(config.to_dict(), table, selection)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def folded_logits(model, table, gates, ids):
    """Logits of the folded tensors in transformers' own model of the folded config."""
    selection = selection_from_gates(table, gates)
    plain = build(small_config(model.config, table, selection), model.config._attn_implementation, torch.float64)
    tensors = fold(dict(model.state_dict(keep_vars=True)), table, selection)
    plain.load_state_dict({name: value.detach() for name, value in tensors.items()}, strict=True)
    own = family_of(plain.config.model_type).table(plain.config, "group")
    with hooked(plain, own, {}), wide_softmax():  # no gates: only norms are widened
        options = {"use_cache": False}
        return functional_call(plain, tensors, (ids,), options, tie_weights=False, strict=False).logits


# Checks ------------------------------------------------------------------------------------------------------------


def check_shapes(table, model):
    """Names and shapes are the state dict's; counts are its numbers of elements."""
    table.check(shapes(model))
    assert table.count() == sum(parameter.numel() for parameter in model.parameters()), "count"
    inside = f"{table.layers_path}."
    norms = {
        id(p) for module in model.modules() if "Norm" in type(module).__name__ for p in module.parameters(recurse=False)
    }
    counted = [p.numel() for name, p in model.named_parameters() if name.startswith(inside) and id(p) not in norms]
    assert table.count(counted_only=True) == sum(counted), "counted_only"
    assert len(model.get_submodule(table.layers_path)) == table.layers


def check_counts_of_cut(table, model, head_mode="group"):
    """The folded config's table counts the folded tensors; so do the gates' expected parameters."""
    gates = uniform_gates(table, cut_kinds(table))
    selection = selection_from_gates(table, gates)
    tensors = fold(model.state_dict(), table, selection)
    small = small_config(model.config, table, selection)
    check_shapes(family_of(small.model_type).table(small, head_mode), plain := build(small))
    check_same_names(tensors, plain)
    is_open = {kind: (gate != 0).double() for kind, gate in gates.items()}
    own = family_of(small.model_type).table(small, head_mode)
    assert expected_parameters(table, is_open).item() == own.count(counted_only=True)


def check_same_names(tensors, model):
    assert {name: tuple(value.shape) for name, value in tensors.items()} == shapes(model)


def cut_kinds(table):
    """Mask kinds whose cut the family can express: all, but for layers where their number is fixed."""
    return [kind for kind in kinds_of(table) if not (kind == "layer" and "layers" in table.fixed)]


def check_every_tensor_matters(table, model, inert=lambda config, name: False):
    """A change of any one tensor changes the output."""
    ids = ids_of(model.config, tokens=20, batch=4)
    with torch.no_grad(), wide_softmax():
        before = logits_of(model, ids)
        for number, name in enumerate(table.by_name):
            value = model.get_parameter(name)
            old = value.clone()
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number), dtype=value.dtype))
            change = (logits_of(model, ids) - before).abs().max().item()
            value.copy_(old)
            assert (change > 1e-6) != inert(model.config, name), f"{name}: the output changes by {change}"


def gradients(loss, model, gates):
    named = dict(model.named_parameters())
    inputs = [*named.values(), *gates.values()]
    values = torch.autograd.grad(loss, inputs, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, values, strict=True)]
    return dict(zip([*named, *gates], filled, strict=True))


def compare(label, mine, right):
    assert torch.isfinite(mine).all(), f"{label}: not finite"
    worst = (mine - right).abs().max().item() if mine.numel() else 0.0
    scale = max(1.0, right.abs().max().item() if right.numel() else 1.0)
    assert worst <= TOLERANCE * scale, f"{label}: off by {worst}"


def open_gates(gates, kind, table):
    """Gates whose gradient is defined: open ones, in branches that run."""
    is_open = gates[kind] != 0
    if kind in BLOCK_MASKS:
        for other in BLOCK_MASKS:
            is_open = is_open & (gates.get(other, gates[kind]) != 0)
    return is_open


def check_agreement(table, model, gates, fold_too=True):
    """Oracle == gated == folded: logits, and gradients of all weights and of the open units' gates."""
    ids = ids_of(model.config)
    generator = torch.Generator().manual_seed(5)
    weighing = torch.randn(*ids.shape, model.config.vocab_size, generator=generator, dtype=torch.float64)

    def outcome(run, model):
        own = fresh(gates)
        logits = run(model, table, own, ids)
        return logits, gradients((logits.log_softmax(-1) * weighing).sum(), model, own)

    expected = outcome(oracle_logits, model)
    runs = {"folded": folded_logits} if fold_too else {}
    for label, run in (runs | {"gated": gated_logits}).items():
        logits, found = outcome(run, copy.deepcopy(model))
        compare(f"{label} logits", logits, expected[0])
        for name, right in expected[1].items():
            mine = found[name]
            if name in gates:
                is_open = open_gates(gates, name, table)
                mine, right = mine[is_open], right[is_open]
            compare(f"{label} gradient of {name}", mine, right)


def check_branches(table, model):
    """What a branch adds to the stream is proportional to its gate; closed layers pass their input on.

    The branch that is not looked at is closed.
    """
    ids = ids_of(model.config)
    layer, found, masks = 0, {}, {ATTENTION: "head_layer", MLP: "mlp"}
    gating = attach(model, table)
    module = model.get_submodule(f"{table.layers_path}.{layer}")

    def keep(_, args, kwargs, output):
        start = args[0] if args else kwargs["hidden_states"]
        found["added"] = (output[0] if isinstance(output, tuple) else output) - start

    handle = module.register_forward_hook(keep, with_kwargs=True)
    for block, mask in masks.items():
        added = []
        for value in (1.0, 0.25, 0.0):
            gates = {name: torch.ones(table.layers, dtype=torch.float64) for name in masks.values()}
            gates[mask][layer] = value
            gates[next(name for name in masks.values() if name != mask)][layer] = 0
            gating.set(selection_from_gates(table, gates))
            with torch.no_grad(), wide_softmax():
                logits_of(model, ids)
            added.append(found["added"])
        assert added[0].abs().max() > 1e-6, f"{block} adds nothing"
        compare(f"{block} at a quarter", added[1], added[0] / 4)
        compare(f"closed {block}", added[2], added[0] * 0)
    handle.remove()


def check_gates(table):
    """Every axis that can be cut is gated where it is read, and the hidden units where they are written."""
    norms = {
        (spec.block, spec.layers): spec for spec in table.tensors if spec.module.form.endswith("norm") and spec.scaled
    }
    for spec in table.tensors:
        is_norm = spec.module.form.endswith("norm")
        if is_norm:
            if spec.axes == ("hidden",) and spec.per_layer:
                assert "hidden" in spec.gates, f"{spec.name}: the hidden gate is missing"
            continue
        written, read = (axes_of(part) if part else () for part in (spec.written(), spec.read()))
        if "hidden" in written:
            assert "hidden" in spec.gates, f"{spec.name}: the hidden gate is missing"
            behind = any(block == spec.block for block, _ in norms)
            assert spec.scaled != behind or not spec.per_layer, f"{spec.name}: scaled is {spec.scaled}"
        for axis in read:
            kind = table.kinds.get(table.axes[axis].kind)
            if kind is not None and kind.rows is not None:
                assert axis in spec.gates, f"{spec.name}: the gate of {axis} is missing"
        if spec.expert is not None and "hidden" in written:
            assert EXPERT in spec.gates, f"{spec.name}: the gate of the expert is missing"


def load(path, dtype=torch.float32):
    """By the Auto classes, strictly."""
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, output_loading_info=True, attn_implementation="eager", **EAGER_EXPERTS
    )
    assert not any(report.values()), report
    return model.eval()


def check_round_trip(table, model, folder):
    """The folded model on disk is the one in memory, and generates with a cache what it does without one."""
    selection = selection_from_gates(table, uniform_gates(table, cut_kinds(table), seed=3))
    model = copy.deepcopy(model).float()
    small = build(small_config(model.config, table, selection))
    small.load_state_dict(fold(model.state_dict(), table, selection), strict=True)
    small.save_pretrained(folder)
    again = load(folder)
    assert {**again.config.to_dict(), "dtype": 0} == {
        **small.config.to_dict(),
        "dtype": 0,
        "_name_or_path": str(folder),
    }
    ids = ids_of(model.config)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(again, ids), logits_of(small, ids), atol=1e-4, rtol=1e-4)
    check_generation(again, ids[:1, :4])


def check_generation(model, ids, tokens=6):
    """Greedy tokens from a KV cache are those of whole forward passes."""
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, use_cache=True,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    for _ in range(tokens):
        with torch.no_grad():
            ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


def check_depth(table, model):
    """A cut of one layer alone leaves transformers' own model, less that layer."""
    gates = {"layer": torch.ones(table.layers, dtype=torch.float64)}
    gates["layer"][CLOSED_LAYER] = 0
    selection = selection_from_gates(table, gates)
    small = build(small_config(model.config, table, selection), dtype=torch.float64)
    small.load_state_dict(fold(model.state_dict(), table, selection), strict=True)
    own = copy.deepcopy(model)
    if getattr(own.config, "layer_types", None):  # transformers 5 looks there for the mask of the layer at each place
        own.config.layer_types = list(small.config.layer_types)
    path, _, name = table.layers_path.rpartition(".")
    layers = own.get_submodule(table.layers_path)
    setattr(own.get_submodule(path), name, torch.nn.ModuleList([*layers[:CLOSED_LAYER], *layers[CLOSED_LAYER + 1 :]]))
    ids = ids_of(model.config)
    with torch.no_grad():
        compare("logits", logits_of(small, ids), logits_of(own, ids))
