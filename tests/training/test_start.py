"""Runs whose masks start informed and stay on target: files, methods, resuming, folding; and what is refused."""

import pytest
import torch
from composer import Callback
from helpers_runs import TARGET_HF, configured, make_model, run, settings, trainer_of, write_yaml
from safetensors.torch import load_file

from llmshearing.checkpoints.checkpoint import load_masks, read_checkpoint
from llmshearing.checkpoints.folding import prune_and_save_model
from llmshearing.errors import ShearingError
from llmshearing.fold.selection import load_selection
from llmshearing.masks import hard_concrete as hc
from llmshearing.train import main, train
from llmshearing.training.resilience.resume import check_files
from llmshearing.training.source import read_source
from llmshearing.training.start import choose

SHAPE = {key: TARGET_HF[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")}
SHAPE |= {key: TARGET_HF[key] for key in ("intermediate_size", "num_hidden_layers")}


class OnTarget(Callback):
    """Before every forward pass: how far the rows' expected open units are from the target of now."""

    def __init__(self):
        self.gaps, self.groups = [], []

    def before_forward(self, state, logger):
        masks = state.model.masks
        for kind, target in masks.targets_now().items():
            size = masks.row_size(kind)
            found = hc.probability_open(masks.rows(kind, masks.log_alpha[kind].detach().double())).sum(-1)
            self.gaps.append((found - size * (1 - target)).abs().max().item())
        self.groups = [group["name"] for group in state.optimizers[0].param_groups]


def masks_config(**changes):
    return {f"model__l0_module__{key}": value for key, value in changes.items()}


def weights_of(folder):
    checkpoint = read_checkpoint(folder / "latest-rank0.pt")
    return {**checkpoint.weights, **checkpoint.masks}


@pytest.fixture(scope="module")
def selection(lab, tmp_path_factory):
    """selection.safetensors as the users' command writes it."""
    output = tmp_path_factory.mktemp("pruned") / "activation"
    sizes = ["--target", *(f"{key}={size}" for key, size in SHAPE.items())]
    done = run(
        "python3", "-m", "llmshearing.prune", "activation", "--model", lab.source, "--output", output,
        "--calibration", lab.data, "--samples", 8, "--report_samples", 4, *sizes,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output / "selection.safetensors"


def test_exact_run_is_on_target_at_every_step_and_resumes_to_the_same_bits(lab, tmp_path, selection):
    changes = masks_config(constraint="exact", noise=0.3, start=str(selection), lagrangian_warmup_steps=None)
    changes |= {"optimizer__lag_lr": 0.2, "autoresume": True}
    cfg = configured(lab, tmp_path / "whole", **changes)
    trainer, memory = trainer_of(cfg)
    watch = OnTarget()
    trainer.state.callbacks.append(watch)
    trainer.fit()
    trainer.close()
    assert len(watch.gaps) == 4 * 8 and max(watch.gaps) < 1e-4  # float32 log alphas
    assert watch.groups == ["weights", "masks"]
    assert not any("lambda" in name or "lagrangian" in name for name in memory.data)
    expected, wanted = (memory.data[f"pruning/{name}_sparsity/hidden"] for name in ("expected", "target"))
    assert [value for _, value in expected] == pytest.approx([value for _, value in wanted], abs=1e-5)

    class Stop(Callback):
        def batch_checkpoint(self, state, logger):
            if state.timestamp.batch.value == 6:
                raise KeyboardInterrupt

    broken, _ = trainer_of(configured(lab, tmp_path / "parts", **changes))
    broken.state.callbacks.append(Stop())
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    broken.close()
    # going on needs no start file: what it said is in the masks
    gone = selection.with_name("moved.safetensors")
    selection.rename(gone)
    try:
        train(configured(lab, tmp_path / "parts", **changes))
        with pytest.raises(ShearingError, match="no such method or file"):  # a run that begins does
            train(configured(lab, tmp_path / "third", **changes))
    finally:
        gone.rename(selection)
    one, other = weights_of(tmp_path / "whole" / "run"), weights_of(tmp_path / "parts" / "run")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    # the checkpoint tells the masks' options, and folds to the target
    masks = load_masks(read_checkpoint(tmp_path / "whole" / "run"))
    assert (masks.constraint, masks.noise, len(masks.lambda_1)) == ("exact", 0.3, 0)
    folded = read_checkpoint(prune_and_save_model(tmp_path / "whole" / "run"))
    assert {key: folded.info.hf_config[key] for key in SHAPE} == SHAPE


def test_a_checkpoint_from_before_the_options(lab, tmp_path):
    train(configured(lab, tmp_path, max_duration="1ba", **masks_config(lagrangian_warmup_steps="0ba")))
    checkpoint = read_checkpoint(tmp_path / "run")
    del checkpoint.info.masks["constraint"], checkpoint.info.masks["noise"]
    masks = load_masks(checkpoint)
    assert (masks.constraint, masks.noise) == ("lagrangian", 1.0)


def test_ramp_of_an_exact_run(lab, tmp_path):
    """Without information the target rises over the warm-up, and every batch's rows expect the one of that batch."""
    cfg = configured(lab, tmp_path, save_folder=None, **masks_config(constraint="exact", start_sparsity=0.05))
    trainer, _ = trainer_of(cfg)
    watch = OnTarget()
    trainer.state.callbacks.append(watch)
    trainer.fit()
    trainer.close()
    assert max(watch.gaps) < 1e-4


@pytest.mark.parametrize("name", ["activation", "obs"])
def test_a_method_starts_the_masks_as_it_would_prune(lab, tmp_path, name):
    """What the masks then select is what the method chooses on the same sequences; the source's weights stay."""
    sizes = {"n_heads": 2, "intermediate_size": 28}
    if name == "activation":
        sizes |= {"d_model": 20, "n_layers": 2}
    options = {"target_model": sizes, "start": name, "start_samples": 9, "pruning_modules": ["head", "intermediate"]}
    options["pruning_modules"] += ["hidden", "layer"] if name == "activation" else []
    cfg = configured(lab, tmp_path, save_folder=None, **masks_config(**options, lagrangian_warmup_steps=None))
    assert cfg.model.l0_module.lagrangian_warmup_steps == "0ba"
    trainer, _ = trainer_of(cfg)
    model = trainer.state.model
    source = read_source(cfg)
    choice = choose(name, source, cfg, trainer.state.train_dataloader.dataset, "cpu", 9)
    found = model.masks.selection(model.masks.deterministic(to_target=True))
    for kind, rows in choice.selection.units.items():
        assert [units.numbers for units in found.units[kind]] == [units.numbers for units in rows], kind
    assert found.kept_layers(3) == choice.selection.kept_layers(3)
    for kind, a in model.masks.log_alpha.items():
        rows = hc.probability_open(model.masks.rows(kind, a.detach().double())).sum(-1)
        assert (rows - model.masks.target[kind]).abs().max() < 1e-4
    stored = load_file(lab.source / "model.safetensors")
    state = model.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in stored.items())
    trainer.close()


def test_going_on_does_not_choose_again(lab, tmp_path, monkeypatch):
    changes = {**masks_config(start="activation", start_samples=4), "autoresume": True, "max_duration": "4ba"}
    train(configured(lab, tmp_path, **changes))
    monkeypatch.setattr("llmshearing.training.start.choose", lambda *_: pytest.fail("chose again"))
    trainer = train(configured(lab, tmp_path, **{**changes, "max_duration": "6ba"}))
    assert trainer.state.timestamp.batch.value == 6
    # and a checkpoint given as load_path brings its own masks
    given = {key: value for key, value in changes.items() if key != "autoresume"}
    path = tmp_path / "run" / "ep0-ba4-rank0.pt"
    other = configured(lab, tmp_path / "other", **given, load_path=str(path), load_weights_only=True, save_folder=None)
    trainer, _ = trainer_of(other)
    masks = read_checkpoint(path).masks
    state = trainer.state.model.masks.state_dict()
    assert all(torch.equal(state[name], value) for name, value in masks.items())
    trainer.close()


def test_a_file_starts_what_it_selects(lab, tmp_path, selection):
    cfg = configured(lab, tmp_path, save_folder=None, **masks_config(start=str(selection), start_spread=0.7))
    trainer, _ = trainer_of(cfg)
    masks = trainer.state.model.masks
    chosen, about = load_selection(selection)
    found = masks.selection(masks.deterministic(to_target=True))
    for kind, rows in chosen.units.items():
        assert [units.numbers for units in found.units[kind]] == [units.numbers for units in rows], kind
    assert masks.log_alpha["hidden"].unique().numel() == 32  # by the scores that the file tells
    assert cfg.model.l0_module.lagrangian_warmup_steps == "3ba"  # asked for, so it is kept
    trainer.close()


# What is refused -------------------------------------------------------------------------------------------------


def test_another_target_than_the_files(lab, tmp_path, selection):
    changes = masks_config(start=str(selection), target_model={"d_model": 16, "n_heads": 2, "n_layers": 2})
    changes |= masks_config(pruning_modules=["hidden", "head", "layer"])
    with pytest.raises(ShearingError) as error:
        trainer_of(configured(lab, tmp_path, **changes))
    text = str(error.value)
    assert text.startswith(f"model.l0_module.start = {selection}: it cuts intermediate, of which there is no mask")
    assert "hidden: it keeps 20 of 32, the target is 16" in text


def test_another_models_file(lab, tmp_path, selection):
    make_model(num_hidden_layers=5, initializer_range=0.1).save_pretrained(tmp_path / "deeper")
    cfg = configured(lab, tmp_path, model__path=str(tmp_path / "deeper"), **masks_config(start=str(selection)))
    cfg.tokenizer_name = str(lab.source)
    with pytest.raises(ShearingError, match="does not fit the model(.|\n)*units of 3 layers, the model needs 5"):
        trainer_of(cfg)


@pytest.mark.parametrize(
    ("start", "say"),
    [
        ("magnitude", "no such method or file; give open, a method .random, activation"),
        ("there/is/none.safetensors", "no such method or file"),
        ("vocabulary", "method vocabulary does not change"),
        ("obs", "method obs does not change hidden_size"),
    ],
)
def test_starts_that_cannot_be(lab, tmp_path, start, say):
    cfg = configured(lab, tmp_path, **masks_config(start=start))
    with pytest.raises(ShearingError, match=f"model.l0_module.start = {start}: .*{say}"):
        trainer_of(cfg)
    assert not (tmp_path / "run").exists()


def test_a_damaged_file(lab, tmp_path, selection):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(selection.read_bytes()[:-40])
    with pytest.raises(ShearingError, match="model.l0_module.start = .*cannot be read"):
        trainer_of(configured(lab, tmp_path, **masks_config(start=str(broken))))
    broken.write_text("{}")
    with pytest.raises(ShearingError, match="cannot be read"):
        trainer_of(configured(lab, tmp_path, **masks_config(start=str(broken))))


def test_a_method_needs_a_shape(lab, tmp_path):
    changes = masks_config(target_model=None, target_sparsity=0.5, start="activation")
    with pytest.raises(ShearingError, match="a method chooses for a shape; give target_model"):
        check_files(configured(lab, tmp_path, **changes))


def test_the_command_names_the_key(lab, tmp_path, caplog):
    path = write_yaml(tmp_path / "run.yaml", settings(lab, tmp_path / "run", model__l0_module__start="fishr"))
    for words in ([str(path)], [str(path), "--dry-run"]):
        caplog.clear()
        assert main(words) != 0
        assert "model.l0_module.start = fishr: no such method or file" in caplog.text
