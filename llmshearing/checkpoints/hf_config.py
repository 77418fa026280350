"""The config of a Hugging Face model, as transformers reads it, without what the weights make needless."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from llmshearing.checkpoints.generation import constructible
from llmshearing.compat import of_config
from llmshearing.errors import ShearingError
from llmshearing.families.nonuniform.table import TYPE
from llmshearing.families.portable import portable

log = logging.getLogger(__name__)

CONFIG = "config.json"
DTYPE_KEYS = ("dtype", "torch_dtype")
QUANTIZED = "quantization_config"
# How attention is computed is decided by who runs the model, not by who wrote it.
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The config with every dropout at 0: a resumed run could not draw the same elements again. Changes ``config``.

    Keys that end in "drop" (``resid_pdrop``, ``layerdrop``) or contain "dropout".
    """
    drops = [key for key in config.to_dict() if key.endswith("drop") or "dropout" in key]
    if found := {key: value for key in drops if isinstance(value := getattr(config, key), float) and value}:
        for key in found:
            setattr(config, key, 0.0)
        log.info("dropout is off, as in every run: %s", ", ".join(f"{key} {was} -> 0" for key, was in found.items()))
    return config


def read_config(name: Path | str) -> PretrainedConfig:
    """The config of a directory, or of a name on the hub. No code of it is run.

    Left out are an unknown dtype (the tensors tell their own), an empty quantization and the way that attention is
    computed. Generation settings that transformers cannot read are left out too, with a warning.

    Raises:
        ShearingError: it is missing, unreadable or of an unknown model type, has text for numbers, or says that the
            weights are quantized.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(str(name))
        if problems := list(text_for_numbers(values)):
            raise ShearingError("\n".join(f"{CONFIG} of {name}: {said}" for said in problems))
        plain = _without_needless(str(name), values)
        config = _loaded(str(name), plain if plain.keys() != values.keys() else None)
    except ShearingError:
        raise
    except Exception as error:  # transformers and the hub raise many kinds
        raise ShearingError(f"the config of {name} cannot be loaded: {_said(error)}") from error
    return constructible(config)


def text_for_numbers(values: Mapping[str, Any]) -> Iterator[str]:
    """What a config's JSON gives as text where the family's own config has a number.

    transformers 4.57 takes such values, and the model fails somewhere later or, with a size, nowhere. Where the family
    has nothing or something compound, as for rotary positions, text that reads as a number is meant.
    """
    try:
        default = CONFIG_MAPPING[str(values.get("model_type")).removeprefix(TYPE)]()
    except Exception:  # no such family, or one that has no defaults: transformers reads it and says
        return
    own, every = portable(default.to_dict()), PretrainedConfig().to_dict()
    for key, value in values.items():
        name = default.attribute_map.get(key, key)
        if name not in own or _is_number(every.get(name)):  # not the family's, or a setting of generation
            continue
        if _is_number(own[name]):
            found = [(key, value)] if isinstance(value, str) else []
        else:
            found = [] if name in every else [each for each in _texts(key, value) if _reads_as_number(each[1])]
        for place, text in found:
            right = f": {text.strip()}" if _reads_as_number(text) else ""
            yield f"{place} = {text!r}: must be a number, without quotes{right}"


def _texts(place: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text in a value of JSON, with its place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, (dict, list)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(f"{place}.{key}", each)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _without_needless(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that decide what the model is.

    Raises:
        ShearingError: the weights are quantized.
    """
    if values.get(QUANTIZED):
        raise ShearingError(
            f"the config of {name} has {QUANTIZED} = {values[QUANTIZED]}: its weights are quantized. Give the model "
            "before the quantization"
        )
    unknown = [key for key in DTYPE_KEYS if values.get(key) is not None and not _is_dtype(values[key])]
    if unknown:
        listed = ", ".join(f"{key} = {values[key]!r}" for key in unknown)
        log.warning("warning: the config of %s has %s, which names no dtype; the tensors' own is taken", name, listed)
    needless = {*unknown, *ATTENTION_KEYS, *([QUANTIZED] if QUANTIZED in values else [])}
    return {key: value for key, value in values.items() if key not in needless}


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _loaded(name: str, values: Mapping[str, Any] | None) -> PretrainedConfig:
    """transformers' own reading, of these values in place of the file's where they are given."""
    if values is None:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(values))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.name_or_path = name
    return config


def _said(error: BaseException) -> str:
    """What an error says; with its kind, where that alone tells something."""
    error = of_config(error)
    kind = type(error).__name__
    return str(error) if isinstance(error, (OSError, ValueError, ImportError)) else f"{kind}: {error}"
