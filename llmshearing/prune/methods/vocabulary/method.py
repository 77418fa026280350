"""A smaller vocabulary: the most frequent tokens of a corpus, and all that must stay for any text to be encoded.

    token frequencies (JSON) -> kept ids -> rows of the embeddings (the one fold) + new tokenizer files + special ids

Kept ids ascend, and a token's new id is its rank among them. What stays whatever the frequencies say: special, control,
unknown, user-defined, added and byte tokens, single characters (of a byte-level tokenizer: its 256 symbols), ids that
the configs name, and with every kept piece the pieces that it is merged from (vocabulary_files says why).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmshearing.data.text.codec import Codec
from llmshearing.data.text.corpus import corpus_texts
from llmshearing.data.text.frequencies import Agreement, Frequencies, compare, count_tokens
from llmshearing.errors import ShearingError
from llmshearing.families.names import VOCAB
from llmshearing.families.table import Table
from llmshearing.fold.selection import Selection, Units
from llmshearing.progress import tqdm
from llmshearing.prune.calibration import Calibration
from llmshearing.prune.method import Choice, Method
from llmshearing.prune.methods.vocabulary.files import READERS, Tokens
from llmshearing.prune.methods.vocabulary.ids import ids_of, renumbered
from llmshearing.prune.methods.vocabulary.write import added_ids, write_tokenizer

log = logging.getLogger(__name__)

KIND = "vocab"


def choose(
    model: PreTrainedModel,
    table: Table,
    target: Mapping[str, int],
    calibration: Calibration | None,
    *,
    corpus: Path | str | None = None,
    frequencies: Path | str | None = None,
    corpus_field: str = "text",
    processes: int | None = None,
) -> Choice:
    """Keep ``target["vocab_size"]`` tokens of the tokenizer in the model's directory.

    Args:
        corpus: JSONL or text, a file or folder: counted, and tokenized with both tokenizers as a check.
        frequencies: JSON file of counts; read if it exists, else written. corpus_field: of JSONL.
        processes: to count and check with; None: one a core.

    Raises:
        ShearingError: neither corpus nor frequencies; no tokenizer that can be cut; a target below what must stay; or a
            document of the corpus that does not come back as before.
    """
    directory, size = Path(model.config.name_or_path), table.kinds[KIND].size
    tokenizers = read_tokenizers(directory, size)
    configs = [model.config.to_dict(), model.generation_config.to_dict() if model.generation_config else {}]
    added = added_ids(directory)
    named = added.union(*map(ids_of, configs))
    if outside := sorted(number for number in named if number >= size):
        raise ShearingError(f"the configs of {directory} name token ids {outside}; the vocabulary has {size}")
    wanted = target[table.keys[VOCAB]]
    must_stay(wanted, tokenizers, named)  # before the corpus is counted
    found = _frequencies(directory, size, corpus, frequencies, corpus_field, processes)
    kept = keep(wanted, tokenizers, found.counts, named)
    new = {old: rank for rank, old in enumerate(kept)}
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(directory, new, Path(folder))
        codec = Codec(folder)
        agreement = None
        if corpus is None:
            log.warning("warning: the new tokenizer is not checked: give --corpus")
        else:
            agreement = check(directory, folder, len(kept), corpus_texts(Path(corpus), corpus_field), processes)
    special = added.union(*(tokens.special for tokens in tokenizers))
    return Choice(
        selection=Selection({KIND: (Units(torch.tensor(kept)),)}),
        about=_about(found, kept, agreement),
        config=renumbered(configs[0], new),
        generation=renumbered(configs[1], new),
        write_tokenizer=partial(write_tokenizer, directory, new),
        reencode=partial(reencode, Codec(directory), codec, new, special),
    )


def _frequencies(
    directory: Path, size: int, corpus: Path | str | None, file: Path | str | None, field: str, processes: int | None
) -> Frequencies:
    if file is not None and Path(file).is_file():
        return Frequencies.load(Path(file), Codec(directory).fingerprint, size)
    if corpus is None:
        missing = f"{file} does not exist, and there is no --corpus" if file else "give --corpus, or a file of them"
        raise ShearingError(f"token frequencies: {missing}")
    texts = corpus_texts(Path(corpus), field)
    found = count_tokens(directory, texts, size, corpus=str(corpus), processes=processes)
    if file is not None:
        found.save(Path(file))
        log.info("wrote token frequencies of %d documents to %s", found.documents, file)
    return found


def _about(found: Frequencies, kept: Sequence[int], agreement: Agreement | None) -> dict[str, Any]:
    total = sum(found.counts)
    about: dict[str, Any] = {"corpus": found.corpus, "tokens": total, "documents": found.documents}
    about["kept_share_of_tokens"] = sum(found.counts[i] for i in kept) / max(1, total)
    if agreement is not None:
        about["check"] = {name: getattr(agreement, name) for name in ("documents", "tokens_before", "tokens_after")}
    return about


def read_tokenizers(directory: Path, size: int) -> list[Tokens]:
    """The tokenizer files of a directory. size: of the model's vocabulary.

    Raises:
        ShearingError: there is none, its ids are not below ``size``, or two files give a token different ids.
    """
    if not directory.is_dir():
        raise ShearingError(f"model {directory}: its vocabulary is cut with its tokenizer's files; give a directory")
    found = {name: read(directory / name) for name, read in READERS.items() if (directory / name).is_file()}
    if not found:
        raise ShearingError(f"{directory} has no tokenizer that can be cut: {' or '.join(READERS)}")
    problems = [
        f"{directory / name}: id {highest} of {token!r}; the model's vocabulary has {size}"
        for name, tokens in found.items()
        for token, highest in [max(tokens.ids.items(), key=lambda item: item[1])]
        if highest >= size
    ]
    first, *others = found.values()
    different = [token for other in others for token, i in other.ids.items() if first.ids.get(token, i) != i]
    if different:
        problems.append(f"{' and '.join(found)} in {directory} give {different[0]!r} different ids")
    if problems:
        raise ShearingError("\n".join(problems))
    return list(found.values())


def must_stay(size: int, tokenizers: Sequence[Tokens], named: set[int]) -> set[int]:
    """Ids that stay whatever the frequencies say. named: ids that configs name.

    Raises:
        ShearingError: they are more than ``size``.
    """
    wanted = named.union(*(tokens.must for tokens in tokenizers))
    kept = {part for number in wanted for part in _parts(number, tokenizers)}
    if size < len(kept):
        raise ShearingError(
            f"target vocab_size = {size} is below what must stay, {len(kept)}: special, user-defined and byte "
            "tokens, single characters, and what these are merged from"
        )
    return kept


def keep(size: int, tokenizers: Sequence[Tokens], counts: Sequence[int], named: set[int]) -> list[int]:
    """Ids to keep, ascending: what must stay, then by frequency whatever still fits with the pieces it is merged from.

    Args:
        counts: of every row of the embeddings. named: ids that configs name.

    Raises:
        ShearingError: ``size`` is below what must stay.
    """
    kept = must_stay(size, tokenizers, named)
    tokens = {number for tokenizer in tokenizers for number in tokenizer.ids.values()}
    rest = set(range(len(counts))) - kept
    # Rows without a token come last: no text uses them.
    order = sorted(rest, key=lambda number: (number not in tokens, -counts[number], number))
    while len(kept) < size:
        for number in tqdm(order, desc="choosing tokens", unit="token", leave=False):
            missing = _parts(number, tokenizers) - kept
            if len(kept) + len(missing) <= size:
                kept |= missing
            if len(kept) == size:
                break
    return sorted(kept)


def _parts(number: int, tokenizers: Sequence[Tokens]) -> set[int]:
    return set().union(*(tokens.parts(number) for tokens in tokenizers))


def check(old: Path | str, new: Path | str, size: int, texts: Any, processes: int | None = None) -> Agreement:
    """Encode and decode texts with both tokenizers' directories.

    Raises:
        ShearingError: a text comes back differently, or with ids that are not kept.
    """
    found = compare(old, new, size, texts, processes=processes)
    if found.wrong:
        raise ShearingError(
            f"the new tokenizer does not give back {', '.join(map(repr, found.wrong[:3]))} as the old one"
        )
    log.info(
        "checked %d documents: %d tokens become %d (%+.1f %%)", found.documents, found.tokens_before,
        found.tokens_after, 100 * (found.tokens_after / max(1, found.tokens_before) - 1),
    )  # fmt: skip
    return found


def reencode(old: Codec, new_codec: Codec, new: Mapping[int, int], special: set[int], ids: Sequence[int]) -> list[int]:
    """Ids of the old tokenizer -> of the new one for the same text; special tokens stay where they are."""
    result: list[int] = []
    run: list[int] = []
    for number in (*ids, None):
        if number is not None and number not in special:
            run.append(number)
            continue
        # Where all of a run is kept it is tokenized as before.
        whole = all(token in new for token in run)
        result += [new[token] for token in run] if whole else new_codec.encode([old.decode(run)])[0]
        run = []
        if number is not None:
            result.append(new[number])
    return result


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", metavar="PATH", help="JSONL or text to count tokens of, and to check with")
    parser.add_argument("--frequencies", metavar="FILE", help="token counts as JSON: read if it exists, else written")
    parser.add_argument("--corpus_field", default="text", help="of the corpus' JSONL (%(default)s)")
    parser.add_argument("--processes", type=int, help="to count and check with (one a core)")


METHOD = Method(
    name="vocabulary",
    choose=choose,
    help="most frequent tokens of a corpus, and what they are merged from",
    sizes=(VOCAB,),
    ratio=(VOCAB,),
    add_options=_add_options,
    needs_calibration=lambda options: False,
)
