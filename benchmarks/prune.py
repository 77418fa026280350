"""All pruners on one source at the same number of block parameters: perplexity by domain, before and after training on.

    python -m benchmarks.prune --source DIR --data MDS --output DIR [--ratios 0.25 0.5] [--steps 60]
        [--shear_steps 30] [--models NAME=DIR ...] [--threads 1]

Every model is evaluated on the same sequences of `eval_merge`; continued pretraining is the same for all: AdamW, the
same sequences of `for_ft` in the same order. What chooses sees `for_prune` only. The learned masks have trained the
weights for ``shear_steps`` by the time they are folded, so they are continued twice: as long as the others, and for so
much less that all have seen equally many tokens. ``--models`` adds models that exist.
Writes results.json, table.txt and perplexity.png; another call with the same settings adds to them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import machine
from benchmarks.learned import shear
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.data.mixture.loader import build_eval_dataloader
from llmshearing.prune import SequenceOptions, prune
from llmshearing.training.evaluation import domain_losses

LEARNED = "learned masks"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "activation": ("activation", {}),
    "obs": ("obs", {}),
    "obs log_increase": ("obs", {"ratios": "log_increase"}),
    "depth window": ("depth", {"by": "window"}),
    "depth greedy": ("depth", {"by": "greedy"}),
    "depth influence": ("depth", {"by": "influence"}),
}


def load(path: Path | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


class Bench:
    """Data and settings that all models share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.data, self.arguments = Path(arguments.data), arguments
        manifest = json.loads((self.data / "manifest.json").read_text())
        self.length = manifest["request"]["options"]["max_seq_len"]
        self.domains = sorted(manifest["splits"]["for_ft"])

    def losses(self, model: PreTrainedModel) -> dict[str, float]:
        spec = build_eval_dataloader(
            local=self.data, split="eval_merge", set_names=self.domains, batch_size=8, max_seq_len=self.length,
            vocab_size=model.config.vocab_size, subset_num_batches=self.arguments.eval_batches,
        )  # fmt: skip
        found = domain_losses(model, spec.dataloader, self.domains)
        found["mean"] = sum(found[name] for name in self.domains) / len(self.domains)  # domains count alike
        return found

    def sequences(self, vocab_size: int) -> torch.Tensor:
        """int64 [steps * batch, T]: the domains in turn, from places spread over each."""
        number = self.arguments.steps * self.arguments.batch
        share = math.ceil(number / len(self.domains))
        columns = []
        for domain in self.domains:
            directory = MdsDirectory(self.data / "for_ft" / domain, self.length, vocab_size)
            places = np.random.default_rng(0).permutation(len(directory))[np.arange(share) % len(directory)]
            columns.append(np.stack([directory[int(place)][0] for place in places]))
        return torch.from_numpy(np.stack(columns, 1).reshape(-1, self.length)[:number])

    def train(self, model: PreTrainedModel, steps: int) -> PreTrainedModel:
        """A short continued pretraining: AdamW, warm-up of a tenth, then cosine to zero."""
        rate = self.arguments.lr
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
        ids = self.sequences(model.config.vocab_size).split(self.arguments.batch)
        model.train()
        for step in trange(steps, desc="continued pretraining", unit="step"):
            progress = (step + 1) / steps
            scale = min(progress / 0.1, 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            logits = model(input_ids=ids[step], use_cache=False).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), ids[step][:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    def rows(self, label: str, path: Path | str) -> dict[str, dict[str, Any]]:
        """label -> parameters, tokens trained on, and losses before and after continued pretraining.

        Two rows for learned masks, which have been trained on tokens already.
        """
        model, steps = load(path), self.arguments.steps
        seen = self.arguments.shear_steps if label.startswith(LEARNED) else 0
        size = {"parameters": model.num_parameters()}
        found: dict[str, dict[str, Any]] = {
            label: {**size, "before": self.losses(model), "tokens": {"before": seen * self.tokens}}
        }
        cases = {label: steps, f"{label}, equal tokens": steps - seen} if seen else {label: steps}
        for name, own in cases.items():
            row = found.setdefault(name, {**size, "tokens": {}})
            if own > 0:
                row["after"] = self.losses(self.train(load(path), own))
                row["tokens"]["after"] = (seen + own) * self.tokens
        return {name: row for name, row in found.items() if row["tokens"]}

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.arguments.batch * self.length

    def make(self) -> dict[str, tuple[str, Path]]:
        """label -> (method, directory) of every pruned model; those that exist are kept."""
        return {
            f"{label} {ratio:g}": (label, self.pruned(label, ratio))
            for ratio in self.arguments.ratios
            for label in self.arguments.methods
        }

    def pruned(self, label: str, ratio: float) -> Path:
        """The directory of one pruned model."""
        options = self.arguments
        output = options.output / f"{label.replace(' ', '-')}-{ratio:g}"
        if output.exists():
            return output
        if label == LEARNED:
            shear(
                output, source=options.source, data=self.data, ratio=ratio, domains=self.domains, length=self.length,
                steps=options.shear_steps, batch=options.batch, lr=options.lr,
            )  # fmt: skip
            return output
        method, own = CASES[label]
        sequences = SequenceOptions(samples=options.samples, report_samples=8)
        prune(method, options.source, output, {"ratio": ratio}, calibration=self.data, sequences=sequences, **own)
        return output


def table(rows: dict[str, dict[str, Any]], domains: list[str]) -> str:
    """Perplexity by domain and their geometric mean."""
    names = [*domains, "mean"]
    lines = [f"{'':42}{'parameters':>12}{'tokens':>10}" + "".join(f"{name:>10}" for name in names)]
    for label, row in rows.items():
        for stage in ("before", "after"):
            if stage in row:
                title = label + (", trained on" if stage == "after" else "")
                cells = "".join(f"{math.exp(row[stage][name]):>10.2f}" for name in names)
                lines.append(f"{title:42}{row['parameters']:>12,}{row['tokens'][stage]:>10,}{cells}")
    return "\n".join(lines)


def plot(rows: dict[str, dict[str, Any]], domains: list[str], path: Path) -> None:
    """A panel per domain and one of the mean: perplexity against parameters, as pruned and trained on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [*domains, "mean"]
    figure, panels = plt.subplots(2, math.ceil(len(names) / 2), figsize=(4 * math.ceil(len(names) / 2), 8))
    kinds = list(dict.fromkeys(row["method"] for row in rows.values()))
    for panel, name in zip(panels.flat, names, strict=False):
        for number, kind in enumerate(kinds):
            of_kind = sorted((r for r in rows.values() if r["method"] == kind), key=lambda row: row["parameters"])
            for stage, mark in (("before", "o-"), ("after", "x--")):
                points = [(row["parameters"] / 1e6, math.exp(row[stage][name])) for row in of_kind if stage in row]
                if points:
                    label = kind if stage == "before" or "before" not in of_kind[0] else None
                    panel.plot(*zip(*points, strict=True), mark, color=f"C{number}", label=label)
        panel.set(title=name, yscale="log", xlabel="parameters, millions", ylabel="perplexity")
        for axis in ("set_major_formatter", "set_minor_formatter"):
            getattr(panel.yaxis, axis)("{x:.0f}")
    panels.flat[0].legend(fontsize=7)
    figure.suptitle("circles, solid: as pruned; crosses, dashed: after the same continued pretraining")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What rows must agree in to be compared."""
    return {key: getattr(arguments, key) for key in ("steps", "shear_steps", "batch", "lr", "eval_batches")}


def earlier(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows of an earlier call with the same settings: methods can be run one after the other."""
    file = arguments.output / "results.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    return record["rows"] if record.get("settings") == settings(arguments) else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, type=Path, help="Hugging Face directory")
    parser.add_argument("--data", required=True, help="directory of the data command")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5], help="of block parameters to remove")
    parser.add_argument("--methods", nargs="+", choices=[*CASES, LEARNED], default=[*CASES, LEARNED], help="(all)")
    parser.add_argument("--samples", type=int, default=128, help="sequences to choose by (%(default)s)")
    parser.add_argument("--eval_batches", type=int, default=28, help="of 8 sequences (%(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="of continued pretraining (%(default)s)")
    parser.add_argument("--shear_steps", type=int, default=30, help="of learning masks (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (%(default)s)")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=DIR", help="further models to compare")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments)
    paths: dict[str, tuple[str, Path]] = {"source": ("source", arguments.source)} | bench.make()
    paths |= {name: (name, Path(path)) for name, _, path in (item.partition("=") for item in arguments.models)}
    rows = earlier(arguments)
    for label, (method, path) in paths.items():
        for name, row in bench.rows(label, path).items() if label not in rows else ():
            rows[name] = {"method": method + name.removeprefix(label), **row}
        record = {"machine": machine(), "settings": settings(arguments), "rows": rows}
        (arguments.output / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    text = table(rows, bench.domains)
    (arguments.output / "table.txt").write_text(text + "\n")
    plot(rows, bench.domains, arguments.output / "perplexity.png")
    print(text)
    print(f"wrote results.json, table.txt and perplexity.png to {arguments.output}")


if __name__ == "__main__":
    main()
