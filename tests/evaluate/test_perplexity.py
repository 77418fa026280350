"""Loss: equal to a loop written by hand, one token at a time, across borders of windows, with BOS and without."""

import json
import math
from collections import Counter

import pytest
import torch
from helpers_answers import NAMES, write_answers
from helpers_prune import model_of
from helpers_runs import SEQ, make_model
from helpers_tokenizers import save_word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.errors import ShearingError
from llmshearing.evaluate.perplexity import LossOptions, measure_losses, unigram_loss
from llmshearing.evaluate.texts import open_data
from llmshearing.evaluate.windows import sequence_losses, windows_of

TEXTS = {
    "web": ["w1 w2 w3", " ".join(f"w{(3 * i + i * i) % 20}" for i in range(50)), "w7  w7\nw7 w8"],
    "code": [" ".join(f"w{(7 * i) % 19}" for i in range(23)), "w4 w5"],
}


@pytest.fixture(scope="module")
def model():
    return model_of("llama", torch.float64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_word_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def by_hand(model, ids: list[int], width: int, stride: int) -> list[float]:
    """Each token's loss by a forward pass of its own, of what its window shows before it."""
    ends, found = [min(width, len(ids))], []
    while ends[-1] < len(ids):
        ends.append(min(ends[-1] + stride, len(ids)))
    for at in range(1, len(ids)):
        end = next(end for end in ends if end > at)
        with torch.no_grad():
            logits = model(torch.tensor([ids[max(0, end - width) : at]])).logits[0, -1]
        found.append(-logits.double().log_softmax(-1)[ids[at]].item())
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, texts in TEXTS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.mark.parametrize("bos", ["always", "never"])
@pytest.mark.parametrize(("window", "stride"), [(8, 7), (8, 3), (16, 8), (32, None), (2, 1)])
def test_loss_is_that_of_a_loop(model, tokenizer, corpus, bos: str, window: int, stride: int | None) -> None:
    options = LossOptions(window, stride, bos, batch_size=3)
    found = measure_losses(model, tokenizer, open_data([str(corpus)]), options)
    assert found["bos"] == ("<s>" if bos == "always" else None)
    nats, tokens, words, size = 0.0, 0, 0, 0
    for name, texts in TEXTS.items():
        rows = [[1] * (bos == "always") + tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        losses = [sum(by_hand(model, row, window, stride or window // 2)) for row in rows]
        scored = sum(len(row) - 1 for row in rows)
        domain = found["domains"][name]
        assert domain["tokens"] == scored
        assert domain["loss"] == pytest.approx(sum(losses) / scored, rel=1e-12)
        assert domain["perplexity"] == pytest.approx(math.exp(sum(losses) / scored), rel=1e-11)
        words += sum(len(text.split()) for text in texts)
        size += sum(len(text) for text in texts)
        nats, tokens = nats + sum(losses), tokens + scored
    every = found["all"]
    assert every["loss"] == pytest.approx(nats / tokens, rel=1e-12)
    assert every["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-11)
    assert every["byte_perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-11)
    assert every["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-12)


@given(length=st.integers(0, 60), width=st.integers(2, 20), part=st.floats(0, 1))
def test_windows_score_each_token_once(length: int, width: int, part: float) -> None:
    stride = 1 + round(part * (width - 2))
    windows = list(windows_of(length, width, stride))
    assert [at for window in windows for at in range(window.scored, window.end)] == list(range(1, length))
    assert all(window.end - window.begin <= width and window.begin < window.scored for window in windows)


def test_batches_change_nothing(model) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(23, (n,), generator=generator).tolist() for n in (5, 31, 1, 0, 12, 40, 12)]
    alone = [next(iter(sequence_losses(model, [row], 9, 4, 1))) for row in rows]
    for one, other in zip(alone, sequence_losses(model, rows, 9, 4, 64), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_auto_asks_the_tokenizer(model, tokenizer, corpus) -> None:
    data = open_data([str(corpus)])
    assert measure_losses(model, tokenizer, data, LossOptions(8))["bos"] is None

    class Adds:
        """The same tokenizer, one that puts BOS before what it encodes."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, add_special_tokens=True, **more):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1] * add_special_tokens + ids}

    found = measure_losses(model, Adds(), data, LossOptions(8))
    always = measure_losses(model, tokenizer, data, LossOptions(8, bos="always"))
    assert found == always and found["bos"] == "<s>"


def test_standard_error_is_that_of_resampled_documents(model, tokenizer, tmp_path) -> None:
    texts = [" ".join(f"w{(i * j + j * j) % 20}" for j in range(3 + i % 7)) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = measure_losses(model, tokenizer, open_data([str(tmp_path)]), LossOptions(16))["all"]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    nats = torch.tensor([sum(by_hand(model, row, 16, 8)) for row in rows])
    number = torch.tensor([len(row) - 1.0 for row in rows])
    drawn = torch.randint(60, (4000, 60), generator=torch.Generator().manual_seed(0))
    resampled = (nats[drawn].sum(1) / number[drawn].sum(1)).std().item()
    assert found["loss_stderr"] == pytest.approx(resampled, rel=0.1)


def test_unigram_leaves_each_token_out() -> None:
    tokens, size = [3, 3, 5, 1, 3, 5], 7
    by_loop = 0.0
    for at, token in enumerate(tokens):
        others = Counter(tokens[:at] + tokens[at + 1 :])
        by_loop -= math.log((others[token] + 1) / (len(tokens) - 1 + size))
    assert unigram_loss(Counter(tokens), size) == pytest.approx(by_loop / len(tokens), rel=1e-12)


def test_a_loss_mask_leaves_answers_alone(tmp_path) -> None:
    data, model = write_answers(tmp_path), make_model()
    found = measure_losses(model, None, open_data([str(data)], split="eval"), LossOptions(window=SEQ))
    for name in NAMES:
        directory = MdsDirectory(data / "apart" / name, None, None)
        nats, ids_of, silent = [], [], 0
        for index in range(len(directory)):
            ids, _, mask = directory.read(index)
            scored = [at for at in range(1, SEQ) if mask is None or mask[at]]
            with torch.no_grad():
                own = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].double().log_softmax(-1)
            nats += [-own[at - 1, ids[at]].item() for at in scored]
            ids_of += [int(ids[at]) for at in scored]
            silent += not scored
        told = found["domains"][name]
        assert told["tokens"] == len(nats) and told["documents"] == len(directory) - silent
        assert told["loss"] == pytest.approx(math.fsum(nats) / len(nats), rel=1e-5)
        assert told["unigram_loss"] == pytest.approx(unigram_loss(Counter(ids_of), model.config.vocab_size))
        assert (silent > 0) == (name == "asked")


def test_mds_equals_the_loss_of_training(lab) -> None:
    from transformers import AutoModelForCausalLM

    from llmshearing.data.mds.shards import MdsDirectory
    from llmshearing.training.evaluation import domain_losses

    model = AutoModelForCausalLM.from_pretrained(lab.source).eval()
    names, per_domain = ["asyncio", "docs", "email"], 8
    rows = MdsDirectory(lab.data / "eval_merge", None, 384)
    batches = []
    for at, name in enumerate(names):
        ids = [torch.from_numpy(row) for row, domain in (rows[i] for i in range(len(rows))) if domain == name]
        batches.append({"input_ids": torch.stack(ids[:per_domain]), "set": torch.full((per_domain,), at)})
    wanted = domain_losses(model, batches, names)
    own = AutoTokenizer.from_pretrained(lab.source)
    found = measure_losses(model, own, open_data([str(lab.data)]), LossOptions(documents=per_domain))
    assert found["window"] == 32 and set(found["domains"]) == set(names)
    for name in names:
        assert found["domains"][name]["loss"] == pytest.approx(wanted[name], rel=1e-5)
    assert found["all"]["loss"] == pytest.approx(wanted["mean"], rel=1e-5)
    assert found["all"]["words"] > 0


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (LossOptions(window=33), "window = 33: must be from 2 to the model's longest, 32 tokens"),
        (LossOptions(window=1), "window = 1"),
        (LossOptions(window=8, stride=8), "stride = 8: must be from 1 to 7"),
        (LossOptions(window=8, stride=-1), "stride = -1"),
    ],
)
def test_windows_that_leave_tokens_out_are_refused(model, tokenizer, corpus, options, wanted: str) -> None:
    with pytest.raises(ShearingError, match=wanted):
        measure_losses(model, tokenizer, open_data([str(corpus)]), options)


def test_plain_text_is_one_document(tmp_path) -> None:
    (tmp_path / "long.txt").write_text("a line of words\n" * 1000)
    (data,) = open_data([str(tmp_path / "long.txt")])
    assert data.name == "long" and list(data.documents()) == ["a line of words\n" * 1000]


def test_a_folder_of_folders_is_domains(tmp_path) -> None:
    for name in ("web/a.jsonl", "web/deep/b.txt", "code.jsonl.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = open_data([str(tmp_path)])
    assert [(each.name, [path.name for path in each.paths]) for each in found] == [
        ("code", ["code.jsonl.gz"]),
        ("web", ["a.jsonl", "b.txt"]),
    ]
