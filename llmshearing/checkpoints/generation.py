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


def _read(given: GenerationConfig | Mapping[str, Any] | None, config: PretrainedConfig) -> GenerationConfig:
    if given is None:
        return GenerationConfig.from_model_config(config)
    values = given.to_dict() if isinstance(given, GenerationConfig) else dict(given)
    return GenerationConfig.from_dict(values)


def _problem(settings: GenerationConfig) -> str | None:
    """What transformers would say when it writes them."""
    try:
        settings.validate(strict=True)
    except Exception as error:  # ValueError for contradictions, others for values of odd kinds
        return str(error) or repr(error)
    return None
