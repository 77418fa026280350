"""Four errors that were silent: modules of other classes, norms of other formulas, fewer heads, stacked tensors."""

from dataclasses import replace

import pytest
import torch
from conformance import check_agreement, random_model, uniform_gates
from helpers_oracle import tiny_config
from tiny import config_of
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.table import Axis, Kind, Table, TensorSpec
from llmshearing.fold.fold import WHOLE, Cut, Part, fold, gate_and_gather
from llmshearing.fold.gating import _Gated, attach
from llmshearing.fold.selection import Selection, Units


class NormOfDistances(nn.Module):
    """Subtracts the mean, and calls its epsilon as an RMSNorm does."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = 1e-6

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, None, self.variance_epsilon)


def check_refused(model, name, cls):
    """Refused by the name of the module and of its class, with nothing swapped."""
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ShearingError, match=rf"{name}: a \S*{cls}, the table says"):
        attach(model, table_for(model.config))
    assert [type(module) for module in model.modules()] == classes
    assert not any(isinstance(module, _Gated) for module in model.modules())


@pytest.mark.parametrize(
    "embedding",
    [
        Gemma3TextScaledWordEmbedding(23, 12, 0, embed_scale=3.0),
        OPTLearnedPositionalEmbedding(21, 12),  # has two rows more
    ],
    ids=["scaled", "offset"],
)
def test_an_embedding_with_another_forward_is_refused(embedding):
    model = random_model(tiny_config())
    model.model.embed_tokens = embedding
    check_refused(model, r"model\.embed_tokens", type(embedding).__name__)


def test_a_norm_that_subtracts_the_mean_is_refused():
    model = random_model(tiny_config())
    model.model.layers[1].input_layernorm = NormOfDistances(12)
    check_refused(model, r"model\.layers\.1\.input_layernorm", "NormOfDistances")


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_attention_that_views_heads_sees_fewer_of_them(family):
    """2 of 4 heads: a view by the source's 4 heads would make 9 positions into 4.5, or mix them."""
    config = config_of(family, "tied")
    table = table_for(config)
    gates = uniform_gates(table, ["head"])
    for heads in ([1, 1, 0, 0], [0, 1, 0, 1]):
        gates["head"] = torch.tensor(heads, dtype=torch.float64).repeat(table.layers, 1) * 0.7
        check_agreement(table, random_model(config), gates, fold_too=False)  # hidden units stay: no plain model
    model = random_model(config)
    forgetful = replace(table, attributes=())
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check_agreement(forgetful, model, gates, fold_too=False)


@pytest.mark.parametrize("parts", [(WHOLE,), (WHOLE, WHOLE), (WHOLE, Part(torch.tensor([0, 2])))])
def test_a_tensor_of_three_dimensions_is_refused(parts):
    with pytest.raises(ShearingError, match=f"3 dimensions met a cut of {len(parts)}"):
        gate_and_gather(torch.ones(2, 3, 4), Cut(parts))


def stacked_table():
    """One layer of 4 experts of [3 intermediate, 5 hidden] in one tensor."""
    return Table(
        family="toy",
        layers=1,
        kinds={
            "hidden": Kind("hidden", 5, None),
            "expert": Kind("expert", 4, 1, minimum=1),
            "intermediate": Kind("intermediate", 3, 4),
        },
        axes={
            "hidden": Axis(5, "hidden"),
            "expert": Axis(4, "expert"),
            "intermediate": Axis(3, "intermediate", of_expert=True),
        },
        tensors=(
            TensorSpec(
                "layers.{layer}.down",
                ("expert", "hidden", "intermediate"),
                gates=("hidden", "intermediate", "expert"),
                block="mlp",
                scaled=True,
                reads=2,
                writes=1,
                stacked=True,
            ),
        ),
        keys={"layers": "num_layers"},
        config_axes={},
    )


def test_stacked_experts_fold_each_by_its_own_units():
    table = stacked_table()
    weight = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    hidden, experts, inside = torch.tensor([0, 1, 4]), torch.tensor([1, 3]), [[0, 1], [0, 2], [1, 2], [1, 2]]
    gates = {
        "hidden": torch.rand(3, dtype=torch.float64),
        "expert": torch.rand(2, dtype=torch.float64),
        "intermediate": torch.rand(4, 2, dtype=torch.float64),
        "mlp": torch.tensor([0.6], dtype=torch.float64),
    }
    flat = torch.tensor([expert * 3 + unit for expert, units in enumerate(inside) for unit in units])
    selection = Selection(
        {
            "hidden": (Units(hidden, gates["hidden"]),),
            "expert": (Units(experts, gates["expert"]),),
            "intermediate": (Units(flat, gates["intermediate"].flatten()),),
        },
        {"mlp": gates["mlp"]},
    )
    folded = fold({"layers.0.down": weight}, table, selection)["layers.0.down"]
    wanted = torch.zeros(2, 3, 2, dtype=torch.float64)
    for new, expert in enumerate(experts.tolist()):
        for row, unit in enumerate(hidden.tolist()):
            for column, own in enumerate(inside[expert]):
                gate = gates["hidden"][row] * gates["intermediate"][expert][column] * gates["expert"][new] * 0.6
                wanted[new, row, column] = weight[expert, unit, own].detach() * gate
    torch.testing.assert_close(folded.detach(), wanted)
    folded.sum().backward()
    assert (weight.grad[[0, 2]] == 0).all() and weight.grad[1, 2].eq(0).all() and weight.grad[1, 0, 0] != 0
