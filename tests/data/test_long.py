"""A long text in pieces gives the ids of the whole, and its memory does not follow its length."""

import json
import random
import subprocess
import sys

import pytest
from helpers_tokenizers import corpus, train_byte_level
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmshearing.data.text import long


def byte_level(folder):
    train_byte_level(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def without_words(folder):
    """As LLaMA's: no pre-tokenizer, so that one word is the whole text, a prefix at its beginning, bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False, max_token_length=9)
    made.train_from_iterator(["".join(corpus()[:60])], trainer)
    return made


def unigram(folder):
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    made.train_from_iterator(corpus(), trainer)
    return made


def digits_in_threes(folder):
    made = Tokenizer(models.BPE())
    split = r"\p{N}{1,3}|[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s?\p{L}+|\s+"
    from tokenizers import Regex

    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*corpus(), "123 456 789 777 " * 30, "        \n\n\n" * 9], trainer)
    return made


KINDS = {kind.__name__: kind for kind in (byte_level, without_words, unigram, digits_in_threes)}


@pytest.fixture(scope="module", params=KINDS)
def backend(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture
def small_pieces(monkeypatch):
    for name, value in (("LONG", 200), ("PIECE", 400), ("OVERLAP", 240), ("RUN", 4)):
        monkeypatch.setattr(long, name, value)


pieces_of_text = st.one_of(
    st.sampled_from([line.strip() for line in corpus()]), st.text(max_size=20),
    st.builds(
        lambda mark, number: mark * number,
        st.sampled_from([" ", "7", "12", "a", "é", "中", "\n", "=", "\U0001f600"]), st.integers(1, 700),
    ),
)  # fmt: skip


@given(parts=st.lists(pieces_of_text, max_size=40), between=st.sampled_from(["", " ", "\n"]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_pieces_give_the_ids_of_the_whole(backend, small_pieces, parts, between):
    texts = ["short", between.join(parts), ""]
    assert long.encode_all(backend, texts) == [backend.encode(text, add_special_tokens=False).ids for text in texts]


def test_most_of_a_long_text_is_done_in_small_pieces(backend, small_pieces, monkeypatch):
    """Else the test above could pass by encoding everything whole."""
    text = "".join(corpus())
    sizes = []
    encoded = long._encoded
    monkeypatch.setattr(long, "_encoded", lambda b, t, s, e: sizes.append(min(e, len(t)) - s) or encoded(b, t, s, e))
    assert long.encode_long(backend, text) == backend.encode(text, add_special_tokens=False).ids
    assert len(sizes) > len(text) / 400 and max(sizes) <= 800


PREPARE = """
import sys
from llmshearing.data.prepare.run import prepare
prepare(*sys.argv[1:4], 512, eval_fraction=0.3, progress=False, shard_size="1mb")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(*arguments) -> int:
    """Bytes, as the process itself sees them."""
    words = [sys.executable, "-c", PREPARE, *map(str, arguments)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.slow
def test_one_long_document_takes_a_few_bytes_a_character(tmp_path, tokenizer_file):
    draw, words = random.Random(0), "".join(corpus()).split()
    peaks, characters = [], 8_000_000
    for name, size in (("short", 10_000), ("long", characters)):
        (tmp_path / name / "web").mkdir(parents=True)
        documents = [" ".join(draw.choices(words, k=2000)) for _ in range(20)]
        documents.append(" ".join(draw.choices(words, k=size // 5))[:size])
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (tmp_path / name / "web" / "a.jsonl").write_text(lines)
        peaks.append(peak(tmp_path / name, tokenizer_file, tmp_path / f"out-{name}"))
    assert (peaks[1] - peaks[0]) / characters < 40, [p >> 20 for p in peaks]
