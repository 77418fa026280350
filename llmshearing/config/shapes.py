"""Shapes of the source and of the target, from the configuration and the source's `config.json`. No torch.

Sizes go by the names of `llmshearing.families.names`. The model's family says which key of a `config.json` each one is.
What fewer heads mean with grouped queries is said in `llmshearing.families.heads`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmshearing.config.schema import Config, TargetModel
from llmshearing.families import DEFAULT, FAMILIES
from llmshearing.families.family import Family, size_problems
from llmshearing.families.heads import complete_heads, head_modes, why_not
from llmshearing.families.names import EXPERTS, GROUPS, HEAD_DIM, HEADS, HIDDEN, YAML_KEYS

OPTIONAL = (GROUPS, HEAD_DIM, EXPERTS)
FACTS = ("rms_norm_eps", "rope_theta", "tie_word_embeddings")
"""Keys of the YAML, besides sizes, that are held against a `config.json` of the same key."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. experts: in each layer that has some; None in a model without."""

    hidden: int
    heads: int
    groups: int
    head_dim: int
    intermediate: int
    layers: int
    vocab: int
    experts: int | None = None


def read_hf_config(path: str) -> dict[str, Any] | None:
    """`path/config.json`, or None where there is none. Raises ValueError where it is no JSON mapping."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no mapping")
    return content


def family_in(hf: Mapping[str, Any] | None) -> Family:
    """The family of a `config.json`; the default one where nothing is known of the model but its sizes.

    A model type without a table is refused where the source is read.
    """
    return FAMILIES.get(str((hf or {}).get("model_type") or DEFAULT.name), DEFAULT)


def complete(sizes: Mapping[str, int | None]) -> Shape:
    """A Shape, with the defaults of transformers for groups and head_dim."""
    known = {size: number for size, number in sizes.items() if number is not None}
    known.setdefault(GROUPS, known[HEADS])
    known.setdefault(HEAD_DIM, known[HIDDEN] // known[HEADS])
    return Shape(**known)


def _sizes(cfg: Config) -> dict[str, int | None]:
    """The source's sizes: from the `config.json` where there is one, else from the YAML's keys."""
    try:
        hf = read_hf_config(cfg.model.path)
    except ValueError:
        hf = None  # source_problems reports it
    if hf is not None:
        family = family_in(hf)
        if _wrong_sizes(hf):
            return dict.fromkeys(family.keys)  # source_problems reports them
        return {size: hf.get(key) for size, key in family.keys.items()} | _filled(family, hf)
    return {size: getattr(cfg.model, key) for size, key in YAML_KEYS.items()}


def _wrong_sizes(hf: Mapping[str, Any]) -> list[str]:
    """Sizes that a `config.json` states and no model can have; absent ones are none."""
    keys = {size: key for size, key in family_in(hf).keys.items() if hf.get(key) is not None}
    return size_problems(hf, keys)


def _filled(family: Family, hf: Mapping[str, Any]) -> dict[str, int | None]:
    """What a family's models are made with where a `config.json` leaves a size out (but for the optional ones)."""
    try:
        sizes = family.sizes(hf)
        return {size: sizes[size] for size, key in family.keys.items() if size not in OPTIONAL and hf.get(key) is None}
    except (TypeError, ZeroDivisionError):
        return {}  # sizes that are no numbers, or 0: source_problems reports them


def source_shape(cfg: Config) -> Shape | None:
    """Shape of `model.path`, or None where only the weights can tell (a `.pt` or a name, without shape keys)."""
    sizes = _sizes(cfg)
    needed = [number for size, number in sizes.items() if size not in OPTIONAL]
    return None if None in needed or not sizes[HEADS] else complete(sizes)


def source_problems(cfg: Config) -> Iterator[str]:
    """What is wrong with the source's shape: disagreement with its `config.json`, sizes missing or indivisible."""
    try:
        hf = read_hf_config(cfg.model.path)
    except ValueError as error:
        yield f"model.path = {cfg.model.path}: {error}"
        return
    if hf is not None and (wrong := _wrong_sizes(hf)):
        yield from (f"model.path = {cfg.model.path}: its config.json has {problem}" for problem in wrong)
        return
    if hf is not None:
        yield from disagreements(cfg, hf, f"{cfg.model.path}/config.json")
    sizes = _sizes(cfg)
    missing = [size for size, number in sizes.items() if number is None and size not in OPTIONAL]
    given = [size for size, number in sizes.items() if number is not None]
    if missing and hf is not None:
        keys = ", ".join(family_in(hf).keys[size] for size in missing)
        yield f"model.path = {cfg.model.path}: its config.json lacks {keys}"
    elif missing and (given or (cfg.model.l0_module is not None and not cfg.model.path.endswith(".pt"))):
        keys = ", ".join(f"model.{YAML_KEYS[size]}" for size in missing)
        yield f"missing key {keys}: {cfg.model.path} has no config.json here, so the source's whole shape is needed"
    if not missing:
        yield from _indivisible(sizes)


def disagreements(cfg: Config, hf: Mapping[str, Any], where: str) -> Iterator[str]:
    """Keys of the YAML that contradict the source's config, which ``where`` holds."""
    family = family_in(hf)
    try:
        actual = family.sizes(hf)
    except (TypeError, ZeroDivisionError):
        actual = {}
    for size, key in YAML_KEYS.items():
        ours, theirs, name = getattr(cfg.model, key), actual.get(size), family.keys.get(size, size)
        if ours is not None and theirs is not None and ours != theirs:
            yield f"model.{key} = {ours}, but {where} has {name} = {theirs}; leave the key out"
    for key in FACTS:
        ours, theirs = getattr(cfg.model, key), hf.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            yield f"model.{key} = {ours}, but {where} has {key} = {theirs}; leave the key out"


def _indivisible(sizes: Mapping[str, int | None]) -> Iterator[str]:
    hidden, heads = sizes[HIDDEN] or 0, sizes[HEADS] or 1
    groups = sizes.get(GROUPS) or heads
    if heads % groups:
        yield f"model.n_heads = {heads} is not divisible by model.n_kv_heads = {groups}: each group needs as many heads"
    if sizes.get(HEAD_DIM) is None and hidden % heads:
        yield f"model.d_model = {hidden} is not divisible by model.n_heads = {heads}: give model.head_dim"


def _target_model(cfg: Config) -> TargetModel | None:
    return cfg.model.l0_module.target_model if cfg.model.l0_module is not None else None


def target_shape(cfg: Config, source: Shape | None = None) -> Shape | None:
    """Shape to reach; None without a target model, or while the source's shape is unknown.

    `source` (read from the checkpoint) stands in for `source_shape(cfg)`. Raises ValueError on impossible heads.
    """
    target, source = _target_model(cfg), source or source_shape(cfg)
    if target is None or source is None:
        return None
    given = {size: number for size, key in YAML_KEYS.items() if (number := getattr(target, key)) is not None}
    counts = source.heads, source.groups
    heads, groups = complete_heads(given.get(HEADS), given.get(GROUPS), counts, keep_groups=False)
    if not head_modes(heads, groups, counts):
        names = YAML_KEYS[HEADS], YAML_KEYS[GROUPS]
        raise ValueError(f"model.l0_module.target_model.{why_not(heads, groups, counts, names)}")
    return replace(source, **{**given, HEADS: heads, GROUPS: groups})


def head_mode(cfg: Config, source: Shape | None = None) -> str:
    """What the `head` mask cuts: whole KV groups (also plain heads), or query heads inside every group."""
    source = source or source_shape(cfg)
    target = target_shape(cfg, source)
    if source is None or target is None:
        return "group"
    modes = head_modes(target.heads, target.groups, (source.heads, source.groups))
    return "group" if "group" in modes else "query"
