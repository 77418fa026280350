"""One real run with every callback: what is logged, recorded, saved and said, against files and closed forms."""

import json
import math
from collections import defaultdict

import pytest
import torch
from composer import Callback
from helpers_runs import NAMES, SEQ, TARGET_HF, VOCAB, configured, trainer_of
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmshearing.checkpoints import prune_and_save_model
from llmshearing.checkpoints.checkpoint import load_masks, read_checkpoint
from llmshearing.config import to_yaml
from llmshearing.data.mixture.loader import build_eval_dataloader
from llmshearing.masks import hard_concrete
from llmshearing.train import train

STEPS = 8
KINDS = {"hidden": (32, 20), "head": (2, 1), "intermediate": (48, 28), "layer": (3, 2)}


class Record(Callback):
    """Domains and per-sample losses of every training batch, over its microbatches."""

    def __init__(self):
        self.batches = []

    def batch_start(self, state, logger):
        self.batches.append([])

    def after_loss(self, state, logger):
        self.batches[-1] += zip(state.batch["set"].tolist(), state.outputs["sample_loss"].tolist(), strict=True)


@pytest.fixture(scope="module")
def finished(lab, tmp_path_factory):
    """(trainer, its metrics by name and step, record, configuration, folder) of a run that never sees one domain."""
    folder = tmp_path_factory.mktemp("lifecycle")
    cfg = configured(
        lab,
        folder,
        callbacks__data_loading__proportion=[0.5, 0.5, 0.0],
        callbacks__data_loading__update_type="constant",
        callbacks__lr_monitor={},
        callbacks__speed_monitor={"window_size": 2},
        device_train_microbatch_size=2,
        eval_first=True,
        eval_subset_num_batches=-1,
        device_eval_batch_size=64,
        optimizer__lag_lr=1.0,
    )
    trainer, memory = trainer_of(cfg)
    record = Record()
    trainer.state.callbacks.append(record)
    trainer.eval()
    trainer.fit()
    trainer.close()
    metrics = {}  # at the end of batch t, the clock stands at t + 1
    for name, pairs in memory.data.items():
        metrics[name] = [(int(time.batch), float(value)) for time, value in pairs if not isinstance(value, str)]
    return trainer, metrics, record, cfg, folder / "run"


def test_masks_are_logged_for_every_kind_and_batch(finished):
    _, metrics, _, _, _ = finished
    warmup = 3
    for kind, (size, target) in KINDS.items():
        asked = [value for _, value in metrics[f"pruning/target_sparsity/{kind}"]]
        assert asked == pytest.approx([(1 - target / size) * min(1, t / warmup) for t in range(STEPS)])
        sparsity = [value for _, value in metrics[f"pruning/expected_sparsity/{kind}"]]
        open_units = [value for _, value in metrics[f"pruning/open_units/{kind}"]]
        assert open_units == pytest.approx([(1 - s) * size for s in sparsity], abs=1e-4)
        for multiplier in ("lambda_1", "lambda_2"):
            assert len(metrics[f"pruning/{multiplier}/{kind}"]) == STEPS
        # more was asked for than given: the first multiplier has ascended on a negative gap
        assert metrics[f"pruning/lambda_1/{kind}"][-1][1] < 0 < metrics[f"pruning/lambda_2/{kind}"][-1][1]
    # 2 layers of: q, o [20, 16], k, v [20, 8], three of [20, 28]
    target = 2 * (2 * 20 * 16 + 2 * 20 * 8 + 3 * 20 * 28)
    source = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert {value for _, value in metrics["pruning/target_parameters"]} == {target}
    expected = dict(metrics["pruning/expected_parameters"])
    assert len(expected) == STEPS and all(0 < value < source for value in expected.values())
    for step, value in metrics["pruning/expected_sparsity/total"]:
        assert value == pytest.approx(1 - expected[step] / source)


def test_training_losses_by_domain(finished):
    _, metrics, record, _, _ = finished
    for index, name in enumerate(NAMES):
        logged = dict(metrics.get(f"loss/train/{name}", []))
        for step, batch in enumerate(record.batches, start=1):
            mine = [loss for domain, loss in batch if domain == index]
            if mine:
                assert logged[step] == pytest.approx(sum(mine) / len(mine), abs=1e-6)
            else:
                assert step not in logged  # nothing rather than NaN
    assert f"loss/train/{NAMES[2]}" not in metrics
    whole, perplexity = dict(metrics["loss/train/cross_entropy"]), dict(metrics["loss/train/perplexity"])
    for step, batch in enumerate(record.batches, start=1):
        assert whole[step] == pytest.approx(sum(loss for _, loss in batch) / 4, abs=1e-6)
        assert perplexity[step] == pytest.approx(math.exp(whole[step]))
    totals, penalties = dict(metrics["loss/train/total"]), dict(metrics["loss/train/lagrangian"])
    for step in range(STEPS):  # Composer's own sum over microbatches, logged before its clock moves: the penalty once
        assert totals[step] == pytest.approx(whole[step + 1] + penalties[step + 1], abs=1e-5)
    assert penalties[STEPS] != 0


def test_no_metric_is_nan(finished):
    _, metrics, _, _, _ = finished
    assert not [name for name, pairs in metrics.items() if any(math.isnan(value) for _, value in pairs)]


def test_gates_are_saved_at_every_evaluation(finished):
    trainer, _, _, _, folder = finished
    names = sorted(path.name for path in (folder / "gates").iterdir())
    assert names == ["gates-ba0.safetensors", "gates-ba4.safetensors", "gates-ba8.safetensors"]
    masks = trainer.state.model.masks
    for name in names:
        saved = load_file(folder / "gates" / name)
        assert set(saved) == {f"{what}.{kind}" for what in ("gate", "log_alpha") for kind in KINDS}
        for kind, (size, target) in KINDS.items():
            log_alpha, gate = saved[f"log_alpha.{kind}"], saved[f"gate.{kind}"]
            for row, gates in zip(log_alpha.view(-1, size), gate.view(-1, size), strict=True):
                threshold = sorted(row.tolist())[size - target]
                want = [1 / (1 + math.exp(-0.8 * a * 3 / 2)) if a >= threshold else 0.0 for a in row.tolist()]
                assert gates.tolist() == pytest.approx(want, abs=1e-6)
    for kind, a in masks.log_alpha.items():
        assert torch.equal(saved[f"log_alpha.{kind}"], a.detach())
        assert (a >= hard_concrete.LOG_ALPHA_MIN).all() and (a <= hard_concrete.LOG_ALPHA_MAX).all()


def test_evaluation_is_that_of_the_folded_model(finished, lab):
    """The last line of evaluations.jsonl, again: fold the checkpoint, load it in transformers, loop over the data."""
    _, metrics, _, _, folder = finished
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines] == [0, 4, 8]
    assert [line["tokens"] for line in lines] == [0, 4 * 4 * SEQ, 8 * 4 * SEQ]
    folded = read_checkpoint(prune_and_save_model(folder / "latest-rank0.pt", folder.parent / "folded.pt"))
    assert {key: getattr(folded.info.config, key) for key in TARGET_HF} == TARGET_HF
    model = LlamaForCausalLM(LlamaConfig(**folded.info.hf_config))
    model.load_state_dict(folded.weights, strict=True)
    options = {"set_names": NAMES, "batch_size": 32, "max_seq_len": SEQ, "vocab_size": VOCAB}
    losses = defaultdict(list)
    for batch in build_eval_dataloader(local=lab.data, split="eval_merge", **options).dataloader:
        for ids, domain in zip(batch["input_ids"].split(1), batch["set"].tolist(), strict=True):
            losses[NAMES[domain]].append((ids, domain))
    means = {}
    with torch.no_grad():
        for name, rows in losses.items():
            ids = torch.cat([row for row, _ in rows])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].transpose(1, 2)
            means[name] = torch.nn.functional.cross_entropy(logits, ids[:, 1:]).item()
    assert lines[-1]["domains"] == pytest.approx(means, abs=1e-4)
    count = sum(map(len, losses.values()))
    assert lines[-1]["loss"] == pytest.approx(sum(means[n] * len(losses[n]) for n in NAMES) / count, abs=1e-4)
    for name in NAMES:
        logged = dict(metrics[f"metrics/eval/{name}_LanguageCrossEntropy"])
        assert logged == {line["batch"]: pytest.approx(line["domains"][name]) for line in lines}


def test_checkpoint_says_what_it_is(finished, lab):
    trainer, _, _, cfg, folder = finished
    checkpoint = read_checkpoint(folder / "latest-rank0.pt")  # loads with weights_only=True
    info = checkpoint.info
    assert info.config.hidden_size == 32 and info.run_config == to_yaml(cfg) and info.tokenizer == str(lab.source)
    assert info.masks["kinds"] == cfg.model.l0_module.pruning_modules and info.masks["head_mode"] == "group"
    assert info.masks["target"] == {kind: target for kind, (_, target) in KINDS.items()}
    assert info.history[-1].startswith(f"pruned from {lab.source} for 8ba")
    masks = load_masks(checkpoint)
    for kind, a in trainer.state.model.masks.log_alpha.items():
        assert torch.equal(masks.log_alpha[kind], a)
    for name, value in trainer.state.model.model.state_dict().items():
        assert torch.equal(checkpoint.weights[name], value), name
    assert {path.name for path in folder.glob("*.pt")} == {"ep0-ba4-rank0.pt", "ep0-ba8-rank0.pt", "latest-rank0.pt"}


def test_composers_monitors_and_loggers(lab, tmp_path, monkeypatch):
    """Every monitor and logger of the schema, by its key, in one short run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = configured(
        lab,
        tmp_path,
        max_duration="3ba",
        eval_interval="3ba",
        callbacks__optimizer_monitor={},
        callbacks__runtime_estimator={},
        callbacks__memory_monitor={},
        loggers__tensorboard={"log_dir": str(tmp_path / "board")},
        loggers__file_logger={"filename": str(tmp_path / "log.txt"), "flush_interval": 1},
        loggers__wandb={"project": "test"},
    )
    train(cfg)
    assert "pruning/expected_sparsity/hidden" in (tmp_path / "log.txt").read_text()
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))
    assert list(tmp_path.rglob("*.wandb"))
