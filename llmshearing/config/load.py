"""Reading a configuration: YAML, `key=value` overrides, and every problem of both in one error.

YAML + overrides -> OmegaConf tree typed by the schema -> dataclasses -> checks of values, then across keys
"""

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from llmshearing.config.checks import ATTENTION, cross_problems
from llmshearing.config.schema import OPEN, Config
from llmshearing.config.values import fraction_of
from llmshearing.errors import ShearingError


class ConfigError(ShearingError):
    """A configuration that cannot run. `problems` lists all that is wrong with it, one line each."""

    def __init__(self, path: str | Path, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  - ".join([f"{path}: {count} in the configuration", *problems]))


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read `path` (YAML) and merge `overrides` such as `optimizer.lr=1e-4` or `model.l0_module=null`.

    Interpolations (`${data_local}`) are resolved; time strings get their unit written out.

    Raises:
        ConfigError: listing every unknown or missing key, wrong type or value, and contradiction between keys.
    """
    problems: list[str] = []
    given = OmegaConf.to_container(_merge(path, overrides, problems), resolve=False)
    reader = _Reader(problems)
    reader.assign(reader.tree, given, Config, "")
    cfg = reader.build(reader.tree, Config, "")
    if "model" not in reader.reported and cfg.model.attn_implementation is None:
        cfg.model.attn_implementation = ATTENTION.get(cfg.model.attn_impl or "torch")
    if "model" not in reader.reported and cfg.model.activation_checkpointing is None:
        cfg.model.activation_checkpointing = bool(cfg.fsdp_config and cfg.fsdp_config.activation_checkpointing)
    l0 = cfg.model.l0_module if "model" not in reader.reported else None
    if l0 is not None and l0.lagrangian_warmup_steps is None:
        l0.lagrangian_warmup_steps = fraction_of(l0.fold_at or "1dur", 0.2) if l0.start == OPEN else "0ba"
    problems += cross_problems(cfg, reader.reported)
    if problems:
        raise ConfigError(path, problems)
    return cfg


def to_yaml(cfg: Config) -> str:
    """The configuration as YAML, every key written out and nothing left to resolve; `load_config` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def _merge(path: str | Path, overrides: Iterable[str], problems: list[str]) -> DictConfig:
    """The file with the overrides merged in; a file that is no YAML mapping ends here."""
    try:
        raw = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(path, [f"not a readable YAML file: {error}"]) from None
    if not isinstance(raw, DictConfig):
        raise ConfigError(path, ["the file must hold a mapping of keys, such as max_duration: 3200ba"])
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip(". "):
            problems.append(f"override {override!r}: must be key=value, such as optimizer.lr=1e-4")
            continue
        try:
            raw = OmegaConf.merge(raw, OmegaConf.from_dotlist([override]))  # type: ignore[assignment]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            reason = str(error).splitlines()[0]
            problems.append(f"override {override!r}: cannot be read ({reason})")
    return raw


class _Reader:
    """Fills the typed tree, then reads it; collects problems and the keys they were reported for."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        self.reported: set[str] = set()
        self.tree = OmegaConf.structured(Config)

    def report(self, key: str, problem: str) -> None:
        self.reported.add(key)
        self.problems.append(problem)

    def assign(self, node: DictConfig, given: Any, schema: type, prefix: str) -> None:
        """Set every value of `given` in the typed `node`, leaf by leaf so that each problem is seen."""
        hints = get_type_hints(schema)
        for name, value in given.items():
            key = f"{prefix}{name}"
            if name not in hints:
                self.problems.append(f"unknown key {key}{_suggestion(key, hints, prefix)}")
                continue
            section, optional = _section(hints[name])
            if section is not None and isinstance(value, Mapping):
                if node[name] is None:
                    node[name] = section
                self.assign(node[name], value, section, f"{key}.")
            elif section is None or optional or value is not None:  # an empty section keeps its defaults
                try:
                    OmegaConf.update(node, name, value, merge=False)
                except OmegaConfBaseException:
                    self.report(key, f"{key} = {_show(value)}: must be {_describe(hints[name])}")

    def build(self, node: DictConfig, schema: type, prefix: str) -> Any:
        """A `schema` instance with interpolations resolved and values checked; None stands for what was reported."""
        hints, values = get_type_hints(schema), {}
        for spec in fields(schema):
            key, (section, _) = f"{prefix}{spec.name}", _section(hints[spec.name])
            value = self._read(node, spec.name, key, hints[spec.name])
            if section is not None and value is not None:
                value = self.build(value, section, f"{key}.")
            elif value is not None and "parse" in spec.metadata:
                try:
                    value = spec.metadata["parse"](value)
                except ValueError as error:
                    self.report(key, f"{key} = {_show(value)}: must be {error}")
            values[spec.name] = value
        return schema(**values)

    def _read(self, node: DictConfig, name: str, key: str, hint: Any) -> Any:
        """The value of `key`, plain and resolved; None where it was or is now reported."""
        if key in self.reported:
            return None
        try:
            value = node[name]
            if isinstance(value, (DictConfig, ListConfig)) and _section(hint)[0] is None:
                value = OmegaConf.to_container(value, resolve=True)
            return value
        except MissingMandatoryValue:
            self.report(key, f"missing key {key}: give {_describe(hint)}")
        except OmegaConfBaseException as error:
            origin = node._get_node(name)
            text = str(origin._value()) if origin is not None else ""
            if text[2:-1] in self.reported:  # follows a key that is reported already
                self.reported.add(key)
            else:
                self.report(key, f"{key} = {text}: {str(error).splitlines()[0]}; must be {_describe(hint)}")
        return None


def _section(hint: Any) -> tuple[Any, bool]:
    """(dataclass of a section or None, whether it may be null) for a field's type."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    sections = [option for option in options if is_dataclass(option)]
    return (sections[0] if sections else None), type(None) in options


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
    list: "a list",
    dict: "a mapping",
}


def _describe(hint: Any) -> str:
    """A field's type in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is list:
        return f"a list, each {_describe(get_args(hint)[0])}"
    if is_dataclass(hint):
        return "a mapping of " + ", ".join(spec.name for spec in fields(hint))
    return _KINDS.get(get_origin(hint) or hint, str(hint))


def _show(value: Any) -> str:
    """A value as one would write it in YAML, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    return text.removesuffix("...").strip()


def all_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of every key of the schema, sections included."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        keys.append(f"{prefix}{name}")
        section, _ = _section(hint)
        keys += all_keys(section, f"{prefix}{name}.") if section is not None else []
    return keys


def _suggestion(key: str, siblings: Iterable[str], prefix: str) -> str:
    """Where the same name lives elsewhere, else the closest name: beside it, then anywhere."""
    known, name = all_keys(), str(key[len(prefix) :])
    elsewhere = [other for other in known if other.rpartition(".")[2] == name]
    elsewhere = [other for other in elsewhere if prefix and other.startswith(prefix)] or elsewhere
    close = [prefix + other for other in difflib.get_close_matches(name, list(siblings), n=1, cutoff=0.7)]
    found = elsewhere[:3] or close or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""
