"""The config of a model whose layers differ in size: the family's own, and the sizes of each layer.

    {"model_type": "nonuniform_llama", "intermediate_size": 10, "num_hidden_layers": 3, ...,
     "layer_sizes": {"intermediate_size": [10, 7, 6]}}

The keys that differ hold the largest size, for programs that only look there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmshearing.errors import ShearingError
from llmshearing.families import UNIFORM
from llmshearing.families.nonuniform.table import CLASS, SIZES, TYPE


class LayerConfig:
    """A config as one layer sees it: its own sizes, and all else as the model's config has it now."""

    def __init__(self, whole: PretrainedConfig, sizes: Mapping[str, int]) -> None:
        vars(self).update(sizes, _whole=whole)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_whole":  # copies and pickles ask before there is a whole
            raise AttributeError(name)
        return getattr(self._whole, name)


class NonUniformConfig(PretrainedConfig):
    """Mixed into a family's config. layer_sizes: key of the config -> its value in each layer."""

    layer_sizes: dict[str, list[int]]

    def __init__(self, layer_sizes: Mapping[str, Sequence[int]] | None = None, **family: Any) -> None:
        from llmshearing.families.nonuniform.model import (
            register,  # brings the modelling code, which a config alone needs not
        )

        register(type(self))
        super().__init__(**family)
        self.layer_sizes = {key: list(sizes) for key, sizes in (layer_sizes or {}).items()}
        if wrong := [key for key, sizes in self.layer_sizes.items() if len(sizes) != self.num_hidden_layers]:
            raise ShearingError(f"{SIZES} of {', '.join(wrong)}: must list {self.num_hidden_layers} sizes, one a layer")
        for key, sizes in self.layer_sizes.items():
            setattr(self, key, max(sizes))

    def of_layer(self, layer: int) -> LayerConfig:
        """The config as a layer sees it."""
        return LayerConfig(self, {key: sizes[layer] for key, sizes in self.layer_sizes.items()})


def config_of(values: Mapping[str, Any]) -> PretrainedConfig:
    """A config of transformers, by its model_type.

    Raises:
        ShearingError: the installed transformers refuses it. 5 checks more than 4.57 does.
    """
    try:
        return CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
    except StrictDataclassError as error:
        said = error.__cause__ or error
        raise ShearingError(f"transformers {__version__} refuses a config of this shape: {said}") from error


def register() -> None:
    """Make the configs known to `AutoConfig`, once; the models follow with the first config that is made."""
    for base in UNIFORM:
        if TYPE + base in CONFIG_MAPPING:
            continue
        config = CONFIG_MAPPING[base]
        name = CLASS + config.__name__
        globals()[name] = type(
            name,
            (NonUniformConfig, config),
            {
                "__module__": __name__,
                "__init__": NonUniformConfig.__init__,  # transformers 5 would write one of the family's fields
                "model_type": TYPE + base,
                "__doc__": __doc__,
            },
        )
        AutoConfig.register(TYPE + base, globals()[name], exist_ok=True)
