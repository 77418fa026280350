"""What finetuning gives back: a model cut by a fifth, recovered by LoRA and by full finetuning on local text.

    python -m benchmarks.finetune --source models/source --corpus corpus --data data/mds --items ../shared/eval \\
        --target hidden_size=512 intermediate_size=1280 --tie_at 512

Everything goes through the commands: prune turn, fisher with a refit, tie, finetune, evaluate. What is done stays done.
The text to learn from is the corpus without the documents of which a held-out sequence (`eval_merge` of the data) is a
part. Losses are on `eval_merge`; tasks on local items, the first `--limit` of each.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common import save_part
from llmshearing.checkpoints.hf_config import read_config
from llmshearing.data.text.corpus import corpus_texts
from llmshearing.prune.calibration import SequenceOptions, read_calibration

log = logging.getLogger(__name__)

TASKS = {"arc_easy": "arc_easy", "piqa": "piqa", "openbookqa": "openbook_qa", "winogrande": "winogrande"}
SNIPPET = 60  # characters of a held-out sequence by which its document is known
WAYS = ("lora", "full")


def main() -> None:
    options = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    out: Path = options.output
    out.mkdir(parents=True, exist_ok=True)
    turned, cut, tied, text = (out / name for name in ("turned", "cut", "tied", "train.jsonl"))
    data = ("--calibration", options.data, "--samples", options.samples, "--report_samples", options.report_samples)
    tie = ("--tie_at", options.tie_at) if options.tie_at else ()
    stage("turn", turned, "prune", "turn", "--model", options.source, "--output", turned, "--untie", *tie, *data)
    stage(
        "cut", cut, "prune", "fisher", "--model", turned, "--output", cut, "--refit", *data, "--target", *options.target
    )
    if options.tie_at:
        stage("tie", tied, "prune", "tie", "--model", cut, "--output", tied)
    small = tied if options.tie_at else cut
    if not text.exists():
        write_text(options, text)
    steps = max(1, options.tokens // (options.batch * options.length))
    seconds, rates = {}, {"lora": options.lora_rate, "full": options.full_rate}
    for way in options.ways:
        more = ("--lora", "--rank", "16") if way == "lora" else ()
        seconds[way] = stage(
            way, out / way, "finetune", small, text, "--output", out / way, "--max_length", options.length,
            "--batch_size", options.batch, "--max_steps", steps, "--learning_rate", rates[way], "--save_every",
            options.save_every, "--precision", options.precision, *more,
        )  # fmt: skip
    report(options, small, steps, seconds)


def arguments() -> argparse.Namespace:
    said = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__.partition("\n")[0])
    said.add_argument("--source", required=True, help="Hugging Face directory")
    said.add_argument("--corpus", type=Path, required=True, help="folder of JSONL or text to learn from")
    said.add_argument("--data", required=True, help="the same, prepared: to choose by and to measure on")
    said.add_argument("--items", type=Path, help="folder of task items (default: no tasks)")
    said.add_argument("--target", nargs="+", required=True, metavar="KEY=VALUE", help="shape of the cut model")
    said.add_argument("--tie_at", help="hidden units of the cut model, where the source's head is tied")
    said.add_argument("--tokens", type=int, default=500_000, help="to learn from (%(default)s)")
    said.add_argument("--length", type=int, default=256, help="tokens of a sequence (%(default)s)")
    said.add_argument("--batch", type=int, default=8, help="sequences of a step (%(default)s)")
    said.add_argument("--samples", type=int, default=64, help="sequences to choose by (%(default)s)")
    said.add_argument("--report_samples", type=int, default=16, help="of the prune commands (%(default)s)")
    said.add_argument("--documents", type=int, help="sequences of each domain to measure on (default: all)")
    said.add_argument("--limit", type=int, default=200, help="items of each task (%(default)s)")
    said.add_argument("--tasks", nargs="+", default=["arc_easy", "piqa"], choices=list(TASKS))
    said.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    said.add_argument("--lora_rate", type=float, default=5e-4, help="learning rate (%(default)s)")
    said.add_argument("--full_rate", type=float, default=5e-5, help="learning rate (%(default)s)")
    said.add_argument("--precision", default="auto", choices=("auto", "bf16", "float32"), help="of the training")
    said.add_argument("--save_every", type=int, default=50, help="steps to a checkpoint (%(default)s)")
    said.add_argument("--name", default="finetune", help="part of results/finetune.json (%(default)s)")
    said.add_argument("--output", type=Path, default=Path("out/finetune"), help="work folder (%(default)s)")
    return said.parse_args()


def stage(title: str, makes: Path, *words: Any) -> float | None:
    """Run a command of llmshearing unless what it makes is there; its seconds."""
    if makes.exists():
        log.info("%s: %s exists", title, makes)
        return None
    line = [sys.executable, "-m", "llmshearing", *map(str, words)]
    log.info("%s: $ llmshearing %s", title, shlex.join(line[3:]))
    start = time.monotonic()
    subprocess.run(line, check=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    return time.monotonic() - start


def write_text(options: argparse.Namespace, path: Path) -> None:
    """Documents of every file in turn, without those that hold held-out text, until there are enough tokens."""
    tokenizer = AutoTokenizer.from_pretrained(options.source)
    config = read_config(options.source)
    held = read_calibration(
        options.data, options.source, config.vocab_size, 1 << 30,
        SequenceOptions(samples=1, report_samples=1 << 20),
    ).report  # fmt: skip
    longest = [max(tokenizer.decode(row).split(tokenizer.eos_token), key=len) for row in held]
    snippets = [text[len(text) // 2 :][:SNIPPET] for text in longest if len(text) >= 2 * SNIPPET]
    tokens, left_out = 0, 0
    with path.open("w") as file:
        for text in corpus_texts(options.corpus, in_turn=True):
            if any(snippet in text for snippet in snippets):
                left_out += 1
                continue
            file.write(json.dumps({"text": text}) + "\n")
            tokens += len(tokenizer(text, verbose=False)["input_ids"])
            if tokens >= options.tokens:
                break
    log.info("%s: %s tokens; %d documents with held-out text left out", path, f"{tokens:,}", left_out)


def report(options: argparse.Namespace, small: Path, steps: int, seconds: dict[str, float | None]) -> None:
    """Evaluate all models side by side, print the table, keep the numbers."""
    models = [small, *(options.output / way for way in options.ways)]
    found = options.output / "evaluation"
    tasks = [f"{name}={options.items / TASKS[name]}.jsonl" for name in options.tasks] if options.items else []
    words = [*map(str, models), "--source", options.source, "--data", options.data, "--no_speed", "--output", found]
    words += ["--documents", options.documents] if options.documents else []
    words += ["--tasks", *tasks, "--limit", options.limit] if tasks else []
    stage("evaluate", found / "evaluation.json", "evaluate", *words)
    result = json.loads((found / "evaluation.json").read_text())
    told = {"steps": steps, "tokens": steps * options.batch * options.length, "target": options.target}
    kept = ("length", "batch", "samples", "documents", "lora_rate", "full_rate", "precision")
    told |= {key: getattr(options, key) for key in kept}
    told |= {"items": options.limit} if options.items else {}
    rows = {model["name"]: row_of(model) for model in result["models"]}
    path = save_part("finetune", options.name, {**told, "seconds": seconds, "models": rows})
    names = list(dict.fromkeys(key for row in rows.values() for key in row))
    print("| model | " + " | ".join(names) + " |\n|---|" + "---:|" * len(names))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(str(row.get(key, "")) for key in names) + " |")
    log.info("wrote %s", path)


def row_of(model: dict[str, Any]) -> dict[str, Any]:
    """Parameters, loss, perplexity, and accuracies with their standard errors."""
    row: dict[str, Any] = {"parameters": model["parameters"]}
    if "loss" in model:
        row["loss"] = round(model["loss"]["all"]["loss"], 4)
        row["perplexity"] = round(model["loss"]["all"]["perplexity"], 3)
    for task, metrics in model.get("tasks", {}).items():
        accuracy = metrics.get("acc")
        if isinstance(accuracy, dict):
            row[task] = f"{accuracy['value']:.3f} ± {accuracy['stderr']:.3f}"
    return row


if __name__ == "__main__":
    main()
