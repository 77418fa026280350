"""The exact constraint: every row expects its target, keeps its order and is left alone when it does already."""

import math

import pytest
import torch
from helpers_oracle import tiny_config
from helpers_prune import model_of
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.masks import hard_concrete as hc
from llmshearing.masks.exact import shifted
from llmshearing.masks.l0 import L0Masks

CONFIG = tiny_config(num_key_value_heads=2)
TARGET = {"hidden": 6, "head": 1, "intermediate": 5, "layer": 2}
# P(open) at the ends, from the definition: the stretched sigmoid is above 0 where log alpha + noise > (2/3) ln(1/11)
LOW, HIGH = (1 / (1 + math.exp(2 / 3 * math.log(1 / 11) - end)) for end in (math.log(0.01), math.log(100)))
values = st.one_of(st.floats(-5, 5), st.floats(-60, 60), st.sampled_from([hc.LOG_ALPHA_MIN, 0.0, hc.LOG_ALPHA_MAX]))
rows = st.lists(values, min_size=1, max_size=40).map(lambda row: torch.tensor(row, dtype=torch.float64))


def build(head_mode="group", target=TARGET, **options):
    kinds = options.pop("kinds", list(target or ()))
    return L0Masks(table_for(CONFIG, head_mode), kinds, target, **{"constraint": "exact", **options})


def expected(row):
    return sum(1 / (1 + math.exp(2 / 3 * math.log(1 / 11) - a)) for a in row.tolist())


@given(rows, st.floats(0, 1))
def test_a_row_expects_exactly_what_is_asked_for(row, share):
    size = len(row)
    wanted = size * (LOW + share * (HIGH - LOW))
    got = shifted(row, wanted)
    assert abs(expected(got) - wanted) < 1e-6
    assert (got >= hc.LOG_ALPHA_MIN).all() and (got <= hc.LOG_ALPHA_MAX).all()
    # the order stays, and whatever is off the ends moved by one and the same shift
    held = hc.clamp(row)
    assert (got[held.argsort(stable=True)].diff() >= 0).all()
    free = (got > hc.LOG_ALPHA_MIN) & (got < hc.LOG_ALPHA_MAX)
    if free.any():
        shift = (got - held)[free]
        assert (shift - shift[0]).abs().max() < 1e-9
    assert (shifted(got, wanted) - got).abs().max() < 1e-6


@given(rows, st.floats(0, 1))
def test_beyond_reach_a_row_keeps_its_order(row, share):
    """Fewer open than a row whose units are all at the lower end: as many as of a row that has made up its mind."""
    size = len(row)
    asked = share * size * LOW * 0.999
    want = asked * HIGH + (size - asked) * LOW
    got = shifted(row, asked)
    assert abs(expected(got) - want) < 1e-6
    assert (got[hc.clamp(row).argsort(stable=True)].diff() >= 0).all()
    assert (shifted(row, size) == hc.LOG_ALPHA_MAX).all()


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**31), st.floats(0.05, 0.99))
def test_rows_do_not_see_each_other(number, size, seed, share):
    generator = torch.Generator().manual_seed(seed)
    block = 4 * torch.randn(number, size, generator=generator, dtype=torch.float64)
    asked = size * share * torch.rand(number, 1, generator=generator, dtype=torch.float64).clamp(min=0.5)
    together = shifted(block, asked)
    for row, want, got in zip(block, asked, together, strict=True):
        torch.testing.assert_close(shifted(row, want.item()), got, rtol=0, atol=1e-9)


def spread_out(masks, seed=0):
    """Log alphas as training leaves them: all over the range, some at its ends."""
    generator = torch.Generator().manual_seed(seed)
    masks = masks.double()
    for a in masks.log_alpha.values():
        a.data = hc.clamp(3 * torch.randn(a.shape, generator=generator, dtype=torch.float64))
    return masks


@pytest.mark.parametrize(("head_mode", "head_rows"), [("group", 3), ("query", 6)])
@pytest.mark.parametrize("progress", [0.2, 0.7, 1.0, 3.0])
def test_masks_hold_the_target_of_now(head_mode, head_rows, progress):
    """Query rows of every group, layer masks, and a ramp from a sparsity to start with; written out row by row."""
    masks = spread_out(build(head_mode, start_sparsity=0.1))
    masks.progress = progress
    masks.hold()
    sizes = {"hidden": (1, 12), "head": (head_rows, 2), "intermediate": (3, 10), "layer": (1, 3)}
    for kind, (number, size) in sizes.items():
        final = 1 - TARGET[kind] / size
        want = size * (1 - (0.1 + (final - 0.1) * min(1.0, progress)))
        found = masks.log_alpha[kind].detach().reshape(number, size)
        assert [abs(expected(row) - want) < 1e-6 for row in found] == [True] * number, kind
    before = {kind: a.detach().clone() for kind, a in masks.log_alpha.items()}
    masks.hold()
    for kind, a in masks.log_alpha.items():
        torch.testing.assert_close(a.detach(), before[kind], rtol=0, atol=1e-9)


def test_blocks_apart_and_experts():
    target = {"head_layer": 2, "mlp": 1, "hidden": 7}
    masks = spread_out(build(target=target))
    masks.progress = 1.0
    masks.hold()
    assert {k: round(expected(a.detach()), 6) for k, a in masks.log_alpha.items()} == target

    table = table_for(model_of("mixtral").config)  # 4 experts of 10 units in each of 4 layers: every expert is a row
    target = {"expert": 2, "intermediate": 4}
    masks = spread_out(L0Masks(table, list(target), target, constraint="exact"))
    masks.progress = 1.0
    masks.hold()
    for kind, number in target.items():
        found = masks.rows(kind, masks.log_alpha[kind].detach()).reshape(-1, masks.row_size(kind))
        assert len(found) == (4 if kind == "expert" else 16)
        assert all(abs(expected(row) - number) < 1e-6 for row in found)


def test_float32_to_its_rounding():
    row = torch.randn(2, 11008, generator=torch.Generator().manual_seed(0))
    got = shifted(row, 5504)
    assert got.dtype == torch.float32
    assert all(abs(expected(each) - 5504) < 1e-3 for each in got)


def test_no_multipliers_and_no_penalty():
    masks = build()
    names = [name for name, _ in masks.named_parameters()]
    assert names == [f"log_alpha.{kind}" for kind in masks.log_alpha] and len(names) == 4
    assert masks.penalty().item() == 0


@pytest.mark.parametrize(
    ("options", "say"),
    [
        ({"target": None, "target_sparsity": 0.5, "kinds": ["hidden"]}, "exact needs a target shape"),
        ({"constraint": "loose"}, "constraint 'loose' is unknown; there are lagrangian and exact"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": math.nan}, "noise is nan"),
    ],
)
def test_refused(options, say):
    with pytest.raises(ShearingError, match=say):
        build(**options)


# Noise -----------------------------------------------------------------------------------------------------------


def test_noise_of_a_scale():
    """Scale 1 is the distribution itself, bit for bit; 0 is a function of log alpha; between, by the formula."""
    masks = spread_out(build())
    masks.step = 5
    whole = {
        kind: hc.sample(a, hc.uniform_noise(tuple(a.shape), seed=masks.seed, step=5, kind=kind, like=a))
        for kind, a in masks.log_alpha.items()
    }
    assert all(torch.equal(gate, whole[kind]) for kind, gate in masks.sample().items())
    for scale in (0.0, 0.3):
        masks.noise = scale
        for kind, gate in masks.sample().items():
            a = masks.log_alpha[kind]
            u = hc.uniform_noise(tuple(a.shape), seed=masks.seed, step=5, kind=kind, like=a)
            triples = zip(*(x.flatten().tolist() for x in (gate, a, u)), strict=True)
            for got, alpha, uniform in triples:
                logit = scale * math.log(uniform / (1 - uniform)) + alpha
                want = min(1.0, max(0.0, 1.2 / (1 + math.exp(-logit / (2 / 3))) - 0.1))
                assert got == pytest.approx(want, abs=1e-9)
        masks.step = 6
        again = masks.sample()
        masks.step = 5
        assert torch.equal(again["hidden"], masks.sample()["hidden"]) == (scale == 0)


def test_without_noise_gradients_still_flow():
    masks = spread_out(build(noise=0.0))
    sum(gate.sum() for gate in masks.sample().values()).backward()
    assert all(a.grad.abs().sum() > 0 for a in masks.log_alpha.values())
