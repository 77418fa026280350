"""The domain mixture in real runs: it moves as the formula says, and the data follow from the next batch on."""

import json
import math

import numpy as np
import pytest
from composer import Callback
from helpers_runs import NAMES, configured, trainer_of

from llmshearing.data.mixture.mixture import Mixture
from llmshearing.training.callbacks.dynamic_loading import DynamicLoadingCallback

START = np.array([0.25, 0.25, 0.5])
TARGETS = np.array([5.5, 6.0, 5.8])


class Seen(Callback):
    """(domain, sample) of every training batch."""

    def __init__(self):
        self.batches = []

    def batch_start(self, state, logger):
        self.batches.append(list(zip(state.batch["set"].tolist(), state.batch["sample"].tolist(), strict=True)))


def short_run(lab, tmp_path, **changes):
    """(trainer, values by name, batches) after 8 batches with an evaluation after every second one."""
    cfg = configured(lab, tmp_path, **{"eval_interval": "2ba", "save_folder": None, **changes})
    trainer, memory = trainer_of(cfg)
    seen = Seen()
    trainer.state.callbacks.append(seen)
    trainer.fit()
    trainer.close()
    values = {name: [value for _, value in pairs] for name, pairs in memory.data.items()}
    return trainer, values, seen.batches


def callback_of(trainer):
    return next(c for c in trainer.state.callbacks if isinstance(c, DynamicLoadingCallback))


@pytest.mark.parametrize("clamped", [False, True])
def test_proportions_move_by_the_formula_and_the_data_follow(lab, tmp_path, clamped):
    options = {"eta": 3.0, "c": 0.01, "clamp_excess": clamped}
    changes = {f"callbacks__data_loading__{key}": value for key, value in options.items()}
    targets = [5.5, 7.0, 5.8] if clamped else TARGETS.tolist()
    trainer, values, batches = short_run(lab, tmp_path, **changes, callbacks__data_loading__target_loss=targets)
    dataset = trainer.state.train_dataloader.dataset
    blocks = [stream.block for stream in dataset.streams]
    twin = Mixture(NAMES, [len(stream) for stream in dataset.streams], START, seed=17, blocks=blocks)
    q = START
    for evaluation in range(4):
        draws = [[twin.next() for _ in range(4)] for _ in range(2)]
        expected = [[(draw[0], twin.sample(draw)) for draw in batch] for batch in draws]
        assert batches[2 * evaluation : 2 * evaluation + 2] == expected
        excess = np.array([values[f"mixture/{name}/excess"][evaluation] for name in NAMES])
        losses = np.array([values[f"metrics/eval/{name}_LanguageCrossEntropy"][evaluation] for name in NAMES])
        np.testing.assert_allclose(excess, losses - targets, atol=1e-12)
        gain = q * np.exp(3.0 * (excess.clip(0) if clamped else excess))
        q = 0.99 * gain / gain.sum() + 0.01 / 3
        found = np.array([values[f"mixture/{name}/proportion"][evaluation] for name in NAMES])
        np.testing.assert_allclose(found, q, atol=1e-6)
        q = found
        twin.set_proportion(found)
    assert not np.allclose(q, START)
    np.testing.assert_array_equal(dataset.proportion, q)


@pytest.mark.parametrize("changes", [{"update_type": "constant"}, {"dynamic": False}])
def test_constant_and_static_mixtures_stay(lab, tmp_path, changes):
    changes = {f"callbacks__data_loading__{key}": value for key, value in changes.items()}
    trainer, values, batches = short_run(lab, tmp_path, **changes)
    for name, share in zip(NAMES, START, strict=True):
        assert values[f"mixture/{name}/proportion"] == [share] * 4
        assert len(values[f"mixture/{name}/loss"]) == 4
    domains = [domain for batch in batches for domain, _ in batch]
    assert [domains.count(index) for index in range(3)] == [8, 8, 16]


def test_a_domain_without_a_sample_keeps_its_last_loss(lab, tmp_path):
    """Two samples are evaluated, of the first two domains; the third reports nothing until it has a loss."""
    few = {"device_eval_batch_size": 1, "eval_subset_num_batches": 2, "callbacks__data_loading__eta": 1.0}
    cfg = configured(lab, tmp_path, **few, save_folder=None)
    trainer, memory = trainer_of(cfg)
    callback, q = callback_of(trainer), START
    for known in (math.nan, 7.25):
        callback.losses = [math.nan, math.nan, known]
        trainer.eval()
        losses = np.array(callback.losses)
        assert losses[2] == known or math.isnan(known) and math.isnan(losses[2])
        gain = q * np.exp(np.nan_to_num(losses - TARGETS))
        q = 0.9999 * gain / gain.sum() + 1e-4 / 3
        np.testing.assert_allclose(callback.dataset.proportion, q, atol=1e-6)
        last = f"mixture/{NAMES[2]}/loss"
        assert last not in memory.data if math.isnan(known) else memory.data[last][-1][1] == known
        assert f"metrics/eval/{NAMES[2]}_LanguageCrossEntropy" not in memory.data
    trainer.close()


def test_state_round_trip(lab, tmp_path):
    trainer, _ = trainer_of(configured(lab, tmp_path, save_folder=None))
    callback = callback_of(trainer)
    callback.losses = [1.0, 2.0, math.nan]
    callback.dataset.set_proportion([0.1, 0.2, 0.7])
    state = json.loads(json.dumps(callback.state_dict()))
    callback.losses = [0.0] * 3
    callback.dataset.set_proportion(START)
    callback.load_state_dict(state)
    assert callback.losses[:2] == [1.0, 2.0] and math.isnan(callback.losses[2])
    np.testing.assert_allclose(callback.dataset.proportion, [0.1, 0.2, 0.7], atol=1e-15)
    trainer.close()
