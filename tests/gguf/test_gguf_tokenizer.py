"""Tokenizers in GGUF files: rebuilt from the keys alone they encode as transformers' do; llama.cpp does too."""

import pytest
from helpers_gguf import model_of, needs_llama_cpp, write
from helpers_tokenizers import TEMPLATE, train_byte_level, train_sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast, T5TokenizerFast

from llmshearing.errors import ShearingError
from llmshearing.families.gguf import PRETOKENIZERS, pretokenizer_of
from llmshearing.families.gguf.pretokenizers import BYTES, DIGITS, WAYS, WORDS_OF_GPT2
from llmshearing.gguf.check import llama_cpp
from llmshearing.gguf.read import keys_of
from llmshearing.gguf.tokenizer import tokenizer_keys

TEXTS = [
    "the walker talks, 12 times: naive cafe",
    "  two  spaces and\n\nlines\tof tabs",
    "naïve café 中文 🙂",
    "I've 1234 paintings; DON'T jumped ...",
]
STEPS = {name: (ignores, way) for name, ignores, way in reversed(WAYS)}


def steps_of(way):
    """The steps of a way as the package tokenizers has them."""
    made = []
    for step in way:
        if step in (BYTES, WORDS_OF_GPT2):
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == WORDS_OF_GPT2))
        elif step == DIGITS:
            made.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            made.append(pre_tokenizers.Split(Regex(step), "isolated"))
    return pre_tokenizers.Sequence(made) if len(made) > 1 else made[0]


def byte_level(folder, steps, **more):
    """A byte-level tokenizer with these steps before the bytes."""
    model = Tokenizer(models.BPE(**more))
    model.pre_tokenizer, model.decoder = steps, decoders.ByteLevel()
    text = ["the walker talks and paints, 1234 times, don't you? naïve café 中文"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    model.add_special_tokens(["<|endoftext|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def sentencepiece(folder):
    train_sentencepiece(folder, "bpe")
    LlamaTokenizerFast(vocab_file=str(folder / "tokenizer.model"), legacy=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", PRETOKENIZERS)
def test_every_way_to_split_is_found_by_its_steps(name, tmp_path):
    ignores, way = STEPS[name]
    keys = tokenizer_keys(byte_level(tmp_path, steps_of(way), ignore_merges=ignores), 400)
    assert keys["tokenizer.ggml.pre"] == name and keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.chat_template"] == TEMPLATE


def test_an_unknown_way_is_refused_unless_named(tmp_path):
    folder = byte_level(tmp_path, pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), steps_of((BYTES,))]))
    with pytest.raises(ShearingError, match="pre_tokenizer has no known name.*Punctuation.*give --pre NAME"):
        tokenizer_keys(folder, 400)
    assert tokenizer_keys(folder, 400, "falcon")["tokenizer.ggml.pre"] == "falcon"
    assert pretokenizer_of(None, False) is None


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_rebuilt_from_the_file_alone_it_encodes_the_same(kind, tmp_path):
    train_byte_level(tmp_path) if kind == "bytes" else sentencepiece(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    keys = tokenizer_keys(tmp_path, 500)
    written = keys_of(write(model_of("llama", vocab_size=500), tmp_path / "a.gguf", tokenizer=keys))
    assert {key: written[key] for key in keys} == keys
    tokens, types = written["tokenizer.ggml.tokens"], written["tokenizer.ggml.token_type"]
    assert len(tokens) == 500 and {types[at] for at in range(len(own), 500)} == {5}
    assert all(types[at] == 3 for at in own.all_special_ids if at != own.unk_token_id)
    ids = {token: at for at, token in reversed([*enumerate(tokens)])}
    if kind == "pieces":
        text = " " * written["tokenizer.ggml.add_space_prefix"] + TEXTS[0]
        assert by_score(text, ids, written["tokenizer.ggml.scores"]) == own.encode(TEXTS[0])[1:]
        assert written["tokenizer.ggml.add_bos_token"]
        return
    merges = [tuple(merge.split(" ")) for merge in written["tokenizer.ggml.merges"]]
    again = Tokenizer(models.BPE(vocab=ids, merges=merges))
    again.pre_tokenizer = steps_of(STEPS[written["tokenizer.ggml.pre"]][1])
    assert [again.encode(text).ids for text in TEXTS] == [own.encode(t, add_special_tokens=False) for t in TEXTS]
    assert written["tokenizer.ggml.add_eos_token"] and not written["tokenizer.ggml.add_bos_token"]


def by_score(text, ids, scores):
    """The rule of llama.cpp for SentencePiece, slowly: merge the neighbours whose token has the highest score."""
    parts = [*text.replace(" ", "▁")]
    while True:
        pairs = [a + b for a, b in zip(parts, parts[1:], strict=False)]
        joined = [(scores[ids[pair]], -at) for at, pair in enumerate(pairs) if pair in ids]
        if not joined:
            return [ids[part] for part in parts]
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_a_unigram_tokenizer_is_refused(tmp_path):
    train_sentencepiece(tmp_path, "unigram")
    T5TokenizerFast(vocab_file=str(tmp_path / "tokenizer.model"), extra_ids=0).save_pretrained(tmp_path)
    with pytest.raises(ShearingError, match="its model is Unigram; llama.cpp merges pairs"):
        tokenizer_keys(tmp_path, 500)


def test_more_tokens_than_rows_are_refused(tmp_path):
    train_byte_level(tmp_path)
    with pytest.raises(ShearingError, match=r"has ids up to \d+; the model has 64 tokens"):
        tokenizer_keys(tmp_path, 64)


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["pieces", "bytes", *PRETOKENIZERS])
def test_llama_cpp_encodes_as_transformers_does(kind, tmp_path):
    if kind in PRETOKENIZERS:
        byte_level(tmp_path, steps_of(STEPS[kind][1]), ignore_merges=STEPS[kind][0])
    else:
        train_byte_level(tmp_path) if kind == "bytes" else sentencepiece(tmp_path)
    keys = tokenizer_keys(tmp_path, 500)
    write(model_of("llama", vocab_size=500), tmp_path / "a.gguf", tokenizer=keys)
    model, own = llama_cpp(tmp_path / "a.gguf"), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        for special in (False, True):
            wanted = own.encode(text, add_special_tokens=special)
            found = model.tokenize(text.encode(), add_bos=special, special=False)
            assert found == wanted, text
    model.close()
