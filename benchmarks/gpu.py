"""What a step costs on a GPU, in one go and from torch and transformers alone: `python -m benchmarks.gpu`.

    dense      transformers' model of the source's shape, our loss, fused AdamW
    open       the same step while masks train and all units are open
    target     the same, with the masks at the target: half of all widths, three quarters of the layers
    plain      a plain model of the target's shape
    distilled  the plain model's step with the source's logits to follow

Weights, gradients and Adam's moments are bfloat16, so that a 7B model fits one card. MFU counts 6 x parameters a token
and attention (a teacher's forward pass a third of that), against the card's own rate on a large matrix product. Ratios
are of one run. A peak counts what the step needs to be on the card: the source's weights in `distilled` alone.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmshearing.families import table_for
from llmshearing.families.nonuniform.config import config_of
from llmshearing.fold.fold import config_of_shape
from llmshearing.fold.gating import attach, detach
from llmshearing.masks.l0 import L0Masks
from llmshearing.training.divergence import distillation_losses
from llmshearing.training.loss import token_losses

SMOL = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
BILLION = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192}
SEVEN = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008}
TINY = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
# shape -> (config, sequences in a batch, tokens in a sequence)
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "tiny": ({**TINY, "num_hidden_layers": 4, "vocab_size": 64}, 2, 16),
    "135m": ({**SMOL, "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True}, 8, 2048),
    "1b": ({**BILLION, "num_hidden_layers": 16, "vocab_size": 128256, "tie_word_embeddings": True}, 4, 2048),
    "7b": ({**SEVEN, "num_hidden_layers": 32, "vocab_size": 32000}, 2, 2048),
}
DTYPE = torch.bfloat16


@dataclass
class Bench:
    """One shape on one device."""

    device: torch.device
    repeats: int
    batch: int
    length: int
    vocab: int

    def ids(self) -> torch.Tensor:
        return torch.randint(self.vocab, (self.batch, self.length), device=self.device)

    def measure(self, step: Callable[[], None]) -> dict[str, Any]:
        """Median seconds of a step after three warm-ups, peak bytes, and how often the host waits for the device."""
        for _ in range(3):
            step()
        self._settle()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            step()
            self._settle()
            times.append(time.perf_counter() - start)
        seconds = sorted(times)[len(times) // 2]
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return {
            "seconds": seconds,
            "range": [min(times), max(times)],
            "tokens_per_second": self.batch * self.length / seconds,
            "peak_bytes": peak,
            "waits": self._waits(step),
        }

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _waits(self, step: Callable[[], None]) -> int | None:
        if self.device.type != "cuda":
            return None
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in seen)


def model_of(config: Any, device: torch.device) -> PreTrainedModel:
    """Random weights; the causal attention kernel, as in training."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa")
    return model.train()


def optimizer_of(*parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for group in parameters for parameter in group], lr=1e-6, fused=True)


def measure_shape(name: str, bench: Bench, values: dict[str, Any]) -> dict[str, Any]:
    """Every step of one shape."""
    config = AutoConfig.for_model("llama", **values, max_position_embeddings=4096)
    model, table = model_of(config, bench.device), table_for(config)
    shape = table.shape()
    target = {key: size if key == "vocab_size" else max(1, size // 2) for key, size in shape.items()}
    target[table.layers_key] = max(1, shape[table.layers_key] * 3 // 4)
    if name == "135m":  # nine heads in three groups
        target |= {"num_attention_heads": 6, "num_key_value_heads": 2}
    found: dict[str, Any] = {"parameters": table.count(), "target": target}
    optimizer = optimizer_of(model.parameters())
    found["dense"] = bench.measure(lambda: _step(model, optimizer, bench))
    optimizer.state.clear()
    found |= measure_masked(model, table, target, bench)
    model.zero_grad(set_to_none=True)
    model.to("cpu")
    small_config = config_of(config_of_shape(config.to_dict(), table, target))
    small = model_of(small_config, bench.device)
    found["target_parameters"] = table_for(small_config).count()
    smaller = optimizer_of(small.parameters())
    found["plain"] = bench.measure(lambda: _step(small, smaller, bench))
    model.to(bench.device)
    found["distilled"] = bench.measure(lambda: _step(small, smaller, bench, teacher=model))
    return found


def measure_masked(model: PreTrainedModel, table: Any, target: dict[str, int], bench: Bench) -> dict[str, Any]:
    """The steps in which masks train: all units open, and at the target; and what the latter spends its time on."""
    found: dict[str, Any] = {}
    units = table.units(target)
    kinds = {"hidden": units["hidden"], "head": units["head"], "intermediate": units["intermediate"],
             "layer": target[table.layers_key]}  # fmt: skip
    masks = L0Masks(table, list(kinds), kinds, noise=0.0).to(bench.device)
    gating = attach(model, table)
    masked = optimizer_of(model.parameters(), masks.log_alpha.parameters())
    for parameter in masks.log_alpha.values():
        parameter.data.fill_(4.5)
    found["open"] = bench.measure(lambda: _step(model, masked, bench, masks, gating))
    for kind, parameter in masks.log_alpha.items():
        rows = masks.rows(kind, parameter.data)
        rows[..., : kinds[kind]], rows[..., kinds[kind] :] = 4.5, -4.5
    found["target"] = bench.measure(lambda: _step(model, masked, bench, masks, gating))
    found["profile"] = profiled(lambda: _step(model, masked, bench, masks, gating), bench)
    gating.set(None)
    detach(model)
    return found


def _step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, bench: Bench, masks: Any = None, gating: Any = None,
    teacher: PreTrainedModel | None = None,
) -> None:  # fmt: skip
    ids = bench.ids()
    if masks is not None:
        gating.set(masks.selection(masks.sample(), round_to=8))
    logits = model(input_ids=ids, use_cache=False).logits
    if teacher is None:
        loss = token_losses(logits, ids).mean()
    else:
        with torch.no_grad():
            theirs = teacher(input_ids=ids, use_cache=False).logits
        loss = distillation_losses(logits, theirs, ids)[0].mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def profiled(step: Callable[[], None], bench: Bench) -> list[dict[str, Any]]:
    """The ten operations that take most of the device's time in a step."""
    cuda = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as seen:
        step()
    def spent(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total)
    # On a card the operations of the host carry their kernels' time too: each would count twice.
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    own = (event for event in seen.key_averages() if event.device_type == kind and not event.is_user_annotation)
    events = [event for event in own if spent(event) > 0]
    total = sum(map(spent, events)) or 1.0
    top = sorted(events, key=spent, reverse=True)[:10]
    return [{"name": event.key[:70], "share": spent(event) / total, "calls": event.count} for event in top]


def ceiling(device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product in bfloat16."""
    size = 8192 if device.type == "cuda" else 256
    one, other = (torch.randn(size, size, device=device, dtype=DTYPE) for _ in range(2))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        one @ other
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(times)[len(times) // 2]


def flops(parameters: int, shape: dict[str, Any], length: int) -> float:
    """Of a training step, a token: 6 x parameters, and 12 x layers x query width x half of the length."""
    width = shape["num_attention_heads"] * shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    return 6.0 * parameters + 12.0 * shape["num_hidden_layers"] * width * length / 2


def correct_on(device: torch.device) -> float:
    """Largest difference of logits between a gated and a folded tiny model on the device, in float64."""
    from llmshearing.fold.fold import fold, folded_config
    from llmshearing.masks.l0 import selection_from_gates

    config = AutoConfig.for_model("llama", **SHAPES["tiny"][0])
    model = model_of(config, device).double().eval()
    table, generator = table_for(config), torch.Generator().manual_seed(0)
    gates = {}
    for kind, keep in (("hidden", 20), ("head", 1), ("intermediate", 30)):
        rows = torch.rand(table.kinds[kind].shape(4), generator=generator).view(-1, table.kinds[kind].size)
        gates[kind] = torch.zeros_like(rows).scatter_(1, rows.topk(keep).indices, 0.7).view(table.kinds[kind].shape(4))
    gates = {kind: gate.to(device, torch.float64) for kind, gate in gates.items()}
    selection = selection_from_gates(table, gates)
    small = AutoModelForCausalLM.from_config(config_of(folded_config(config.to_dict(), table, selection))).to(device)
    small.double().load_state_dict(fold(model.state_dict(), table, selection), strict=True)
    ids = torch.arange(12, device=device).view(1, 12)
    attach(model, table).set(selection)
    attach(small, table_for(small.config))  # the wider norms on both sides
    with torch.no_grad():
        return (model(ids, use_cache=False).logits - small.eval()(ids, use_cache=False).logits).abs().max().item()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135m", "1b", "7b"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    result: dict[str, Any] = {
        "device": name, "torch": torch.__version__, "transformers": transformers.__version__,
        "matmul_flops": ceiling(device), "gated_minus_folded_float64": correct_on(device), "shapes": {},
    }  # fmt: skip
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"matrix product {result['matmul_flops'] / 1e12:.0f} TFLOP/s; gated - folded in float64: "
          f"{result['gated_minus_folded_float64']:.1e}")  # fmt: skip
    print(f"{'shape':6}{'step':11}{'ms':>9}{'/ dense':>9}{'tokens/s':>12}{'GiB':>8}{'MFU':>7}{'waits':>7}")
    for shape in options.shapes:
        values, batch, length = SHAPES[shape]
        bench = Bench(device, options.repeats, batch, length, values["vocab_size"])
        found = result["shapes"][shape] = measure_shape(shape, bench, values)
        found |= {"batch": batch, "length": length, "repeats": options.repeats, "dtype": str(DTYPE)}
        for step in ("dense", "open", "target", "plain", "distilled"):
            row, small = found[step], step in ("target", "plain", "distilled")
            parameters = found["target_parameters"] if small else found["parameters"]
            work = flops(parameters, {**values, **(found["target"] if small else {})}, length)
            if step == "distilled":
                work += flops(found["parameters"], values, length) / 3
            row["mfu"] = work * row["tokens_per_second"] / result["matmul_flops"]
            ratio = row["seconds"] / found["dense"]["seconds"]
            print(f"{shape:6}{step:11}{1e3 * row['seconds']:9.2f}{ratio:9.2f}{row['tokens_per_second']:12,.0f}"
                  f"{row['peak_bytes'] / 2**30:8.2f}{row['mfu']:7.1%}{row['waits'] or 0:7}", flush=True)  # fmt: skip
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result


if __name__ == "__main__":
    main()
