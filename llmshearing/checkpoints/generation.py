"""Settings of generation, which we only pass on: what transformers would not write is left out, and said."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

log = logging.getLogger(__name__)


def writable(given: GenerationConfig | Mapping[str, Any] | None, config: PretrainedConfig) -> GenerationConfig:
    """Settings that can be written, of a model's own or, where it has none, of those that its config implies.

    transformers reads settings that contradict one another with a warning, and refuses to write them. They are left
    out here, with one warning that names them: no export fails for them.
    """
    try:
        found = _read(given, config)
    except Exception as error:  # transformers raises many kinds for odd settings
        log.warning("warning: the generation settings cannot be read and are left out: %s", error)
        return GenerationConfig()
    left: dict[str, Any] = {}
    while (problem := _problem(found)) is not None:
        default, own = GenerationConfig(), found.to_diff_dict()
        named = [name for name in re.findall(r"`(\w+)`", problem) if name in own and name not in left]
        rest = [name for name in own if name not in left and hasattr(default, name) and name != "transformers_version"]
        if not named and not rest:
            log.warning("warning: the generation settings are left out, transformers would not write them: %s", problem)
            return default
        name = (named or rest)[0]
        left[name] = getattr(found, name)
        setattr(found, name, getattr(default, name, None))
    if left:
        listed = ", ".join(f"{name} = {value}" for name, value in left.items())
        log.warning("warning: generation settings left out, since transformers would not write them: %s", listed)
    return found


# Keys of a config that decide more than how text is generated.
SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache")


def constructible(config: PretrainedConfig) -> PretrainedConfig:
    """The config, without settings of generation that no model could be made with. Changes ``config``."""
    try:
        GenerationConfig.from_model_config(config)
    except Exception as error:  # transformers raises many kinds for odd settings
        default, plain = GenerationConfig(), PretrainedConfig()
        named = {name: value for name, value in config.to_dict().items() if hasattr(default, name)}
        left = _unreadable({name: value for name, value in named.items() if name not in SHARED})
        _say_unreadable(left, error)
        for name in left:
            if hasattr(plain, name):
                setattr(config, name, getattr(plain, name))
            else:
                delattr(config, name)
    return config


def readable(values: Mapping[str, Any]) -> GenerationConfig:
    """Settings as transformers reads them; those that it cannot read are left out, with one warning that names them."""
    try:
        return GenerationConfig.from_dict(dict(values))
    except Exception as error:  # as above
        left = _unreadable(values)
        _say_unreadable(left, error)
        return GenerationConfig.from_dict({name: value for name, value in values.items() if name not in left})


def _unreadable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that cannot be read by themselves; all, where that is not enough."""
    wrong = {name: value for name, value in values.items() if not _can_read({name: value})}
    rest = {name: value for name, value in values.items() if name not in wrong}
    return wrong if _can_read(rest) else dict(values)


def _can_read(values: Mapping[str, Any]) -> bool:
    try:
        GenerationConfig.from_dict(dict(values))
    except Exception:
        return False
    return True


def _say_unreadable(left: Mapping[str, Any], error: Exception) -> None:
    listed = ", ".join(f"{name} = {value}" for name, value in left.items())
    log.warning("warning: generation settings left out, since transformers cannot read them: %s (%s)", listed, error)


def _read(given: GenerationConfig | Mapping[str, Any] | None, config: PretrainedConfig) -> GenerationConfig:
    if given is None:
        return GenerationConfig.from_model_config(config)
    values = given.to_dict() if isinstance(given, GenerationConfig) else dict(given)
    return readable(values)


def _problem(settings: GenerationConfig) -> str | None:
    """What transformers would say when it writes them."""
    try:
        settings.validate(strict=True)
    except Exception as error:  # ValueError for contradictions, others for values of odd kinds
        return str(error) or repr(error)
    return None
