"""Loss and perplexity by domain: per token, per word and per byte, with standard errors and a unigram baseline.

    loss             nats per scored token                       exp(loss): perplexity per token
    per word         nats of a document / its words              words: what white space parts
    per byte         nats of a document / its UTF-8 bytes        bits per byte: the same over ln 2
    unigram          what the same tokens cost a model that knows only how often each occurs among the others:
                     p(t) = count(t) / (N - 1 + V), Laplace's estimate from all tokens but the one it predicts

Tokens of different vocabularies do not compare, words and bytes do. Standard errors are over documents: those of a
ratio of sums. Nothing is scored that has nothing before it, so without BOS each document is short of its first token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmshearing.data.mds.manifest import check_tokenizer
from llmshearing.errors import ShearingError
from llmshearing.evaluate.texts import Data, TextDomain, TokenDomains, Tokens, counts_of
from llmshearing.evaluate.windows import sequence_losses
from llmshearing.progress import tqdm

BOS = ("auto", "always", "never")
WIDEST = 1024
"""Tokens of a window where none is asked for; less where the model knows fewer positions."""


@dataclass(frozen=True)
class LossOptions:
    """How texts are cut and scored."""

    window: int | None = None
    """Tokens that the model sees at once; None: what MDS data has, else WIDEST or the model's longest."""
    stride: int | None = None
    """Tokens between two windows' ends; None: half a window."""
    bos: str = "auto"
    """Whether a document begins with BOS: as the tokenizer does by itself, always (EOS where there is no BOS), never.
    Sequences of MDS stay as they are."""
    batch_size: int = 8
    documents: int | None = None
    """At most so many of each domain."""


@dataclass
class Sums:
    """What is summed over the documents of a domain."""

    documents: list[tuple[float, int]] = field(default_factory=list)
    """Nats and scored tokens of each."""
    words: int = 0
    bytes: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    """Scored tokens by id."""

    def add(self, other: Sums) -> None:
        """Take another domain in."""
        self.documents += other.documents
        self.words, self.bytes = self.words + other.words, self.bytes + other.bytes
        self.counts += other.counts

    def as_plain(self, vocab_size: int) -> dict[str, Any]:
        """Losses in nats and what follows from them."""
        nats, tokens = math.fsum(nats for nats, _ in self.documents), sum(number for _, number in self.documents)
        loss, stderr = nats / tokens, _ratio_stderr(self.documents)
        per_word = nats / self.words if self.words else None
        per_byte = nats / self.bytes if self.bytes else None
        return {
            "documents": len(self.documents),
            "tokens": tokens,
            "words": self.words,
            "bytes": self.bytes,
            "loss": loss,
            "loss_stderr": stderr,
            "perplexity": _exp(loss),
            "perplexity_stderr": None if stderr is None else stderr * _exp(loss),
            "loss_per_word": per_word,
            "word_perplexity": None if per_word is None else _exp(per_word),
            "loss_per_byte": per_byte,
            "byte_perplexity": None if per_byte is None else _exp(per_byte),
            "bits_per_byte": None if per_byte is None else per_byte / math.log(2),
            "unigram_loss": unigram_loss(self.counts, vocab_size),
        }


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _ratio_stderr(documents: Sequence[tuple[float, int]]) -> float | None:
    """Standard error of sum(nats) / sum(tokens) over documents, linearised; None for one document."""
    number, tokens = len(documents), sum(tokens for _, tokens in documents)
    if number < 2:
        return None
    loss = math.fsum(nats for nats, _ in documents) / tokens
    squares = math.fsum((nats - loss * own) ** 2 for nats, own in documents)
    return math.sqrt(number / (number - 1) * squares) / tokens


def unigram_loss(counts: Counter[int], vocab_size: int) -> float:
    """Nats per token of the leave-one-out unigram model with Laplace's estimate; see the module."""
    number = sum(counts.values())
    return math.fsum(c * math.log((number - 1 + vocab_size) / c) for c in counts.values()) / number


def bos_id(tokenizer: PreTrainedTokenizerBase, bos: str) -> int | None:
    """The token that documents begin with; None: none does."""
    if bos == "never":
        return None
    own = tokenizer.bos_token_id
    if bos == "always":
        found = own if own is not None else tokenizer.eos_token_id
        if found is None:
            raise ShearingError("--bos always: the tokenizer has neither BOS nor EOS")
        return found
    encoded = tokenizer("a")["input_ids"]
    return own if own is not None and encoded and encoded[0] == own else None


def measure_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, data: Data, options: LossOptions, name: str = ""
) -> dict[str, Any]:
    """Losses by domain and of all, and how they were measured; plain data.

    Args:
        tokenizer: None is allowed for MDS, whose words and bytes are then not known. name: of the model, for progress.

    Raises:
        ShearingError: data without a token to score, or of another tokenizer; or options that no window fits.
    """
    if isinstance(data, TokenDomains):
        sums, how = _of_tokens(model, tokenizer, data, options, name)
    elif tokenizer is None:
        raise ShearingError("texts need a tokenizer: give --tokenizer DIRECTORY")
    else:
        sums, how = _of_texts(model, tokenizer, data, options, name)
    if empty := [domain for domain, found in sums.items() if not found.documents]:
        raise ShearingError(f"data: {', '.join(empty)}: no token to score; give texts of two tokens or more")
    total = Sums()
    for found in sums.values():
        total.add(found)
    size = model.config.vocab_size
    return {**how, "all": total.as_plain(size), "domains": {key: each.as_plain(size) for key, each in sums.items()}}


def _of_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: TokenDomains,
    options: LossOptions,
    name: str,
) -> tuple[dict[str, Sums], dict[str, Any]]:
    if data.recorded is not None and tokenizer is not None:
        check_tokenizer(data.recorded, Path(tokenizer.name_or_path))
    domains = data.sequences(model.config.vocab_size, options.documents)
    length = max((len(row.ids) for rows in domains.values() for row in rows), default=0)
    width, stride = sizes(model, options, length or WIDEST)
    sums = {}
    for domain, rows in domains.items():
        sums[domain] = _scored(model, rows, (width, stride, options.batch_size), f"{name} {domain}".strip())
        if tokenizer is not None:
            texts = tokenizer.batch_decode([row.scored() for row in rows], skip_special_tokens=True)
            sums[domain].words, sums[domain].bytes = (counts_of(texts)[key] for key in ("words", "bytes"))
    return sums, {"window": width, "stride": stride, "bos": None, "data": str(data.path)}


def _of_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[TextDomain],
    options: LossOptions,
    name: str,
) -> tuple[dict[str, Sums], dict[str, Any]]:
    width, stride = sizes(model, options, WIDEST)
    first = bos_id(tokenizer, options.bos)
    sums = {}
    for domain in data:
        texts = list(domain.documents(options.documents))
        rows = [Tokens(ids) for ids in _encoded(tokenizer, texts, [] if first is None else [first])]
        if (highest := max((max(row.ids) for row in rows if row.ids), default=0)) >= model.config.vocab_size:
            said = f"the tokenizer gives id {highest}, the model's vocab_size is {model.config.vocab_size}"
            raise ShearingError(f"{said}: they do not belong together; give --tokenizer DIRECTORY")
        sums[domain.name] = _scored(model, rows, (width, stride, options.batch_size), f"{name} {domain.name}".strip())
        sums[domain.name].words, sums[domain.name].bytes = (counts_of(texts)[key] for key in ("words", "bytes"))
    token = None if first is None else tokenizer.convert_ids_to_tokens(first)
    return sums, {"window": width, "stride": stride, "bos": token, "data": ", ".join(each.name for each in data)}


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], first: list[int]) -> Iterator[list[int]]:
    for text in texts:
        yield first + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def sizes(model: PreTrainedModel, options: LossOptions, default: int) -> tuple[int, int]:
    """Window and stride, in tokens.

    Raises:
        ShearingError: no window fits the model, or tokens would be left out between two windows.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or default
    width = options.window or min(default, longest)
    stride = options.stride or max(1, width // 2)
    if not 2 <= width <= longest:
        raise ShearingError(f"window = {width}: must be from 2 to the model's longest, {longest} tokens")
    if not 1 <= stride < width:
        raise ShearingError(
            f"stride = {stride}: must be from 1 to {width - 1}, below the window, or tokens are left out"
        )
    return width, stride


def _scored(model: PreTrainedModel, rows: Sequence[Tokens], sizes: tuple[int, int, int], title: str) -> Sums:
    sums = Sums()
    width, stride, batch_size = sizes
    losses = sequence_losses(model, [row.ids for row in rows], width, stride, batch_size)
    total = sum(max(0, len(row.ids) - 1) for row in rows)
    with tqdm(total=total, desc=f"loss {title}", unit="token", leave=False) as bar:
        for row, found in zip(rows, losses, strict=True):
            bar.update(len(found))
            if row.counts is not None:
                found = found[torch.tensor(row.counts[1:], dtype=torch.bool)]
            if len(found):
                sums.documents.append((float(found.sum()), len(found)))
                sums.counts.update(row.scored())
    return sums
