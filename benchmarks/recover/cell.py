"""One cell: a row with a seed and a budget of tokens, from the source to the losses."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.recover import commands
from benchmarks.recover.configuration import Start, configuration, started
from benchmarks.recover.rows import ROWS, Row, Training
from benchmarks.recover.settings import Setting
from llmshearing.training.evaluation import domain_losses, eval_batches


@dataclass(frozen=True)
class Cell:
    """row: a key of ROWS. budget: tokens of all training."""

    row: str
    seed: int
    budget: int

    @property
    def name(self) -> str:
        return f"{self.row}-{self.budget}-s{self.seed}"


def multiplied(model: PreTrainedModel) -> int:
    """Parameters that a token is multiplied by: all but the input embedding, which is looked up."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return model.num_parameters() - (0 if tied else model.get_input_embeddings().weight.numel())


def shape_of(path: Path | str) -> PreTrainedModel:
    """The model of a directory's config, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))


def source_losses(setting: Setting, root: Path) -> dict[str, float]:
    """The source on the held-out sequences, by domain and ``mean`` over domains; kept in a file."""
    file = root / "source.json"
    with commands.once(file) as missing:
        if missing:
            data, held_out = commands.prepare(setting, root, 0)
            model = AutoModelForCausalLM.from_pretrained(setting.source, dtype=torch.float32)
            names = commands.domains(data)
            batches = eval_batches(
                str(held_out), "eval_merge", names, setting.length, model.config.vocab_size, setting.microbatch
            )
            found = domain_losses(model, batches, names, torch.bfloat16)
            found["mean"] = sum(found[name] for name in names) / len(names)
            file.write_text(json.dumps({**found, "parameters": model.num_parameters()}))
    return json.loads(file.read_text())


def run_cell(setting: Setting, cell: Cell, root: Path) -> dict[str, Any]:
    """All stages of a cell; what an earlier call has made is kept. The record says what came out."""
    with commands.alone(root / "cells" / cell.name):
        return _run(setting, cell, root)


def _run(setting: Setting, cell: Cell, root: Path) -> dict[str, Any]:
    row, folder, begun = ROWS[cell.row], root / "cells" / cell.name, time.monotonic()
    log_file = folder / "log.txt"
    data, held_out = commands.prepare(setting, root, cell.seed)
    places: dict[str, Any] = {"data": data, "held_out": held_out, "seed": cell.seed}
    places |= {"targets": source_losses(setting, root)}
    begin = started(commands.cut(setting, root, data, cell.seed, row.cuts), setting.source)
    if row.scratch:
        begin = replace(begin, model=commands.scratch(setting, root, begin.model, cell.seed))
    seconds = {"cut": time.monotonic() - begun}
    used, curve = 0, []
    if row.masks is not None:
        steps, per_step = stage_steps(setting, row.masks, round(cell.budget * row.masks.share))
        made = configuration(setting, row.masks, start=begin, folder=folder / "masks", steps=steps, l0=row.l0, **places)
        folded = commands.fold(log_file, commands.train(log_file, made, folder / "masks"))
        begin = Start(folded, begin.model, folded.with_suffix(".selection.safetensors"))
        used = steps * per_step
        curve += evaluations(folder / "masks", 0, per_step)
    training = row.recovery(cell.budget)
    steps, per_step = stage_steps(setting, training, cell.budget - used)
    seconds["masks"] = time.monotonic() - begun - sum(seconds.values())
    made = configuration(setting, training, start=begin, folder=folder / "run", steps=steps, **places)
    commands.train(log_file, made, folder / "run")
    seconds["train"] = time.monotonic() - begun - sum(seconds.values())
    after = evaluations(folder / "run", used, per_step)
    return {
        "row": cell.row, "seed": cell.seed, "budget": cell.budget, "tokens": used + steps * per_step,
        "pruned": after[0]["loss"], "loss": after[-1]["loss"], "domains": after[-1]["domains"],
        "curve": [{"tokens": at["tokens"], "loss": at["loss"]} for at in (*curve, *after)],
        **sizes(setting, row, training, folder / "run", used, steps * per_step),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }  # fmt: skip


def stage_steps(setting: Setting, training: Training, tokens: int) -> tuple[int, int]:
    """Steps that ``tokens`` suffice for, and tokens of a step."""
    per_step = min(training.batch, setting.largest_batch) * setting.length
    return max(1, tokens // per_step), per_step


def evaluations(folder: Path, before: int, per_step: int) -> list[dict[str, Any]]:
    """A run's evaluations, with the tokens that the cell has trained on by then; domains count alike."""
    found = []
    for line in (folder / "evaluations.jsonl").read_text().splitlines():
        at = json.loads(line)
        values = at["domains"]
        found.append({
            "tokens": before + at["batch"] * per_step, "loss": sum(values.values()) / len(values), "domains": values
        })  # fmt: skip
    return found


def sizes(setting: Setting, row: Row, training: Training, folder: Path, masks: int, tokens: int) -> dict[str, float]:
    """Parameters, and compute in passes of the whole source, forward and backward, over a token.

    A step of the masks counts as one of the source: an upper bound, as closed units cost nothing.
    """
    compact = shape_of_run(folder)
    share = multiplied(compact) / multiplied(shape_of(setting.source))
    teacher = 1 / 3
    compute = setting.samples * setting.length * row.seen
    if row.masks is not None:
        compute += masks * (1 + (teacher if row.masks.distill else 0))
    compute += tokens * (share + (teacher if training.distill else 0))
    return {"parameters": compact.num_parameters(), "source_tokens": round(compute)}


def shape_of_run(folder: Path) -> PreTrainedModel:
    """The compact model of a run's last checkpoint, without weights."""
    from llmshearing.checkpoints.checkpoint import read_checkpoint

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(read_checkpoint(folder / commands.LATEST).info.config)
