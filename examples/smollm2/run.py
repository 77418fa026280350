"""`make smollm2`: shear SmolLM2-135M on a CPU, end to end, by the commands that users type.

    source -> corpus -> data                                            out/smollm2/{source,corpus,data}
    turn -> fisher, refit -> tie -> recover -> Hugging Face             {turned,half,tied,recover,hf}
    learned masks -> fold -> continue -> Hugging Face (as published)    {prune,continue,hf-published}

30 layers, hidden 576, 3 KV groups, intermediate 1536 become 22 layers, 384, 2 and 1024. The training is short (see
configs/smollm2), the same tokens for both: it shows the pipeline on a real model and does not make a model to use. What
exists is not made again.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import subprocess
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer

from examples.quickstart.run import last_checkpoint, load, table
from examples.smollm2.source import generate
from llmshearing.config import Config, load_config, target_shape
from llmshearing.errors import ShearingError
from llmshearing.training.evaluation import domain_losses, eval_batches, tokens_per_second

log = logging.getLogger("smollm2")

PRUNE, CONTINUE = Path("configs/smollm2/135m.yaml"), Path("configs/smollm2/53m.yaml")
RECOVER = Path("configs/smollm2/recover.yaml")
OUTPUT = Path("out/smollm2")
CORPUS_MB = "1"
"""Text a domain; both training runs together see about an eighth of it."""
SEPARATOR = "<|endoftext|>"
"""Between documents in SmolLM2's pretraining; its BOS and EOS belong to chat messages."""
EVAL_BATCH = 4
"""Sequences of 256 tokens: their logits over 49,152 tokens take 200 MB."""
CHOOSE_BY = "128"
"""Sequences of 256 tokens that units are chosen by, and tensors refitted to."""
PROMPTS = ("The capital of France is", "def __init__(self, ", "Returns a list of ")


def stage(title: str, makes: Path, *arguments: str | Path) -> None:
    """Run `python -m ARGUMENTS`, shown as one would type it, unless what it makes is there.

    Raises:
        ShearingError: it failed; its own output has said why.
    """
    if makes.exists():
        log.info("%s: %s exists", title, makes)
        return
    words = ["-m", *map(str, arguments)]
    log.info("%s: $ python %s", title, shlex.join(words))
    start = time.monotonic()
    if status := subprocess.run([sys.executable, *words], check=False).returncode:
        raise ShearingError(f"{title} failed with exit status {status}; what is done so far stays, run it again")
    log.info("%s: %.0f s", title, time.monotonic() - start)


def stages(out: Path) -> None:
    """Everything up to the two models in Hugging Face's format."""
    source, corpus, data, prune, kept = (out / n for n in ("source", "corpus", "data", "prune", "continue"))
    stage("source", source, "examples.smollm2.source", "--output", source)
    stage("corpus", corpus, "examples.quickstart.corpus", "--output", corpus, "--limit", CORPUS_MB)
    stage(
        "data", data, "llmshearing.data.prepare", "--input", corpus, "--tokenizer", source, "--output", data,
        "--max_seq_len", "256", "--eval_fraction", "0.06", "--eval_seqs", "16", "--bos_token", SEPARATOR,
        "--eos_token", SEPARATOR,
    )  # fmt: skip
    here = [f"data_local={data}", f"tokenizer_name={source}"]
    cut(out)
    turned, kept_units = out / "turned", out / "half" / "selection.safetensors"
    stage(
        "recover", last_checkpoint(out / "recover", load_config(RECOVER)), "llmshearing.train", RECOVER, *here,
        f"model.path={out / 'tied'}", f"distill.teacher={turned}", f"distill.selection={kept_units}",
        f"save_folder={out / 'recover'}",
    )  # fmt: skip
    done, pruned = last_checkpoint(prune, load_config(PRUNE)), prune / "pruned-latest-rank0.pt"
    stage("shear", done, "llmshearing.train", PRUNE, *here, f"model.path={source}", f"save_folder={prune}")
    stage(
        "fold", pruned, "llmshearing.utils.post_pruning_processing", "prune_and_save_model", prune / "latest-rank0.pt"
    )
    done = last_checkpoint(kept, load_config(CONTINUE))
    stage("continue", done, "llmshearing.train", CONTINUE, *here, f"model.path={pruned}", f"save_folder={kept}")
    exports = {"hf": out / "recover" / "latest-rank0.pt", "hf-masks": pruned, "hf-published": kept / "latest-rank0.pt"}
    for name, path in exports.items():
        stage(
            "export", out / name, "llmshearing.utils.composer_to_hf", path, out / name, "dtype=bfloat16",
            f"tokenizer={source}",
        )  # fmt: skip


def cut(out: Path) -> None:
    """The model of the target's shape: turned, cut where its loss depends least on units, refitted, tied again."""
    target = target_shape(load_config(PRUNE))
    sizes = {
        "hidden_size": target.hidden,
        "num_key_value_heads": target.groups,
        "intermediate_size": target.intermediate,
        "num_hidden_layers": target.layers,
    }
    turned, half, tied = (out / name for name in ("turned", "half", "tied"))
    data = ("--calibration", out / "data", "--samples", CHOOSE_BY, "--report_samples", "16")
    prune = "llmshearing.prune"
    stage(
        "turn", turned, prune, "turn", "--model", out / "source", "--output", turned, "--untie", "--tie_at",
        target.hidden, *data,
    )  # fmt: skip
    shape = [f"{key}={size}" for key, size in sizes.items()]
    stage("choose", half, prune, "fisher", "--model", turned, "--output", half, "--refit", *data, "--target", *shape)
    stage("tie", tied, prune, "tie", "--model", half, "--output", tied)


def report(out: Path, cfg: Config) -> str:
    """Losses of the three models on held-out documents, their speed, and what they write; also kept as files."""
    names = cfg.callbacks.data_loading.set_names or []
    folders = {
        "source": out / "source",
        "sheared": out / "tied",
        "sheared, continued": out / "hf",
        "learned masks": out / "hf-masks",
        "learned masks, continued": out / "hf-published",
    }
    models = {name: load(folder) for name, folder in folders.items()}
    speed = tokens_per_second(models, shape=(2, cfg.max_seq_len), repeats=3)
    rows = {}
    for name, model in models.items():
        vocab = model.config.vocab_size
        batches = eval_batches(str(out / "data"), "eval_merge", names, cfg.max_seq_len, vocab, EVAL_BATCH)
        losses = domain_losses(model, batches, names)
        rows[name] = {"parameters": model.num_parameters(), "tokens/s": speed[name], **losses}
    tokenizer = AutoTokenizer.from_pretrained(out / "hf")
    samples = [f"[{name}] {generate(m, tokenizer, prompt)!r}" for prompt in PROMPTS for name, m in models.items()]
    text = "\n".join([table(rows), "", *samples])
    (out / "report.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "report.txt").write_text(text + "\n")
    return text


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.smollm2.run",
        description="Shear SmolLM2-135M-Instruct: about 15 minutes on two free CPU cores. Run in the root.",
        epilog="example: make smollm2",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for everything (%(default)s)")
    out = parser.parse_args(argv).output
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    start = time.monotonic()
    try:
        cfg = load_config(PRUNE)
        out.mkdir(parents=True, exist_ok=True)
        stages(out)
        text = report(out, cfg)
    except (ShearingError, OSError) as error:
        log.error("%s", error)
        return 1
    print(f"\nLoss on held-out documents, nats per token; tokens/s of a forward pass; greedy samples.\n\n{text}\n")
    log.info("%.1f minutes", (time.monotonic() - start) / 60)
    made = (out / name for name in ("source", "tied", "hf", "report.txt"))
    log.info("wrote source, sheared and continued model and the report to %s, %s, %s, %s", *made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
