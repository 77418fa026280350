"""Price of a shearing step.

    python -m benchmarks.step                              everything, in the precision that the processor has
    python -m benchmarks.step --parts ratios --repeats 9
    python -m benchmarks.step --batch 4 --repeats 3        smaller and sooner

A: step of transformers' dense LLaMA. B: shearing step, all gates open. S: shearing step at the target (hidden, heads,
intermediate to one half, layers to three quarters; 5 % of the closed units sampled open). C: transformers' plain model
with the open counts of S. Everything takes turns in one run; medians; "passes" are forward and backward alone.

ratios: A, B, S, C and the judged figures. curve: S and C as units close in ten stages. memory: peak resident memory,
each contestant in a process of its own, and of the loss alone; there glibc gives freed blocks back at once, so that the
figure is what was in use. What it keeps by default differs from run to run: "as allocated" is the median of three.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from benchmarks.common import alternate, peak_rss, save_part
from benchmarks.models import (
    TARGET,
    Contestant,
    Metrics,
    add_options,
    autocast_dtype,
    close,
    config,
    dense,
    open_fully,
    plain,
    precision_note,
    random_tokens,
    shearing,
)  # fmt: skip
from benchmarks.plots import plot_lines
from llmshearing.training.loss import token_losses

PARTS = ("ratios", "curve", "memory")
LARGE_VOCABULARY = 32_000
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # larger blocks are the system's again once they are freed


def ratios(arguments: argparse.Namespace, autocast: torch.dtype | None) -> dict[str, Any]:
    """A, B, S and C, and what is judged."""
    cfg = config()
    input_ids = random_tokens(cfg, arguments.batch, arguments.length)
    a = dense(LlamaForCausalLM(cfg), autocast)
    b, open_model = shearing(cfg, TARGET, autocast=autocast)
    open_fully(open_model)
    s, model = shearing(cfg, TARGET, autocast=autocast)
    close(model.masks, 1.0, TARGET)
    c = dense(plain(cfg, model), autocast)
    unrounded, other = shearing(cfg, TARGET, autocast=autocast, round_to=1)

    def at_target(contestant: Contestant, masks, what: str):
        def run() -> None:
            close(masks, 1.0, TARGET)
            getattr(contestant, what)(input_ids)

        return run

    cases = {name: lambda x=x: x.step(input_ids) for name, x in {"A": a, "B": b, "C": c}.items()}
    cases["S"] = at_target(s, model.masks, "step")
    cases |= {f"{name} passes": lambda x=x: x.passes(input_ids) for name, x in {"A": a, "B": b, "C": c}.items()}
    cases["S passes"] = at_target(s, model.masks, "passes")
    cases["S passes, round_to 1"] = at_target(unrounded, other.masks, "passes")
    seconds = alternate(cases, arguments.repeats)
    seconds["metrics"] = metrics_seconds(model, arguments.batch)
    found = {
        "B / A": seconds["B"] / seconds["A"],
        "passes: S / C": seconds["S passes"] / seconds["C passes"],
        "passes: S / C, round_to 1": seconds["S passes, round_to 1"] / seconds["C passes"],
        "S / A": seconds["S"] / seconds["A"],
        "C / A": seconds["C"] / seconds["A"],
        "metrics / S": seconds["metrics"] / seconds["S"],
    }
    tokens = input_ids.numel()
    print(f"{'case':22} {'seconds':>9} {'tokens/s':>10} {'/ A':>7}")
    for name, value in seconds.items():
        base = seconds["A passes" if "passes" in name else "A"]
        print(f"{name:22} {value:9.4f} {tokens / value:10,.0f} {value / base:7.4f}")
    for name, value in found.items():
        print(f"{name:28} {value:.4f}")
    return {"tokens": tokens, "seconds": seconds, "ratios": found}


def metrics_seconds(model, batch: int, repeats: int = 50) -> float:
    """Mean time of the callbacks' metrics for a batch."""
    metrics = Metrics(model.masks, domains=7)
    outputs = {"sample_loss": torch.rand(batch), "penalty": torch.zeros(())}
    metrics(outputs)
    start = time.perf_counter()
    for _ in range(repeats):
        metrics(outputs)
    return (time.perf_counter() - start) / repeats


def curve(arguments: argparse.Namespace, autocast: torch.dtype | None) -> dict[str, Any]:
    """Steps of S and of the plain model with the same open counts, stage by stage, against A."""
    cfg = config()
    input_ids = random_tokens(cfg, arguments.batch, arguments.length)
    stages = [round(i / arguments.stages, 3) for i in range(arguments.stages + 1)]
    a = dense(LlamaForCausalLM(cfg), autocast)
    s, model = shearing(cfg, TARGET, autocast=autocast)
    cases = {"A": lambda: a.step(input_ids)}
    for fraction in stages:
        close(model.masks, fraction, TARGET)
        c = dense(plain(cfg, model), autocast)

        def sheared(fraction: float = fraction) -> None:
            close(model.masks, fraction, TARGET)
            s.step(input_ids)

        cases |= {f"S {fraction}": sheared, f"C {fraction}": lambda c=c: c.step(input_ids)}
    seconds = alternate(cases, arguments.curve_repeats)
    lines = {name: [seconds[f"{name} {f}"] / seconds["A"] for f in stages] for name in "SC"}
    print(f"{'closed':>8} {'S / A':>8} {'C / A':>8}")
    for fraction, ours, theirs in zip(stages, lines["S"], lines["C"], strict=True):
        print(f"{fraction:8.2f} {ours:8.3f} {theirs:8.3f}")
    labels = {"S": "shearing step", "C": "transformers' model with the same open counts"}
    drawn = plot_lines(
        "step", stages, {labels[name]: line for name, line in lines.items()} | {"dense step": [1.0] * len(stages)},
        x="units to close that are closed", y="step / dense step", title=precision_note(autocast),
    )  # fmt: skip
    print("wrote", drawn)
    return {"stages": stages, "seconds": seconds}


def memory(arguments: argparse.Namespace, autocast: torch.dtype | None) -> dict[str, Any]:
    """Peak resident memory of two steps, each contestant in a process of its own."""
    found = {}
    for vocabulary in (config().vocab_size, LARGE_VOCABULARY):
        for name in ("A", "B", "S", "C"):
            found[f"{name} {vocabulary}"] = peak_of(arguments, "contestant", name, vocabulary)
        for name in ("logits", "ours", "transformers"):
            found[f"loss {name} {vocabulary}"] = peak_of(arguments, "loss", name, vocabulary)
    for name in "AB":
        peaks = [peak_of(arguments, "contestant", name, config().vocab_size, {}) for _ in range(3)]
        found[f"{name} {config().vocab_size}, as allocated"] = int(statistics.median(peaks))
    print(f"{'peak RSS, MiB':22}" + "".join(f"{v:>9}" for v in (config().vocab_size, LARGE_VOCABULARY)))
    for name in ("A", "B", "S", "C", "loss logits", "loss ours", "loss transformers"):
        row = [found[f"{name} {v}"] for v in (config().vocab_size, LARGE_VOCABULARY)]
        print(f"{name:22}" + "".join(f"{value / 2**20:9,.0f}" for value in row))
    copy = arguments.batch * arguments.length * LARGE_VOCABULARY * 4
    base = found[f"loss logits {LARGE_VOCABULARY}"]
    held = {name: (found[f"loss {name} {LARGE_VOCABULARY}"] - base) / copy for name in ("ours", "transformers")}
    vocabularies = (f"{config().vocab_size}", f"{LARGE_VOCABULARY}", f"{config().vocab_size}, as allocated")
    ratios = {f"B / A, vocabulary {v}": found[f"B {v}"] / found[f"A {v}"] for v in vocabularies}
    for name, value in ratios.items():
        print(f"{name:36} {value:.4f}")
    print(f"beside float32 logits of {LARGE_VOCABULARY:,} tokens, the loss holds so many of their size:", held)
    return {"bytes": found, "ratios": ratios, "copies_of_logits": held}


def peak_of(
    arguments: argparse.Namespace, what: str, name: str, vocabulary: int, environment: dict[str, str] = GIVE_BACK
) -> int:
    """Bytes, measured by a process that does nothing else."""
    options = {"batch": arguments.batch, "length": arguments.length, "precision": arguments.precision}
    command = [sys.executable, "-m", "benchmarks.step", "--measure", what, name, str(vocabulary)]
    command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    return int(done.stdout.split()[-1])


def measure(arguments: argparse.Namespace, autocast: torch.dtype | None) -> None:
    """Print the peak memory of this process after one contestant, or one loss."""
    what, name, vocabulary = arguments.measure
    cfg = config(vocab_size=int(vocabulary))
    input_ids = random_tokens(cfg, arguments.batch, arguments.length)
    if what == "loss":
        loss_alone(name, input_ids, cfg.vocab_size)
    else:
        contestant = build(name, cfg, autocast)
        for _ in range(2):
            contestant.step(input_ids)
    print(peak_rss())


def build(name: str, cfg, autocast: torch.dtype | None) -> Contestant:
    if name == "A":
        return dense(LlamaForCausalLM(cfg), autocast)
    contestant, model = shearing(cfg, TARGET, autocast=autocast)
    if name == "B":
        open_fully(model)
        return contestant
    close(model.masks, 1.0, TARGET)
    return contestant if name == "S" else dense(plain(cfg, model), autocast)


def loss_alone(name: str, input_ids: torch.Tensor, vocabulary: int) -> None:
    """Forward and backward of one loss on float32 logits; "logits": none."""
    logits = torch.zeros(*input_ids.shape, vocabulary).normal_().requires_grad_()
    if name == "ours":
        token_losses(logits, input_ids).mean().backward()
    elif name == "transformers":
        F.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten()).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--curve_repeats", type=int, default=2)
    parser.add_argument("--stages", type=int, default=10)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    autocast = autocast_dtype(arguments.precision)
    torch.manual_seed(0)
    if arguments.measure:
        return measure(arguments, autocast)
    print(f"{arguments.batch} x {arguments.length} tokens, {precision_note(autocast)}")
    for part in arguments.parts:
        result = {"ratios": ratios, "curve": curve, "memory": memory}[part](arguments, autocast)
        setting = {name: getattr(arguments, name) for name in ("batch", "length", "repeats")}
        print("wrote", save_part("step", part, {"precision": precision_note(autocast), **setting, **result}))


if __name__ == "__main__":
    main()
