"""A cut vocabulary: closed under merges, any text encoded and given back with kept ids, and all ids follow.

The tokenizers are trained here, of every kind; the lab's documents are used where they are (LAB=directory).
"""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers_tokenizers import SPECIAL, add_beside_sentencepiece, corpus, train_byte_level, train_sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmshearing.compat import FIVE
from llmshearing.data.text import frequencies
from llmshearing.data.text.codec import Codec
from llmshearing.data.text.corpus import corpus_texts
from llmshearing.data.text.frequencies import Frequencies, compare, count_tokens
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.fold import fold
from llmshearing.prune.methods.vocabulary.method import choose, keep, read_tokenizers
from llmshearing.prune.methods.vocabulary.write import write_tokenizer

LAB = Path(os.environ.get("LAB", Path(__file__).resolve().parents[4] / "shared" / "lab"))


@pytest.fixture(scope="module", params=["byte-level", "bpe", "unigram", "lab"])
def source(request, tmp_path_factory):
    """Directory with a tokenizer and the frequencies of its ids; 3 rows of the embeddings have no token."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "lab":
        if not LAB.is_dir():
            pytest.skip(f"no lab at {LAB} (set LAB)")
        folder, texts = LAB / "tokenizer", corpus_texts(LAB / "corpus" / "eval")
    else:
        train_byte_level(folder) if request.param == "byte-level" else train_sentencepiece(folder, request.param)
        texts = corpus()
    size = 3 + max(i for tokens in read_tokenizers(folder, 1 << 20) for i in tokens.ids.values()) + 1
    return folder, size, count_tokens(folder, texts, size, processes=1)


def minimum(folder, size):
    with pytest.raises(ShearingError, match=r"vocab_size = 1 is below what must stay, \d+") as error:
        keep(1, read_tokenizers(folder, size), [0] * size, set())
    return int(str(error.value).split("must stay, ")[1].split(":")[0])


@pytest.fixture(scope="module", params=[0.0, 0.3, 0.9, 1.0])
def cut(source, request, tmp_path_factory):
    """(old directory, new directory, old id -> new id), with nothing more than must stay up to everything."""
    folder, size, found = source
    low = minimum(folder, size)
    kept = keep(low + int(request.param * (size - low)), read_tokenizers(folder, size), found.counts, set())
    assert len(kept) == low + int(request.param * (size - low))
    assert kept == sorted(set(kept))
    new, out = {old: rank for rank, old in enumerate(kept)}, tmp_path_factory.mktemp("new")
    write_tokenizer(folder, new, out)
    return folder, out, new


def assert_agrees(cut, texts):
    folder, out, new = cut
    old_codec, new_codec = Codec(folder), Codec(out)
    for text, before, after in zip(texts, old_codec.encode(texts), new_codec.encode(texts), strict=True):
        assert all(0 <= i < len(new) for i in after)
        assert new_codec.decode(after) == old_codec.decode(before)
        if all(i in new for i in before):  # a text of kept tokens is tokenized as before
            assert after == [new[i] for i in before], text


awkward = st.text(
    st.one_of(
        st.characters(codec="utf-8"), st.sampled_from("the walkingtalked 0123456789\n\t \x00\x07\x1b\x7f"),
        st.sampled_from("😀👩‍👩‍👧‍👦🏳️‍🌈中文字漢にほんご한국어אבגﷺ\u200d\u202e\ufeff�"),
    )
)  # fmt: skip


@given(texts=st.lists(st.one_of(awkward, st.sampled_from([*SPECIAL, "<s>", "</s>", "<0x0A>", "<tool>"])), max_size=8))
@settings(max_examples=60)
def test_any_text_comes_back_with_kept_ids(cut, texts):
    assert_agrees(cut, [*texts, "".join(texts), " ".join(texts)])


def test_documents_come_back(cut):
    folder = cut[0]
    assert_agrees(cut, list(corpus_texts(LAB / "corpus" / "eval")) if folder == LAB / "tokenizer" else corpus())


def test_what_must_stay_stays_and_pieces_can_still_be_made(cut):
    folder, out, new = cut
    for name in ("tokenizer.model", "tokenizer.json"):
        if not (folder / name).is_file():
            continue
        old, model = Codec(folder, name), Codec(out, name)
        if name.endswith("model"):
            pieces = {old.model.id_to_piece(i): i for i in range(old.model.get_piece_size())}
            other = [i for i in pieces.values() if not (old.model.is_control(i) or old.model.is_unknown(i))]
            assert all(i in new for i in pieces.values() if i not in other or old.model.is_byte(i))
        else:
            pieces = old.model.get_vocab(with_added_tokens=True)
            added = json.loads((folder / name).read_text())["added_tokens"]
            assert all(token["id"] in new for token in added)
            assert {t["content"]: new[t["id"]] for t in added} == {
                t["content"]: t["id"] for t in json.loads((out / name).read_text())["added_tokens"]
            }
            if "walking stick" in pieces:
                assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(model.model.get_vocab())
        assert all(i in new for piece, i in pieces.items() if len(piece) == 1)
        # Closure: a piece that the old tokenizer makes of its own text, the new one makes too.
        kept = [(piece, i) for piece, i in pieces.items() if i in new]
        texts = [old.decode([i]) for _, i in kept]
        for text, before, after in zip(texts, old.encode(texts), model.encode(texts), strict=True):
            if all(i in new for i in before):
                assert after == [new[i] for i in before], text


def merged_from(ids, ranks, piece):
    """Whether some order of merges leads to the piece within ``ids``; brute force over all splits."""
    if len(piece) == 1:
        return piece in ids
    return piece in ids and any(
        (piece[:at], piece[at:]) in ranks and all(merged_from(ids, ranks, part) for part in (piece[:at], piece[at:]))
        for at in range(1, len(piece))
    )


def test_closure_by_brute_force(tmp_path):
    train_byte_level(tmp_path)
    size = 430
    counts = count_tokens(tmp_path, corpus(), size, processes=1).counts
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    text, ranks = {i: piece for piece, i in model["vocab"].items()}, {tuple(merge) for merge in model["merges"]}
    for wanted in range(minimum(tmp_path, size), size, 13):
        kept = keep(wanted, read_tokenizers(tmp_path, size), counts, set())
        ids = {text[i] for i in kept if i in text}
        assert all(merged_from(ids, ranks, piece) for piece in ids)


def model_in(folder, size, tied):
    config = LlamaConfig(
        vocab_size=size, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1,
        tie_word_embeddings=tied, bos_token_id=421, eos_token_id=[422, 421], pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id, model.generation_config.suppress_tokens = 420, [5, 400, 422]
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_model_config_and_chat_template_follow(tmp_path, tied):
    train_byte_level(tmp_path)
    model = model_in(tmp_path, 430, tied)
    (tmp_path / "text.txt").write_text("".join(corpus()), encoding="utf-8")
    table, counts = table_for(model.config), tmp_path / "counts.json"
    target = {**table.shape(), "vocab_size": 300}
    choice = choose(model, table, target, None, corpus=tmp_path / "text.txt", frequencies=counts, processes=1)
    assert (
        sum(json.loads(counts.read_text())["counts"])
        == choice.about["tokens"]
        == choice.about["check"]["tokens_before"]
    )
    (units,) = choice.selection.units["vocab"]
    new = {old: rank for rank, old in enumerate(units.index.tolist())}
    assert choice.config["bos_token_id"] == new[421]
    assert choice.config["eos_token_id"] == [new[422], new[421]]
    assert choice.generation["pad_token_id"] == new[420]
    assert choice.generation["suppress_tokens"] == [new[i] for i in (5, 400, 422) if i in new]
    out = tmp_path / "out"
    out.mkdir()
    choice.write_tokenizer(out)
    old, small = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(out)
    assert small.eos_token_id == new[old.eos_token_id]
    assert small.encode("paint")[-1] == new[old.eos_token_id]
    chat = [{"role": "user", "content": "walked 中 😀"}]
    both = [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for tokenizer in (old, small)]
    assert both[1][0] == new[both[0][0]]
    assert small.decode(both[1]) == old.decode(both[0]) == old.apply_chat_template(chat, tokenize=False)
    # The rows follow their tokens: the same text of kept tokens has the same logits on kept tokens.
    folded = LlamaForCausalLM(LlamaConfig.from_dict({**model.config.to_dict(), **target, **choice.config}))
    folded.load_state_dict(fold(model.state_dict(), table, choice.selection), strict=True)
    ids = torch.tensor([[old_id for old_id in new if old_id < 420][:40]])
    again = torch.tensor([choice.reencode(ids[0].tolist())])
    assert again.tolist() == [[new[i] for i in ids[0].tolist()]]
    torch.testing.assert_close(folded.eval()(again).logits, model(ids).logits[..., units.index])
    text = "jumper 421 unprintable"
    assert choice.reencode([421, *Codec(tmp_path).encode([text])[0], 422]) == [
        new[421], *Codec(out).encode([text])[0], new[422]
    ]  # fmt: skip


def test_slow_and_fast_tokenizers_of_the_lab_agree(tmp_path):
    if not LAB.is_dir():
        pytest.skip(f"no lab at {LAB} (set LAB)")
    counts = count_tokens(LAB / "tokenizer", corpus_texts(LAB / "corpus" / "eval" / "wiki"), 4096, processes=1).counts
    kept = keep(2000, read_tokenizers(LAB / "tokenizer", 4096), counts, set())
    write_tokenizer(LAB / "tokenizer", {old: rank for rank, old in enumerate(kept)}, tmp_path)
    fast, slow = (AutoTokenizer.from_pretrained(tmp_path, use_fast=use) for use in (True, False))
    source, plain = AutoTokenizer.from_pretrained(LAB / "tokenizer"), Codec(tmp_path)
    for text in list(corpus_texts(LAB / "corpus" / "eval" / "code"))[:5]:
        assert fast.encode(text) == slow.encode(text)
        # transformers 5 loses one of the spaces that a text begins with, of the source's tokenizer too
        before, after = (each.decode(each.encode(text), skip_special_tokens=True) for each in (source, fast))
        assert after == before and (after.lstrip() == text.lstrip() if FIVE else after == text)
        assert plain.decode(plain.encode([text])[0]) == text


def test_tokens_that_transformers_adds_to_a_sentencepiece_model_stay(tmp_path):
    train_sentencepiece(tmp_path, "bpe")
    extra = add_beside_sentencepiece(tmp_path, "<extra>")
    slow = AutoTokenizer.from_pretrained(tmp_path, use_fast=False)
    assert slow.convert_tokens_to_ids("<extra>") == extra
    model, text = model_in(tmp_path, 430, False), tmp_path / "text.txt"
    text.write_text("".join(corpus()), encoding="utf-8")
    table, out = table_for(model.config), tmp_path / "out"
    choice = choose(model, table, {**table.shape(), "vocab_size": 370}, None, corpus=text, processes=1)
    out.mkdir()
    choice.write_tokenizer(out)
    kept = choice.selection.units["vocab"][0].index.tolist()
    small = AutoTokenizer.from_pretrained(out, use_fast=False)
    assert small.convert_tokens_to_ids("<extra>") == kept.index(extra)
    before, after = (tokenizer.encode("walk<extra>") for tokenizer in (slow, small))
    assert small.decode(after) == slow.decode(before)
    assert after[-1] == kept.index(extra)
    assert choice.reencode([extra, 1]) == [kept.index(extra), 1]


def test_processes_and_frequencies_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(frequencies, "BATCH", 1 << 10)
    monkeypatch.setattr(frequencies, "SMALL", 4 << 10)
    train_byte_level(tmp_path)
    texts = corpus()
    one, two = (count_tokens(tmp_path, texts, 430, processes=processes) for processes in (1, 2))
    assert one == two
    assert one.documents == len(texts)
    seen = compare(tmp_path, tmp_path, 430, texts, processes=2)
    assert (seen.documents, seen.tokens_before, seen.wrong) == (len(texts), sum(one.counts), ())
    one.save(tmp_path / "counts.json")
    assert Frequencies.load(tmp_path / "counts.json", one.tokenizer, 430) == one
    with pytest.raises(ShearingError, match="counted with another tokenizer"):
        Frequencies.load(tmp_path / "counts.json", "other", 430)
    (tmp_path / "counts.json").write_text("{")
    with pytest.raises(ShearingError, match="cannot be read"):
        Frequencies.load(tmp_path / "counts.json", one.tokenizer, 430)


def test_bad_input_is_named(tmp_path):
    train_byte_level(tmp_path)
    model = model_in(tmp_path, 430, False)
    table, text = table_for(model.config), tmp_path / "text.txt"
    text.write_text("a walk\n")

    def attempt(size=300, **options):
        return choose(model, table, {**table.shape(), "vocab_size": size}, None, processes=1, **options)

    with pytest.raises(ShearingError, match="vocab_size = 100 is below what must stay, 2"):
        attempt(100, corpus=tmp_path / "nowhere")  # said before anything is counted
    with pytest.raises(ShearingError, match="give --corpus"):
        attempt()
    with pytest.raises(ShearingError, match="no file ending in"):
        attempt(corpus=tmp_path / "nowhere")
    model.generation_config.sequence_bias = [[[1], 2.0]]
    with pytest.raises(ShearingError, match="sequence_bias"):
        attempt(corpus=text)
    model.generation_config.sequence_bias = None
    model.config.pad_token_id = 999
    with pytest.raises(ShearingError, match=r"token ids \[999\]"):
        attempt(corpus=text)
    with pytest.raises(ShearingError, match="the model's vocabulary has 400"):
        read_tokenizers(tmp_path, 400)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "model": {"type": "WordPiece", "vocab": {}}}))
    with pytest.raises(ShearingError, match="only plain BPE can be cut, this is a WordPiece model"):
        read_tokenizers(tmp_path, 430)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ShearingError, match="no tokenizer that can be cut"):
        read_tokenizers(tmp_path, 430)
    with pytest.raises(ShearingError, match="give a directory"):
        read_tokenizers(Path("some/name"), 430)
