"""Shows what a prepared directory holds: `python -m llmshearing.data.inspect DIR [--tokenizer T --samples N]`.

DIR is the output of `prepare`, or any folder with MDS directories inside (the predecessor's too).
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llmshearing.commands import parser, run
from llmshearing.data.mds.index import INDEX
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.data.text.tokenizer import load_decoder
from llmshearing.errors import ShearingError


def inspect(root: Path, samples: int = 0, decode: Callable[[list[int]], str] | None = None) -> str:
    """A table of every MDS directory below `root`, and the first `samples` sequences of each, decoded.

    Where there is a loss mask the table has the share of answers, and a sequence shows them in double brackets.

    Raises ShearingError where there is none, or one that cannot be read.
    """
    found = sorted(path.parent for path in root.rglob(INDEX))
    if not found:
        raise ShearingError(f"{root} has no MDS directory (a folder with an {INDEX})")
    lines = [f"{'directory':<32}{'sequences':>12}{'length':>8}{'shards':>8}{'MB':>10}  tokens"]
    for path in found:
        name = str(path.relative_to(root))
        data = MdsDirectory(path, None, None)
        size = data.size / 1e6
        kind = f"{data.kind}, {_share(data):.1%} answers" if data.masked else data.kind
        lines.append(f"{name:<32}{len(data):>12,}{data.max_seq_len:>8}{data.shards:>8}{size:>10.2f}  {kind}")
        for i in range(min(samples, len(data))):
            ids, domain, mask = data.read(i)
            runs = [(True, ids.tolist())] if mask is None else _runs(ids, mask)
            parts = [(answer, _shown(run, decode, path)) for answer, run in runs]
            said = [f"[[{text}]]" if answer and mask is not None else text for answer, text in parts]
            lines.append(f"  [{domain} {i}] {''.join(said)}")
    return "\n".join(lines)


def _share(data: MdsDirectory) -> float:
    """Of all tokens, those that count in the loss (reads every sample once)."""
    masks = (data.read(index)[2] for index in range(len(data)))
    counted = sum(data.max_seq_len - 1 if mask is None else int(mask[1:].sum()) for mask in masks)
    return counted / (len(data) * data.max_seq_len)


def _runs(ids: np.ndarray, mask: np.ndarray) -> list[tuple[bool, list[int]]]:
    """Answers, and what is none, in turn."""
    borders = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    parts = zip(np.split(mask, borders), np.split(ids, borders), strict=True)
    return [(bool(marks[0]), run.tolist()) for marks, run in parts]


def _shown(ids: list[int], decode: Callable[[list[int]], str] | None, where: Path) -> str:
    if decode is None:
        return str(ids)
    try:
        return decode(ids)
    except (IndexError, OverflowError) as error:
        raise ShearingError(f"{where} has token ids up to {max(ids)}, which --tokenizer does not know") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    prog = "python -m llmshearing.data.inspect"
    said = "Show the MDS directories of prepared data and decode samples."
    options = parser(prog, said, f"{prog} data/mds --samples 1 --tokenizer models/source")
    options.add_argument(
        "directory", type=Path, help="output of llmshearing.data.prepare, or a folder of MDS directories"
    )
    options.add_argument("--samples", type=int, default=0, help="sequences to show of each directory (default: none)")
    options.add_argument("--tokenizer", help="decode them with it (default: show ids)")
    arguments = options.parse_args(argv)

    def command() -> int:
        decode = load_decoder(arguments.tokenizer) if arguments.tokenizer else None
        sys.stdout.write(inspect(arguments.directory, arguments.samples, decode) + "\n")
        return 0

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
