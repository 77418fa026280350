"""How the price of a shearing step grows with the model.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --axes vocabulary domains --batch 2 --repeats 3

hidden size, layers, vocabulary: A, B, S and C as in `benchmarks.step`, taking turns. domains: S with the metrics of 2
to 64 domains against 1; the same model takes turns with each number. Smaller batches than in `benchmarks.step`: what
masks cost does not grow with the tokens, so that it weighs more here.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import alternate, save_part
from benchmarks.models import (
    Metrics,
    add_options,
    autocast_dtype,
    close,
    config,
    dense,
    halved,
    open_fully,
    plain,
    precision_note,
    random_tokens,
    shearing,
)  # fmt: skip
from benchmarks.plots import plot_panels

AXES = {
    "hidden_size": [256, 512, 1024],
    "num_hidden_layers": [4, 8, 16],
    "vocab_size": [4096, 16_384, 32_000],
}
DOMAINS = [1, 2, 8, 64]
COLUMNS = ("B / A", "S / A", "S / C")


def sized(axis: str, value: int) -> LlamaConfig:
    """The judged model with one size changed; width scales heads and the MLP along."""
    if axis != "hidden_size":
        return config(**{axis: value})
    return config(hidden_size=value, num_attention_heads=value // 64, intermediate_size=value * 43 // 16)


def compare(cfg: LlamaConfig, arguments: argparse.Namespace, autocast: torch.dtype | None) -> dict[str, float]:
    """Ratios at one size."""
    input_ids, target = random_tokens(cfg, arguments.batch, arguments.length), halved(cfg)
    b, open_model = shearing(cfg, target, autocast=autocast)
    open_fully(open_model)
    s, model = shearing(cfg, target, autocast=autocast)
    close(model.masks, 1.0, target)
    contestants = {"A": dense(LlamaForCausalLM(cfg), autocast), "B": b, "C": dense(plain(cfg, model), autocast)}
    cases = {name: lambda x=x: x.step(input_ids) for name, x in contestants.items()}

    def at_target() -> None:
        close(model.masks, 1.0, target)
        s.step(input_ids)

    seconds = alternate({**cases, "S": at_target}, arguments.repeats)
    return {"B / A": seconds["B"] / seconds["A"], "S / A": seconds["S"] / seconds["A"],
            "S / C": seconds["S"] / seconds["C"], **seconds}  # fmt: skip


def domains(arguments: argparse.Namespace, autocast: torch.dtype | None) -> dict[str, float]:
    """Cost of a step at the target with the metrics of so many domains, over that with one."""
    cfg = config()
    input_ids, target = random_tokens(cfg, arguments.batch, arguments.length), halved(cfg)
    s, model = shearing(cfg, target, autocast=autocast)
    after = s.after

    def with_domains(number: int):
        metrics = Metrics(model.masks, number)

        def run() -> None:
            close(model.masks, 1.0, target)
            s.after = lambda: after(metrics)
            s.step(input_ids)

        return run

    seconds = alternate({str(number): with_domains(number) for number in DOMAINS}, 3 * arguments.repeats)
    return {number: value / seconds["1"] for number, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch=4)
    parser.add_argument("--axes", nargs="+", choices=[*AXES, "domains"], default=[*AXES, "domains"])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    autocast = autocast_dtype(arguments.precision)
    torch.manual_seed(0)
    print(f"{arguments.batch} x {arguments.length} tokens, {precision_note(autocast)}")
    setting = {"precision": precision_note(autocast), "batch": arguments.batch, "length": arguments.length}
    panels: dict[str, Any] = {}
    for axis in arguments.axes:
        if axis == "domains":
            found: dict[str, Any] = domains(arguments, autocast)
            print("domains / 1:  " + "   ".join(f"{number}: {value:.3f}" for number, value in found.items()))
            panels[axis] = (axis, DOMAINS, {"S, domains / 1": list(found.values())})
        else:
            found = {str(value): compare(sized(axis, value), arguments, autocast) for value in AXES[axis]}
            print(f"{axis:18}" + "".join(f"{name:>9}" for name in COLUMNS))
            for value, row in found.items():
                print(f"{value:>18}" + "".join(f"{row[name]:9.3f}" for name in COLUMNS))
            panels[axis] = (axis, AXES[axis], {name: [row[name] for row in found.values()] for name in COLUMNS})
        print("wrote", save_part("scaling", axis, {**setting, "found": found}))
    print("wrote", plot_panels("scaling", panels, y="ratio"))


if __name__ == "__main__":
    main()
