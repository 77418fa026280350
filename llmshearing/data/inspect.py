"""Shows what a prepared directory holds: `python -m llmshearing.data.inspect DIR [--tokenizer T --samples N]`.

DIR is the output of `prepare`, or any folder with MDS directories inside (the predecessor's too).
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from streaming import LocalDataset

from llmshearing.data.mds.shards import BYTES_DTYPE
from llmshearing.data.text.tokenizer import load_decoder
from llmshearing.errors import ShearingError

log = logging.getLogger(__name__)


def inspect(root: Path, samples: int = 0, decode: Callable[[list[int]], str] | None = None) -> str:
    """A table of every MDS directory below `root`, and the first `samples` sequences of each, decoded.

    Raises ShearingError where there is none, or one that cannot be read.
    """
    found = sorted(path.parent for path in root.rglob("index.json"))
    if not found:
        raise ShearingError(f"{root} has no MDS directory (a folder with an index.json)")
    lines = [f"{'directory':<32}{'sequences':>12}{'length':>8}{'shards':>8}{'MB':>10}  tokens"]
    for path in found:
        name = str(path.relative_to(root))
        try:
            data = LocalDataset(str(path))
            lines.append(f"{name:<32}{_row(data)}")
            for i in range(min(samples, len(data))):
                ids = _tokens(data[i]).tolist()
                lines.append(f"  [{data[i]['set']} {i}] {decode(ids) if decode else ids}")
        except Exception as error:  # whatever a damaged directory makes Streaming do
            raise ShearingError(f"{path} cannot be read: {error!r}") from error
    return "\n".join(lines)


def _row(data: LocalDataset) -> str:
    size = sum(shard.raw_data.bytes for shard in data.shards) / 1e6
    if not len(data):
        return f"{0:>12}{'-':>8}{len(data.shards):>8}{size:>10.2f}  -"
    encoding = dict(zip(data.shards[0].column_names, data.shards[0].column_encodings, strict=True))["tokens"]
    return f"{len(data):>12,}{_tokens(data[0]).size:>8}{len(data.shards):>8}{size:>10.2f}  {encoding}"


def _tokens(sample: dict[str, Any]) -> np.ndarray:
    tokens = sample["tokens"]
    return np.frombuffer(tokens, BYTES_DTYPE) if isinstance(tokens, bytes) else tokens


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m llmshearing.data.inspect",
        description="Show the MDS directories of prepared data and decode samples.",
        epilog="example: python -m llmshearing.data.inspect data/mds --samples 1 --tokenizer models/source",
    )
    parser.add_argument(
        "directory", type=Path, help="output of llmshearing.data.prepare, or a folder of MDS directories"
    )
    parser.add_argument("--samples", type=int, default=0, help="sequences to show of each directory (default: none)")
    parser.add_argument("--tokenizer", help="decode them with it (default: show ids)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        decode = load_decoder(arguments.tokenizer) if arguments.tokenizer else None
        sys.stdout.write(inspect(arguments.directory, arguments.samples, decode) + "\n")
    except ShearingError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
