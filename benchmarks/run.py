"""Price of a whole pruning run against the same number of dense steps.

    python -m benchmarks.run
    python -m benchmarks.run --steps 30 --batch 4     smaller and sooner

The published schedule in small: the target rises during the first 20 % of the run, then the masks settle. Tokens are
random: the masks do what the penalty asks for. Every few shearing steps a dense step of transformers' LLaMA is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from benchmarks.common import save
from benchmarks.models import (
    TARGET,
    Contestant,
    add_options,
    autocast_dtype,
    config,
    dense,
    precision_note,
    random_tokens,
    shearing,
)  # fmt: skip
from benchmarks.plots import plot_lines

WARMUP = 0.2


def timed(contestant: Contestant, input_ids: torch.Tensor) -> float:
    start = time.perf_counter()
    contestant.step(input_ids)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="shearing steps for each dense step")
    parser.add_argument("--lag_lr", type=float, default=1.0, help="published: 1.0; less swings longer about the target")
    arguments = parser.parse_args()
    autocast = autocast_dtype(arguments.precision)
    torch.manual_seed(0)
    cfg = config()
    a = dense(LlamaForCausalLM(cfg), autocast)
    s, model = shearing(cfg, TARGET, domains=7, autocast=autocast, lag_lr=arguments.lag_lr)
    masks, ours, theirs, share = model.masks, [], [], []
    timed(a, random_tokens(cfg, arguments.batch, arguments.length))  # warms up; the masks must not
    for step in tqdm(range(arguments.steps), desc="steps"):
        masks.progress = step / (WARMUP * arguments.steps)
        input_ids = random_tokens(cfg, arguments.batch, arguments.length)
        ours.append(timed(s, input_ids))
        share.append(masks.expected_parameters().item() / model.table.count(counted_only=True))
        if step % arguments.every == 0:
            theirs.append(timed(a, input_ids))
    dense_step = statistics.median(theirs)
    ratio = sum(ours) / (dense_step * arguments.steps)
    print(f"{arguments.steps} steps of {arguments.batch} x {arguments.length} tokens, {precision_note(autocast)}")
    prices = []
    for tenth in range(10):
        part = slice(tenth * arguments.steps // 10, (tenth + 1) * arguments.steps // 10)
        prices.append(statistics.mean(ours[part]) / dense_step)
        print(f"tenth {tenth + 1:2}: step / A {prices[-1]:.3f}, expected size {statistics.mean(share[part]):.3f}")
    target = masks.target_parameters() / model.table.count(counted_only=True)
    print(f"size at the end {share[-1]:.3f}, target {target:.3f}")
    print(f"whole run / the same number of A steps: {ratio:.3f}")
    tenths = [0.05 + i / 10 for i in range(10)]
    sizes = [share[round(at * (arguments.steps - 1))] for at in tenths]
    lines = {"shearing step / dense step": prices, "expected parameters / all": sizes}
    print("wrote", plot_lines("run", tenths, lines, x="part of the run", y="share", title=precision_note(autocast)))
    setting = {name: getattr(arguments, name) for name in ("batch", "length", "steps", "lag_lr")}
    result = {"precision": precision_note(autocast), **setting, "ratio": ratio, "target_size": target}
    print("wrote", save("run", {**result, "expected_size": share, "shearing_seconds": ours, "dense_seconds": theirs}))


if __name__ == "__main__":
    main()
