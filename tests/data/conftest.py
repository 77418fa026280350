"""Small real inputs: text of two domains, a tokenizer trained on it, prepared data; MDS directories made by hand."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEQ = 16
VOCAB = 300


WORDS = "the model sheds heads and layers while it learns café".split()


def words(generator: random.Random, number: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(number))


@pytest.fixture(scope="session")
def texts() -> dict[str, list[str]]:
    """Documents of two domains, a third of them exact duplicates of documents of the other domain."""
    generator = random.Random(0)
    books = [f"book {i} " + words(generator, generator.randint(1, 60)) for i in range(120)]
    code = [f"code {i} " + words(generator, generator.randint(1, 60)) for i in range(80)] + books[:40]
    return {"books": books, "code": code}


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, list[str]], None]:
    def write(path: Path, documents: list[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))

    return write


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts, write_jsonl) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    for domain, documents in texts.items():
        write_jsonl(root / domain / "a.jsonl", documents[:50])
        write_jsonl(root / domain / "b.jsonl", documents[50:])
    return root


def _train_tokenizer(documents: list[str], special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def train_tokenizer() -> Callable[[list[str], list[str]], Tokenizer]:
    return _train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory, texts) -> Path:
    """A byte-level BPE `tokenizer.json` with <s> = 0 and </s> = 1."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    _train_tokenizer(texts["books"], ["<s>", "</s>"]).save(str(path))
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, corpus, tokenizer_file) -> Path:
    from llmshearing.data.prepare.run import prepare

    output = tmp_path_factory.mktemp("prepared") / "data"
    prepare(corpus, tokenizer_file, output, SEQ, eval_fraction=0.3, for_prune_fraction=0.3, progress=False)
    return output


def _write_domain(path: Path, name: str, samples: int, first: int = 0, seq: int = SEQ, shard: str = "64mb") -> None:
    """An MDS directory whose sample i is seq times the id first + i."""
    columns = {"tokens": f"ndarray:uint16:{seq}", "set": "str"}
    with MDSWriter(out=str(path), columns=columns, hashes=["xxh64"], size_limit=shard) as writer:
        for i in range(samples):
            writer.write({"tokens": np.full(seq, first + i, np.uint16), "set": name})


@pytest.fixture(scope="session")
def write_domain() -> Callable[..., None]:
    return _write_domain


@pytest.fixture
def domains(tmp_path) -> tuple[Path, list[str]]:
    """`train/{a,b,c}` of very different sizes and a merged `eval` of 101 samples; ids tell samples apart."""
    names = ["a", "b", "c"]
    for i, samples in enumerate((5, 40, 23)):
        _write_domain(tmp_path / "train" / names[i], names[i], samples, 100 * i)
    columns = {"tokens": f"ndarray:uint16:{SEQ}", "set": "str"}
    with MDSWriter(out=str(tmp_path / "eval"), columns=columns, hashes=["xxh64"]) as writer:
        for i in range(101):
            name = names[0] if i < 70 else names[1] if i < 98 else names[2]
            writer.write({"tokens": np.full(SEQ, i, np.uint16), "set": name})
    return tmp_path, names
