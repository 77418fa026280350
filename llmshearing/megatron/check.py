"""A short continued training of shards in megatron-core: `python -m llmshearing.megatron.check`, under torchrun.

It shows that megatron-core takes the shards strictly, and that their loss falls. Long training is Megatron's own work.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from llmshearing.commands import parser, run
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.errors import ShearingError
from llmshearing.megatron.core import load, train

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and tell the losses; the exit status is 0 where the loss fell."""
    said = parser(
        "python -m llmshearing.megatron.check",
        "Load shards strictly into megatron-core's GPTModel and train a few steps: one process for each rank.",
        "torchrun --nproc_per_node 2 -m llmshearing.megatron.check --load out/shards --data data/mds --steps 10",
    )
    said.add_argument("--load", required=True, help="Megatron's checkpoint, of as many ranks as there are processes")
    said.add_argument("--data", required=True, help="MDS data of the data command")
    said.add_argument("--split", default="for_ft", help="of the data (%(default)s)")
    said.add_argument("--steps", type=int, default=10, help="of AdamW (%(default)s)")
    said.add_argument("--batch_size", type=int, default=4, help="sequences a step (%(default)s)")
    said.add_argument("--max_seq_len", type=int, help="tokens (default: what the data has)")
    said.add_argument("--lr", type=float, default=1e-4, help="learning rate (%(default)s)")
    options = said.parse_args(argv)

    def work() -> int:
        return check(
            options.load,
            options.data,
            options.split,
            options.steps,
            options.batch_size,
            options.max_seq_len,
            options.lr,
        )

    return run(work)


def check(
    path: Path | str, data: Path | str, split: str, steps: int, batch_size: int, length: int | None, rate: float
) -> int:
    """0 where the mean loss of the second half of the steps is below that of the first, else 1.

    Raises:
        ShearingError: the shards or the data cannot be read, or there are too few sequences.
    """
    if steps < 2 or batch_size < 1:
        raise ShearingError(f"steps = {steps} of batch_size = {batch_size}: at least 2 steps of 1 sequence")
    core = load(path)
    losses = train(core, _batches(Path(data), split, steps, batch_size, length, core.tokens), rate)
    half = steps // 2
    first, second = (sum(part) / len(part) for part in (losses[:half], losses[half:]))
    fell = second < first and all(math.isfinite(loss) for loss in losses)
    if dist.get_rank() == 0:
        for step, loss in enumerate(losses, 1):
            log.info("step %d: loss %.4f nats per token", step, loss)
        log.info(
            "%s: %d steps of %d sequences on %d ranks of %s; mean loss of the first half %.4f, of the second %.4f",
            *("PASS" if fell else "FAIL", steps, batch_size, dist.get_world_size(), core.device.type, first, second),
        )
    return 0 if fell else 1


def _batches(data: Path, split: str, steps: int, size: int, length: int | None, tokens: int) -> list[Tensor]:
    """[B, T] for each step: sequences of all domains in turn."""
    root = data / split
    folders = [root] if (root / "index.json").is_file() else sorted(file.parent for file in root.glob("*/index.json"))
    if not folders:
        raise ShearingError(f"{data} has no split {split!r} of MDS data")
    opened = [MdsDirectory(folder, length, tokens) for folder in folders]
    there = [(row, domain) for domain in opened for row in range(len(domain))]
    there.sort(key=lambda item: item[0])  # domains in turn
    if len(there) < steps * size:
        raise ShearingError(f"{root} has {len(there)} sequences; {steps} steps of {size} need {steps * size}")
    rows = [torch.from_numpy(domain[row][0]) for row, domain in there[: steps * size]]
    if len({len(row) for row in rows}) > 1:
        raise ShearingError(f"{root}: its domains have sequences of different lengths; give --max_seq_len")
    return list(torch.stack(rows).split(size))


if __name__ == "__main__":
    sys.exit(main())
