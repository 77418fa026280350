"""The YAML of a cell's stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.recover.commands import domains
from benchmarks.recover.rows import Training
from benchmarks.recover.settings import Setting
from llmshearing.checkpoints.output import REPORT, SELECTION


@dataclass(frozen=True)
class Start:
    """A model to train, and what it was made of."""

    model: Path
    origin: Path
    """The model whose units and layers it has: the source, or the source turned."""
    selection: Path
    """Which of them."""


def started(model: Path, source: Path) -> Start:
    """Of a directory that `prune` wrote, or of the source itself."""
    if model == source:
        return Start(model, model, model)
    return Start(model, Path(json.loads((model / REPORT).read_text())["source"]), model / SELECTION)


def configuration(
    setting: Setting, training: Training, *, start: Start, data: Path, held_out: Path, folder: Path, seed: int,
    steps: int, l0: Mapping[str, Any] | None = None, targets: Mapping[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The YAML of a stage. l0: of the masks; None: there are none.

    targets: the source's loss by domain, for a dynamic mixture.
    """
    names, batch = domains(data), min(training.batch, setting.largest_batch)
    warmup = max(1, round(steps * (0.05 if l0 is None else 0.1)))
    made: dict[str, Any] = {
        "data_local": str(data), "tokenizer_name": str(setting.source), "max_seq_len": setting.length,
        "global_seed": seed, "run_name": folder.name,
        "model": {"path": str(start.model)},
        "train_loader": {"dataset": {"split": "for_ft" if l0 is None else "for_prune"}},
        "eval_loader": {"dataset": {"local": str(held_out), "split": "eval_merge"}, "drop_last": False},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": f"{warmup}ba", "alpha_f": 0.05},
        "optimizer": {
            "name": "adamw", "lr": training.lr, "betas": [0.9, 0.95], "weight_decay": 0.1, **training.optimizer
        },
        "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
        "max_duration": f"{steps}ba", "eval_first": True, "eval_interval": f"{max(1, steps // 4)}ba",
        "global_train_batch_size": batch,
        "device_train_microbatch_size": min(batch, setting.microbatch),
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
        made["eval_interval"] = f"{max(1, steps // 16)}ba"  # each evaluation updates it
    if training.distill is not None:
        # under masks no teacher is named: the run's own source
        made["distill"] = {"teacher": str(setting.source) if l0 is None else None, **training.distill}
        if training.distill.get("hidden"):
            made["distill"] |= {"teacher": str(start.origin), "selection": str(start.selection)}
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
