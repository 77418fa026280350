"""A config's values in the form that transformers 4.57 and 5 both read.

5 writes other keys than 4.57 for the same thing, and 4.57 passes over them without a word: a model would get the
default rotary base. 5 reads the keys of 4.57. So what is written has those, whichever version writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmshearing.families import FAMILIES

NEW = "rope_parameters"
SCALING = "rope_scaling"
THETA, PARTIAL, KIND = "rope_theta", "partial_rotary_factor", "rope_type"
# of layers that see all positions, and of those that see a window
FULL, SLIDING, LOCAL = "full_attention", "sliding_attention", "rope_local_base_freq"


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config's ``to_dict()`` or JSON, under the keys of 4.57; those of 4.57 come back as they are."""
    family = FAMILIES.get(config.get("model_type", ""))
    values = dict(config)
    for alias, key in (family.aliases if family is not None else {}).items():
        if alias in values:
            values[key] = values.pop(alias)
    rope = values.pop(NEW, None)
    if not isinstance(rope, Mapping):
        return values
    if FULL in rope or SLIDING in rope:
        if THETA in (local := rope.get(SLIDING) or {}):
            values[LOCAL] = local[THETA]
        rope = rope.get(FULL) or {}
    scaling = {key: value for key, value in rope.items() if key not in (THETA, PARTIAL)}
    names = family.rope if family is not None else {}
    for key in (THETA, PARTIAL):
        if rope.get(key) is not None:
            values |= {key: rope[key], names.get(key, key): rope[key]}  # 4.57 writes both
    scaled = scaling.get(KIND, scaling.get("type", "default")) != "default"
    if scaled and names.get(KIND) == "type":  # a family that 4.57 wants to know nothing more of
        scaling = {"type": scaling[KIND], **{key: scaling[key] for key in ("short_factor", "long_factor")}}
    if scaled or family is None or names.get(SCALING, SCALING) == SCALING:
        values[SCALING] = scaling if scaled else None
    return values
