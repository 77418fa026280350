"""Learned masks for `benchmarks.prune`: a short shearing run at the shape that a ratio means, by the users' commands.

    python -m llmshearing.train run.yaml -> post_pruning_processing -> composer_to_hf

Masks on heads and intermediate units only, which is what the one-shot methods cut at a ratio.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from llmshearing.families import table_for
from llmshearing.prune.methods import METHODS
from llmshearing.prune.targets import resolve_target


def config(
    source: Path,
    data: Path,
    folder: Path,
    ratio: float,
    *,
    domains: Sequence[str],
    length: int,
    steps: int,
    batch: int,
    lr: float,
) -> dict[str, Any]:
    """The run's configuration. length: tokens of a sequence; batch: sequences of a step."""
    target = resolve_target({"ratio": ratio}, table_for(AutoConfig.from_pretrained(source)), METHODS["random"]).shape
    return {
        "data_local": str(data),
        "tokenizer_name": str(source),
        "max_seq_len": length,
        "run_name": f"learned-{ratio:g}",
        "model": {
            "path": str(source),
            "l0_module": {
                "pruning_modules": ["head", "intermediate"],
                "lagrangian_warmup_steps": f"{steps // 2}ba",
                "eval_target_model": True,
                "target_model": {
                    "n_heads": target["num_attention_heads"],
                    "n_kv_heads": target["num_key_value_heads"],
                    "intermediate_size": target["intermediate_size"],
                },
            },
        },
        "train_loader": {"dataset": {"split": "for_prune"}},
        "eval_loader": {"dataset": {"split": "eval_merge", "shuffle": False}, "drop_last": False},
        "scheduler": {"t_warmup": f"{max(1, steps // 10)}ba"},
        "optimizer": {"lr": lr, "lag_lr": 1.0, "schedule_masks": False},
        "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
        "max_duration": f"{steps}ba",
        "eval_interval": f"{steps}ba",
        "eval_subset_num_batches": 1,
        "global_train_batch_size": batch,
        "device_train_microbatch_size": min(batch, 4),
        "precision": "fp32",
        "callbacks": {
            "data_loading": {
                "dynamic": True,
                "set_names": list(domains),
                "proportion": [1 / len(domains)] * len(domains),
                "update_type": "constant",
            }
        },
        "save_folder": str(folder),
        "save_interval": f"{steps}ba",
    }


def shear(output: Path, **settings: Any) -> None:
    """Write the sheared model's Hugging Face directory; the run stays beside it. settings: as of :func:`config`."""
    folder = output.with_name(f"{output.name}-run")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config(folder=folder, **settings)))
    _run("llmshearing.train", file)
    _run("llmshearing.utils.post_pruning_processing", "prune_and_save_model", folder / "latest-rank0.pt")
    pruned = folder / "pruned-latest-rank0.pt"
    _run("llmshearing.utils.composer_to_hf", pruned, output, f"tokenizer={settings['source']}")


def _run(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)
