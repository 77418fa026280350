"""The options of `prepare`, as a dataclass and as a command line."""

import argparse
import os
from dataclasses import dataclass

from llmshearing.commands import parser as command_parser
from llmshearing.data.mds.compression import NAMES
from llmshearing.data.prepare.forms import AUTO, FORMS
from llmshearing.data.prepare.packing import EVAL, FOR_FT, FOR_PRUNE
from llmshearing.errors import ShearingError

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LARGEST_ID = {"uint16": 2**16 - 1, "uint32": 2**32 - 1}


@dataclass(frozen=True)
class Options:
    """Everything but the input and the tokenizer that decides the result."""

    max_seq_len: int
    text_field: str = "text"
    seed: int = 17
    eval_fraction: float = 0.02
    for_prune_fraction: float = 0.25
    eval_seqs: int | None = None
    for_prune_seqs: int | None = None
    for_ft_seqs: int | None = None
    eval_tokens: int | None = None
    for_prune_tokens: int | None = None
    for_ft_tokens: int | None = None
    proportions: dict[str, float] | None = None
    dedup: bool = False
    on_error: str = "fail"
    dtype: str = "auto"
    shard_size: str = "64mb"
    compression: str | None = None
    form: str = AUTO

    def fractions(self) -> dict[str, float]:
        """Share of the documents by split; splits without a share are not written."""
        rest = 1 - self.eval_fraction - self.for_prune_fraction
        shares = {EVAL: self.eval_fraction, FOR_PRUNE: self.for_prune_fraction, FOR_FT: rest}
        return {split: share for split, share in shares.items() if share > 1e-9}

    def limits(self) -> dict[str, int | None]:
        """Most sequences a domain in each split."""
        return {EVAL: self.eval_seqs, FOR_PRUNE: self.for_prune_seqs, FOR_FT: self.for_ft_seqs}

    def budgets(self) -> dict[str, int | None]:
        """Most tokens of all domains together in each split."""
        return {EVAL: self.eval_tokens, FOR_PRUNE: self.for_prune_tokens, FOR_FT: self.for_ft_tokens}

    def limit(self, split: str, domain: str, domains: int) -> int | None:
        """Most sequences of a domain in a split: by number, and by its share of the split's tokens."""
        given, budget = self.limits()[split], self.budgets()[split]
        if budget is None:
            return given
        share = 1 / domains if self.proportions is None else self.proportions[domain]
        by_tokens = max(1, round(budget * share / self.max_seq_len))
        return by_tokens if given is None else min(given, by_tokens)

    def problems(self) -> list[str]:
        said = []
        if self.max_seq_len < 2:
            said.append(f"max_seq_len is {self.max_seq_len}; it must be at least 2")
        if min(self.eval_fraction, self.for_prune_fraction) < 0 or self.eval_fraction + self.for_prune_fraction > 1:
            said.append(
                f"eval_fraction {self.eval_fraction} and for_prune_fraction {self.for_prune_fraction} "
                "must be at least 0 and sum to at most 1"
            )
        said += [f"{s}_seqs is {n}; it must be at least 1" for s, n in self.limits().items() if n is not None and n < 1]
        said += [
            f"{s}_tokens is {n}; at least 1 is needed" for s, n in self.budgets().items() if n is not None and n < 1
        ]
        if self.proportions is not None:
            shares = list(self.proportions.values())
            if min(shares, default=0) <= 0 or abs(sum(shares) - 1) > 1e-6:
                said.append(f"proportions {self.proportions} must be above 0 and sum to 1")
            if not any(self.budgets().values()):
                said.append("proportions are shares of a split's tokens; give for_prune_tokens or another budget too")
        if self.on_error not in ("fail", "skip"):
            said.append(f"on_error is {self.on_error!r}; known are fail and skip")
        if self.form not in (AUTO, *FORMS):
            said.append(f"form is {self.form!r}; known are {', '.join((AUTO, *FORMS))}")
        if self.dtype not in ("auto", *LARGEST_ID):
            said.append(f"dtype is {self.dtype!r}; known are auto, uint16, uint32")
        said += self._shard_problems()
        if self.seed < 0:
            said.append(f"seed is {self.seed}; it must be at least 0")
        return said

    def _shard_problems(self) -> list[str]:
        from streaming.base.util import bytes_to_int  # brings torch, which worker processes do without

        said = []
        try:
            size = bytes_to_int(self.shard_size)
        except ValueError:
            size = 0
        if not 0 < size < 2**32:  # MDS counts a shard's bytes in 32 bits
            said.append(f"shard_size is {self.shard_size!r}; write it like 64mb, below 4gb")
        if self.compression is not None and self.compression not in NAMES:
            names = sorted(name for name in NAMES if ":" not in name)
            said.append(f"compression is {self.compression!r}; known are {', '.join(names)}, with a level as in zstd:7")
        return said


def _whole(text: str) -> int:
    return int(float(text))


def _share(text: str) -> tuple[str, float]:
    domain, _, share = text.rpartition("=")
    if not domain:
        raise ValueError(text)
    return domain, float(share)


def resolve_dtype(asked: str, vocab_size: int) -> str:
    """uint16 or uint32; raises ShearingError if `asked` cannot hold every id below `vocab_size`."""
    if asked == "auto":
        return "uint16" if vocab_size - 1 <= LARGEST_ID["uint16"] else "uint32"
    if vocab_size - 1 > LARGEST_ID[asked]:
        raise ShearingError(
            f"dtype is {asked}, but the tokenizer has ids up to {vocab_size - 1}; use --dtype uint32 (or auto)"
        )
    return asked


def parser() -> argparse.ArgumentParser:
    """The command line; its names are those of `Options` and of `prepare`."""
    example = """
python -m llmshearing.data.prepare --input corpus --tokenizer models/source \\
    --output data/mds --max_seq_len 4096 --eval_seqs 500
python -m llmshearing.data.prepare --input chats --form chat --tokenizer models/source-instruct \\
    --output data/answers --max_seq_len 4096
"""
    said = command_parser(
        "python -m llmshearing.data.prepare",
        "Turn folders of JSONL or Parquet, one folder a domain, into the MDS data that training reads.",
        example,
    )
    said.add_argument(
        "--input", required=True, help="folder with a folder of .jsonl[.gz|.zst] or .parquet files a domain"
    )
    said.add_argument("--tokenizer", required=True, help="HF directory, tokenizer.json, or SentencePiece .model file")
    said.add_argument("--output", required=True, help="folder to write; must not exist, or hold this very result")
    said.add_argument("--max_seq_len", type=int, required=True, help="tokens a sequence")
    said.add_argument("--domains", nargs="+", help="only these folders of the input (default: all)")
    said.add_argument(
        "--text_field", default=Options.text_field, help="field or column of the text (default: %(default)s)"
    )
    said.add_argument(
        "--form", default=AUTO, choices=(AUTO, *FORMS),
        help="of the records: text; prompt ({prompt, completion}) and chat ({messages}) get a loss mask of their "
        "answers; auto: what the first record of each file is (default: %(default)s)",
    )  # fmt: skip
    said.add_argument("--seed", type=int, default=Options.seed, help="of the split by hash (default: %(default)s)")
    shares = (("eval", Options.eval_fraction), ("for_prune", Options.for_prune_fraction))
    for split, share in shares:
        said.add_argument(
            f"--{split}_fraction",
            type=float,
            default=share,
            help=f"share of the documents that goes to {split}; for_ft gets the rest (default: %(default)s)",
        )
    for split in (EVAL, FOR_PRUNE, FOR_FT):
        said.add_argument(f"--{split}_seqs", type=int, help=f"most sequences a domain in {split} (default: all)")
    for split in (EVAL, FOR_PRUNE, FOR_FT):
        said.add_argument(
            f"--{split}_tokens", type=_whole, help=f"most tokens of all domains in {split}, e.g. 4e8 (default: all)"
        )
    said.add_argument(
        "--proportions", nargs="+", type=_share, metavar="DOMAIN=SHARE", help="of those tokens (default: equal shares)"
    )
    said.add_argument("--dedup", action="store_true", help="keep the first of equal documents, over all domains")
    said.add_argument(
        "--on_error", default="fail", choices=("fail", "skip"), help="broken lines: stop, or leave out and count them"
    )
    said.add_argument(
        "--processes", type=int, default=CORES, help="that tokenize; changes no byte (default: %(default)s)"
    )
    said.add_argument("--dtype", default="auto", choices=("auto", *LARGEST_ID), help="of the ids (default: by size)")
    said.add_argument("--shard_size", default=Options.shard_size, help="of one MDS file (default: %(default)s)")
    said.add_argument("--compression", help="of the shards: br, bz2, gz, snappy or zstd, as in zstd:7 (default: none)")
    said.add_argument("--remote", help="upload the result there too, e.g. s3://bucket/data; the manifest comes last")
    said.add_argument(
        "--drop_local", dest="keep_local", action="store_false",
        help="with --remote: remove training shards here once they are uploaded",
    )  # fmt: skip
    said.add_argument("--bos_token", help="if the tokenizer has none or the wrong one")
    said.add_argument("--eos_token", help="if the tokenizer has none or the wrong one")
    said.add_argument("--no_progress", action="store_true", help="no progress bars")
    return said
