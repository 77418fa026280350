"""Shapes of the source and of the target, from the configuration and the source's `config.json`. No torch.

Grouped queries: `queries per group = num_attention_heads / num_key_value_heads`. A target cuts either whole groups
(`group`: queries per group stay) or the same number of query heads inside every group (`query`: groups stay).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llmshearing.config.schema import Config, TargetModel


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, in transformers' names."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int


HF_NAMES = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
}
"""Shape keys of the YAML and their names in a `config.json`."""

COMPARED = HF_NAMES | {key: key for key in ("rms_norm_eps", "rope_theta", "tie_word_embeddings")}
OPTIONAL = ("n_kv_heads", "head_dim")


def read_hf_config(path: str) -> dict[str, Any] | None:
    """`path/config.json`, or None where there is none. Raises ValueError where it is no JSON mapping."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no mapping")
    return content


def _complete(sizes: dict[str, int | None]) -> Shape:
    """A Shape from the YAML's names, with the defaults of transformers for `n_kv_heads` and `head_dim`."""
    known = {key: size for key, size in sizes.items() if size is not None}
    known.setdefault("n_kv_heads", known["n_heads"])
    known.setdefault("head_dim", known["d_model"] // known["n_heads"])
    return Shape(**{HF_NAMES[key]: size for key, size in known.items()})


def _sizes(cfg: Config) -> dict[str, int | None]:
    """The source's sizes by the YAML's names: from the `config.json` where there is one, else from the keys."""
    try:
        hf = read_hf_config(cfg.model.path)
    except ValueError:
        hf = None  # source_problems reports it
    if hf is not None:
        return {key: hf.get(name) for key, name in HF_NAMES.items()}
    return {key: getattr(cfg.model, key) for key in HF_NAMES}


def source_shape(cfg: Config) -> Shape | None:
    """Shape of `model.path`, or None where only the weights can tell (a `.pt` or a name, without shape keys)."""
    sizes = _sizes(cfg)
    needed = [size for key, size in sizes.items() if key not in OPTIONAL]
    return None if None in needed or not sizes["n_heads"] else _complete(sizes)


def source_problems(cfg: Config) -> Iterator[str]:
    """What is wrong with the source's shape: disagreement with its `config.json`, sizes missing or indivisible."""
    try:
        hf = read_hf_config(cfg.model.path)
    except ValueError as error:
        yield f"model.path = {cfg.model.path}: {error}"
        return
    if hf is not None:
        yield from _disagreements(cfg, hf)
    sizes = _sizes(cfg)
    missing = [key for key, size in sizes.items() if size is None and key not in OPTIONAL]
    given = [key for key, size in sizes.items() if size is not None]
    if missing and hf is not None:
        yield f"model.path = {cfg.model.path}: its config.json lacks {', '.join(HF_NAMES[k] for k in missing)}"
    elif missing and (given or (cfg.model.l0_module is not None and not cfg.model.path.endswith(".pt"))):
        keys = ", ".join(f"model.{key}" for key in missing)
        yield f"missing key {keys}: {cfg.model.path} has no config.json here, so the source's whole shape is needed"
    if not missing:
        yield from _indivisible(sizes)


def _disagreements(cfg: Config, hf: dict[str, Any]) -> Iterator[str]:
    actual = dict(hf)
    if hf.get("num_attention_heads"):
        actual.setdefault("num_key_value_heads", hf["num_attention_heads"])
        actual.setdefault("head_dim", hf.get("hidden_size", 0) // hf["num_attention_heads"])
    for key, name in COMPARED.items():
        ours, theirs = getattr(cfg.model, key), actual.get(name)
        if ours is not None and theirs is not None and ours != theirs:
            yield f"model.{key} = {ours}, but {cfg.model.path}/config.json has {name} = {theirs}; leave the key out"


def _indivisible(sizes: dict[str, int | None]) -> Iterator[str]:
    hidden, heads = sizes["d_model"] or 0, sizes["n_heads"] or 1
    kv = sizes["n_kv_heads"] or heads
    if heads % kv:
        yield f"model.n_heads = {heads} is not divisible by model.n_kv_heads = {kv}: every group needs as many heads"
    if sizes["head_dim"] is None and hidden % heads:
        yield f"model.d_model = {hidden} is not divisible by model.n_heads = {heads}: give model.head_dim"


def _target_model(cfg: Config) -> TargetModel | None:
    return cfg.model.l0_module.target_model if cfg.model.l0_module is not None else None


def target_heads(target: TargetModel, source: Shape) -> tuple[int, int]:
    """(query heads, KV groups) of the target. Raises ValueError where no way of cutting gives them."""
    per_group = source.num_attention_heads // source.num_key_value_heads
    heads, kv = target.n_heads, target.n_kv_heads
    prefix = "model.l0_module.target_model."
    if heads is None:
        kv = kv or source.num_key_value_heads
        return kv * per_group, kv
    if kv is None:
        if heads % per_group == 0:
            return heads, heads // per_group
        raise ValueError(
            f"{prefix}n_heads = {heads} is not divisible by the {per_group} query heads of a KV group: give a multiple "
            f"(whole groups are cut), or n_kv_heads = {source.num_key_value_heads} to cut heads inside every group"
        )
    if heads == kv * per_group or (kv == source.num_key_value_heads and heads % kv == 0):
        return heads, kv
    raise ValueError(
        f"{prefix}n_heads = {heads} with n_kv_heads = {kv}: the source has {source.num_attention_heads} heads in "
        f"{source.num_key_value_heads} groups; either cut whole groups (n_heads = {kv * per_group} for n_kv_heads = "
        f"{kv}), or keep n_kv_heads = {source.num_key_value_heads} with n_heads a multiple of it"
    )


def target_shape(cfg: Config, source: Shape | None = None) -> Shape | None:
    """Shape to reach; None without a target model, or while the source's shape is unknown.

    `source` (read from the checkpoint) stands in for `source_shape(cfg)`. Raises ValueError on impossible heads.
    """
    target, source = _target_model(cfg), source or source_shape(cfg)
    if target is None or source is None:
        return None
    heads, kv = target_heads(target, source)
    return replace(
        source,
        hidden_size=target.d_model or source.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=target.intermediate_size or source.intermediate_size,
        num_hidden_layers=target.n_layers or source.num_hidden_layers,
    )


def head_mode(cfg: Config, source: Shape | None = None) -> Literal["group", "query"]:
    """What the `head` mask cuts: whole KV groups (also plain heads), or query heads inside every group."""
    source = source or source_shape(cfg)
    target = target_shape(cfg, source)
    if source is None or target is None:
        return "group"
    same_groups = target.num_key_value_heads == source.num_key_value_heads
    return "query" if same_groups and target.num_attention_heads < source.num_attention_heads else "group"
