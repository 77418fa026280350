"""`optimizer.lag_lr: auto`: masks alone under their penalty, on stages of four lengths; and the run that uses it."""

import math

import pytest
import torch
from composer import Callback
from helpers_oracle import tiny_config
from helpers_runs import configured, trainer_of

from llmshearing.config import load_config
from llmshearing.config.load import ConfigError
from llmshearing.config.schema import Config, L0Module
from llmshearing.families import table_for
from llmshearing.masks.l0 import L0Masks
from llmshearing.training.build import build_optimizer
from llmshearing.training.rates import Rates, build_rates, mask_groups

TARGET = {"hidden": 6, "head": 1, "intermediate": 5, "layer": 2}  # of 12, 2 groups, 10 and 3


def config_of(steps, lag_lr, warmup="0.2dur"):
    """A configuration that is no more than the optimizer needs."""
    cfg = Config()
    cfg.max_duration, cfg.global_train_batch_size, cfg.max_seq_len = f"{steps}ba", 4, 8
    cfg.optimizer.lag_lr = lag_lr
    cfg.model.l0_module = L0Module(lagrangian_warmup_steps=warmup)
    return cfg


def gaps(steps, lag_lr, pull=0.0):
    """By step: the largest distance of a kind's expected sparsity from its target of now, after that step.

    Without a model: the masks descend on the penalty, and on ``pull`` (nats) times the square of the sparsity, which
    stands for what closed units cost. Gradients are clipped as in a run.
    """
    cfg = config_of(steps, lag_lr)
    masks = L0Masks(table_for(tiny_config(num_key_value_heads=2)), list(TARGET), TARGET)
    optimizer = build_optimizer(mask_groups(masks, cfg), cfg)
    rates, found = build_rates(cfg), []
    for step in range(steps):
        for group in optimizer.param_groups if rates else ():
            group["lr"] = rates.at(step)[group["name"]]
        masks.progress = step / (0.2 * steps)
        optimizer.zero_grad()
        cost = sum(rows.mean().square() for rows in masks.sparsity().values())
        (masks.penalty() + pull * cost).backward()
        torch.nn.utils.clip_grad_norm_(masks.parameters(), 1.0)
        optimizer.step()
        masks.project()
        now = masks.targets_now()
        found.append(max(abs(rows.mean().item() - now[kind]) for kind, rows in masks.sparsity().items()))
    return found


@pytest.mark.parametrize("pull", [0.0, 2.0])
@pytest.mark.parametrize(
    ("steps", "settled"),  # part of the warm-up after which the sparsity stays within 0.02 of its target
    [(40, 1.5), (100, 1.0), (400, 1.0), pytest.param(3200, 1.0, marks=pytest.mark.slow)],
)
def test_sparsity_reaches_its_target_and_stays(steps, settled, pull):
    found = gaps(steps, "auto", pull)
    warmup = 0.2 * steps
    assert max(found[math.ceil(warmup) :]) < 0.08
    assert max(found[math.ceil(settled * warmup) :]) < 0.02


def test_the_published_rate_on_a_short_stage():
    """What auto is for: at rate 1.0 the sparsity goes past its target by 0.2 and more, long after the warm-up."""
    found = gaps(100, 1.0)
    assert max(found[20:]) > 0.2 and max(found[40:]) > 0.1


def test_rates_written_out():
    assert Rates(100, 20).at(0) == {"masks": 0.4, "lambda_1": pytest.approx(0.1), "lambda_2": 10.0}
    assert Rates(100, 20).at(19)["masks"] == 0.4 and Rates(100, 20).at(20)["masks"] == 0.08
    assert Rates(3200, 640).at(0)["masks"] == Rates(3200, 640).at(3199)["masks"] == 0.0125
    assert Rates(50, 0).at(0)["masks"] == 0.08  # nothing to travel


def test_lengths_in_other_units():
    assert build_rates(config_of(100, "auto", "10ba")) == Rates(100, 10)
    assert build_rates(config_of(100, "auto", "40sp")) == Rates(100, 10)
    assert build_rates(config_of(100, "auto", "320tok")) == Rates(100, 10)
    assert build_rates(config_of(100, "auto", "0.1dur")) == Rates(100, 10)
    assert build_rates(config_of(100, 1.0)) is None


def test_groups_of_a_number_are_what_they_were():
    masks = L0Masks(table_for(tiny_config(num_key_value_heads=2)), list(TARGET), TARGET)
    groups = mask_groups(masks, config_of(100, 0.5))
    assert [group["name"] for group in groups] == ["masks", "multipliers"]
    assert all(group.keys() == {"name", "params", "lr", "weight_decay"} and group["lr"] == 0.5 for group in groups)
    assert len(groups[1]["params"]) == 8
    exact = L0Masks(table_for(tiny_config()), list(TARGET), TARGET | {"head": 2}, constraint="exact")
    assert [group["name"] for group in mask_groups(exact, config_of(100, "auto"))] == ["masks"]


def test_a_run_takes_the_rates(lab, tmp_path):
    seen = []

    class Watch(Callback):
        def before_forward(self, state, logger):
            seen.append({group["name"]: group["lr"] for group in state.optimizers[0].param_groups})

    cfg = configured(lab, tmp_path, optimizer__lag_lr="auto", save_folder=None)
    trainer, _ = trainer_of(cfg)
    trainer.state.callbacks.append(Watch())
    trainer.fit()
    trainer.close()
    wanted = Rates(8, 3)
    assert [{k: v for k, v in rates.items() if k != "weights"} for rates in seen] == [wanted.at(t) for t in range(8)]
    assert [group["betas"] for group in trainer.state.optimizers[0].param_groups][1:3] == [(0.5, 0.8), (0.9, 0.95)]


@pytest.mark.parametrize(
    ("changes", "say"),
    [
        ({"optimizer__lag_lr": "fast"}, "optimizer.lag_lr = fast: must be a number of at least 0, or auto"),
        ({"optimizer__lag_lr": -1}, "optimizer.lag_lr = -1"),
        ({"optimizer__lag_lr": "auto", "max_duration": "2ep"}, "lag_lr = auto with max_duration = 2ep: it needs"),
        (
            {"optimizer__lag_lr": "auto", "model__l0_module__lagrangian_warmup_steps": "3sec"},
            "lag_lr = auto with model.l0_module.lagrangian_warmup_steps = 3sec",
        ),
    ],
)
def test_refused(lab, tmp_path, changes, say):
    with pytest.raises(ConfigError, match=say):
        configured(lab, tmp_path, **changes)


@pytest.mark.parametrize(("given", "value"), [("1", 1.0), ("2e-3", 0.002), ("0.5", 0.5), ("auto", "auto")])
def test_written_in_any_way(lab, tmp_path, given, value):
    configured(lab, tmp_path)
    assert load_config(tmp_path / "run.yaml", [f"optimizer.lag_lr={given}"]).optimizer.lag_lr == value
