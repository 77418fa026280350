"""The fold of a pruning run's checkpoint: exact target shape, the same function, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmshearing.checkpoints import build_model, checkpoint_to_hf, prune_and_save_model
from llmshearing.checkpoints.checkpoint import load_masks, read_checkpoint, save_checkpoint
from llmshearing.errors import ShearingError
from llmshearing.fold.gating import attach
from llmshearing.fold.selection import load_selection
from llmshearing.masks.l0 import L0Masks

IDS = torch.arange(40).view(2, 20) % 53


def log_probabilities(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)


@pytest.mark.parametrize("head_mode", ["group", "query"])
def test_folded_model_is_the_gated_source(write_pruning: Callable, case: str, head_mode: str) -> None:
    if case == "mha" and head_mode == "query":
        pytest.skip("one query head a group: nothing to cut inside")
    path, model, masks = write_pruning(case, head_mode=head_mode, dtype=torch.float64)
    folded = read_checkpoint(prune_and_save_model(path))
    config = folded.info.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (20, 24, 3)
    groups = model.config.num_key_value_heads
    expected = (groups, groups) if head_mode == "query" else (4 // groups, 1)
    assert (config.num_attention_heads, config.num_key_value_heads) == expected
    assert config.head_dim == model.config.head_dim and config.rope_scaling == model.config.rope_scaling
    assert not folded.masks and folded.info.masks is None

    selection, about = load_selection(path.with_name("pruned-latest-rank0.selection.safetensors"))
    assert about["history"] == folded.info.history and len(folded.info.history) == 2
    compact = build_model(folded.weights, config)
    attach(compact, folded.table).set(None)  # both sides with the norm that keeps float64
    gating = attach(model, masks.table)
    gating.set(selection)
    torch.testing.assert_close(log_probabilities(compact), log_probabilities(model), rtol=0, atol=1e-10)
    assert compact.num_parameters() == folded.table.count()


def test_folded_model_loads_in_transformers(
    tmp_path: Path, write_pruning: Callable, command: Callable, main: Callable
) -> None:
    """The seeds' commands, from the pruning run to a directory that transformers loads."""
    path, model, masks = write_pruning()
    folding = command("post_pruning_processing", "prune_and_save_model", path)
    assert folding.returncode == 0, folding.stderr
    pruned = path.with_name("pruned-latest-rank0.pt")
    last = folding.stderr.strip().splitlines()[-1]
    assert str(pruned) in last and f"{read_checkpoint(pruned).table.count():,}" in last
    keys = ["model_class=LlamaForCausalLM", "hidden_size=20", "num_attention_heads=2", "num_hidden_layers=3"]
    keys += ["intermediate_size=24", "num_key_value_heads=1", "_name_or_path=Sheared"]
    result = main("composer_to_hf", pruned, tmp_path / "hf", *keys)
    assert result.returncode == 0, result.stderr
    assert "has no tokenizer" in result.stderr

    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    gating = attach(model, masks.table)
    gating.set(masks.selection(masks.deterministic(to_target=True)))
    torch.testing.assert_close(log_probabilities(loaded), log_probabilities(model), rtol=0, atol=1e-4)


def sized_by(numbers: dict[str, list[int]]) -> Callable[[L0Masks], None]:
    """Open the first units of each layer, so many as given."""

    def edit(masks: L0Masks) -> None:
        for kind, sizes in numbers.items():
            for layer, size in enumerate(sizes):
                masks.log_alpha[kind][layer] = -4.5
                masks.log_alpha[kind][layer, :size] = 4.5

    return edit


def test_without_a_target_shape_layers_are_levelled_or_refused(write_pruning: Callable) -> None:
    edit = sized_by({"intermediate": [10, 20, 20, 30]})
    path, _, _ = write_pruning(target=None, kinds=["intermediate"], edit=edit)
    with pytest.raises(ShearingError, match=r"layer 0: \d+, layer 1.*--uniform"):
        prune_and_save_model(path)
    assert [item.name for item in path.parent.iterdir()] == ["latest-rank0.pt"]
    config = read_checkpoint(prune_and_save_model(path, uniform=True)).info.config
    # 20 units on average; a closed one still counts 0.06 in the expected size.
    assert 20 <= config.intermediate_size <= 22


def test_masks_that_agree_need_no_levelling(write_pruning: Callable) -> None:
    def some(masks: L0Masks) -> None:  # transformers 5 wants a multiple of the 4 heads
        masks.log_alpha["hidden"].fill_(-4.5)[:24] = 4.5

    path, _, masks = write_pruning(target=None, kinds=["hidden"], edit=some)
    kept = int(masks.deterministic(False)["hidden"].ne(0).sum())
    assert read_checkpoint(prune_and_save_model(path)).info.config.hidden_size == kept == 24


def test_half_a_layer_is_refused_by_name_or_written_as_zeros(write_pruning: Callable) -> None:
    def disagree(masks: L0Masks) -> None:
        masks.log_alpha["head_layer"].copy_(torch.tensor([4.0, 3.0, 2.0, -4.0]))
        masks.log_alpha["mlp"].copy_(torch.tensor([4.0, -4.0, 2.0, 3.0]))

    target = {"head_layer": 3, "mlp": 3, "hidden": 20}
    path, model, masks = write_pruning("mha", target, dtype=torch.float64, edit=disagree)
    with pytest.raises(ShearingError, match="layer 1: its mlp block is closed.*layer 3: its attention block is closed"):
        prune_and_save_model(path)
    folded = read_checkpoint(prune_and_save_model(path, zero_closed_blocks=True))
    assert folded.info.config.num_hidden_layers == 4
    attach(compact := build_model(folded.weights, folded.info.config), folded.table).set(None)
    attach(model, masks.table).set(masks.selection(masks.deterministic(to_target=True)))
    torch.testing.assert_close(log_probabilities(compact), log_probabilities(model), rtol=0, atol=1e-10)


def test_a_shape_that_contradicts_the_checkpoint_names_both(write_pruning: Callable, main: Callable) -> None:
    path, _, _ = write_pruning()
    result = main("post_pruning_processing", "prune_and_save_model", path, "hidden_size=24", "num_hidden_layers=3")
    assert result.returncode == 1
    assert "hidden_size=24 was given" in result.stderr and "hidden_size=20" in result.stderr
    assert "num_hidden_layers" not in result.stderr and "Traceback" not in result.stderr
    assert [item.name for item in path.parent.iterdir()] == ["latest-rank0.pt"]


def test_a_checkpoint_without_masks_is_refused(write_pruning: Callable, main: Callable) -> None:
    path, _, _ = write_pruning()
    checkpoint = read_checkpoint(path)
    plain = save_checkpoint(path.with_name("plain.pt"), checkpoint.weights, replace(checkpoint.info, masks=None))
    result = main("post_pruning_processing", "prune_and_save_model", plain)
    assert result.returncode == 1 and "checkpoint without masks" in result.stderr
    assert "Traceback" not in result.stderr


def test_output_and_directory_arguments(tmp_path: Path, write_pruning: Callable, source: Path) -> None:
    path, _, _ = write_pruning(tokenizer=str(source), generation_config={"temperature": 0.5, "do_sample": True})
    output = prune_and_save_model(path.parent, tmp_path / "deep" / "compact.pt", {"intermediate_size": 24})
    assert output == tmp_path / "deep" / "compact.pt"
    with pytest.raises(ShearingError, match="exists; give another name, or --overwrite"):
        prune_and_save_model(path, output)
    prune_and_save_model(path, output, overwrite=True)
    assert (checkpoint_to_hf(output, tmp_path / "hf") / "tokenizer.json").is_file()


def test_fold_is_the_same_on_every_call(write_pruning: Callable) -> None:
    path, _, _ = write_pruning()
    one, two = (read_checkpoint(prune_and_save_model(path, path.with_name(name))) for name in ("a.pt", "b.pt"))
    assert all(torch.equal(value, two.weights[name]) for name, value in one.weights.items())
    assert load_masks(read_checkpoint(path)).target is not None
