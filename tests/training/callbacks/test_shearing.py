"""The masks' driver under Composer's own clock: warm-up in every unit, projection, learning rates."""

import math

import pytest
import torch
from composer import Callback, Trainer
from composer.core import Time
from composer.optim import CosineAnnealingWithWarmupScheduler
from helpers_runs import VOCAB, make_model
from torch.utils.data import DataLoader

from llmshearing.families import table_for
from llmshearing.masks import hard_concrete
from llmshearing.masks.l0 import L0Masks
from llmshearing.training.callbacks.shearing import Shearing, warmup_progress
from llmshearing.training.model import ShearingModel

TARGET = {"hidden": 20, "head": 1, "intermediate": 28, "layer": 2}
LENGTH, BATCH, SEQ, BATCHES = 4, 2, 16, 7  # batches an epoch, samples a batch, tokens a sample, batches in all
# warm-up -> progress before batch t, in closed form
CLOCKS = {
    "5ba": lambda t: t / 5,
    "7sp": lambda t: BATCH * t / 7,
    "100tok": lambda t: BATCH * SEQ * t / 100,
    "1ep": lambda t: t / LENGTH,
    "2ep": lambda t: t / (2 * LENGTH),
    "0.5dur": lambda t: 2 * t / BATCHES,
    "0ba": lambda t: 1.0,
    "0ep": lambda t: 1.0,
    "0dur": lambda t: 1.0,
}


class Watch(Callback):
    """Before each batch (after the algorithms): progress, target and step of every driver; learning rates."""

    def __init__(self, drivers):
        self.drivers, self.seen, self.rates, self.outside = drivers, [], [], 0

    def before_forward(self, state, logger):
        self.seen.append({d.warmup.to_timestring(): (d.masks.progress, d.masks.step) for d in self.drivers})
        self.targets = [d.masks.targets_now()["hidden"] for d in self.drivers]
        self.rates.append({group["name"]: group["lr"] for group in state.optimizers[0].param_groups})

    def batch_checkpoint(self, state, logger):
        low, high = hard_concrete.LOG_ALPHA_MIN, hard_concrete.LOG_ALPHA_MAX
        for driver in self.drivers:
            values = torch.cat([a.detach().flatten() for a in driver.masks.log_alpha.values()])
            self.outside += int(((values < low - 1e-6) | (values > high + 1e-6)).sum())


def build_masks(start=0.1):
    return L0Masks(table_for(make_model().config), list(TARGET), TARGET, start_sparsity=start)


def fit(drivers, masks=None, duration=f"{BATCHES}ba", lag_lr=0.5, **more):
    """A real run over `LENGTH` batches an epoch."""
    model = make_model()
    shearing = ShearingModel(model, masks)
    ids = torch.arange(LENGTH * BATCH * SEQ).view(-1, SEQ) % VOCAB
    rows = [{"input_ids": row, "set": 0} for row in ids]
    groups = [{"name": "weights", "params": list(model.parameters())}]
    if masks is not None:
        multipliers = [*masks.lambda_1.parameters(), *masks.lambda_2.parameters()]
        groups.append({"name": "masks", "params": list(masks.log_alpha.parameters()), "lr": lag_lr})
        groups.append({"name": "multipliers", "params": multipliers, "lr": lag_lr})
    watch = Watch(drivers)
    trainer = Trainer(
        model=shearing,
        train_dataloader=DataLoader(rows, batch_size=BATCH),
        optimizers=torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0),
        max_duration=duration,
        algorithms=drivers,
        callbacks=[watch],
        device="cpu",
        progress_bar=False,
        auto_log_hparams=False,
        **more,
    )
    trainer.fit()
    trainer.close()
    return watch


def test_warm_up_in_every_unit():
    drivers = [Shearing(build_masks(), warmup) for warmup in CLOCKS]
    watch = fit(drivers)
    assert len(watch.seen) == BATCHES
    for t, seen in enumerate(watch.seen):
        for warmup, clock in CLOCKS.items():
            progress, step = seen[Time.from_timestring(warmup).to_timestring()]
            assert progress == pytest.approx(clock(t), abs=1e-12), (warmup, t)
            assert step == t
    for target, clock in zip(watch.targets, CLOCKS.values(), strict=True):
        final = 1 - TARGET["hidden"] / 32
        assert target == pytest.approx(0.1 + (final - 0.1) * min(1, clock(BATCHES - 1)), abs=1e-12)


def test_fraction_of_a_run_that_is_given_in_epochs():
    watch = fit([Shearing(build_masks(), "0.25dur")], duration="2ep")
    progress = [seen["0.25dur"][0] for seen in watch.seen]
    assert progress == pytest.approx([t / (0.25 * 2 * LENGTH) for t in range(2 * LENGTH)])


def test_warm_up_in_seconds():
    watch = fit([Shearing(build_masks(), "20sec")])
    progress = [seen["20sec"][0] for seen in watch.seen]
    assert progress[0] == 0 and 0 < progress[-1] < 10
    assert progress == sorted(set(progress))


def test_warm_up_of_zero_seconds_is_over_at_once():
    assert warmup_progress(None, Time.from_timestring("0sec")) == 1.0


@pytest.mark.parametrize("constant", [None, 30.0])
def test_learning_rates_and_projection(constant):
    """Steps of size 30 overshoot the range at once: they are put back before the checkpoint."""
    masks = build_masks()
    driver = Shearing(masks, "2ba", constant)
    schedule = CosineAnnealingWithWarmupScheduler(t_warmup="2ba", alpha_f=0.1)
    watch = fit([driver], masks, lag_lr=30.0, schedulers=schedule)
    assert watch.outside == 0
    low, high = hard_concrete.LOG_ALPHA_MIN, hard_concrete.LOG_ALPHA_MAX
    ends = torch.cat([a.detach().flatten() for a in masks.log_alpha.values()]).tolist()
    assert any(math.isclose(a, low, abs_tol=1e-5) or math.isclose(a, high, abs_tol=1e-5) for a in ends)
    for t, rates in enumerate(watch.rates):
        now = max(0, t - 1)  # Composer sets the rate of the next batch before its clock moves on
        rest = (now - 2) / (BATCHES - 2)
        share = now / 2 if now < 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * rest)) / 2
        assert rates["weights"] == pytest.approx(1e-3 * share, abs=1e-12), t
        wanted = constant if constant is not None else 30.0 * share
        assert rates["masks"] == rates["multipliers"] == pytest.approx(wanted, abs=1e-9), t
