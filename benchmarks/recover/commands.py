"""The commands of a cell, run as a user runs them; what they have made is not made again.

data prepare -> prune ... -> train (masks) -> fold -> train
"""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.recover.rows import Cut
from benchmarks.recover.settings import Setting
from llmshearing.errors import ShearingError

log = logging.getLogger("recover")
THREADS = {"OMP_NUM_THREADS": "1"}
"""Cells run side by side, one core each; and the same arithmetic everywhere."""
RUNNING: set[subprocess.Popen[bytes]] = set()
LATEST, FOLDED = "latest-rank0.pt", "pruned-latest-rank0.pt"


def command(log_file: Path, *words: str | Path) -> None:
    """Run `llmshearing WORDS`; its output goes to ``log_file``.

    Raises:
        ShearingError: it failed, with the last lines of its output.
    """
    said = [str(word) for word in words]
    log.info("$ llmshearing %s", shlex.join(said))
    with log_file.open("a") as output:
        words = [sys.executable, "-m", "llmshearing", *said]
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **THREADS})
        RUNNING.add(process)
        status = process.wait()
        RUNNING.discard(process)
    if status:
        tail = "".join(log_file.read_text(errors="replace").splitlines(keepends=True)[-15:])
        raise ShearingError(f"llmshearing {shlex.join(said)}: exit status {status}\n{tail}")


def stop() -> None:
    """Ask what runs to save its state and end."""
    for process in list(RUNNING):
        process.terminate()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Work in a folder while no other process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def once(makes: Path) -> Iterator[bool]:
    """Whether ``makes`` has yet to be made; other processes that want it wait meanwhile."""
    makes.parent.mkdir(parents=True, exist_ok=True)
    with makes.with_name(f"{makes.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not makes.exists()


def prepare(setting: Setting, root: Path, seed: int) -> tuple[Path, Path]:
    """The data of a seed, and where the held-out split is. The seed says which documents are for choosing alone."""
    data, held_out = root / f"data-{seed}", root / "eval"
    shared = ["--tokenizer", setting.source, "--max_seq_len", str(setting.length), "--no_progress"]
    if setting.separator is not None:
        shared += ["--bos_token", setting.separator, "--eos_token", setting.separator]
    eval_seqs = ["--eval_seqs", str(setting.eval_seqs)]
    own = ["--eval_fraction", "0"] if setting.held_out else ["--eval_fraction", "0.06", *eval_seqs]
    with once(data) as missing:
        if missing:
            own += ["--for_prune_fraction", "0.1", "--seed", str(seed)]
            command(root / "data.log", "data", "prepare", "--input", setting.corpus, "--output", data, *shared, *own)
    if setting.held_out is None:
        return data, data
    with once(held_out) as missing:
        if missing:
            whole = ["--eval_fraction", "1", "--for_prune_fraction", "0", *eval_seqs]
            command(
                root / "data.log", "data", "prepare", "--input", setting.held_out, "--output", held_out, *shared, *whole
            )
    return data, held_out


def domains(data: Path) -> list[str]:
    """Names of the data's domains."""
    return sorted(path.name for path in (data / "for_ft").iterdir() if path.is_dir())


def cut(setting: Setting, root: Path, data: Path, seed: int, cuts: Sequence[Cut]) -> Path:
    """The directory that a chain of `prune` commands ends in; rows with the same beginning share it."""
    model, name = setting.source, ""
    for step in cuts:
        options = [option.format(**setting.target) for option in step.options]
        target = [f"{key}={setting.target[key]}" for key in step.sizes if key in setting.target]
        name += ("+" if name else "") + "-".join([step.method, *(option.lstrip("-") for option in options)])
        if len(target) < len(setting.target):
            name += f"-{len(target)}" if target else ""
        output = root / "cuts" / f"{name}-s{seed}"
        with once(output) as missing:
            if missing:
                words = ["prune", step.method, "--model", model, "--output", output, "--calibration", data]
                words += ["--samples", str(setting.samples), "--batch_size", str(min(16, setting.samples))]
                words += ["--report_samples", "8", "--report_split", "for_ft"]
                words += ["--seed", str(seed)] if step.method == "random" else []
                words += ["--target", *target] if target else []
                words += setting.turning if step.method == "turn" else ()
                command(output.with_suffix(".log"), *words, *options)
        model = output
    return model


def scratch(setting: Setting, root: Path, model: Path, seed: int) -> Path:
    """A model of the same config with weights that transformers draws."""
    output = root / "cuts" / f"scratch-s{seed}"
    with once(output) as missing:
        if missing:
            torch.manual_seed(seed)
            config = AutoConfig.from_pretrained(model)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(output)
            AutoTokenizer.from_pretrained(model).save_pretrained(output)
    return output


def train(log_file: Path, settings: Mapping[str, Any], folder: Path) -> Path:
    """Run a configuration to its end, or go on where it stopped; the last checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(dict(settings), sort_keys=False))
    command(log_file, "train", file)
    return folder / LATEST


def fold(log_file: Path, checkpoint: Path) -> Path:
    """The compact checkpoint of a stage that learned masks."""
    output = checkpoint.with_name(FOLDED)
    with once(output) as missing:
        if missing:
            command(log_file, "fold", checkpoint)
    return output
