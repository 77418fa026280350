"""Whether a cache is one of a run's data, vocabulary and teacher. All that is not is said at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.data.mixture.dataset import MixtureDataset
from llmshearing.errors import ShearingError
from llmshearing.training.cache.index import ONE_FOLDER, CacheIndex, fingerprint
from llmshearing.training.cache.read import TeacherCache
from llmshearing.training.cache.teacher import identify, tokenizer_hash


def streams_of(data: MixtureDataset) -> dict[str, MdsDirectory]:
    """The directories that a run trains on, by the name that a cache has for them."""
    names = [ONE_FOLDER] if data.plain else data.set_names
    return dict(zip(names, data.streams, strict=True))


def check_cache(
    cache: TeacherCache,
    streams: Mapping[str, MdsDirectory],
    vocab_size: int,
    tokenizer: str | None,
    asked: Mapping[str, Any],
) -> None:
    """Refuse a cache that a run cannot follow.

    Args:
        streams: the run's data by domain. tokenizer: directory of the run's. asked: keys of ``distill`` that must be
            the cache's (top_k, tail, temperature) -> value, None: whatever it has.

    Raises:
        ShearingError: naming everything that differs, with both values.
    """
    index = cache.index
    problems = [*_data_problems(index, streams), *_model_problems(index, vocab_size, tokenizer)]
    for key, value in asked.items():
        if value is not None and value != (has := getattr(index, key)):
            problems.append(f"its {key} is {has}, distill.{key} is {value}")
    if problems:
        raise ShearingError("\n".join(f"distill.cache = {cache.path}: {problem}" for problem in problems))


def _data_problems(index: CacheIndex, streams: Mapping[str, MdsDirectory]) -> Iterator[str]:
    if missing := [name for name in streams if name not in index.domains]:
        yield f"it has no targets for {', '.join(missing)}; it has {', '.join(index.domains)}"
    for name, stream in streams.items():
        if stream.max_seq_len != index.max_seq_len:
            yield f"its sequences are {index.max_seq_len} tokens long, those of {stream.path} {stream.max_seq_len}"
        elif name in index.domains and (there := fingerprint(stream)) != index.domains[name]:
            counts = f"({index.domains[name].samples:,} samples, not {there.samples:,})"
            same = there.samples == index.domains[name].samples
            yield f"it was written for other data than {stream.path} {'(another index.json)' if same else counts}"


def _model_problems(index: CacheIndex, vocab_size: int, tokenizer: str | None) -> Iterator[str]:
    if index.vocab_size != vocab_size:
        yield f"its teacher has vocab_size {index.vocab_size}, the model has {vocab_size}"
    theirs, own = index.teacher.get("tokenizer"), tokenizer_hash(tokenizer)
    if theirs and own and theirs.split()[0] == own.split()[0] and theirs != own:
        yield f"its teacher has another {own.split()[0]} than {tokenizer}: ids mean other tokens"


def check_teacher(cache: TeacherCache, teacher: str) -> None:
    """Refuse a cache of another teacher; reads the teacher's weights once.

    Raises:
        ShearingError: config or weights differ.
    """
    own, has = identify(teacher), cache.index.teacher
    if differing := [key for key in ("config", "weights") if own[key] != has[key]]:
        raise ShearingError(
            f"distill.cache = {cache.path}: it was written by another teacher ({has['name']}) than distill.teacher = "
            f"{teacher}: {' and '.join(differing)} differ"
        )
