"""Hugging Face models in: a directory or name -> weights by name and a config -> checkpoint. Strict, no remote code."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME

from llmshearing.checkpoints.arguments import check_facts
from llmshearing.checkpoints.checkpoint import CheckpointInfo, check_weights, plain_config, save_checkpoint
from llmshearing.checkpoints.generation import readable
from llmshearing.checkpoints.hf_config import read_config
from llmshearing.checkpoints.output import check_file
from llmshearing.compat import TIES_WHAT_IS_ABSENT
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.stored import as_stored
from llmshearing.families.table import Table
from llmshearing.progress import tqdm
from llmshearing.storage import LazyTensor, LazyTensors, find_file, open_weights

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
    config = config or read_config(name)
    config.return_dict = True  # outputs are asked for by name
    settings = _generation(name, config)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(name), config=config, generation_config=settings, dtype=dtype, output_loading_info=True,
            trust_remote_code=False,
        )  # fmt: skip
    except Exception as error:  # transformers, safetensors and the hub raise many kinds for broken or absent models
        reason = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        raise ShearingError(f"Hugging Face model {name} cannot be loaded: {reason}") from error
    _check_report(str(name), report)
    if absent := [key for key, parameter in model.named_parameters() if parameter.is_meta]:
        raise ShearingError(f"{name}: tensors and config do not belong together: there is no {', '.join(absent)}")
    if TIES_WHAT_IS_ABSENT and config.tie_word_embeddings:
        model.tie_weights()  # what the config ties is one tensor, also where files have two that differ
    return as_stored(model)


def load_hf_weights(name: Path | str) -> tuple[LazyTensors, PretrainedConfig]:
    """Tensors by name, each read on access, and config of a Hugging Face model, whose model is not built.

    Raises:
        ShearingError: it cannot be loaded, or its tensors are not exactly those of its family's table.
    """
    _check_directory(name)
    config = read_config(name)
    table = table_for(config)
    entries = as_loaded(name, open_weights(name).entries, config, table)
    return check_weights(str(name), entries, table), config


def as_loaded(
    name: Path | str, entries: Mapping[str, LazyTensor], config: PretrainedConfig, table: Table
) -> dict[str, LazyTensor]:
    """The tensors of files as transformers takes them into the model.

    Names of the bare decoder get its prefix. What is computed, and buffers of earlier versions, are left out. Of two
    tensors that the config ties, the one counts that the other is tied to.
    """
    known, prefix = table.by_name, f"{causal_lm(config).base_model_prefix}."
    full = {key: prefix + key if key not in known and prefix + key in known else key for key in entries}
    found = {full[key]: entry for key, entry in entries.items()}
    if strange := found.keys() - known.keys():
        ignored = _ignored(config, prefix)
        found = {key: entry for key, entry in found.items() if key not in strange or not ignored(key)}
    for key, (spec, _) in known.items():
        if spec.alias in found and key in found and not torch.equal(found[key].make(), found[spec.alias].make()):
            del found[key]
            log.warning(
                "warning: %s: the config ties %s to %s, but they differ; taking %s, as transformers does",
                *(name, key, spec.alias, spec.alias),
            )
    return found


def _ignored(config: PretrainedConfig, prefix: str) -> Callable[[str], bool]:
    """Which tensors without a place transformers leaves out: by patterns of the class, or named as buffers are."""
    model_class = causal_lm(config)
    patterns = [COMPUTED, *(getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ())]
    try:
        with torch.device("meta"):
            buffers = {name for name, _ in model_class(config).named_buffers()}
    except Exception:  # no model can be made: this is said where one is needed
        buffers = set()
    return lambda key: bool({key, prefix + key} & buffers) or any(re.search(pattern, key) for pattern in patterns)


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
    return as_stored(model.eval())


def hf_to_checkpoint(
    name: Path | str, output: Path | str, given: Mapping[str, Any] | None = None, *, overwrite: bool = False
) -> Path:
    """Hugging Face directory or name -> checkpoint in Composer's layout. given: facts to check; ``tokenizer`` sets."""
    output, given = Path(output), given or {}
    check_file(output, overwrite)
    weights, info = read_hf(name, given)
    with tqdm(total=len(weights), desc="converting", unit="tensor") as bar:
        save_checkpoint(output, weights, info, progress=bar.update)
    count = table_for(info.config).count()
    log.info("wrote %s (%s parameters, Composer's keys) to %s", _where(name), f"{count:,}", output)
    return output


def read_hf(name: Path | str, given: Mapping[str, Any]) -> tuple[LazyTensors, CheckpointInfo]:
    """Tensors of a Hugging Face model and what is known of it. given: as :func:`hf_to_checkpoint`."""
    weights, config = load_hf_weights(name)
    check_given(given, config, str(name))
    info = CheckpointInfo(
        hf_config=plain_config(config),
        tokenizer=str(given.get("tokenizer") or _where(name)),
        history=[f"converted from the Hugging Face model {_where(name)}"],
        generation_config=_generation(name, config).to_dict(),
    )
    return weights, info


def _where(name: Path | str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


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
        file = find_file(name, GENERATION_CONFIG_NAME)
        if file is not None:
            return readable(json.loads(file.read_bytes()))
    except Exception as error:  # no JSON, no mapping, ...: it is only passed on
        log.warning("warning: %s of %s cannot be read and is left out: %s", GENERATION_CONFIG_NAME, name, error)
    return GenerationConfig.from_model_config(config)


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
    """Name of the causal LM of the config's model type."""
    return causal_lm(config).__name__


def causal_lm(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The causal LM of the config's model type. `AutoModelForCausalLM` takes it whatever the architectures say."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
