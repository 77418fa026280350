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

from benchmarks.recover.rows import Cut, Training
from benchmarks.recover.settings import Setting
from llmshearing.errors import ShearingError

log = logging.getLogger("recover")
LATEST, FOLDED = "latest-rank0.pt", "pruned-latest-rank0.pt"


def command(log_file: Path, *words: str | Path) -> None:
    """Run `llmshearing WORDS`; its output goes to ``log_file``.

    Raises:
        ShearingError: it failed, with the last lines of its output.
    """
    said = [str(word) for word in words]
    log.info("$ llmshearing %s", shlex.join(said))
    with log_file.open("a") as output:
        status = subprocess.run(
            [sys.executable, "-m", "llmshearing", *said], stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status:
        tail = "".join(log_file.read_text(errors="replace").splitlines(keepends=True)[-15:])
        raise ShearingError(f"llmshearing {shlex.join(said)}: exit status {status}\n{tail}")


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
        target = [f"{key}={setting.target[key]}" for key in step.sizes if key in setting.target]
        name += "".join(["+" * bool(name), step.method, *(option.replace("--", "-") for option in step.options)])
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
                command(output.with_suffix(".log"), *words, *step.options)
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


def configuration(
    setting: Setting, training: Training, *, model: Path, data: Path, held_out: Path, folder: Path, seed: int,
    steps: int, l0: Mapping[str, Any] | None = None, targets: Mapping[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The YAML of a stage. l0: the masks', None without. targets: the source's loss by domain, for a dynamic mixture."""
    names = domains(data)
    warmup = max(1, round(steps * (0.05 if l0 is None else 0.1)))
    made: dict[str, Any] = {
        "data_local": str(data), "tokenizer_name": str(setting.source), "max_seq_len": setting.length,
        "global_seed": seed, "run_name": folder.name,
        "model": {"path": str(model)},
        "train_loader": {"dataset": {"split": "for_ft" if l0 is None else "for_prune"}},
        "eval_loader": {"dataset": {"local": str(held_out), "split": "eval_merge"}, "drop_last": False},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": f"{warmup}ba", "alpha_f": 0.05},
        "optimizer": {
            "name": "adamw", "lr": training.lr, "betas": [0.9, 0.95], "weight_decay": 0.1, **training.optimizer
        },
        "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
        "max_duration": f"{steps}ba", "eval_first": True, "eval_interval": f"{interval(setting, training, steps)}ba",
        "global_train_batch_size": training.batch,
        "device_train_microbatch_size": min(training.batch, setting.microbatch),
        "device_eval_batch_size": setting.microbatch,
        "callbacks": {"data_loading": {
            "dynamic": True, "set_names": names, "proportion": [1 / len(names)] * len(names),
            "update_type": "constant",
        }},
        "progress_bar": False, "save_folder": str(folder), "save_interval": f"{max(1, steps // 8)}ba",
        "save_num_checkpoints_to_keep": 1, "autoresume": True,
    }  # fmt: skip
    if training.dynamic and targets is not None:
        mixture = {"update_type": "doremi", "target_loss": [targets[name] for name in names]}
        made["callbacks"]["data_loading"] |= mixture
    if training.distill is not None:
        made["distill"] = {"teacher": str(setting.source), **training.distill}
    if l0 is not None:
        made["model"]["l0_module"] = {"eval_target_model": True, "target_model": setting.mask_target, **l0}
        made["scheduler"] = {"name": "constant_with_warmup", "t_warmup": f"{warmup}ba"}
        made["eval_first"] = False
    for key, value in training.extra.items():
        *path, last = key.split(".")
        place = made
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return made


def interval(setting: Setting, training: Training, steps: int) -> int:
    """Steps between evaluations: a sixteenth of a million tokens of the lab's longest run, a quarter of short ones."""
    return max(1, steps // 4)


def environment(threads: int) -> None:
    """Threads of the commands that follow."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
