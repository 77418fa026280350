"""`llmshearing finetune`: what it writes, runs that are killed, two processes, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers_finetune import write_lines
from helpers_prune import model_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmshearing.cli import main


def run(*words):
    return main([str(word) for word in words])


def tensors(directory):
    return load_file(directory / "model.safetensors")


def test_chats_end_to_end(place, tmp_path, caplog):
    caplog.set_level("INFO")
    source, out = place / "source", tmp_path / "out"
    words = ["finetune", source, place / "chats.jsonl", "--output", out, "--epochs", 30, "--learning_rate", 0.01]
    assert run(*words, "--eval_fraction", 0.2, "--gradient_checkpointing") == 0
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    record = json.loads((out / "finetune.json").read_text())
    losses = record["held_out_loss"]
    assert losses["after"] < losses["before"] / 2
    assert record["data"]["answer_tokens"] < record["data"]["tokens"] / 2
    assert "loss/train" in (out / "run.jsonl").read_text() and "held out" in (out / "report.html").read_text()
    assert "full finetuning for 60 steps" in (out / "README.md").read_text()
    assert not (tmp_path / "out-checkpoints").exists() and "wrote the finetuned model to" in caplog.text
    model, tokenizer = (of.from_pretrained(out) for of in (AutoModelForCausalLM, AutoTokenizer))
    asked = [{"role": "user", "content": "walk 3"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    said = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(said).startswith("jumps<|im_end|>")  # it answers, and ends its turn by the one token


def test_the_stored_dtype_is_kept(place, tmp_path):
    shutil.copytree(place / "source", tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(place / "source", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert run("finetune", tmp_path / "half", place / "texts.jsonl", "--output", tmp_path / "o", "--max_steps", 2) == 0
    assert {value.dtype for value in tensors(tmp_path / "o").values()} == {torch.bfloat16}


# The process kills itself at a known moment: one that watches from outside races with short steps.
DIES = """
import os, signal, sys
from llmshearing.cli import main
from llmshearing.finetune.training import Progress

def die(self, args, state, control, **more):
    if state.global_step >= 6:
        os.kill(os.getpid(), signal.SIGKILL)

Progress.on_save = die
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on_and_gives_what_an_uninterrupted_one_gives(place, tmp_path, caplog):
    caplog.set_level("INFO")
    words = ["finetune", place / "source", place / "prompts.jsonl", "--max_steps", 12, "--save_every", 3]
    words += ["--learning_rate", 0.01, "--batch_size", 4, "--device", "cpu", "--eval_fraction", 0.1]
    command = [sys.executable, "-c", DIES, *map(str, words), "--output", str(tmp_path / "killed")]
    # As Composer leaves a process without others.
    alone = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    alone.pop("MASTER_ADDR", None)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    checkpoints = tmp_path / "killed-checkpoints"
    assert not (tmp_path / "killed").exists() and (checkpoints / "checkpoint-6" / "trainer_state.json").is_file()
    (checkpoints / "checkpoint-9").mkdir()  # as a kill leaves one that was being written
    (checkpoints / "checkpoint-9" / "trainer_state.json").write_text("{")
    assert run(*words, "--output", tmp_path / "killed") == 0
    assert "going on from" in caplog.text
    assert run(*words, "--output", tmp_path / "whole") == 0
    one, other = tensors(tmp_path / "killed"), tensors(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_unfinished_run_that_was_told_otherwise_is_refused(place, tmp_path, caplog):
    folder = tmp_path / "o-checkpoints"
    folder.mkdir()
    words = ["finetune", place / "source", place / "texts.jsonl", "--output", tmp_path / "o", "--max_steps", 1]
    (folder / "run.json").write_text(json.dumps({"learning_rate": 1.0}))
    assert run(*words) == 1
    assert "learning_rate was 1.0 and is None" in caplog.text and "--restart" in caplog.text
    assert run(*words, "--restart") == 0


@pytest.mark.slow
def test_two_processes_give_what_one_gives(place, tmp_path):
    # Two steps: 16 of the 18 records that are not held out. Processes share the rest of an epoch otherwise.
    words = ["finetune", place / "source", place / "prompts.jsonl", "--max_steps", 2, "--learning_rate", 0.005]
    words += ["--device", "cpu", "--eval_fraction", 0.2]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "llmshearing"]
    command = [*two, *map(str, words), "--batch_size", "4", "--output", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(*words, "--batch_size", 8, "--output", tmp_path / "one") == 0
    one, other, source = tensors(tmp_path / "one"), tensors(tmp_path / "two"), tensors(place / "source")
    flat = [torch.cat([values[name].flatten() for name in sorted(one)]) for values in (one, other, source)]
    # Adam's first steps are signs of gradients, some of which are no more than rounding.
    assert (flat[0] - flat[1]).abs().mean() < 1e-3 * (flat[0] - flat[2]).abs().mean()
    losses = [json.loads((tmp_path / name / "finetune.json").read_text())["held_out_loss"] for name in ("one", "two")]
    for when in ("before", "after"):
        assert losses[0][when] == pytest.approx(losses[1][when], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eval_fraction", 1.5, "--batch_size", 0], "batch_size = 0: must be at least 1"),
        (["--eval_fraction", 0.1, "--eval", "x.jsonl"], "held-out data is given twice"),
        (["--max_length", 100], "reads at most 64 tokens"),
        (["--save_adapter", "a"], "a full finetuning has no adapter"),
        (["--eval_fraction", 0.99], "leaves none to learn from"),
    ],
)
def test_options_that_cannot_be(place, tmp_path, caplog, words, said):
    assert run("finetune", place / "source", place / "texts.jsonl", "--output", tmp_path / "o", *words) == 1
    assert said in caplog.text and not list(tmp_path.iterdir())


def test_sources_that_cannot_be(place, tmp_path, caplog):
    model_of("llama").save_pretrained(tmp_path / "bare")
    out = ["--output", tmp_path / "o"]
    assert run("finetune", tmp_path / "bare", place / "texts.jsonl", *out) == 1
    assert "bare has no tokenizer" in caplog.text
    assert run("finetune", tmp_path / "bare", place / "texts.jsonl", *out, "--tokenizer", place / "source") == 1
    assert "the tokenizer has 424 tokens" in caplog.text
    assert run("finetune", tmp_path / "none", place / "texts.jsonl", *out) == 1
    assert run("finetune", place / "source", *out) == 1
    assert "nothing to do: give files of data" in caplog.text
    assert run("finetune", place / "source", place / "texts.jsonl", "--output", place / "source") == 1
    unknown = write_lines(tmp_path / "u.jsonl", [{"text": "a b"}, {"question": "?", "answer": "!"}])
    assert run("finetune", place / "source", unknown, *out) == 1
    assert f"{unknown}:2 is of no known form" in caplog.text
    assert not (tmp_path / "o").exists() and not (tmp_path / "o-checkpoints").exists()


def test_the_commands_of_the_readme(place, tmp_path, monkeypatch, root):
    pytest.importorskip("peft")
    text = (root / "README.md").read_text().split("## Finetune\n")[1].split("```bash\n")[1].split("```")[0]
    shutil.copytree(place / "source", tmp_path / "out" / "small")
    shutil.copy(place / "chats.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = text.splitlines()
    assert len(lines) == 3 and all(run(*line.split()[1:]) == 0 for line in lines)
    config = json.loads((tmp_path / "out" / "smaller" / "config.json").read_text())
    assert config["intermediate_size"] == 8 and (tmp_path / "out" / "chat" / "chat_template.jinja").is_file()
