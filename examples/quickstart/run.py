"""The quickstart, `make shear`: shear a real model on real text, end to end, by the commands that users type.

    corpus -> data                                                      out/quickstart/{corpus,data}
    turn -> fisher, refit -> tie -> recover -> Hugging Face             {turned,half,tied,recover,hf}
    random selection -> continue -> Hugging Face                        {random,continue-random,hf-random}
    learned masks -> fold -> continue -> Hugging Face (as published)    {prune,continue,hf-published}

All three see the same number of tokens. The source is `examples/quickstart/source`, 4.3 M parameters, trained by
`examples.quickstart.train_source`. What exists is not made again; a training stage that was interrupted continues from
its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.quickstart.train_source import EVAL_FRACTION, SEQUENCE
from llmshearing.checkpoints.checkpoint import read_checkpoint, save_checkpoint
from llmshearing.checkpoints.hf_read import hf_to_checkpoint
from llmshearing.config import Config, load_config
from llmshearing.errors import ShearingError
from llmshearing.fold.fold import fold, folded_shape
from llmshearing.prune.methods.random import random_selection
from llmshearing.training.evaluation import domain_losses, eval_batches, tokens_per_second
from llmshearing.training.model import CAUSAL_SDPA
from llmshearing.training.source import read_source

log = logging.getLogger("quickstart")
SOURCE = Path("examples/quickstart/source")
CONFIGS = Path("configs/tiny")
EVAL_SEQUENCES = 64
"""Held-out sequences a domain: enough for two digits, and evaluated several times."""
SHORT = ("max_duration=100ba", "scheduler.t_warmup=10ba", "eval_interval=50ba")
"""Plain training from the random choice sees the tokens that recover.yaml sees."""
MASKS = ("max_duration=50ba", "scheduler.t_warmup=5ba", "model.l0_module.lagrangian_warmup_steps=20ba")
AFTER = ("max_duration=50ba", "scheduler.t_warmup=5ba", "eval_interval=50ba")
"""So does the published recipe: half of them with masks, half without."""
PROMPTS = ("def __init__(self, ", "Returns a list of ", "The license ")


def command(title: str, makes: Path, *arguments: str) -> None:
    """Run `python -m ARGUMENTS` unless what it makes is there.

    Raises:
        ShearingError: it failed; its own output has said why.
    """
    if makes.exists():
        log.info("%s: %s exists", title, makes)
        return
    log.info("%s: python -m %s", title, " ".join(arguments))
    start = time.monotonic()
    if subprocess.run([sys.executable, "-m", *arguments]).returncode:
        raise ShearingError(f"{title} failed: python -m {' '.join(arguments)}")
    log.info("%s: %.0f s", title, time.monotonic() - start)


def train(title: str, config: str, makes: Path, *overrides: str) -> None:
    """A training stage; `makes` is its last checkpoint."""
    command(title, makes, "llmshearing.train", str(CONFIGS / config), *overrides)


def last_checkpoint(folder: Path, cfg: Config) -> Path:
    """Name of the checkpoint at the end of a run."""
    batches = cfg.max_duration.removesuffix("ba")
    return folder / cfg.save_filename.format(epoch=0, batch=batches, rank=0)


def fold_random(cfg: Config, output: Path) -> None:
    """A random selection of the target's shape, folded by the same fold into the same kind of file."""
    if output.exists():
        log.info("random selection: %s exists", output)
        return
    composer = output.with_name("source.pt")
    hf_to_checkpoint(SOURCE, composer, overwrite=True)
    checkpoint, source = read_checkpoint(composer), read_source(cfg)
    selection = random_selection(source.table, source.target or {}, seed=cfg.seed)
    weights = fold(checkpoint.weights, source.table, selection)
    config = {**checkpoint.info.hf_config, **folded_shape(source.table, selection)}
    info = checkpoint.info.then(f"random selection, seed {cfg.seed}", hf_config=config)
    save_checkpoint(output, {name: tensor.float() for name, tensor in weights.items()}, info)
    log.info("random selection: wrote %s", output)


def load(directory: Path) -> PreTrainedModel:
    """What any user of transformers does with the result."""
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    if any(report.values()):
        raise ShearingError(f"{directory}: tensors missing or left over: {report}")
    model.set_attn_implementation(CAUSAL_SDPA)
    return model


def table(rows: dict[str, dict[str, float]]) -> str:
    """Rows of numbers under their names."""
    columns = list(next(iter(rows.values())))
    width = max(map(len, rows)) + 2
    lines = ["".ljust(width) + "".join(column.rjust(12) for column in columns)]
    for name, row in rows.items():
        cells = (f"{row[c]:,.0f}" if c in ("parameters", "tokens/s") else f"{row[c]:.4f}" for c in columns)
        lines.append(name.ljust(width) + "".join(cell.rjust(12) for cell in cells))
    return "\n".join(lines)


def report(out: Path, cfg: Config) -> None:
    """Evaluate source, sheared, continued and random; print the table and a sample; keep both as files."""
    names = cfg.callbacks.data_loading.set_names or []
    folders = {
        "source": SOURCE,
        "sheared": out / "tied",
        "sheared, continued": out / "hf",
        "random": out / "hf-random-start",
        "random, continued": out / "hf-random",
        "learned masks": out / "hf-masks",
        "learned masks, continued": out / "hf-published",
    }
    models = {name: load(folder) for name, folder in folders.items()}
    speed = tokens_per_second(models)
    rows = {}
    for name, model in models.items():
        batches = eval_batches(cfg.data_local, "eval_merge", names, cfg.max_seq_len, model.config.vocab_size)
        losses = domain_losses(model, batches, names)
        rows[name] = {"parameters": model.num_parameters(), "tokens/s": speed[name], **losses}
    text = table(rows)
    tokenizer = AutoTokenizer.from_pretrained(out / "hf")
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        options = {"do_sample": False, "repetition_penalty": 1.2, "pad_token_id": tokenizer.eos_token_id}
        made = models["sheared, continued"].generate(**inputs, max_new_tokens=40, **options)
        text += f"\n\n> {tokenizer.decode(made[0], skip_special_tokens=True)}"
    (out / "report.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "report.txt").write_text(text + "\n")
    print(f"\nLoss on held-out documents, nats per token; tokens/s of a forward pass.\n\n{text}\n")


def shrinking(cfg: Config) -> dict[str, int]:
    """Keys of the source's config that the target makes smaller, as `prune` takes them."""
    source = read_source(cfg)
    before = source.table.shape()
    return {key: size for key, size in (source.target or {}).items() if size != before[key]}


def cut(out: Path, target: dict[str, int]) -> None:
    """The model of the target's shape: turned, cut where its loss depends least on units, refitted, tied again.

    target: see :func:`shrinking`.
    """
    data = ("--calibration", str(out / "data"), "--report_samples", "16")
    width = str(target["hidden_size"])
    sizes = [f"{key}={size}" for key, size in target.items()]
    turned, half, tied = (out / name for name in ("turned", "half", "tied"))
    command(
        "turn", turned, "llmshearing.prune", "turn", "--model", str(SOURCE), "--output", str(turned), "--untie",
        "--tie_at", width, *data,
    )  # fmt: skip
    command(
        "choose", half, "llmshearing.prune", "fisher", "--model", str(turned), "--output", str(half), "--refit",
        *data, "--target", *sizes,
    )  # fmt: skip
    command("tie", tied, "llmshearing.prune", "tie", "--model", str(half), "--output", str(tied))


def run(out: Path) -> None:
    """All stages; see the module."""
    out.mkdir(parents=True, exist_ok=True)
    data = out / "data"
    command("corpus", out / "corpus", "examples.quickstart.corpus", "--output", str(out / "corpus"))
    command(
        "data", data, "llmshearing.data.prepare", "--input", str(out / "corpus"), "--tokenizer", str(SOURCE),
        "--output", str(data), "--max_seq_len", str(SEQUENCE), "--eval_fraction", str(EVAL_FRACTION),
        "--eval_seqs", str(EVAL_SEQUENCES),
    )  # fmt: skip
    local = f"data_local={data}"
    prune = out / "prune"
    cfg = load_config(CONFIGS / "prune.yaml", [local, *MASKS])
    cut(out, shrinking(cfg))
    pruned, start = prune / "pruned-latest-rank0.pt", out / "random" / "pruned-latest-rank0.pt"
    train("learned masks", "prune.yaml", last_checkpoint(prune, cfg), local, f"save_folder={prune}", *MASKS)
    command(
        "fold", pruned, "llmshearing.utils.post_pruning_processing", "prune_and_save_model",
        str(prune / "latest-rank0.pt"),
    )  # fmt: skip
    fold_random(cfg, start)
    follow = [f"distill.teacher={out / 'turned'}", f"distill.selection={out / 'half' / 'selection.safetensors'}"]
    for title, config, path, name, *more in (
        ("continue", "recover.yaml", out / "tied", "recover", *follow),
        ("continue random", "continue.yaml", start, "continue-random", *SHORT),
        ("continue learned masks", "continue.yaml", pruned, "continue", *AFTER),
    ):
        made = last_checkpoint(out / name, load_config(CONFIGS / config, [local, *more]))
        folder = f"save_folder={out / name}"
        train(title, config, made, local, f"model.path={path}", folder, f"run_name={name}", *more)
    exports = {
        "hf": out / "recover",
        "hf-random-start": start,
        "hf-random": out / "continue-random",
        "hf-masks": pruned,
        "hf-published": out / "continue",
    }
    for name, path in exports.items():
        file = path if path.is_file() else path / "latest-rank0.pt"
        command(
            "export", out / name, "llmshearing.utils.composer_to_hf", str(file), str(out / name), f"tokenizer={SOURCE}"
        )
    report(out, cfg)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.quickstart.run",
        description="Shear a small LLaMA on real text: about 8 minutes on two CPU cores.",
        epilog="example: make shear",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out/quickstart"), help="folder for everything (%(default)s)"
    )
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier run made, then start")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    start = time.monotonic()
    if arguments.fresh:
        shutil.rmtree(arguments.output, ignore_errors=True)
    try:
        run(arguments.output)
    except ShearingError as error:
        log.error("%s", error)
        return 1
    log.info("%.1f minutes", (time.monotonic() - start) / 60)
    log.info(
        "wrote the sheared, continued model to %s and the table to %s",
        *(arguments.output / n for n in ("hf", "report.txt")),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
