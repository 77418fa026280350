"""What is learned: the loss of a step against a sum written by hand, examples of every length, batches."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_finetune import write_lines
from helpers_prune import model_of
from transformers import AutoTokenizer, TrainerCallback

from llmshearing.errors import ShearingError
from llmshearing.finetune.options import Options
from llmshearing.finetune.records import IGNORED, Data, Example, Padding, read_data
from llmshearing.finetune.training import HELD_OUT, answer_loss, make_trainer, training_arguments

EXAMPLES = [
    Example(np.int32([3, 4, 5, 6]), np.int64([IGNORED, IGNORED, 5, 6])),
    Example(np.int32([7, 8]), np.int64([IGNORED, 8])),
    Example(np.int32([9, 1, 2, 3, 4, 5]), np.int64([IGNORED, 1, 2, 3, IGNORED, 5])),
]


def by_hand(model, examples):
    """The negative log-probabilities of all answers, one sequence and one token at a time, without padding."""
    found = []
    for ids, labels in examples:
        with torch.no_grad():
            logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0].double()
        for at in range(1, len(ids)):
            if labels[at] != IGNORED:
                row = logits[at - 1]
                found.append(math.log(sum(math.exp(value) for value in row.tolist())) - row[ids[at]].item())
    return found


def test_the_loss_is_the_sum_over_answers_by_their_number():
    model = model_of("llama", dtype=torch.float64)
    batch = Padding(pad_id=0, multiple=8)(EXAMPLES)
    assert batch["input_ids"].shape == (3, 8)
    labels = batch.pop("labels")
    losses = by_hand(model, EXAMPLES)
    assert len(losses) == 7
    assert answer_loss(model(**batch), labels).item() == pytest.approx(sum(losses) / 7, abs=1e-10)
    assert answer_loss(model(**batch), labels, 10).item() == pytest.approx(sum(losses) / 10, abs=1e-10)


def test_a_step_of_several_batches_weighs_every_answer_alike(tmp_path):
    """Two batches of a step, with 3 and 4 answers: the gradient is that of the mean over 7, not of two means."""
    model = model_of("llama")
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *given, **more):
            seen.update({name: value.grad.clone() for name, value in more["model"].named_parameters()})

    options = Options(max_steps=1, batch_size=2, accumulate=2, clip=0.0, device="cpu")
    arguments = training_arguments(options, tmp_path, 1)
    arguments.save_strategy = "no"
    reference = model_of("llama")
    batch = Padding(0)(EXAMPLES)
    labels = batch.pop("labels")
    answer_loss(reference(**batch), labels).backward()
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    trainer = make_trainer(model, tokenizer, Data(EXAMPLES, EXAMPLES), options, arguments, [Look()])
    before = trainer.evaluate()[HELD_OUT]
    assert before == pytest.approx(np.mean(by_hand(model_of("llama"), EXAMPLES)), abs=1e-5)
    trainer.train()
    assert len(seen) == len(list(reference.parameters()))
    for name, value in reference.named_parameters():
        torch.testing.assert_close(seen[name], value.grad, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def tokenizer(place):
    return AutoTokenizer.from_pretrained(place / "source")


def test_answers_alone_are_labels(place, tokenizer):
    data = read_data([place / "chats.jsonl", place / "prompts.jsonl", place / "texts.jsonl"], [], tokenizer, 64)
    learned = [tokenizer.decode(labels[labels != IGNORED]) for _, labels in data.train]
    assert len(learned) == 12 + 23 + 12
    assert learned[0] == "jumps<|im_end|>" and learned[12] == " 0 talks<|endoftext|>"
    assert learned[-1].endswith("walker talks 11 times<|endoftext|>")  # all but the first token


def test_what_is_too_long_is_said(place, tokenizer, tmp_path, caplog):
    long = {"prompt": "walk " * 30, "completion": "s"}
    cut = {"prompt": "walk", "completion": "0123456789" * 3}
    file = write_lines(tmp_path / "x.jsonl", [{"text": "0123456789" * 3}, cut, long, {"text": "a b"}])
    data = read_data([file], [], tokenizer, 12)
    assert "of 4 records some are longer than 12 tokens" in caplog.text
    assert "1 text(s) became several sequences; 1 record(s) lost their end; 1 record(s) are left out" in caplog.text
    assert [len(ids) for ids, _ in data.train] == [12, 12, 7, 12, 4]
    assert "".join(tokenizer.decode(ids) for ids, _ in data.train[:3]) == "0123456789" * 3 + "<|endoftext|>"


def test_held_out_records_are_no_training_records(place, tokenizer):
    data = read_data([place / "prompts.jsonl"], [], tokenizer, 64, fraction=0.2, seed=3)
    assert len(data.held_out) == 5 and len(data.train) == 18
    both = [tuple(ids.tolist()) for ids, _ in data.train + data.held_out]
    assert len(set(both)) == 23
    assert data.fingerprint != read_data([place / "prompts.jsonl"], [], tokenizer, 64, fraction=0.2, seed=4).fingerprint


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", "", "x.jsonl is empty"),
        ("x.jsonl", "\n\n", "holds nothing to learn"),
        ("x.json", "[]", "holds nothing to learn"),
        ("x.jsonl", '{"text": "a b"}\n{"question": "?"}\n', r"x.jsonl:2 is of no known form: it has \['question'\]"),
        ("x.json", '[{"text": "a b"}, {"text": 3}]', r"x.json, record 2 is of no known form"),
        ("x.jsonl", '{"text": "a b"}\n{"text": \n', "x.jsonl:2 is not JSON"),
        ("x.jsonl", '{"text": "a\tb"}\n', "x.jsonl:1 is not JSON: Invalid control character at column 12"),
        ("x.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', "x.jsonl:2 has a lone surrogate"),
        ("x.json", '[{"text": "\\ud800"}]', "x.json, record 1 has a lone surrogate"),
        ("x.csv", "a,b", "is of no known kind"),
        (None, None, "does not exist"),
    ],
)
def test_bad_files_are_named(tokenizer, tmp_path, name, content, said):
    path = tmp_path / (name or "x.jsonl")
    if name:
        path.write_text(content)
    with pytest.raises(ShearingError, match=said):
        read_data([path], [], tokenizer, 64)


def test_json_list_text_and_folder(tokenizer, tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a b"}]')
    (tmp_path / "b.txt").write_text("walks and\ntalks")
    data = read_data([tmp_path], [], tokenizer, 64)
    assert [tokenizer.decode(ids) for ids, _ in data.train] == ["a b<|endoftext|>", "walks and\ntalks<|endoftext|>"]
