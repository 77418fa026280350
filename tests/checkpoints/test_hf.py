"""Hugging Face <-> Composer: bit-identical round trips, the seeds' commands, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from llmshearing.checkpoints import (
    build_model,
    checkpoint_to_hf,
    compare,
    hf_to_checkpoint,
    load_hf_weights,
    write_hf_directory,
)
from llmshearing.checkpoints.arguments import parse_pairs
from llmshearing.checkpoints.checkpoint import CheckpointInfo, read_checkpoint, save_checkpoint
from llmshearing.errors import ShearingError
from llmshearing.families.portable import portable


def tensors_on_disk(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_identical(tmp_path: Path, make_model: Callable, case: str, dtype: torch.dtype) -> None:
    first, file, last = tmp_path / "a", tmp_path / "b.pt", tmp_path / "c"
    model = make_model(case, dtype)
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[2, 3])
    model.save_pretrained(first)
    hf_to_checkpoint(first, file)
    checkpoint_to_hf(file, last, max_shard_size="20KB")

    before, after = tensors_on_disk(first), tensors_on_disk(last)
    assert before.keys() == after.keys()
    assert all(value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items())
    assert len(list(last.glob("model-*-of-*.safetensors"))) > 1
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (first, last))
    one = {key: value for key, value in portable(one).items() if (key, value) != ("pad_token_id", None)}  # of 5
    assert other == {**one, "head_dim": model.config.head_dim}
    generation = json.loads((last / "generation_config.json").read_text())
    assert generation["temperature"] == 0.7 and generation["eos_token_id"] == [2, 3]
    result = compare(last, file, sequences=2, length=16)
    assert (result.max_difference, result.unequal, result.passed) == (0.0, [], True)


def test_directory_loads_strictly_and_gives_the_same_log_probabilities(
    tmp_path: Path, make_model: Callable, case: str
) -> None:
    model = make_model(case)
    write_hf_directory(model.state_dict(), model.config, tmp_path / "out")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    ids = torch.randint(53, (2, 20))
    assert torch.equal(loaded(ids).logits.log_softmax(-1), model(ids).logits.log_softmax(-1))
    weights, config = load_hf_weights(tmp_path / "out")
    assert torch.equal(build_model(weights, config)(ids).logits, model(ids).logits)
    if case == "tied":
        assert build_model(weights, config).lm_head.weight is not None and "lm_head.weight" in weights


@pytest.mark.slow
def test_seed_commands(tmp_path: Path, source: Path, command: Callable) -> None:
    """HF -> Composer, the comparison, and back with the seeds' keys."""
    file, output = tmp_path / "state_dict.pt", tmp_path / "hf-latest_rank0"
    there = command("composer_to_hf", source, file)
    assert there.returncode == 0, there.stderr
    assert there.stderr.strip().splitlines()[-1].endswith(f"to {file}")
    equal = command("test_composer_hf_eq", source, file)
    assert equal.returncode == 0 and "PASS" in equal.stderr and "67 of 67" in equal.stderr, equal.stderr
    keys = ["model_class=LlamaForCausalLM", "hidden_size=32", "num_attention_heads=4", "num_hidden_layers=4"]
    keys += ["intermediate_size=40", "num_key_value_heads=2", "_name_or_path=Sheared-Tiny", "rms_norm_eps=1e-6"]
    back = command("composer_to_hf", file, output, *keys, "dtype=float16")
    assert back.returncode == 0, back.stderr
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == torch.float16
    assert AutoTokenizer.from_pretrained(output)("w3 w4").input_ids == [3, 4]
    assert "# Sheared-Tiny" in (output / "README.md").read_text()
    assert not [item for item in tmp_path.iterdir() if item.name.startswith(".")]


def test_comparison_sees_a_difference_in_one_value(tmp_path: Path, source: Path, main: Callable) -> None:
    lazy, config = load_hf_weights(source)
    weights = dict(lazy)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.5
    file = save_checkpoint(tmp_path / "x.pt", weights, CheckpointInfo(config.to_dict()))
    result = main("test_composer_hf_eq", source, file, "--sequences", "2", "--length", "16")
    assert result.returncode == 1
    assert "at least 1" in main("test_composer_hf_eq", source, file, "--sequences", "0").stderr
    assert "FAIL" in result.stderr and "differs: model.layers.1.mlp.up_proj.weight" in result.stderr


def test_card_tells_source_shape_data_and_config(tmp_path: Path, source: Path) -> None:
    checkpoint = read_checkpoint(hf_to_checkpoint(source, tmp_path / "a.pt"))
    run = "callbacks:\n  data_loading:\n    set_names: [web, code]\n    proportion: [0.75, 0.25]\nmax_duration: 7ba\n"
    info = replace(checkpoint.info, run_config=run).then("trained for 7ba")
    save_checkpoint(tmp_path / "b.pt", checkpoint.weights, info)
    card = (checkpoint_to_hf(tmp_path / "b.pt", tmp_path / "out") / "README.md").read_text()
    for part in (str(source), "trained for 7ba", "| hidden_size | 32 |", "| web | 0.75 |", "max_duration: 7ba"):
        assert part in card


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["hidden_size=64"], "hidden_size=64 was given, but .* has hidden_size=32"),
        (["hiden_size=32"], "unknown key hiden_size; did you mean hidden_size"),
        (["tie_word_embeddings=1"], "tie_word_embeddings=1 was given"),
        (["dtype=int8"], "dtype=int8: must be one of float32, float16, bfloat16"),
        (["model_class=GPT2LMHeadModel"], "model_class=GPT2LMHeadModel: .* is of LlamaForCausalLM"),
        (["tokenizer=/nowhere/at/all"], "tokenizer /nowhere/at/all does not exist"),
        (["vocab_size=53", "vocab_size=53"], "vocab_size is given twice"),
        (["32"], "argument '32' must be key=value"),
    ],
)
def test_wrong_arguments_name_key_and_values(tmp_path: Path, source: Path, pairs: list[str], message: str) -> None:
    file = hf_to_checkpoint(source, tmp_path / "a.pt")
    with pytest.raises(ShearingError, match=message):
        checkpoint_to_hf(file, tmp_path / "out", parse_pairs(pairs))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.pt", "source"]


def test_all_wrong_arguments_come_at_once(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ShearingError, match=r"(?s)hidden_size=1 .*num_hidden_layers=2 .*unknown key x"):
        hf_to_checkpoint(source, tmp_path / "a.pt", parse_pairs(["hidden_size=1", "num_hidden_layers=2", "x=1"]))


def test_outputs_with_something_else_are_left_alone(tmp_path: Path, source: Path, main: Callable) -> None:
    file, output = hf_to_checkpoint(source, tmp_path / "a.pt"), tmp_path / "out"
    output.mkdir()
    checkpoint_to_hf(file, output)  # empty: fine
    with pytest.raises(ShearingError, match="--overwrite"):
        checkpoint_to_hf(file, output)
    checkpoint_to_hf(file, output, {"dtype": "float32"}, overwrite=True)
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == torch.float32

    (output / "thesis.tex").write_text("years of work")
    for more in ([], ["--overwrite"]):
        result = main("composer_to_hf", file, output, *more)
        assert result.returncode == 1 and "something else in it: thesis.tex" in result.stderr
        assert "Traceback" not in result.stderr
    assert (output / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ShearingError, match="exists"):
        hf_to_checkpoint(source, file)
    with pytest.raises(ShearingError, match="is a file"):
        checkpoint_to_hf(file, file)
    with pytest.raises(ShearingError, match="is a directory"):
        hf_to_checkpoint(source, output)


def test_damage_and_absence_exit_with_a_message(tmp_path: Path, source: Path, main: Callable) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(hf_to_checkpoint(source, tmp_path / "a.pt").read_bytes()[:4000])
    result = main("composer_to_hf", broken, tmp_path / "out")
    assert result.returncode == 1 and f"checkpoint {broken} is damaged" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()
    with pytest.raises(ShearingError, match=r"no Hugging Face directory: it has no config\.json"):
        hf_to_checkpoint(tmp_path / "absent", tmp_path / "b.pt")


def test_a_foreign_or_incomplete_model_is_refused(tmp_path: Path, make_model: Callable) -> None:
    from safetensors.torch import load_file, save_file

    make_model("mha").save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file({**tensors, "extra": torch.ones(1)}, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ShearingError, match=r"(?s)model\.norm\.weight: missing.*extra: has no row"):
        hf_to_checkpoint(tmp_path / "a", tmp_path / "b.pt")
    with pytest.raises(ShearingError, match=r"model\.norm\.weight: missing"):
        write_hf_directory(tensors, make_model("mha").config, tmp_path / "c")


def test_a_lost_tokenizer_is_a_warning(tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = hf_to_checkpoint(source, tmp_path / "a.pt")
    shutil.rmtree(source)
    output = checkpoint_to_hf(file, tmp_path / "out")
    assert "has no tokenizer" in caplog.text and f"{source} does not exist" in caplog.text
    assert not (output / "tokenizer.json").exists()
    assert isinstance(AutoModelForCausalLM.from_pretrained(output), LlamaForCausalLM)


def test_masks_must_be_folded_first(tmp_path: Path, write_pruning: Callable, main: Callable) -> None:
    path, model, _ = write_pruning()
    model.save_pretrained(tmp_path / "hf")
    for name, arguments in (
        ("composer_to_hf", (path, tmp_path / "out")),
        ("test_composer_hf_eq", (tmp_path / "hf", path)),
    ):
        result = main(name, *arguments)
        assert result.returncode == 1 and f"prune_and_save_model {path}" in result.stderr
