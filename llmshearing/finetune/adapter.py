"""LoRA by PEFT: which modules, an adapter that others trained, its base.

An adapter is a difference to one base. Beside PEFT's files a small one tells a fingerprint of the base's weights, so
that a moved directory is known again and another model is refused, whatever it is called.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from llmshearing.data.json_file import read_json
from llmshearing.errors import ShearingError
from llmshearing.evaluate.lm_eval_tasks import need
from llmshearing.families.table import EXPERT, Table
from llmshearing.finetune.options import LoraOptions

log = logging.getLogger(__name__)

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "llmshearing_base.json"
SAMPLED = 256
"""Elements of each tensor, from its beginning and its end, that the fingerprint is made of."""
NAMED = 3


def peft() -> Any:
    """The library; raises ShearingError where it is not installed."""
    return need("peft", "finetune", "LoRA and adapters")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of names, shapes and some elements of all tensors, which no training leaves as they were."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        some = torch.cat([flat[:SAMPLED], flat[-SAMPLED:]]).float().cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()


def default_targets(table: Table) -> list[str]:
    """Every linear module inside the layers; no router: its outputs choose, they are no features."""
    return [
        name.removesuffix(".weight")
        for name, spec, layer in table.instances()
        if layer is not None
        and spec.module.form in ("linear", "conv1d")
        and spec.reads is not None
        and name.endswith(".weight")
        and EXPERT not in spec.axes
    ]


def with_adapter(model: PreTrainedModel, table: Table, options: LoraOptions) -> Any:
    """The model with a new adapter; its other weights are frozen.

    Raises:
        ShearingError: PEFT is absent, or a target is no module that it can adapt.
    """
    library, targets = peft(), list(options.targets) or default_targets(table)
    config = library.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        fan_in_fan_out=any(spec.module.form == "conv1d" for spec in table.tensors),
    )
    try:
        return library.get_peft_model(model, config)
    except ValueError as error:  # no such module, or one of another class
        raise ShearingError(f"LoRA targets {', '.join(targets[:NAMED])}: {error}") from error


def with_stored_adapter(model: PreTrainedModel, directory: Path, name: Path | str) -> Any:
    """The model with the adapter of a directory, to be trained on or merged.

    Args:
        model: its base, loaded from `name`.

    Raises:
        ShearingError: it is no adapter that PEFT wrote as safetensors, or one of another base.
    """
    library = peft()
    if missing := [file for file in (CONFIG, WEIGHTS) if not (directory / file).is_file()]:
        raise ShearingError(f"adapter {directory} has no {' and no '.join(missing)}: it is no adapter of PEFT's")
    config = read_json(directory / CONFIG, "adapter")
    _check_base(directory, config, model, name)
    if config.get("peft_type") != "LORA":
        raise ShearingError(f"adapter {directory} is of type {config.get('peft_type')}; LORA is known")
    try:
        loaded = library.PeftConfig.from_pretrained(str(directory))
        loaded.inference_mode = False
        adapted = library.get_peft_model(model, loaded)
        tensors = load_file(directory / WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ShearingError(f"adapter {directory} cannot be loaded on {name}: {error}") from error
    own = library.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    _check_tensors(directory, name, own, tensors)
    library.set_peft_model_state_dict(adapted, tensors)
    return adapted


def _check_base(directory: Path, config: Mapping[str, Any], model: nn.Module, name: Path | str) -> None:
    """By the fingerprint where one is there; else by the name that PEFT keeps."""
    if (directory / BASE).is_file():
        about = read_json(directory / BASE, "adapter")
        if about.get("fingerprint") != fingerprint(model):
            raise ShearingError(
                f"adapter {directory} is of another base: it was trained on {about.get('base')}, and {name} has other "
                "weights"
            )
        return
    base = str(config.get("base_model_name_or_path"))
    if base != str(name) and Path(base).resolve() != Path(name).resolve():
        raise ShearingError(
            f"adapter {directory} is of another base: it was trained on {base}, not {name}. Where they are the same "
            f"weights, write {name} into base_model_name_or_path of its {CONFIG}"
        )


def _check_tensors(
    directory: Path, name: Path | str, own: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> None:
    """PEFT would take what fits and pass over the rest."""
    wrong = sorted(own.keys() ^ found.keys())
    wrong += [key for key in own.keys() & found.keys() if own[key].shape != found[key].shape]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise ShearingError(
            f"adapter {directory} is of another base: of {name} these tensors are absent or of another shape: "
            f"{', '.join(wrong[:NAMED])}{more}"
        )


def save_adapter(adapted: Any, directory: Path, name: Path | str, base: str) -> None:
    """Write the adapter as PEFT does, and the fingerprint of its base."""
    adapted.save_pretrained(str(directory), save_embedding_layers=False)
    about = {"base": str(name), "fingerprint": base}
    (directory / BASE).write_text(json.dumps(about, indent=1) + "\n")
    log.info("wrote the adapter to %s", directory)
