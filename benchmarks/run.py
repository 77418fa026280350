"""Price of a whole pruning run against the same number of dense steps.

    python -m benchmarks.run

The published schedule in small: 20 % of the run is warm-up, then the masks settle. Random tokens: what the masks do
then is what the penalty asks for. Every few shearing steps one dense step of transformers' LLaMA is timed in between.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from benchmarks.common import machine, save
from benchmarks.models import config, dense, shearing
from benchmarks.step import TARGET


def timed(step, input_ids: torch.Tensor) -> float:
    start = time.perf_counter()
    step(input_ids)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=5, help="shearing steps for each dense step")
    parser.add_argument("--lag_lr", type=float, default=0.5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cfg = config()
    a = dense(LlamaForCausalLM(cfg))
    s, model = shearing(cfg, TARGET)
    masks = model.masks
    weights = {"params": list(model.model.parameters()), "lr": 1e-4}
    s.optimizer = torch.optim.AdamW([weights, {"params": list(masks.parameters()), "lr": arguments.lag_lr}], fused=True)
    ours, theirs, open_share = [], [], []
    for step in tqdm(range(arguments.steps), desc="steps"):
        masks.progress = step / (0.2 * arguments.steps)
        input_ids = torch.randint(0, cfg.vocab_size, (16, 256))
        ours.append(timed(s.step, input_ids))
        open_share.append(masks.expected_parameters().item() / model.table.count(counted_only=True))
        if step % arguments.every == 0:
            theirs.append(timed(a.step, input_ids))
    ratio = sum(ours) / (statistics.mean(theirs) * arguments.steps)
    print(machine())
    for tenth in range(10):
        part = slice(tenth * arguments.steps // 10, (tenth + 1) * arguments.steps // 10)
        share = statistics.mean(open_share[part])
        price = statistics.mean(ours[part]) / statistics.mean(theirs)
        print(f"tenth {tenth + 1:2}: step / A {price:.3f}, open {share:.3f}")
    print(f"whole run / the same number of A steps: {ratio:.3f}")
    print("wrote", save("run", {"ratio": ratio, "shearing_seconds": ours, "dense_seconds": theirs, "open": open_share}))


if __name__ == "__main__":
    main()
