"""`model.turn`: what a run turns is what the command turns; once; and norms then count energy, gated as folded."""

import dataclasses

import pytest
import torch
from composer import Callback
from helpers_oracle import random_model, tiny_config, wide_softmax
from helpers_runs import SHAPE, VOCAB, configured, make_model, settings, trainer_of, write_yaml
from transformers import AutoConfig, AutoModelForCausalLM

from llmshearing.checkpoints.checkpoint import load_masks, read_checkpoint
from llmshearing.checkpoints.folding import fold_checkpoint, prune_and_save_model
from llmshearing.config import load_config
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.nonuniform.config import config_of
from llmshearing.fold.fold import fold, folded_config
from llmshearing.fold.gating import attach
from llmshearing.masks.l0 import L0Masks, energy_norms
from llmshearing.prune.calibration import SequenceOptions
from llmshearing.prune.run import prune
from llmshearing.storage import open_archive
from llmshearing.train import train
from llmshearing.training import turning
from llmshearing.training.distillation import build_teacher
from llmshearing.training.source import read_source

TURN = {"model__turn": {"samples": 9}}
L0 = "model__l0_module__"


class Stop(Callback):
    def __init__(self, batch):
        self.batch = batch

    def batch_checkpoint(self, state, logger):
        if state.timestamp.batch.value == self.batch:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("tied", "basis"), [(False, "energy"), (True, "energy"), (False, "output")])
def test_a_run_turns_as_the_command_does(lab, tmp_path, tied, basis):
    path = lab.source
    if tied:
        path = tmp_path / "tied"
        make_model(initializer_range=0.1, tie_word_embeddings=True).save_pretrained(path)
    sequences = SequenceOptions(samples=9, report_samples=2, batch_size=4)
    output = {"basis": "output", "keep": 20} if basis == "output" else {}
    prune("turn", path, tmp_path / "turned", {}, calibration=lab.data, sequences=sequences, untie=tied, **output)
    turn = {"samples": 9, "untie": tied, "basis": basis}
    cfg = configured(lab, tmp_path, model__path=str(path), model__turn=turn, save_folder=None)
    trainer, _ = trainer_of(cfg)
    command = AutoModelForCausalLM.from_pretrained(tmp_path / "turned")
    ours, theirs = trainer.state.model.model.state_dict(), command.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
    assert trainer.state.model.model.config.tie_word_embeddings is False
    masks = trainer.state.model.masks
    assert masks.energy.shape == (7, 32) and torch.allclose(masks.energy.sum(-1), torch.ones(7))
    if basis == "energy":
        assert (masks.energy.sum(0).diff()[:8] < 1e-3).all()  # the first directions carry most
    else:
        assert trainer.state.model.model.config.hidden_units_by_order is True
    trainer.close()


def test_the_source_is_turned_once_and_resumes_to_the_same_bits(lab, tmp_path, monkeypatch):
    changes = {**TURN, f"{L0}start": "fisher", f"{L0}start_samples": 6, f"{L0}constraint": "exact", "autoresume": True}
    changes |= {f"{L0}lagrangian_warmup_steps": None, "distill": {}, "max_duration": "6ba"}
    train(configured(lab, tmp_path / "whole", **changes))
    broken, _ = trainer_of(configured(lab, tmp_path / "parts", **changes))
    broken.state.callbacks.append(Stop(5))
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    broken.close()
    monkeypatch.setattr(turning, "find_basis", lambda *_, **__: pytest.fail("turned again"))
    train(configured(lab, tmp_path / "parts", **changes))
    one, other = (read_checkpoint(tmp_path / name / "run") for name in ("whole", "parts"))
    for part in ("weights", "masks"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert one.masks["energy"].shape == (7, 32) and load_masks(one).energy is not None
    assert "turned hidden units into directions by energy" in one.info.history
    basis = open_archive(one.path).subtree("state", "callbacks", "TurnedBasis")["basis"].make()
    assert (basis.T @ basis - torch.eye(32, dtype=torch.float64)).abs().max() < 1e-12

    # the teacher is the source, turned as the student was
    cfg = configured(lab, tmp_path / "other", **changes)
    source = dataclasses.replace(read_source(cfg), basis=basis)
    ids = torch.arange(20).view(2, 10)
    model, own = build_teacher(cfg, source).model, AutoModelForCausalLM.from_pretrained(lab.source)
    assert (model(ids).logits - own(ids).logits).abs().max() < 1e-4
    moved = own.model.embed_tokens.weight - model.model.embed_tokens.weight
    assert (model.model.norm.weight == 1).all() and moved.abs().max() > 0.1

    # and the checkpoint's fold counts energy as the run did
    folded, _, selection = fold_checkpoint(one)
    assert set(selection.energy) == set(energy_norms(one.table))
    assert not torch.allclose(folded["model.norm.weight"], folded["model.norm.weight"].mean().expand(20))
    prune_and_save_model(tmp_path / "whole" / "run")


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "gemma2"])
@pytest.mark.parametrize("round_to", [1, 4])
def test_gated_is_folded_where_norms_count_energy(family, round_to):
    """Soft gates, in float64; the fold knows no rounding, whose units are closed."""
    more = {"num_local_experts": 2} if family == "mixtral" else {}
    config = tiny_config(num_key_value_heads=2) if family == "llama" else AutoConfig.for_model(
        family, vocab_size=23, hidden_size=12, num_attention_heads=4, num_key_value_heads=2, intermediate_size=10,
        num_hidden_layers=3, max_position_embeddings=32, pad_token_id=0, head_dim=4, tie_word_embeddings=False,
        attn_implementation="eager", sliding_window=4, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = random_model(config) if family == "llama" else AutoModelForCausalLM.from_config(config).double().eval()
    table = table_for(config)
    masks = L0Masks(table, ["hidden", "intermediate", "head"], {"hidden": 6, "intermediate": 5, "head": 1}, noise=0.5)
    masks = masks.double()
    generator = torch.Generator().manual_seed(1)
    for a in masks.log_alpha.values():
        a.data = torch.randn(a.shape, generator=generator, dtype=torch.float64)
    names = energy_norms(table)
    assert len(names) == (13 if family == "gemma2" else 7)
    shares = torch.rand(len(names), 12, generator=generator, dtype=torch.float64) ** 4
    masks.count_energy(dict(zip(names, shares / shares.sum(-1, keepdim=True), strict=True)))
    gates = masks.sample()
    selection = masks.selection(gates)
    small = AutoModelForCausalLM.from_config(config_of(folded_config(config.to_dict(), table, selection))).double()
    with torch.no_grad():
        small.load_state_dict(fold(model.state_dict(), table, selection), strict=True)
    attach(small.eval(), table_for(small.config))  # whole: as transformers has it, but that norms keep the wider type
    ids = torch.arange(14).view(2, 7)
    gating = attach(model, table)
    gating.set(masks.selection(gates, round_to))
    with torch.no_grad(), wide_softmax():
        gated, folded = model(ids, use_cache=False).logits, small(ids, use_cache=False).logits
        gating.set(dataclasses.replace(selection, energy={}))
        units = model(ids, use_cache=False).logits
    assert (gated - folded).abs().max() < 1e-10 and (gated - units).abs().max() > 1e-3


def test_norms_may_count_units_all_the_same(lab, tmp_path):
    for norms, start, known in (("units", "activation", False), ("energy", "open", True), ("auto", "open", False)):
        options = {f"{L0}norms": norms, f"{L0}start": start, f"{L0}start_samples": 4, "save_folder": None}
        trainer, _ = trainer_of(configured(lab, tmp_path, **options))
        assert (trainer.state.model.masks.energy is not None) == known
        trainer.close()


# What is refused -------------------------------------------------------------------------------------------------


def test_all_that_stands_against_turning_comes_at_once(lab, tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    cfg = configured(lab, tmp_path, model__path=str(tmp_path / "tied"), model__turn={"samples": 0 + 1}, max_seq_len=16)
    cfg.model.l0_module.target_model.n_layers = 9
    with pytest.raises(ShearingError) as error:
        read_source(cfg)
    text = str(error.value)
    assert "n_layers = 9 is larger" in text and "Say model.turn.untie=true" in text and "Say --untie" not in text
    assert (
        "model.turn.samples = 1 of max_seq_len = 16: 16 tokens cannot tell 32 directions apart; give at least 2" in text
    )


def test_layer_norms_are_refused(lab, tmp_path):
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=3
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "neox")
    cfg = configured(lab, tmp_path, model__path=str(tmp_path / "neox"), **TURN)
    with pytest.raises(ShearingError, match=r"model\.turn: hidden units of the gpt_neox family .* subtract the mean"):
        read_source(cfg)


def test_a_run_that_was_not_turned(lab, tmp_path):
    train(configured(lab, tmp_path, max_duration="3ba"))
    with pytest.raises(ShearingError, match="of a run that did not turn its source"):
        trainer_of(configured(lab, tmp_path, max_duration="4ba", autoresume=True, **TURN))


def test_a_file_of_hidden_units_belongs_to_another_basis(lab, tmp_path):
    train(configured(lab, tmp_path, max_duration="1ba", **{f"{L0}lagrangian_warmup_steps": "0ba"}))
    compact = prune_and_save_model(tmp_path / "run")
    file = compact.with_suffix(".selection.safetensors")
    cfg = configured(lab, tmp_path / "b", save_folder=None, **TURN, **{f"{L0}start": str(file)})
    with pytest.raises(ShearingError, match=r"model\.turn makes others"):
        trainer_of(cfg)


def test_unknown_keys(lab, tmp_path):
    made = settings(lab, None, model__turn={"samples": 0, "basis": "fourier"})
    with pytest.raises(ShearingError) as error:
        load_config(write_yaml(tmp_path / "run.yaml", made), [])
    assert "model.turn.samples" in str(error.value) and "model.turn.basis" in str(error.value)
    assert SHAPE["hidden_size"] == 32
