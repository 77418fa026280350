"""Agreement with the reference vectors: gates, penalty, logits and every gradient, in float64 to 1e-9.

Every pair `*_masks.json`, `*_masks.safetensors` of the directory REFERENCE_VECTORS is tried, whatever its sizes.
"""

import json
import os
from functools import cached_property
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers_oracle import widen_norms
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llmshearing.families import table_for
from llmshearing.families.names import BLOCK_MASKS as BLOCK_KINDS
from llmshearing.fold.fold import fold, folded_shape
from llmshearing.fold.gating import attach
from llmshearing.masks import hard_concrete, lagrangian
from llmshearing.masks.l0 import TOTAL, L0Masks, selection_from_gates

TOLERANCE = 1e-9
DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "reference-vectors"
FILES = sorted(Path(os.environ.get("REFERENCE_VECTORS", DEFAULT)).glob("*_masks.json"))


def close(found, expected, what):
    found, expected = (
        x.detach() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64) for x in (found, expected)
    )
    assert found.dtype == expected.dtype == torch.float64, what
    assert found.shape == expected.shape, what
    assert (found - expected).abs().max().item() <= TOLERANCE, what


class Vectors:
    """One pair of files, and our model and masks with its values."""

    def __init__(self, path):
        self.meta, self.data = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        self.l0 = self.meta["l0"]
        self.config = LlamaConfig(**{"tie_word_embeddings": False, **self.meta["model"]})
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        by_query = groups < heads and "head" in self.l0["masks"] and self.data["log_alpha.head"].shape[-1] == heads
        self.table = table_for(self.config, "query" if by_query else "group")
        self.ids, self.steps = self.data["input_ids"], self.meta["lagrangian_by_step"]

    def model(self, config=None, weights=None):
        """transformers' model in float64 with norms as wide, and RoPE tables in float32."""
        model = LlamaForCausalLM(config or self.config).double()
        given = {key[len("weight.") :]: value for key, value in self.data.items() if key.startswith("weight.")}
        if self.config.tie_word_embeddings:
            given.setdefault("lm_head.weight", given["model.embed_tokens.weight"])
        model.load_state_dict(weights or given, strict=True)
        model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
        return widen_norms(model)

    def gated(self):
        model = self.model()
        for module in model.modules():
            module.__dict__.pop("forward", None)  # the gated norm is as wide by itself
        return model, attach(model, self.table)

    @cached_property
    def target(self):
        if self.l0.get("target") is None:
            return None
        target = self.l0["target"]
        shape = {**self.table.shape(), **target}
        repeat = self.config.num_attention_heads // self.config.num_key_value_heads
        by_query = self.table.kinds["head"].rows == self.config.num_key_value_heads and repeat > 1
        head = shape["num_attention_heads"] // (self.config.num_key_value_heads if by_query else repeat)
        units = {"hidden": shape["hidden_size"], "intermediate": shape["intermediate_size"], "head": head}
        return {kind: units.get(kind, shape["num_hidden_layers"]) for kind in self.l0["masks"]}

    def masks(self):
        total = None if self.target else self.l0.get("target_sparsity", self.meta["target_sparsity"])
        masks = L0Masks(self.table, self.l0["masks"], self.target, total, self.l0["start_sparsity"]).double()
        for kind in masks.kinds:
            masks.log_alpha[kind].data = self.data[f"log_alpha.{kind}"].clone()
        for kind in masks.lambda_1:
            masks.lambda_1[kind].data = self.multiplier("lambda_1", kind).clone().view(1)
            masks.lambda_2[kind].data = self.multiplier("lambda_2", kind).clone().view(1)
        return masks

    def multiplier(self, name, kind, prefix=""):
        value = self.data.get(prefix + (name if kind == TOTAL else f"{name}_{kind}"))
        return torch.zeros((), dtype=torch.float64) if value is None else value

    def sampled(self, masks):
        return {
            kind: hard_concrete.sample(a, self.data[f"uniform_noise.{kind}"]) for kind, a in masks.log_alpha.items()
        }

    def progress(self, step):
        return int(step) / self.l0["warmup_steps"] if self.l0["warmup_steps"] else 1.0

    def given_gates(self, when):
        prefix = f"{when}.z."
        return {key[len(prefix) :]: value for key, value in self.data.items() if key.startswith(prefix)}


@pytest.fixture(params=FILES or [None], ids=lambda path: path.stem if path else "absent")
def vectors(request, reference_vectors):
    if request.param is None:
        pytest.skip(f"no *_masks.json in {reference_vectors}")
    return Vectors(request.param)


def spread(gates):
    """Gates by kind as the vectors have them: those of both blocks instead of the layer's."""
    spread = dict(gates)
    layer = spread.pop("layer", 1.0)
    for kind in ("head_layer", "mlp"):
        if kind in spread or torch.is_tensor(layer):
            spread[kind] = spread.get(kind, 1.0) * layer
    return spread


def test_reference_counts(vectors):
    model = vectors.model()
    assert vectors.table.count() == sum(p.numel() for p in model.parameters())
    assert vectors.table.count(counted_only=True) == vectors.meta["prunable_params"]


def test_reference_sampled_gates_and_logits(vectors):
    masks, (model, gating) = vectors.masks(), vectors.gated()
    gates = vectors.sampled(masks)
    for kind, gate in spread(gates).items():
        close(gate, vectors.data[f"train.z.{kind}"], kind)
    gating.set(masks.selection(gates))
    close(model(vectors.ids, use_cache=False).logits, vectors.data["train.logits"], "logits")


def test_reference_penalty_and_sparsities_by_step(vectors):
    masks = vectors.masks()
    whole = vectors.table.count(counted_only=True)
    final = 1 - masks.target_parameters() / whole
    close(final, vectors.meta["target_sparsity"], "target_sparsity")
    for step, expected in vectors.steps.items():
        masks.progress = vectors.progress(step)
        close(masks.penalty(), expected["lagrangian_loss"], f"penalty at step {step}")
        close(1 - masks.expected_parameters() / whole, expected["expected_sparsity"], f"expected size at step {step}")
        now = lagrangian.target_now(final, vectors.l0["start_sparsity"], masks.progress)
        close(now, expected["target_sparsity"], f"total target at step {step}")
        for kind, sparsity in masks.sparsity().items():
            close(sparsity.mean(), expected[f"expected_{kind}_sparsity"], f"{kind} at step {step}")
        for kind, target in masks.targets_now().items():
            key = "target_sparsity" if kind == TOTAL else f"target_{kind}_sparsity"
            close(target, expected[key], f"{key} at step {step}")


@pytest.mark.parametrize("ascending", [False, True])
def test_reference_all_gradients(vectors, ascending):
    masks, (model, gating) = vectors.masks(), vectors.gated()
    step, expected = list(vectors.steps.items())[-1]
    masks.progress = vectors.progress(step)
    gating.set(masks.selection(vectors.sampled(masks)))
    logits = model(vectors.ids, use_cache=False).logits
    cross_entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), vectors.ids[:, 1:].flatten())
    close(cross_entropy, expected["ce_loss"], "cross-entropy")
    (cross_entropy + masks.penalty(ascending)).backward()
    parameters = {f"weight.{name}": parameter for name, parameter in model.named_parameters()}
    parameters |= {f"log_alpha.{kind}": parameter for kind, parameter in masks.log_alpha.items()}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        close(parameter.grad, vectors.data.get(f"grad.{name}", torch.zeros_like(parameter)), name)
    sign = -1 if ascending else 1
    for name, multipliers in (("lambda_1", masks.lambda_1), ("lambda_2", masks.lambda_2)):
        for kind, parameter in multipliers.items():
            want = sign * vectors.multiplier(name, kind, "grad.")
            close(parameter.grad, want.view(1), f"gradient of {name} of {kind}")


@pytest.mark.parametrize("when", ["eval_current", "eval_target"])
def test_reference_deterministic_gates_and_logits(vectors, when):
    if f"{when}.logits" not in vectors.data:
        pytest.skip(f"{when} is not in these vectors")
    masks, (model, gating) = vectors.masks(), vectors.gated()
    gates = masks.deterministic(to_target=when == "eval_target")
    for kind, gate in spread(gates).items():
        close(gate, vectors.data[f"{when}.z.{kind}"], kind)
    gating.set(masks.selection(gates))
    close(model(vectors.ids).logits, vectors.data[f"{when}.logits"], "logits")


def test_reference_folded_model(vectors):
    """Folded with the given gates: a plain transformers model of the target's shape."""
    if "eval_target.logits" not in vectors.data:
        pytest.skip("these vectors have no target shape")
    gates = vectors.given_gates("eval_target")
    selection = selection_from_gates(vectors.table, gates)
    shape = folded_shape(vectors.table, selection)
    # The masks of both blocks may keep different layers: a block that is closed alone is written as zeros.
    folded = fold(dict(vectors.model().state_dict()), vectors.table, selection, zero_closed_blocks=True)
    config = LlamaConfig(**{**vectors.config.to_dict(), **shape})
    close(vectors.model(config, folded)(vectors.ids).logits, vectors.data["eval_target.logits"], "logits")
    for kind, size in vectors.target.items():
        row = vectors.table.layers if kind in BLOCK_KINDS else vectors.table.kinds[kind].size
        if kind in gates:
            assert ((gates[kind].unflatten(-1, (-1, row)) != 0).sum(-1) == size).all(), kind
