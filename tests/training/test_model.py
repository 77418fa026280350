"""The Composer model: losses by hand, one penalty whatever the microbatches, metrics by a loop, attention, autocast."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers_runs import VOCAB, make_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from llmshearing.families import table_for
from llmshearing.fold.fold import fold
from llmshearing.masks.l0 import L0Masks
from llmshearing.training.model import CAUSAL_SDPA, DomainLoss, ShearingModel, token_losses

TARGET = {"hidden": 20, "head": 1, "intermediate": 28, "layer": 2}


def a_batch(rows=4, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, length), generator=generator)
    return {"input_ids": ids, "set": torch.arange(rows) % 3}


def sheared(spread=2.0, **options):
    """A gated model whose log alphas are spread out and whose multipliers are not 0."""
    model = make_model(initializer_range=0.2)
    masks = L0Masks(table_for(model.config), list(TARGET), TARGET, seed=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for a in masks.log_alpha.values():
            a.copy_(spread * torch.randn(a.shape, generator=generator)).clamp_(-4.5, 4.5)
        for value in [*masks.lambda_1.values(), *masks.lambda_2.values()]:
            value.fill_(0.7)
    masks.progress = 0.5
    return ShearingModel(model, masks, domains=3, **options)


# Losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_token_losses_by_hand(dtype):
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    ids = torch.tensor([[0, 3, 6, 2, 2], [1, 1, 5, 0, 4]])
    losses = token_losses(logits, ids)
    assert losses.shape == (2, 4) and losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row in range(2):
        for at in range(4):
            scores = logits[row, at].double().tolist()
            want = math.log(sum(map(math.exp, scores))) - scores[ids[row, at + 1]]
            assert losses[row, at].item() == pytest.approx(want, abs=1e-6)


def test_plain_loss_is_that_of_transformers():
    model = make_model(initializer_range=0.2)
    shearing, batch = ShearingModel(copy.deepcopy(model)), a_batch()
    outputs = shearing(batch)
    want = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    assert "penalty" not in outputs
    torch.testing.assert_close(shearing.loss(outputs, batch), want)


def test_loss_is_that_of_the_folded_model_plus_the_penalty():
    shearing, batch = sheared(), a_batch()
    masks = shearing.masks
    outputs = shearing(batch)
    assert set(outputs) == {"sample_loss", "penalty"} and outputs["sample_loss"].shape == (4,)
    # what the same gates fold to may differ in size from layer to layer, so compare where layers agree: evaluation
    shearing.eval_target_model = True
    shearing.eval()
    selection = masks.selection(masks.deterministic(to_target=True))
    weights = fold(dict(shearing.model.state_dict()), masks.table, selection)
    changes = {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = type(shearing.model.config)(
        **{**shearing.model.config.to_dict(), **changes, "intermediate_size": 28, "num_hidden_layers": 2}
    )
    compact = LlamaForCausalLM(config)
    compact.load_state_dict(weights, strict=True)
    evaluated = shearing(batch)
    assert "penalty" not in evaluated
    want = compact(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    torch.testing.assert_close(evaluated["sample_loss"].mean(), want, atol=1e-5, rtol=0)
    total = shearing.loss(outputs, batch)
    torch.testing.assert_close(total, outputs["sample_loss"].mean() + masks.penalty())


@pytest.mark.parametrize("sizes", [[4], [2, 2], [1, 1, 1, 1], [3, 1]])
def test_microbatches_give_the_gradient_of_the_whole_batch(sizes):
    """Composer scales each microbatch's loss by its share, so that the penalty counts once; gates are shared."""
    whole, parts, batch = sheared(), sheared(), a_batch()
    whole.loss(whole(batch), batch).backward()
    start = 0
    for size in sizes:
        part = {key: value[start : start + size] for key, value in batch.items()}
        (parts.loss(parts(part), part) * size / 4).backward()
        start += size
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(other.grad, one.grad, atol=2e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert parts.masks.lambda_1["hidden"].grad.abs() > 0


def test_closed_layers_leave_zero_gradients():
    shearing, batch = sheared(spread=0.0), a_batch()
    with torch.no_grad():
        shearing.masks.log_alpha["layer"][1] = -4.5
    shearing.masks.step = next(
        step for step in range(99) if _sampled(shearing, step)["layer"].ne(0).tolist() == [True, False, True]
    )
    shearing.loss(shearing(batch), batch).backward()
    for name, parameter in shearing.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if "layers.1." in name:
            assert not parameter.grad.any(), name


def _sampled(shearing, step):
    shearing.masks.step = step
    return shearing.masks.sample()


# Gates of training and evaluation --------------------------------------------------------------------------------


def test_evaluation_runs_at_the_target_or_at_the_masks_size():
    batch = a_batch()
    for to_target in (True, False):
        shearing = sheared(eval_target_model=to_target).eval()
        shearing(batch)
        masks, selection = shearing.masks, shearing.gating.selection
        for kind in ("hidden", "head", "intermediate"):
            rows = masks.rows(kind, masks.log_alpha[kind].detach()).double()
            # P(open), written out with the constants of the paper
            p = torch.sigmoid(rows - 2 / 3 * math.log(0.1 / 1.1)).sum(-1).flatten()
            want = [TARGET[kind]] * len(p) if to_target else p.round().int().tolist()
            assert [len(units.index) for units in selection.units[kind]] == want
    assert not torch.equal(sheared(eval_target_model=True).eval()(batch)["sample_loss"], shearing(batch)["sample_loss"])


def test_evaluation_is_deterministic_and_training_noise_hangs_on_the_step_alone():
    one, batch = sheared(), a_batch()
    one.masks.step = 5
    loss = one(batch)["sample_loss"]
    torch.manual_seed(1234)
    other = sheared()
    other.load_state_dict(one.state_dict(), strict=True)
    other.masks.step = 5  # what resuming restores is the step
    assert torch.equal(other(batch)["sample_loss"], loss)
    other.masks.step = 6
    assert not torch.equal(other(batch)["sample_loss"], loss)
    other.eval()
    evaluated = other(batch)["sample_loss"]
    other.masks.step = 7
    assert torch.equal(other(batch)["sample_loss"], evaluated)


def test_state_dict_has_the_names_of_transformers():
    shearing = sheared()
    masks = {f"masks.log_alpha.{kind}" for kind in TARGET}
    masks |= {f"masks.lambda_{i}.{kind}" for kind in TARGET for i in (1, 2)}
    assert set(shearing.state_dict()) == {f"model.{name}" for name in make_model().state_dict()} | masks
    assert set(ShearingModel(make_model()).state_dict()) == {f"model.{name}" for name in make_model().state_dict()}


# Precision and attention -----------------------------------------------------------------------------------------


def test_autocast_only_where_asked_for():
    batch = a_batch()
    full, half = sheared().eval(), sheared(autocast=torch.bfloat16).eval()
    seen = {}
    for name, shearing in (("full", full), ("half", half)):
        layer = shearing.model.model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.dtype}))
        loss = shearing.eval_forward(batch)["sample_loss"]
        assert loss.dtype == torch.float32
        seen[name, "loss"] = loss
    assert seen["full"] == torch.float32 and seen["half"] == torch.bfloat16
    torch.testing.assert_close(seen["half", "loss"], seen["full", "loss"], atol=0.05, rtol=0)
    half.train()
    half.loss(half(batch), batch).backward()
    assert {p.grad.dtype for p in half.parameters()} == {torch.float32}


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_attention_implementations_agree(kv):
    """Ours builds no mask; causality is then SDPA's. Packed data has no padding."""
    ids, logits = a_batch()["input_ids"], {}
    for name in (CAUSAL_SDPA, "sdpa", "eager"):
        model = make_model(num_key_value_heads=kv, initializer_range=0.2).eval()
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits[name] = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits[CAUSAL_SDPA], logits["sdpa"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[CAUSAL_SDPA], logits["eager"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [CAUSAL_SDPA, "eager"])
def test_gated_attention_is_causal(name):
    shearing, batch = sheared(), a_batch()
    shearing.model.set_attn_implementation(name)
    shearing.set_selection()
    ids = batch["input_ids"]
    with torch.no_grad():
        before = shearing.model(input_ids=ids, use_cache=False).logits
        after = shearing.model(input_ids=torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % VOCAB], 1), use_cache=False).logits
    torch.testing.assert_close(after[:, :-1], before[:, :-1], atol=1e-6, rtol=0)
    assert not torch.allclose(after[:, -1], before[:, -1])


# Metrics ---------------------------------------------------------------------------------------------------------

DOMAINS = st.integers(1, 6)


@given(data=st.data(), domains=DOMAINS)
def test_domain_loss_by_a_loop(data, domains):
    """Batches of any size, on two ranks; -1 is padding."""
    pair = st.tuples(st.floats(0, 20, width=32), st.integers(-1, domains - 1))
    batches = data.draw(st.lists(st.lists(pair, min_size=1, max_size=5), max_size=4))
    ranks = [DomainLoss(domains), DomainLoss(domains)]
    for i, batch in enumerate(batches):
        losses, sets = zip(*batch, strict=True)
        ranks[i % 2].update(torch.tensor(losses), torch.tensor(sets))
    merged = DomainLoss(domains)
    for state in ("total", "count"):  # the reduction over ranks is a sum
        assert merged._reductions[state] is ranks[0]._reductions[state]
        setattr(merged, state, merged._reductions[state](torch.stack([getattr(rank, state) for rank in ranks])))
    merged._update_count = 1
    mean = merged.compute().item()
    counted = [(loss, domain) for batch in batches for loss, domain in batch if domain >= 0]
    for domain in range(domains):
        mine = [loss for loss, at in counted if at == domain]
        found = merged.by_domain[domain].item()
        assert math.isnan(found) if not mine else found == pytest.approx(sum(mine) / len(mine), abs=1e-9)
    assert math.isnan(mean) if not counted else mean == pytest.approx(sum(x for x, _ in counted) / len(counted))


def test_perplexity_and_reset():
    metric = DomainLoss(2, exponentiate=True)
    metric.update(torch.tensor([1.0, 3.0, 50.0]), torch.tensor([0, 1, -1]))
    assert metric.compute().item() == pytest.approx(math.exp(2))
    metric.reset()
    metric.update(torch.tensor([4.0]), torch.tensor([1]))
    assert metric.compute().item() == pytest.approx(math.exp(4))
    assert math.isnan(metric.by_domain[0]) and metric.by_domain[1] == 4


def test_evaluation_metrics_of_the_model():
    shearing, batch = sheared().eval(), a_batch()
    metrics = shearing.get_metrics(is_train=False)
    assert set(metrics) == {"LanguageCrossEntropy", "LanguagePerplexity"} and not shearing.get_metrics(is_train=True)
    batch["set"] = torch.tensor([0, 2, 2, -1])
    outputs = shearing.eval_forward(batch)
    for metric in metrics.values():
        shearing.update_metric(batch, outputs, metric)
    logits = shearing.model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    hand = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(-1)
    mean = metrics["LanguageCrossEntropy"].compute()
    assert mean.item() == pytest.approx(hand[:3].mean().item(), abs=1e-6)
    found = metrics["LanguageCrossEntropy"].by_domain
    assert found[0].item() == pytest.approx(hand[0].item(), abs=1e-6) and found[1].isnan()
    assert found[2].item() == pytest.approx(hand[1:3].mean().item(), abs=1e-6)
    assert metrics["LanguagePerplexity"].compute().item() == pytest.approx(mean.exp().item(), rel=1e-6)


# Padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", [False, True])
@pytest.mark.parametrize("pad", [0, 2])
def test_the_id_called_padding_learns_as_in_a_model_without_one(pad, pruning):
    """Packed data have no padding: pad_token_id = eos_token_id must not keep EOS from learning."""
    gradients = []
    for pad_token_id in (pad, None):
        model = make_model(initializer_range=0.2, pad_token_id=pad_token_id)
        with torch.no_grad():  # transformers begins the row of padding with zeros
            generator = torch.Generator().manual_seed(3)
            weight = model.get_input_embeddings().weight
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
        masks = L0Masks(table_for(model.config), list(TARGET), TARGET, seed=5) if pruning else None
        shearing, batch = ShearingModel(model, masks, domains=3), a_batch()
        batch["input_ids"][:, 3] = pad
        shearing.loss(shearing(batch), batch).backward()
        gradients.append({name: value.grad for name, value in shearing.named_parameters()})
    with_padding, without = gradients
    assert with_padding["model.model.embed_tokens.weight"][pad].abs().max() > 0
    for name, gradient in without.items():
        assert torch.equal(with_padding[name], gradient), name
