"""The vocabulary method through the prune command: every family and variant ends in the source's rows, and chains."""

import pytest
import torch
from helpers_prune import VARIANTS, model_of
from helpers_tokenizers import corpus, train_byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmshearing.fold.selection import load_selection
from llmshearing.prune import SequenceOptions, prune
from llmshearing.prune.__main__ import main

SIZE = 430


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(corpus()), encoding="utf-8")
    return path


def source(folder, family, **changes):
    folder.mkdir()
    train_byte_level(folder)
    named = {"vocab_size": SIZE, "bos_token_id": 422, "eos_token_id": 422}
    model_of(family, torch.bfloat16, **named, **changes).save_pretrained(folder)
    return folder


def loaded(path):
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_written_model_is_the_sources_rows(tmp_path, text, family, variant):
    old = source(tmp_path / "old", family, **variant)
    prune("vocabulary", old, tmp_path / "new", {"vocab_size": 320}, corpus=text, processes=1)
    selection, _ = load_selection(tmp_path / "new" / "selection.safetensors")
    kept = selection.units["vocab"][0].index
    big, small = loaded(old), loaded(tmp_path / "new")
    assert small.config.vocab_size == 320
    assert small.config.eos_token_id == small.generation_config.eos_token_id == kept.tolist().index(422)
    ids = torch.arange(24).view(2, 12)  # of the smaller vocabulary
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, big(kept[ids]).logits[..., kept])
    assert AutoTokenizer.from_pretrained(tmp_path / "new").eos_token_id == small.config.eos_token_id


def test_it_chains_and_reports_perplexity_by_token_of_the_source(tmp_path, text):
    old = source(tmp_path / "old", "llama")
    options = {"calibration": text, "sequences": SequenceOptions(2, 2, 16, 2), "corpus": text, "processes": 1}
    first = prune("vocabulary", old, tmp_path / "one", {"ratio": 0.1}, **options)
    second = prune("vocabulary", tmp_path / "one", tmp_path / "two", {"vocab_size": 300}, **options)
    straight = prune("vocabulary", old, tmp_path / "both", {"vocab_size": 300}, **options)
    assert first.before.perplexity != first.after.perplexity
    assert loaded(tmp_path / "two").config.vocab_size == loaded(tmp_path / "both").config.vocab_size == 300
    assert second.after.parameters == straight.after.parameters


def test_a_target_below_what_must_stay_is_one_message(tmp_path, text, caplog):
    old = source(tmp_path / "old", "llama")
    words = ["vocabulary", "--model", str(old), "--output", str(tmp_path / "new"), "--corpus", str(text)]
    with caplog.at_level("INFO"):
        assert main([*words, "--target", "vocab_size=200"]) == 1
    assert "vocab_size = 200 is below what must stay, 2" in caplog.records[-1].getMessage()
    assert not (tmp_path / "new").exists()
