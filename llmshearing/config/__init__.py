"""Configuration: one YAML file and `key=value` overrides in, one checked dataclass out. Imports no torch.

`schema` lists every key, `values` what one value may be, `shapes` source and target, `checks` what must hold
across keys, `load` the reading.
"""

from llmshearing.config.checks import target_problems
from llmshearing.config.load import ConfigError, all_keys, load_config, to_yaml
from llmshearing.config.schema import MASK_KINDS, Config, L0Module, TargetModel
from llmshearing.config.shapes import Shape, complete, disagreements, head_mode, source_shape, target_shape
from llmshearing.config.values import TimeValue, parse_time

__all__ = [
    "MASK_KINDS",
    "Config",
    "ConfigError",
    "L0Module",
    "Shape",
    "TargetModel",
    "TimeValue",
    "all_keys",
    "complete",
    "disagreements",
    "head_mode",
    "load_config",
    "parse_time",
    "source_shape",
    "target_problems",
    "target_shape",
    "to_yaml",
]
