"""The certificate of an export: what it says, what fails it, and where a failed export goes."""

import json
import math

import pytest
import torch
from tiny import VARIANTS, config_of
from transformers import AutoModelForCausalLM

from llmshearing.checkpoints import checkpoint_to_hf, hf_to_checkpoint, hf_write, parity
from llmshearing.checkpoints.hf_write import write_hf_directory
from llmshearing.checkpoints.parity import ParityError, largest_difference, scores_of
from llmshearing.prune import run
from llmshearing.prune.run import prune


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("llama", "grouped"))
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def certificate(folder):
    return json.loads((folder / "parity.json").read_text())


def damage(monkeypatch, by=0.5):
    """What is written is not what was to be written."""
    write = hf_write.write_safetensors

    def wrong(path, tensors, *more):
        name = next(name for name in tensors if "mlp" in name)
        entry = tensors[name]
        changed = type(entry)(entry.shape, entry.dtype, lambda: entry.make() + by)
        return write(path, {**tensors, name: changed}, *more)

    monkeypatch.setattr(hf_write, "write_safetensors", wrong)


def test_an_export_tells_its_reader_and_what_it_found(source, tmp_path):
    out = checkpoint_to_hf(hf_to_checkpoint(source, tmp_path / "a.pt"), tmp_path / "out")
    told = certificate(out)
    assert told["reader"] == "transformers" and told["compared"] == "log-probabilities" and told["passed"]
    assert told["largest_difference"] < 1e-6 and [len(row) for row in told["tokens"]] == [16, 16]
    again = checkpoint_to_hf(tmp_path / "a.pt", out, overwrite=True)  # its own certificate is nothing foreign
    assert certificate(again) == told
    assert not (checkpoint_to_hf(tmp_path / "a.pt", tmp_path / "plain", check=False) / "parity.json").exists()


def test_an_export_that_is_another_function_is_kept_under_another_name(source, tmp_path, monkeypatch):
    file, out = hf_to_checkpoint(source, tmp_path / "a.pt"), tmp_path / "out"
    damage(monkeypatch)
    for _ in range(2):  # a second failure takes the place of the first
        with pytest.raises(ParityError, match=r"log-probabilities differ by [\d.e-]+ nats .*kept as .*out\.failed"):
            checkpoint_to_hf(file, out)
    assert not out.exists() and not certificate(tmp_path / "out.failed")["passed"]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "a.pt", "out.failed"}
    assert checkpoint_to_hf(file, out, check=False) == out


def test_a_failed_check_ends_the_command_with_an_error(source, tmp_path, monkeypatch):
    from llmshearing.cli import main

    file = hf_to_checkpoint(source, tmp_path / "a.pt")
    damage(monkeypatch)
    assert main(["convert", str(file), str(tmp_path / "out")]) == 1
    assert main(["convert", str(file), str(tmp_path / "out"), "--no-check"]) == 0


def test_a_pruned_model_is_checked_against_the_one_in_memory(source, tmp_path, monkeypatch):
    target = {"intermediate_size": 6}
    prune("random", source, tmp_path / "good", target)
    assert certificate(tmp_path / "good")["passed"]
    damage(monkeypatch)
    with pytest.raises(ParityError):
        prune("random", source, tmp_path / "bad", target)
    assert (tmp_path / "bad.failed" / "model.safetensors").is_file() and not (tmp_path / "bad").exists()
    assert run.prune("random", source, tmp_path / "unchecked", target, check=False).path.is_dir()


@pytest.mark.parametrize("by", [0.0, 0.5])
def test_a_model_too_large_for_memory_is_compared_by_tensors(source, tmp_path, monkeypatch, by):
    monkeypatch.setattr(parity, "free_memory", lambda: 0)
    monkeypatch.setattr(parity, "build_model", None)  # none may be built
    file = hf_to_checkpoint(source, tmp_path / "a.pt")
    if by:
        damage(monkeypatch, by)
        with pytest.raises(ParityError, match="tensors differ by 0.5"):
            checkpoint_to_hf(file, tmp_path / "out")
        return
    told = certificate(checkpoint_to_hf(file, tmp_path / "out"))
    assert told["compared"] == "tensors" and told["largest_difference"] == 0 and told["tokens"] == []


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "gpt2", "opt"])
def test_families_of_other_forms_pass_in_a_smaller_dtype(family, tmp_path):
    variant = next(iter(VARIANTS[family]))
    model = AutoModelForCausalLM.from_config(config_of(family, variant))
    out = write_hf_directory(model.state_dict(), model.config, tmp_path / "out", dtype="bfloat16", check=True)
    assert certificate(out)["passed"]


def test_differences_count_what_is_not_finite():
    one = torch.tensor([0.0, -math.inf])
    assert largest_difference(one, one) == 0
    assert largest_difference(one, torch.tensor([0.0, 1.0])) == math.inf
    assert largest_difference(torch.tensor([math.nan]), torch.tensor([math.nan])) == 0
    assert largest_difference(one, torch.tensor([0.0])) == math.inf


def test_scores_are_log_probabilities(source):
    model = AutoModelForCausalLM.from_pretrained(source)
    scores = scores_of(model, torch.tensor([[1, 2, 3]]))
    assert torch.allclose(scores.exp().sum(-1), torch.ones(1, 3), atol=1e-5)
