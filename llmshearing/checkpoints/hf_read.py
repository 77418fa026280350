"""Hugging Face models in: a directory or name -> weights by name and a config -> checkpoint. Strict, no remote code."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llmshearing.checkpoints.arguments import check_facts
from llmshearing.checkpoints.checkpoint import CheckpointInfo, check_weights, plain_config, save_checkpoint
from llmshearing.checkpoints.generation import writable
from llmshearing.checkpoints.output import check_file
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.storage import LazyTensors, open_weights

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Keys of the command line that set something; every other one states a fact, which is checked.
SETTABLE = ("model_class", "dtype", "tokenizer")
# Old checkpoints hold this, which is computed from the config; transformers leaves it out of account too.
COMPUTED = "rotary_emb.inv_freq"


def load_hf_model(
    name: Path | str, dtype: torch.dtype | str = "auto", config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """A causal LM of transformers on the CPU, strictly and without remote code.

    Args:
        dtype: "auto" is the model's own. config: in place of the model's own, as when a run turns dropout off.

    Raises:
        ShearingError: it cannot be loaded, or its tensors are not exactly those of its config.
    """
    _check_directory(name)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(name), config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # transformers, safetensors and the hub raise many kinds for broken or absent models
        raise ShearingError(f"Hugging Face model {name} cannot be loaded: {error}") from error
    _check_report(str(name), report)
    return model


def load_hf_weights(name: Path | str) -> tuple[LazyTensors, PretrainedConfig]:
    """Tensors by name, each read on access, and config of a Hugging Face model, whose model is not built.

    Raises:
        ShearingError: it cannot be loaded, or its tensors are not exactly those of its family's table.
    """
    _check_directory(name)
    try:
        config = AutoConfig.from_pretrained(str(name), trust_remote_code=False)
    except Exception as error:  # transformers and the hub raise many kinds
        raise ShearingError(f"Hugging Face model {name} cannot be loaded: {error}") from error
    table = table_for(config)
    entries = {key: value for key, value in open_weights(name).entries.items() if not key.endswith(COMPUTED)}
    return check_weights(str(name), entries, table), config


def _check_directory(name: Path | str) -> None:
    if looks_local(name) and not (Path(name) / "config.json").is_file():
        raise ShearingError(f"{name} is no Hugging Face directory: it has no config.json")


def build_model(
    weights: Mapping[str, Tensor], config: PretrainedConfig, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """The transformers model with these weights, strictly; "auto": the weights' dtype."""
    named = causal_lm(config)
    wanted = next(iter(weights.values())).dtype if dtype == "auto" else dtype
    model, report = named.from_pretrained(
        None, config=config, state_dict=dict(weights), dtype=wanted, output_loading_info=True
    )
    _check_report(type(model).__name__, report)
    return model.eval()


def hf_to_checkpoint(
    name: Path | str, output: Path | str, given: Mapping[str, Any] | None = None, *, overwrite: bool = False
) -> Path:
    """Hugging Face directory or name -> checkpoint in Composer's layout. given: facts to check; ``tokenizer`` sets."""
    output, given = Path(output), given or {}
    check_file(output, overwrite)
    weights, config = load_hf_weights(name)
    check_given(given, config, str(name))
    where = str(Path(name).resolve()) if Path(name).is_dir() else str(name)
    info = CheckpointInfo(
        hf_config=plain_config(config),
        tokenizer=str(given.get("tokenizer") or where),
        history=[f"converted from the Hugging Face model {where}"],
        generation_config=_generation(name, config).to_dict(),
    )
    with tqdm(total=len(weights), desc="converting", unit="tensor") as bar:
        save_checkpoint(output, weights, info, progress=bar.update)
    count = table_for(config).count()
    log.info("wrote %s (%s parameters, Composer's keys) to %s", where, f"{count:,}", output)
    return output


def looks_local(name: Path | str) -> bool:
    """Whether to look for a directory only: a name on the hub is at most owner/name, and no such path exists here."""
    text = str(name)
    return isinstance(name, Path) or Path(text).exists() or text.count("/") > 1 or text.startswith((".", "/", "~"))


def _check_report(name: str, report: Mapping[str, Any]) -> None:
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := [str(item) for item in report.get(kind) or ()]:
            problems.append(f"{kind.replace('_', ' ')}: {', '.join(sorted(found)[:8])} ({len(found)} in all)")
    if problems:
        raise ShearingError(f"{name}: tensors and config do not belong together: " + "; ".join(problems))


def _generation(name: Path | str, config: PretrainedConfig) -> GenerationConfig:
    """The model's own, or, where it has none, the one that transformers makes from its config."""
    try:
        return GenerationConfig.from_pretrained(str(name))
    except Exception:  # OSError where it has none; many other kinds where it is damaged or odd: it is only passed on
        return writable(None, config)


def check_given(given: Mapping[str, Any], config: PretrainedConfig, where: str) -> None:
    """Check the command line's facts, dtype and model_class against a config.

    Raises:
        ShearingError: naming every unknown key, and every contradiction with both values.
    """
    facts = config.to_dict()
    facts.pop("dtype", None)  # dtype= sets what is written
    check_facts(given, facts, where, SETTABLE)
    dtype, name = given.get("dtype"), given.get("model_class")
    if dtype is not None and dtype not in DTYPES:
        raise ShearingError(f"dtype={dtype}: must be one of {', '.join(DTYPES)}")
    if name is not None and getattr(getattr(transformers, str(name), None), "config_class", None) is not type(config):
        raise ShearingError(f"model_class={name}: {where} is of {model_class(config)}")


def model_class(config: PretrainedConfig) -> str:
    """Name of the class that the config asks for, else of its model type's causal LM."""
    return causal_lm(config).__name__


def causal_lm(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that the config asks for, else its model type's causal LM."""
    named = (config.architectures or [None])[0]
    known = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return known if not named or named == known.__name__ else getattr(transformers, named, known)
