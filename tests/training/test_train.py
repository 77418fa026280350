"""`train.py` itself: dry runs, refusals in one message, optimizer groups, seeds, resuming, the kept configuration."""

import copy
import json
import logging

import pytest
import torch
import yaml
from composer import Callback
from composer.core import Time
from helpers_runs import NAMES, ROOT, SEQ, TARGET, configured, make_model, settings, trainer_of, write_yaml

from llmshearing.checkpoints import hf_to_checkpoint
from llmshearing.checkpoints.checkpoint import read_checkpoint
from llmshearing.config import load_config
from llmshearing.families import table_for
from llmshearing.masks.l0 import L0Masks
from llmshearing.train import main, train
from llmshearing.training.build import build_optimizer, build_scheduler, cpu_autocast, optimizer_groups
from llmshearing.training.model import ShearingModel

MASKED = {"hidden": 20, "head": 1, "intermediate": 28, "layer": 2}


@pytest.fixture
def command(lab, tmp_path, caplog):
    """Run `train.py` in this process on a changed configuration: (exit code, error messages)."""

    def execute(*arguments, **changes):
        path = write_yaml(tmp_path / "changed.yaml", settings(lab, tmp_path / "run", **changes))
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            code = main([str(path), *arguments])
        return code, [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]

    return execute


# Dry runs --------------------------------------------------------------------------------------------------------


def test_dry_run_counts_and_loads_no_weights(capsys, monkeypatch):
    """LLaMA-2-7B and Sheared-LLaMA-1.3B have these many parameters; no weights of either are here."""
    monkeypatch.chdir(ROOT)
    assert main(["configs/llama2/7b.yaml", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "6,738,415,616 parameters" in output and "1,345,423,360 parameters" in output
    assert "lagrangian_warmup_steps: 640ba" in output and "eval_interval: 50ba" in output


def test_dry_run_prints_a_configuration_that_loads(lab, tmp_path, capsys):
    path = write_yaml(tmp_path / "run.yaml", settings(lab, tmp_path / "run"))
    assert main([str(path), "optimizer.lr=0.125", "--dry-run"]) == 0
    text, _, shapes = capsys.readouterr().out.partition("\nsource ")
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_config(again, []) == load_config(path, ["optimizer.lr=0.125"])
    # embeddings 2 * 384 * 32; a layer: q, o 32 * 32, k, v 32 * 16, three 32 * 48, two norms; the final norm
    count = 2 * 384 * 32 + 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    assert f"{count:,} parameters" in shapes and f"{make_model().num_parameters():,}" == f"{count:,}"
    small = 2 * 384 * 20 + 2 * (2 * 20 * 16 + 2 * 20 * 8 + 3 * 20 * 28 + 2 * 20) + 20
    assert f"{small:,} parameters" in shapes
    assert not (tmp_path / "run").exists()


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "changes", "wanted"),
    [
        (["optimizer.lag_rl=1.0"], {}, ["optimizer.lag_rl", "lag_lr"]),
        (["evalinterval=3ba"], {}, ["evalinterval", "eval_interval"]),
        ([], {"model__l0_module__target_model": {**TARGET, "d_model": 64}}, ["d_model = 64", "larger", "32"]),
        ([], {"model__l0_module__pruning_modules": ["head", "intermediate", "layer"]}, ["d_model = 20", "mask hidden"]),
        (
            [],
            {"callbacks__data_loading__proportion": [0.5, 0.25, 0.5]},
            ["callbacks.data_loading.proportion", "sums to 1.25"],
        ),
        ([], {"callbacks__data_loading__set_names": ["asyncio", "docs", "books"]}, ["'books'", "asyncio"]),
        ([], {"train_loader__dataset__split": "for_purne"}, ["for_purne", "for_prune"]),
        ([], {"max_seq_len": 16}, ["max_seq_len is 16", str(SEQ)]),
        ([], {"model__path": "no/such/model", "model__l0_module": None}, ["model.path", "no/such/model"]),
        ([], {"load_path": "no/such/checkpoint.pt"}, ["load_path", "no/such/checkpoint.pt"]),
    ],
)
def test_refusals_are_one_message_and_exit_code_1(command, tmp_path, arguments, changes, wanted):
    code, errors = command(*arguments, **changes)
    assert code == 1 and len(errors) == 1, errors
    for text in wanted:
        assert text in errors[0]
    assert not (tmp_path / "run" / "latest-rank0.pt").exists()


def test_every_problem_of_a_file_at_once(command):
    code, errors = command(
        "optimzer.lr=1", eval_interval="fifty", callbacks__data_loading__proportion=[0.5, 0.5], max_duration=None
    )
    assert code == 1 and len(errors) == 1
    for text in ("optimzer", "eval_interval", "max_duration"):
        assert text in errors[0]


def test_tokenizer_larger_than_the_model(command, tmp_path):
    make_model(vocab_size=300).save_pretrained(tmp_path / "small")
    code, errors = command(model__path=str(tmp_path / "small"))
    assert code == 1 and "384" in errors[0] and "300" in errors[0] and len(errors) == 1


def test_weights_that_do_not_match_their_config(command, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    code, errors = command(model__path=str(tmp_path / "model"))
    assert code == 1 and len(errors) == 1 and "layers.3." in errors[0]


def test_shape_keys_that_contradict_a_checkpoint(command, lab, tmp_path):
    checkpoint = hf_to_checkpoint(lab.source, tmp_path / "source.pt")
    assert command("--dry-run", model__path=str(checkpoint))[0] == 0
    changes = {"model__d_model": 64, "model__n_heads": 4, "model__n_layers": 3, "model__intermediate_size": 48}
    code, errors = command("--dry-run", model__path=str(checkpoint), model__vocab_size=384, **changes)
    assert code == 1 and len(errors) == 1
    assert f"model.d_model = 64, but {checkpoint} has hidden_size = 32" in errors[0]
    assert "n_layers = 3," not in errors[0]


def test_a_pruning_checkpoint_is_no_source(command, tmp_path):
    assert command(max_duration="1ba", eval_interval="1ba", model__l0_module__lagrangian_warmup_steps="0ba")[0] == 0
    checkpoint = str(tmp_path / "run" / "latest-rank0.pt")
    code, errors = command(model__path=checkpoint, model__l0_module=None, save_overwrite=True)
    assert code == 1 and len(errors) == 1
    assert checkpoint in errors[0] and "post_pruning_processing prune_and_save_model" in errors[0]


def test_never_over_an_earlier_run(uninterrupted, command):
    folder, _ = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, errors = command(save_folder=str(folder))
    assert code == 1 and len(errors) == 1
    for text in (str(folder), "ep0-ba4-rank0.pt", "autoresume=true", "save_overwrite=true"):
        assert text in errors[0]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_batch_that_ranks_cannot_share(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, errors = command("--dry-run")
    assert code == 1 and "global_train_batch_size = 4 is not divisible by the 3 ranks" in errors[0]


# Optimizer -------------------------------------------------------------------------------------------------------


def gated():
    model = make_model()
    masks = L0Masks(table_for(model.config), list(MASKED), MASKED)
    masks.progress = 1.0
    return ShearingModel(model, masks)


@pytest.mark.parametrize("name", ["decoupled_adamw", "adamw"])
def test_multipliers_ascend_while_masks_and_weights_descend(lab, tmp_path, name):
    """Adam's first step is lr * sign(gradient): each value moves by it, and to the side that the objective says."""
    cfg = configured(lab, tmp_path, optimizer__name=name)
    shearing, twin = gated(), gated()
    batch = {"input_ids": torch.randint(384, (4, 16))}
    for model in (shearing, twin):
        with torch.no_grad():
            for first, second in zip(model.masks.lambda_1.values(), model.masks.lambda_2.values(), strict=True):
                first.fill_(0.3), second.fill_(0.9)
    # the true gradient of the objective, without the turn that makes multipliers ascend
    objective = twin(batch)["sample_loss"].mean() + twin.masks.penalty(ascending=False)
    objective.backward()
    groups = optimizer_groups(shearing.model, shearing.masks.table, shearing.masks, cfg)
    assert [group["name"] for group in groups] == ["weights", "masks", "multipliers"]
    optimizer = build_optimizer(groups, cfg)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, shearing.parameters()))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.5, 0.5]
    before = copy.deepcopy(shearing.state_dict())
    shearing.loss(shearing(batch), batch).backward()
    optimizer.step()
    for (key, value), other in zip(shearing.named_parameters(), twin.parameters(), strict=True):
        clear = other.grad.abs() > 1e-5  # where eps of Adam does not matter
        side = 1 if "lambda" in key else -1
        lr = 1e-3 if key.startswith("model.") else 0.5
        moved = (value.detach() - before[key])[clear]
        torch.testing.assert_close(moved, side * lr * other.grad[clear].sign(), rtol=2e-3, atol=1e-6)
        assert clear.any(), key


@pytest.mark.parametrize("name", ["decoupled_adamw", "adamw", "muon"])
def test_only_weights_decay(lab, tmp_path, name):
    cfg = configured(lab, tmp_path, optimizer__name=name, optimizer__weight_decay=0.1)
    shearing = gated()
    optimizer = build_optimizer(optimizer_groups(shearing.model, shearing.masks.table, shearing.masks, cfg), cfg)
    before = copy.deepcopy(shearing.state_dict())
    for parameter in shearing.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    share = 1 - (0.1 * 1e-3 if name == "adamw" else 0.1)  # Composer's decay does not scale with the rate
    for key, value in shearing.state_dict().items():
        torch.testing.assert_close(value, before[key] * (share if key.startswith("model.") else 1.0))


@pytest.mark.parametrize("name", ["decoupled_adamw", "adamw", "muon"])
def test_closed_layers_survive_many_steps(lab, tmp_path, name):
    cfg = configured(lab, tmp_path, optimizer__name=name)
    shearing = gated()
    optimizer = build_optimizer(optimizer_groups(shearing.model, shearing.masks.table, shearing.masks, cfg), cfg)
    with torch.no_grad():
        shearing.masks.log_alpha["layer"].copy_(torch.tensor([4.5, -4.5, 4.5]))
    batch = {"input_ids": torch.randint(384, (2, 16))}
    before, closed = copy.deepcopy(shearing.state_dict()), 0
    for step in range(6):
        shearing.masks.step = step
        closed += shearing.masks.sample()["layer"][1].item() == 0
        shearing.loss(shearing(batch), batch).backward()
        assert all(parameter.grad is not None for parameter in shearing.parameters())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            shearing.masks.log_alpha["layer"].copy_(torch.tensor([4.5, -4.5, 4.5]))
    assert closed >= 5
    changed = {key for key, value in shearing.state_dict().items() if not torch.equal(value, before[key])}
    assert any("layers.0." in key for key in changed)
    if closed == 6:
        assert not [key for key in changed if "layers.1." in key]
    assert len(optimizer.state) == len(list(shearing.parameters()))


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("constant_with_warmup", [0, 0.5, 1, 1, 1]),
        ("linear_decay_with_warmup", [0, 0.5, 1, 0.7, 0.4]),
        ("cosine_with_warmup", [0, 0.5, 1, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.25]),
    ],
)
def test_schedules(lab, tmp_path, name, shares):
    """Warm-up of 2 batches, then from batch 2 to 5 down to a tenth."""
    cfg = configured(lab, tmp_path, scheduler__name=name, scheduler__t_warmup="2ba", max_duration="5ba")
    trainer, _ = trainer_of(configured(lab, tmp_path, save_folder=None))
    trainer.state.max_duration = Time.from_timestring("5ba")
    scheduler = build_scheduler(cfg)
    found = []
    for batch in range(5):
        trainer.state.timestamp = trainer.state.timestamp.copy(batch=batch)
        found.append(scheduler(trainer.state))
    trainer.close()
    assert found == pytest.approx(shares)


def test_autocast_is_asked_for_by_precision(lab, tmp_path):
    assert cpu_autocast(configured(lab, tmp_path), "cpu") is None
    half = configured(lab, tmp_path, precision="amp_bf16")
    assert cpu_autocast(half, "gpu") is None
    assert cpu_autocast(half, "cpu") in (None, torch.bfloat16)


# Runs ------------------------------------------------------------------------------------------------------------


def weights_of(folder):
    checkpoint = read_checkpoint(folder / "latest-rank0.pt")
    return {**checkpoint.weights, **checkpoint.masks}


def difference(one, other):
    assert one.keys() == other.keys()
    return max((one[key].double() - other[key].double()).abs().max().item() for key in one)


@pytest.fixture(scope="module")
def uninterrupted(lab, tmp_path_factory):
    """(folder, configuration) of 8 batches in one go, evaluated before the first."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    cfg = configured(lab, folder, eval_first=True, eval_interval="2ba")
    train(cfg)
    return folder / "run", cfg


def test_the_resolved_configuration_is_kept(uninterrupted):
    folder, cfg = uninterrupted
    assert load_config(folder / "config.yaml", []) == cfg
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 17  # nothing left to interpolate


def test_evaluation_before_the_first_step(uninterrupted, lab, tmp_path):
    folder, _ = uninterrupted
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines] == [0, 2, 4, 6, 8]
    assert all(set(line["domains"]) == set(NAMES) for line in lines)


def test_resumed_run_ends_where_an_uninterrupted_one_does(uninterrupted, lab, tmp_path):
    """Interrupted after batch 4 of 8, masks, mixture, optimizer and schedule go on as if nothing had happened."""
    folder, cfg = uninterrupted
    changes = {"autoresume": True, "eval_first": True, "eval_interval": "2ba"}

    class Stop(Callback):
        def batch_checkpoint(self, state, logger):
            if state.timestamp.batch.value == 7:  # batches and an evaluation after the checkpoint: that work is lost
                raise KeyboardInterrupt

    broken, _ = trainer_of(configured(lab, tmp_path, **changes))
    broken.state.callbacks.append(Stop())
    broken.eval()
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    broken.close()
    assert {path.name for path in (tmp_path / "run").glob("ep*.pt")} == {"ep0-ba4-rank0.pt"}
    resumed = train(configured(lab, tmp_path, **changes))
    assert resumed.state.timestamp.batch.value == 8
    assert difference(weights_of(tmp_path / "run"), weights_of(folder)) == 0
    lines = [(path / "evaluations.jsonl").read_text().splitlines() for path in (tmp_path / "run", folder)]
    assert lines[0] == lines[1]


def test_microbatches_do_not_change_a_run(lab, tmp_path):
    """A large eps keeps Adam from blowing up the rounding of gradients near 0."""
    changes = {"optimizer__eps": 1.0, "optimizer__lr": 0.1, "algorithms": {}}
    for size in (4, 1):
        train(configured(lab, tmp_path / str(size), device_train_microbatch_size=size, **changes))
    one, other = weights_of(tmp_path / "4" / "run"), weights_of(tmp_path / "1" / "run")
    assert difference(one, other) < 1e-5
    assert one["lambda_1.hidden"].abs() > 0.1


def test_seeds_decide(uninterrupted, lab, tmp_path):
    folder, _ = uninterrupted
    again = configured(lab, tmp_path / "again", eval_first=True, eval_interval="2ba")
    train(again)
    assert difference(weights_of(tmp_path / "again" / "run"), weights_of(folder)) == 0
    train(configured(lab, tmp_path / "other", eval_first=True, eval_interval="2ba", global_seed=18))
    assert difference(weights_of(tmp_path / "other" / "run"), weights_of(folder)) > 0.02


def test_total_sparsity_and_separate_layer_masks(lab, tmp_path):
    masks = {"target_sparsity": 0.5, "pruning_modules": ["head", "mlp", "head_layer", "hidden"]}
    trainer = train(configured(lab, tmp_path, model__l0_module=masks | {"lagrangian_warmup_steps": "0ba"}))
    assert set(trainer.state.model.masks.lambda_1) == {"total"}
    info = read_checkpoint(tmp_path / "run").info
    assert info.masks["target"] is None and info.masks["target_sparsity"] == 0.5


@pytest.mark.parametrize("follow", [True, False])
def test_masks_follow_the_schedule_or_not(lab, tmp_path, follow):
    rates = []

    class Watch(Callback):
        def before_forward(self, state, logger):
            rates.append([group["lr"] for group in state.optimizers[0].param_groups])

    cfg = configured(lab, tmp_path, optimizer__schedule_masks=follow, save_folder=None, scheduler__t_warmup="0ba")
    trainer, _ = trainer_of(cfg)
    trainer.state.callbacks.append(Watch())
    trainer.fit()
    trainer.close()
    shares = [weights / 1e-3 for weights, _, _ in rates]
    assert shares[0] == pytest.approx(1) and shares[-1] < 0.3
    for share, (_, masks, multipliers) in zip(shares, rates, strict=True):
        assert masks == multipliers == pytest.approx(0.5 * share if follow else 0.5)
