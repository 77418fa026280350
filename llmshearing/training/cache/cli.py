"""`llmshearing distill cache`: a teacher's targets for every sample of the training data, written once."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from llmshearing.commands import needs_training, parser, run

if __name__ == "__main__":
    needs_training("llmshearing distill cache")  # one error, before an import below fails

from llmshearing.data.mds.index import INDEX as MDS_INDEX
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.errors import ShearingError
from llmshearing.training.cache.codec import Codec
from llmshearing.training.cache.index import ONE_FOLDER, PART_BYTES, CacheIndex, fingerprint, sample_type
from llmshearing.training.cache.teacher import describe, identify
from llmshearing.training.cache.write import Asked, write_cache
from llmshearing.training.distillation import load_teacher
from llmshearing.training.sparse import SAMPLED, TAILS, content_keys, sparse_targets
from llmshearing.training.targets import Sparse

log = logging.getLogger(__name__)

PROG = "python -m llmshearing.training.cache.cli"
EXAMPLES = f"""{PROG} --teacher models/source --data data/mds --split for_ft --output cache/for_ft
{PROG} --teacher models/source --data data/mds --split for_ft --output cache/wide --top_k 64 --tail bucket"""
PRECISIONS = {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


def cache_targets(
    teacher: str,
    data: Path | str,
    output: Path | str,
    *,
    split: str | None = None,
    domains: Sequence[str] | None = None,
    top_k: int = 32,
    tail: str = SAMPLED,
    temperature: float = 1.0,
    batch: int = 8,
    precision: str | None = None,
    part_bytes: int = PART_BYTES,
) -> CacheIndex:
    """Write the cache, or what is missing of it; see the command's help.

    Raises:
        ShearingError: bad input, or the output is something else. Nothing is written then.
    """
    if batch < 1 or not 0 < temperature < float("inf"):
        raise ShearingError(f"batch = {batch}, temperature = {temperature}: at least 1, and above 0")
    precision = precision or ("amp_bf16" if torch.cuda.is_available() else "fp32")
    output = Path(output)
    config, _ = describe(teacher)
    codec = Codec(config.vocab_size, top_k, tail)
    streams = open_streams(Path(data, split) if split else Path(data), domains, config.vocab_size)
    length = _length(streams)
    whole = max(1, part_bytes // sample_type(codec, length).itemsize // batch) * batch
    index = CacheIndex(
        identify(teacher), config.vocab_size, length, top_k, tail, float(temperature), precision, batch, whole,
        {name: fingerprint(stream) for name, stream in streams.items()},
    )  # fmt: skip
    complete = write_cache(output, index, streams, lambda: asked(teacher, index))
    if complete:
        log.info("wrote the targets of %s to %s: %s", teacher, output, _told(index))
    else:
        log.info("other processes are at the rest of %s (%s); the last of them finishes it", output, _told(index))
    return index


def _told(index: CacheIndex) -> str:
    size, tokens = index.samples * index.sample.itemsize, index.samples * index.max_seq_len
    what = f"{index.samples:,} sequences of {index.max_seq_len:,} tokens, {', '.join(index.domains)}"
    return f"{what}; {size / tokens:.1f} bytes a token, {size / 1e9:.2f} GB"


def open_streams(root: Path, domains: Sequence[str] | None, vocab_size: int) -> dict[str, MdsDirectory]:
    """The data of a split by domain; one folder for all is the domain `.`.

    Raises:
        ShearingError: there are none, or they are not of this vocabulary.
    """
    if not domains and (root / MDS_INDEX).is_file():
        return {ONE_FOLDER: MdsDirectory(root, None, vocab_size)}
    there = sorted(file.parent.name for file in root.glob(f"*/{MDS_INDEX}"))
    below = sorted({file.parent.parent.name for file in root.glob(f"*/*/{MDS_INDEX}")})
    if below and not domains:  # folders beside the splits, as the merged evaluation split, are no domains
        raise ShearingError(f"{root} has no MDS data of one split; give --split, one of {', '.join(below)}")
    if missing := [name for name in domains or () if name not in there]:
        raise ShearingError(f"{root} has no domain {', '.join(missing)}; it has {', '.join(there) or 'none'}")
    if not there:
        raise ShearingError(f"{root} has no MDS data: no folder with an {MDS_INDEX}")
    return {name: MdsDirectory(root / name, None, vocab_size) for name in domains or there}


def _length(streams: dict[str, MdsDirectory]) -> int:
    lengths = {name: stream.max_seq_len for name, stream in streams.items()}
    if len(set(lengths.values())) > 1:
        raise ShearingError(f"sequences are of different lengths: {lengths}; prepare the data anew, or name --domains")
    length = next(iter(lengths.values()))
    if length < 2:
        raise ShearingError(f"sequences of {length} token: nothing follows in them")
    return length


def asked(teacher: str, index: CacheIndex) -> Asked:
    """What a batch's targets are; loads the teacher."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_teacher(teacher).eval().requires_grad_(False).to(device)
    dtype = PRECISIONS[index.precision]

    @torch.no_grad()
    def give(input_ids: Tensor) -> Sparse:
        input_ids = input_ids.to(device)
        with torch.autocast(device, dtype) if dtype is not None else nullcontext():
            logits = model(input_ids=input_ids, use_cache=False).logits
        return sparse_targets(logits, index.top_k, index.tail, content_keys(input_ids), index.temperature)

    return give


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    arguments = _parser().parse_args(argv)

    def command() -> int:
        cache_targets(**vars(arguments))
        return 0

    return run(command)


def _parser() -> argparse.ArgumentParser:
    said = (
        "Write a teacher's targets for every sample of a split, for distill.cache. The same command goes on after a "
        "kill; given to several processes (one for each GPU) it shares the work. docs/distillation.md."
    )
    options = parser(PROG, said, EXAMPLES)
    add = options.add_argument
    add("--teacher", required=True, help="Hugging Face directory or name, or checkpoint")
    add("--data", required=True, help="data_local of the run: output of the data command, or MDS directories")
    add("--split", help="train_loader.dataset.split of the run (default: the domains lie in --data itself)")
    add("--output", required=True, help="directory of the cache")
    add("--domains", nargs="+", help="folders of the split (default: all)")
    add("--top_k", "--top-k", type=int, default=32, help="entries of a position (default: %(default)s)")
    tails = "how the mass beyond is kept: half of the entries sampled from it, or its sum (default: %(default)s)"
    add("--tail", choices=TAILS, default=SAMPLED, help=tails)
    add("--temperature", type=float, default=1.0, help="distill.temperature of the run (default: %(default)s)")
    add("--batch", type=int, default=8, help="sequences that the teacher sees at a time (default: %(default)s)")
    add("--precision", choices=PRECISIONS, help="of the teacher (default: amp_bf16 on a GPU, fp32 without one)")
    return options


if __name__ == "__main__":
    sys.exit(main())
