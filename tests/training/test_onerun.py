"""One run from source to compact model: what the separate commands give, at any moment that it is cut off."""

import dataclasses

import pytest
import torch
from composer import Callback
from helpers_faults import differences, equal, load_plain
from helpers_oracle import tiny_config
from helpers_runs import NAMES, TARGET, TARGET_HF, configured, settings, write_yaml
from transformers import AutoConfig, AutoModelForCausalLM

from llmshearing import train as train_module
from llmshearing.checkpoints.checkpoint import read_checkpoint
from llmshearing.checkpoints.folding import prune_and_save_model
from llmshearing.config import load_config
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.fold import fold, renamed, resolve
from llmshearing.fold.selection import load_selection
from llmshearing.masks.l0 import L0Masks, energy_norms
from llmshearing.prune.calibration import Calibration, SequenceOptions, spread
from llmshearing.prune.refit import refit
from llmshearing.prune.run import prune
from llmshearing.storage import write_torch_file
from llmshearing.train import train
from llmshearing.training import build, handover
from llmshearing.training.moments import cut_moment

L0 = "model__l0_module__"
FOLD = {f"{L0}fold_at": "4ba", f"{L0}lagrangian_warmup_steps": "2ba", "scheduler__t_max": "8ba"}
BEST = {
    **FOLD,
    "model__turn": {"samples": 9},
    f"{L0}start": "fisher",
    f"{L0}start_samples": 6,
    f"{L0}constraint": "exact",
    f"{L0}lagrangian_warmup_steps": "0ba",
    "autoresume": True,
    "save_interval": "3ba",
    "record_samples": True,
    "distill": {"hidden": 0.5},
}


class Stop(Callback):
    def __init__(self, batch):
        self.batch = batch

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == self.batch:
            raise KeyboardInterrupt


def same_weights(one, other, **tolerance):
    one, other = read_checkpoint(one).weights, read_checkpoint(other).weights
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 0, "atol": 0}))


def result(folder):
    """As `helpers_faults.Job.result`."""
    state = load_plain(folder / "latest-rank0.pt")["state"]
    return {
        "model": dict(state["model"]),
        "optimizer": state["optimizers"],
        "schedule": state["schedulers"],
        "mixture": state["dataset_state"]["train"],
        "evaluations": (folder / "evaluations.jsonl").read_text(),
        "samples": (folder / "samples-rank0.jsonl").read_text(),
        "batch": state["timestamp"]["Timestamp"]["batch"],
    }


@pytest.mark.parametrize("optimizer", ["decoupled_adamw", "muon"])
def test_it_is_the_separate_commands(lab, tmp_path, optimizer):
    changes = {**FOLD, "optimizer__name": optimizer, f"{L0}start": "activation", f"{L0}start_samples": 4}
    log = {"loggers__file_logger": {"filename": str(tmp_path / "log.txt"), "flush_interval": 1}}
    train(configured(lab, tmp_path / "one", **changes, **log))
    run = tmp_path / "one" / "run"
    names = sorted(path.name for path in run.glob("*.pt") if not path.is_symlink())
    assert names == ["ep0-ba4-rank0.pt", "ep0-ba8-rank0.pt", "pruned-ep0-ba4-rank0.pt"]
    assert (run / "pruned-ep0-ba4-rank0.selection.safetensors").is_file()
    text = (tmp_path / "log.txt").read_text()
    assert all(f"[metric][batch={batch}]: loss/train/cross_entropy" in text for batch in range(1, 9))

    # before: `train` alone
    alone = {**changes, f"{L0}fold_at": None, "max_duration": "4ba"}
    train(configured(lab, tmp_path / "two", **alone))
    one, two = (load_plain(tmp_path / name / "run" / "ep0-ba4-rank0.pt")["state"] for name in ("one", "two"))
    assert all(equal(one[key], two[key]) for key in ("model", "optimizers", "schedulers", "dataset_state"))

    # between: post_pruning_processing
    pruned = prune_and_save_model(tmp_path / "two" / "run")
    same_weights(run / "pruned-ep0-ba4-rank0.pt", pruned)
    assert read_checkpoint(pruned).info.hf_config == read_checkpoint(run / "pruned-ep0-ba4-rank0.pt").info.hf_config

    # after: `train` of the compact model, from the state that was handed over
    second = {"model__l0_module": None, "model__path": str(pruned), "optimizer__name": optimizer}
    second |= {"load_path": str(run / "pruned-ep0-ba4-rank0.pt"), "scheduler__t_max": "8ba"}
    train(configured(lab, tmp_path / "three", **second))
    one, two = (load_plain(tmp_path / name / "run" / "ep0-ba8-rank0.pt")["state"] for name in ("one", "three"))
    assert all(equal(one[key], two[key]) for key in ("model", "optimizers", "schedulers", "dataset_state"))
    info = read_checkpoint(run).info
    assert info.masks is None and {key: info.hf_config[key] for key in TARGET_HF} == TARGET_HF
    assert any("folded ep0-ba4-rank0.pt" in line for line in info.history)
    assert len(one["optimizers"][next(iter(one["optimizers"]))]["state"]) == len(one["model"])


def test_at_the_start_it_is_a_pruner_and_a_run(lab, tmp_path):
    """Chosen once, cut, trained: nothing of masks or optimizer is carried."""
    changes = {f"{L0}fold_at": "0ba", f"{L0}start": "fisher", f"{L0}start_samples": 6, "eval_first": True}
    changes |= {f"{L0}lagrangian_warmup_steps": "0ba", "max_duration": "4ba"}
    train(configured(lab, tmp_path / "one", **changes))
    sequences = SequenceOptions(samples=6, report_samples=2, batch_size=4)
    shape = {key: size for key, size in TARGET_HF.items() if key not in ("head_dim", "vocab_size")}
    prune("fisher", lab.source, tmp_path / "cut", shape, calibration=lab.data, sequences=sequences)
    second = {"model__l0_module": None, "model__path": str(tmp_path / "cut"), "max_duration": "4ba", "eval_first": True}
    train(configured(lab, tmp_path / "two", **second))
    same_weights(tmp_path / "one" / "run", tmp_path / "two" / "run", rtol=1e-3, atol=1e-5)
    one, two = (
        load_plain(tmp_path / name / "run" / "latest-rank0.pt")["state"]["optimizers"]["FusedDecoupledAdamW"]
        for name in ("one", "two")
    )
    assert one["state"].keys() == two["state"].keys()
    assert all(torch.equal(one["state"][name]["step"], two["state"][name]["step"]) for name in one["state"])


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(configured(lab, folder, **BEST))
    return folder / "run"


def test_turned_informed_exact_and_distilled(whole):
    """All of it at once; after the fold hidden states follow the selection of the run."""
    state = load_plain(whole / "latest-rank0.pt")["state"]
    assert {"FoldedInRun", "TurnedBasis"} <= state["callbacks"].keys()
    folded = handover.read_folded(whole / "ep0-ba8-rank0.pt")
    assert set(folded.selection.units) == {"hidden", "intermediate", "head"} and folded.selection.energy
    assert len(folded.selection.kept_layers(3)) == 2
    history = read_checkpoint(whole).info.history
    assert sum("folded" in line for line in history) == 1 and "turned hidden units" in history[0]


@pytest.mark.parametrize("stops", [(3,), (4,), (5, 7), ("handover", 6), ("evaluation",)])
def test_it_goes_on_from_any_moment(lab, tmp_path, whole, monkeypatch, stops):
    cfg = configured(lab, tmp_path, **BEST)
    original = build.build_callbacks
    for stop in stops:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if stop == "handover":
                patch.setattr(handover, "write_torch_file", _torn)
            else:
                batch = 4 if stop == "evaluation" else stop
                extra = InEvaluation(batch) if stop == "evaluation" else Stop(batch)
                patch.setattr(build, "build_callbacks", lambda *given, extra=extra: [extra, *original(*given)])
            train(cfg)
    train(cfg)
    assert differences(result(whole), result(tmp_path / "run")) == []
    trainer = train(cfg)  # it has ended: nothing to do
    assert trainer.state.timestamp.batch.value == 8


class InEvaluation(Callback):
    """What a signal within an evaluation does: saves, and ends the run."""

    def __init__(self, batch):
        self.batch = batch

    def eval_batch_end(self, state, logger):
        if state.timestamp.batch.value == self.batch:
            from llmshearing.training.resilience.stop import StopOnSignal

            stop = next(each for each in state.callbacks if isinstance(each, StopOnSignal))
            stop._within = True
            stop.saver.ensure(state, logger)
            raise KeyboardInterrupt


def _torn(path, values):
    write_torch_file(path.with_name("torn"), values)
    raise KeyboardInterrupt


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_moments_are_gradients_of_the_compact_model(family):
    """A momentum that is a gradient of the gated model folds into that of the compact one; autograd is the oracle."""
    more = {"num_local_experts": 2} if family == "mixtral" else {}
    config = tiny_config(num_key_value_heads=2) if family == "llama" else AutoConfig.for_model(
        family, vocab_size=23, hidden_size=12, num_attention_heads=4, num_key_value_heads=2, intermediate_size=10,
        num_hidden_layers=3, max_position_embeddings=32, pad_token_id=0, head_dim=4, tie_word_embeddings=False, **more,
    )  # fmt: skip
    table = table_for(config)
    model = AutoModelForCausalLM.from_config(config).double()
    target = {"hidden": 6, "intermediate": 5, "head": 1, "layer": 2}
    masks = L0Masks(table, [*target], target)
    generator = torch.Generator().manual_seed(1)
    for a in masks.double().log_alpha.values():
        a.data = torch.randn(a.shape, generator=generator, dtype=torch.float64)
    names = energy_norms(table)
    shares = torch.rand(len(names), 12, generator=generator, dtype=torch.float64)
    masks.count_energy(dict(zip(names, shares / shares.sum(-1, keepdim=True), strict=True)))
    gates = {kind: gate.detach() for kind, gate in masks.deterministic(to_target=True).items()}
    selection = masks.selection(gates)
    assert any((gate > 0).logical_and(gate < 1).any() for gate in gates.values())
    weights = {name: value.detach().requires_grad_() for name, value in model.state_dict(keep_vars=True).items()}
    small = fold(weights, table, selection)
    loss = torch.stack([value.square().sum() + value.sin().sum() for value in small.values()]).sum()
    theirs = dict(zip(small, torch.autograd.grad(loss, [*small.values()], retain_graph=True), strict=True))
    loss.backward()
    cuts = resolve(table, selection, folding=True)
    for name, new, _, _ in renamed(table, selection):
        moment = weights[name].grad
        torch.testing.assert_close(cut_moment(moment, cuts[name], 1), theirs[new], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(cut_moment(moment**2, cuts[name], 2), theirs[new] ** 2, rtol=1e-9, atol=1e-12)


def test_the_choice_alone_refitted(lab, tmp_path):
    """The source cut by what the masks chose and fitted to the source, whatever the weights learned until then."""
    more = {f"{L0}refit": True, f"{L0}refit_samples": 12, "max_duration": "5ba", "optimizer__lr": 0.05}
    trainer = train(configured(lab, tmp_path, **{**FOLD, **more}))
    run = tmp_path / "run"
    selection, _ = load_selection(run / "pruned-ep0-ba4-rank0.selection.safetensors")
    assert all(units.gate is None for rows in selection.units.values() for units in rows)
    source = AutoModelForCausalLM.from_pretrained(lab.source).eval()
    compact = AutoModelForCausalLM.from_config(read_checkpoint(run).info.config).eval()
    cut = fold(source.state_dict(), table_for(source.config), selection)
    compact.load_state_dict(cut)
    ids, _ = spread(trainer.state.train_dataloader.dataset.streams, 12)
    assert refit(source, compact, table_for(source.config), selection, Calibration(ids, ids, "a", "b", 4)).kept
    state = load_plain(run / "pruned-ep0-ba4-rank0.pt")["state"]
    for name, value in compact.state_dict().items():
        torch.testing.assert_close(state["model"][f"model.{name}"], value, rtol=1e-3, atol=1e-4)
    assert any((value - cut[name]).abs().max() > 1e-3 for name, value in compact.state_dict().items())
    [optimizer] = state["optimizers"].values()
    assert all(not value.any() for entry in optimizer["state"].values() for value in entry.values())


# What is refused -------------------------------------------------------------------------------------------------


def test_all_that_stands_against_it_comes_at_once(lab, tmp_path):
    made = settings(lab, None, **{f"{L0}fold_at": "8ba", f"{L0}lagrangian_warmup_steps": "9ba", "autoresume": False})
    made["model"]["l0_module"] |= {"target_model": None, "target_sparsity": 0.5}
    with pytest.raises(ShearingError) as error:
        load_config(write_yaml(tmp_path / "run.yaml", made), [])
    text = str(error.value)
    for part in (
        "fold_at = 8ba is before the warm-up's end",
        "fold_at = 8ba is not before max_duration = 8ba",
        "fold_at = 8ba without model.l0_module.target_model",
        "missing key save_folder: model.l0_module.fold_at",
    ):
        assert part in text, part


def test_refit_is_of_the_fold(lab, tmp_path):
    made = settings(lab, tmp_path, **{f"{L0}refit": True})
    with pytest.raises(ShearingError, match=r"refit = true without model\.l0_module\.fold_at"):
        load_config(write_yaml(tmp_path / "run.yaml", made), [])


def test_nothing_is_chosen_at_the_start(lab, tmp_path):
    made = settings(lab, tmp_path, **{f"{L0}fold_at": "0ba", f"{L0}lagrangian_warmup_steps": "0ba"})
    made["fsdp_config"] = {"state_dict_type": "sharded"}
    with pytest.raises(ShearingError) as error:
        load_config(write_yaml(tmp_path / "run.yaml", made), [])
    assert "fold_at = 0ba with model.l0_module.start = open" in str(error.value)
    assert "fsdp_config.state_dict_type = sharded" in str(error.value)


def test_hidden_states_of_another_basis(lab, tmp_path):
    made = settings(lab, tmp_path, **{**BEST, "distill": {"hidden": 1.0, "teacher": "another"}})
    with pytest.raises(ShearingError, match=r"distill\.teacher = another with model\.turn: .* of another basis"):
        load_config(write_yaml(tmp_path / "run.yaml", made), [])


def test_the_warmup_follows_the_stage(lab, tmp_path):
    cfg = configured(lab, tmp_path, **{f"{L0}fold_at": "5ba", f"{L0}lagrangian_warmup_steps": None})
    assert cfg.model.l0_module.lagrangian_warmup_steps == "1ba"


def test_a_run_that_folded_by_itself_is_no_other_run(lab, tmp_path, whole):
    """Its folder is not gone on with by a run without fold_at, nor by one that was never folded."""
    cfg = configured(lab, whole.parent / "again", **{**BEST, f"{L0}fold_at": None, "save_folder": str(whole)})
    with pytest.raises(ShearingError, match="is of another run"):
        train(cfg)


def test_a_damaged_last_checkpoint_with_masks(lab, tmp_path):
    """It is not folded: the one before is gone on with."""
    cfg = configured(lab, tmp_path, **{**FOLD, "autoresume": True, "save_interval": "3ba", "max_duration": "5ba"})
    train(cfg)
    run = tmp_path / "run"
    for name in ("ep0-ba5-rank0.pt", "ep0-ba4-rank0.pt"):
        data = bytearray((run / name).read_bytes())
        data[len(data) // 2] ^= 255
        (run / name).write_bytes(data)
    train(cfg)
    assert (run / "ep0-ba4-rank0.pt.damaged").is_file() and read_checkpoint(run).info.masks is None


def test_the_dry_run_tells(lab, tmp_path, capsys):
    made = settings(lab, tmp_path / "run", **BEST)
    assert train_module.main([str(write_yaml(tmp_path / "run.yaml", made)), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "turn    hidden units by energy, from 9 sequences" in text and "fold    at 4ba, inside the run" in text
    assert len(NAMES) == 3 and dataclasses.is_dataclass(handover.Folded) and TARGET["n_layers"] == 2
