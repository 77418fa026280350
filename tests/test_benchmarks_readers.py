"""`python -m benchmarks.readers`: a cell says "works" only where its reader ran, and ran what was written."""

from importlib.util import find_spec

import pytest
import torch

from benchmarks.readers import HEAD, NOT_RUN, READERS, cell, main, row_of
from benchmarks.readers_checks import forget
from benchmarks.readers_models import METHODS, tiny_config, tiny_model
from llmshearing.checkpoints.parity import largest_difference, scores_of, token_ids


def test_only_what_was_run_works(tmp_path):
    out = tmp_path / "readers.md"
    words = ["--families", "llama", "opt", "--methods", "random", "turn", "--readers", "transformers", "--jobs", "1"]
    assert main([*words, "--output", str(out)]) == 0
    text = out.read_text()
    heads, random, turned, *others = (
        [value.strip("| ") for value in line.split(" | ")]
        for line in text.splitlines()
        if line.startswith(("| method", "| random", "| turn"))
    )
    assert heads[2:] == [*READERS, "transformers 5"] and len(others) == 2
    assert random[:2] == ["random", "`llama`"] and random[2].startswith("works, ") and set(random[3:]) == {"not run"}
    assert turned[2].startswith("works, ")
    assert others[1][:2] == ["turn", "`opt`"] and "the method refuses" in others[1][2] and set(others[1][3:]) == {"-"}
    assert all(name in text for name in NOT_RUN)


def test_a_difference_is_no_success():
    assert cell(1e-6) == "works, 1e-06" and cell(0.5) == "**differs**, 0.5" and "differs" in cell(float("inf"))
    assert cell(0.3, float("inf"), " (int8)") == "works, 3e-01 (int8)" and "differs" in cell(float("nan"))


def test_every_method_is_told_of():
    assert {"random", "activation", "fisher", "obs", "depth", "turn", "vocabulary", "unequal"} == set(METHODS)
    assert all(f"`{name}`" in HEAD for name in ("turn", "vocabulary", "unequal", "tie"))


@pytest.mark.parametrize("name", ["torch.export", "PEFT", "lm-eval", "torchao"])
def test_a_reader_agrees_and_would_not_with_other_weights(tmp_path, name):
    """Programs are made once for a shape: they must follow the weights of the row."""
    reader = READERS[name]
    if reader.package is not None and find_spec(reader.package) is None:
        pytest.skip(f"{reader.package} is not installed")
    forget()
    for seed in range(2):
        folder = tmp_path / str(seed)
        model = tiny_model(tiny_config("llama", num_hidden_layers=1), folder)
        if seed:
            with torch.no_grad():
                model.lm_head.weight.mul_(-1)
            model.save_pretrained(folder)
        said = row_of("llama", folder, [name])
        assert said[name].startswith("works, ")
    ids = token_ids(model.config)
    if name == "torch.export":
        assert largest_difference(reader.check(folder, model, ids), scores_of(model, ids)) < 1e-5
    if name == "lm-eval":
        with torch.no_grad():
            model.lm_head.weight.zero_()
        assert reader.check(folder, model, ids) > 0.1
