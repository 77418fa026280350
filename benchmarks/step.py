"""Price of a shearing step.

    python -m benchmarks.step

A: dense step of transformers' LLaMA. B: shearing step, all gates open. S0.1 ... S1.0: shearing steps as units close to
the target (hidden, heads, intermediate to one half, layers to three quarters; 5 % of the closed units sampled open). C:
transformers' plain model with the open counts of S1.0. One run, taking turns; medians; optimizer step included unless
named "passes" (forward and backward).
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaForCausalLM

from benchmarks.common import alternate, machine, save
from benchmarks.models import close, config, dense, open_fully, plain, shearing

TARGET = {"hidden": 256, "head": 4, "intermediate": 688, "layer": 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stages", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cfg = config()
    input_ids = torch.randint(0, cfg.vocab_size, (arguments.batch, arguments.length))
    a = dense(LlamaForCausalLM(cfg))
    b, open_model = shearing(cfg, TARGET)
    open_fully(open_model)
    s, model = shearing(cfg, TARGET)
    masks = model.masks
    close(masks, 1.0, TARGET)
    sample = masks.sample()
    c = dense(plain(cfg, model, masks.selection({k: g.detach() for k, g in sample.items()})))

    def at(fraction: float) -> None:
        """Shearing step with the same noise each time, so that C has the same counts at the target."""
        close(masks, fraction, TARGET)
        masks.step = 0

    def stage(fraction: float, what: str):
        def run() -> None:
            at(fraction)
            getattr(s, what)(input_ids)

        return run

    stages = [round((i + 1) / arguments.stages, 3) for i in range(arguments.stages)]
    cases = {"A": lambda: a.step(input_ids), "B": lambda: b.step(input_ids), "C": lambda: c.step(input_ids)}
    cases |= {"A passes": lambda: a.passes(input_ids), "C passes": lambda: c.passes(input_ids)}
    cases |= {"S passes": stage(1.0, "passes")}
    cases |= {f"S{f}": stage(f, "step") for f in stages}
    seconds = alternate(cases, arguments.repeats)
    last = f"S{stages[-1]}"
    ratios = {
        "B / A": seconds["B"] / seconds["A"],
        "S at target / A": seconds[last] / seconds["A"],
        "C / A": seconds["C"] / seconds["A"],
        "passes: S at target / C": seconds["S passes"] / seconds["C passes"],
    }
    print(machine())
    tokens = input_ids.numel()
    print(f"{'case':10} {'tokens/s':>10} {'/ A':>7}")
    for name, value in seconds.items():
        base = seconds["A passes"] if "passes" in name else seconds["A"]
        print(f"{name:10} {tokens / value:10,.0f} {value / base:7.3f}")
    for name, value in ratios.items():
        print(f"{name:28} {value:.3f}")
    print("wrote", save("step", {"seconds": seconds, "ratios": ratios, "tokens": tokens}))


if __name__ == "__main__":
    main()
