"""Losses that are not finite, and weights that do not do what they did: stopped before the next step."""

import json
import math

import pytest
import torch
from composer import Callback
from helpers_faults import Job, differences, load_plain
from helpers_runs import NAMES, configured, make_model, settings, trainer_of, write_yaml

from llmshearing.checkpoints import prune_and_save_model
from llmshearing.checkpoints.checkpoint import read_checkpoint
from llmshearing.data.mixture.loader import build_train_dataloader
from llmshearing.errors import ShearingError
from llmshearing.train import main, train

POISONED = 5  # batch, counted from 1


def batches_of(lab, number):
    """The first batches of a run with fixed proportions, as dicts."""
    loader = build_train_dataloader(
        local=lab.data, split="for_prune", set_names=NAMES, proportion=[0.25, 0.25, 0.5], batch_size=4,
        max_seq_len=32, vocab_size=384, seed=17,
    ).dataloader  # fmt: skip
    return [batch for batch, _ in zip(loader, range(number), strict=False)]


@pytest.fixture(scope="module")
def poisoned(lab, tmp_path_factory):
    """(source whose embedding of one token is NaN, domain, sample and row): first met in batch POISONED."""
    batches = batches_of(lab, POISONED)
    before = torch.cat([batch["input_ids"] for batch in batches[:-1]]).unique()
    last = batches[-1]
    row = next(i for i in range(4) if not torch.isin(last["input_ids"][i], before).all())
    token = next(t for t in last["input_ids"][row].tolist() if t not in before.tolist())
    rows = [i for i in range(4) if token in last["input_ids"][i].tolist()]
    folder = tmp_path_factory.mktemp("poisoned") / "source"
    model = make_model(initializer_range=0.1)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    model.save_pretrained(folder)
    return folder, [(NAMES[last["set"][i]], int(last["sample"][i]), i) for i in rows]


CHANGES = {
    "callbacks__data_loading__update_type": "constant",
    "eval_interval": "100ba",
    "save_interval": "3ba",
    "max_duration": "8ba",
}


def test_a_poisoned_batch_stops_the_run(lab, poisoned, tmp_path):
    """Before its step, naming domains and samples; the checkpoint is that of a run that ended one batch earlier."""
    source, samples = poisoned
    changes = {**CHANGES, "model__path": str(source)}
    with pytest.raises(ShearingError) as error:
        train(configured(lab, tmp_path, **changes))
    message = str(error.value)
    assert f"before the step of batch {POISONED}" in message and "rank 0: loss nan" in message
    for domain, sample, _ in samples:
        assert domain in message and str(sample) in message
    saved = tmp_path / "run" / f"ep0-ba{POISONED - 1}-rank0.pt"
    assert str(saved) in message and (tmp_path / "run" / "latest-rank0.pt").resolve() == saved

    class Stop(Callback):
        def batch_checkpoint(self, state, logger):
            if state.timestamp.batch.value == POISONED - 1:
                state.stop_training()

    trainer, _ = trainer_of(configured(lab, tmp_path / "good", **changes))
    trainer.state.callbacks.insert(0, Stop())
    trainer.fit()
    trainer.close()
    one, other = (load_plain(path)["state"] for path in (saved, tmp_path / "good" / "run" / saved.name))
    parts = ("model", "optimizers", "dataset_state")
    assert differences({key: one[key] for key in parts}, other) == []
    # going on from it meets the same batch, and says so again
    with pytest.raises(ShearingError, match=f"before the step of batch {POISONED}"):
        train(configured(lab, tmp_path, **changes, autoresume=True))


def test_all_ranks_stop_together(lab, poisoned, tmp_path):
    source, samples = poisoned
    changes = {**CHANGES, "model__path": str(source)}
    config = write_yaml(tmp_path / "two.yaml", settings(lab, tmp_path / "run", **changes))
    outcome = Job(tmp_path, config, 2).start()
    assert outcome.codes == [1, 1], outcome.output
    for _, sample, row in samples:
        assert f"rank {row // 2}: loss nan" in outcome.output and str(sample) in outcome.output
    assert (tmp_path / "run" / f"ep0-ba{POISONED - 1}-rank0.pt").is_file()


def test_a_gradient_that_overflows_stops_the_run(lab, tmp_path):
    """The loss is finite, its gradient is not: sqrt has one of infinity at 0."""
    trainer, _ = trainer_of(configured(lab, tmp_path, **CHANGES))
    original = trainer.state.model.loss
    trainer.state.model.loss = lambda *a: original(*a) + (trainer.state.model.masks.lambda_1["hidden"] * 0).sqrt().sum()
    with pytest.raises(ShearingError, match="batch 1: rank 0: a gradient that is not finite with samples"):
        trainer.fit()
    trainer.close()
    before = read_checkpoint(tmp_path / "run" / "ep0-ba0-rank0.pt")
    assert all(value.isfinite().all() for value in (*before.weights.values(), *before.masks.values()))


# The first batch -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folded(lab, tmp_path_factory):
    """A checkpoint that a pruning run folds to, which tells the loss of its last evaluation."""
    folder = tmp_path_factory.mktemp("folded")
    train(configured(lab, folder, eval_interval="8ba"))
    path = prune_and_save_model(folder / "run" / "latest-rank0.pt", folder / "folded.pt")
    record = json.loads((folder / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert read_checkpoint(path).info.evaluation == record
    return path


def going_on(lab, tmp_path, path, **changes):
    return configured(
        lab, tmp_path, model__l0_module=None, model__path=str(path), train_loader__dataset__split="for_ft",
        max_duration="2ba", eval_interval="2ba", save_interval="2ba", **changes,
    )  # fmt: skip


def test_continued_pretraining_begins_at_the_recorded_loss(lab, folded, tmp_path):
    train(going_on(lab, tmp_path, folded))
    assert read_checkpoint(tmp_path / "run").info.evaluation["batch"] == 2


@pytest.mark.parametrize("first", [False, True], ids=["", "evaluated first"])
def test_weights_that_were_not_loaded_are_noticed(lab, folded, tmp_path, monkeypatch, first):
    """The predecessor's pain: continued pretraining that starts at loss 10, not 2. Here the weights are tripled."""
    from llmshearing.training import build as module

    def wrong(source, cfg):
        model = load(source, cfg)
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(3)
        return model

    load = module.load_model
    monkeypatch.setattr(module, "load_model", wrong)
    with pytest.raises(ShearingError, match=r"first batch's loss is .*first_batch_tolerance = 1"):
        train(going_on(lab, tmp_path, folded, eval_first=first))
    assert not list((tmp_path / "run").glob("ep*.pt"))
    train(going_on(lab, tmp_path / "anyway", folded, first_batch_tolerance=None))


def test_other_domains_are_not_compared(lab, folded, tmp_path):
    """What the record does not name has no loss to compare with."""
    checkpoint = read_checkpoint(folded)
    from dataclasses import replace

    from llmshearing.checkpoints.checkpoint import save_checkpoint

    info = replace(checkpoint.info, evaluation={"batch": 8, "loss": 0.1, "domains": {"books": 0.1, "asyncio": 9.0}})
    other = save_checkpoint(tmp_path / "other.pt", checkpoint.weights, info)
    train(going_on(lab, tmp_path, other))


def test_exit_code_of_a_poisoned_run(lab, poisoned, tmp_path):
    changes = {**CHANGES, "model__path": str(poisoned[0])}
    assert main([str(write_yaml(tmp_path / "p.yaml", settings(lab, tmp_path / "run", **changes)))]) == 1
