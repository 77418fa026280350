"""A sharded checkpoint is folded and converted like the file with the same state."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_storage import save_sharded
from transformers import AutoModelForCausalLM

from llmshearing.checkpoints import compare, hf_to_checkpoint, prune_and_save_model
from llmshearing.checkpoints.checkpoint import checkpoint_file, is_checkpoint, read_checkpoint
from llmshearing.errors import ShearingError


def sharded(path: Path, folder: Path, ranks: int) -> Path:
    """As Composer saves under FSDP 2: the folder of a batch, and `latest` that leads to it."""
    save_sharded(folder, torch.load(path, weights_only=True), ranks)
    (folder.parent / "latest-rank0.pt").symlink_to(folder.name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("case", "ranks"), [("gqa", 2), ("tied", 1)])
def test_it_folds_to_the_same_bits(tmp_path: Path, write_pruning: Callable, case: str, ranks: int) -> None:
    path, model, _ = write_pruning(case, dtype=torch.bfloat16)
    run = sharded(path, tmp_path / "fsdp" / "ep0-ba3", ranks).parent
    expected = read_checkpoint(prune_and_save_model(path))
    for source in (run, run / "ep0-ba3", run / "latest-rank0.pt"):
        assert is_checkpoint(source)
        output = prune_and_save_model(source, overwrite=True)
        assert output.parent == run and output.name == f"pruned-{checkpoint_file(source).name.removesuffix('.pt')}.pt"
        folded = read_checkpoint(output)
        assert list(folded.weights) == list(expected.weights)
        assert all(torch.equal(value, expected.weights[name]) for name, value in folded.weights.items())
        assert folded.info.config.to_dict() == expected.info.config.to_dict()
    assert all(torch.equal(value, read_checkpoint(run).weights[name]) for name, value in model.state_dict().items())


def test_it_converts(tmp_path: Path, source: Path, main: Callable) -> None:
    plain = hf_to_checkpoint(source, tmp_path / "plain.pt")
    folder = sharded(plain, tmp_path / "run" / "ep0-ba3", 1)
    result = main("composer_to_hf", folder.parent, tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), torch.nn.Module)
    assert compare(tmp_path / "hf", folder, sequences=2, length=8).unequal == []


def test_another_programs_folder_is_refused(tmp_path: Path) -> None:
    save_sharded(tmp_path / "other", {"weights": torch.zeros(3)})
    with pytest.raises(ShearingError, match="is no Composer checkpoint"):
        read_checkpoint(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShearingError, match=r"the directory has no latest-rank0\.pt"):
        read_checkpoint(tmp_path / "empty")
