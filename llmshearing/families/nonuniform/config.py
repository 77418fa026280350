"""The config of a model whose layers differ in size: the family's own, and the sizes of each layer.

    {"model_type": "nonuniform_llama", "intermediate_size": 10, "num_hidden_layers": 3, ...,
     "layer_sizes": {"intermediate_size": [10, 7, 6]},
     "per_layer_config": {"0": {"intermediate_size": 10}, "1": {"intermediate_size": 7}, "2": {"intermediate_size": 6}}}

The keys that differ hold the largest size, for programs that only look there. `per_layer_config` is transformers 5's
form of the same. No model of transformers 5.24 that has a table here is built from it; a config is, and so is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmshearing.compat import of_config
from llmshearing.errors import ShearingError
from llmshearing.families import UNIFORM
from llmshearing.families.nonuniform.table import CLASS, PER_LAYER, SIZES, TYPE, per_layer


class LayerConfig:
    """A config as one layer sees it: its own sizes, and all else as the model's config has it now."""

    def __init__(self, whole: PretrainedConfig, sizes: Mapping[str, int]) -> None:
        vars(self).update(sizes, _whole=whole)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_whole":  # copies and pickles ask before there is a whole
            raise AttributeError(name)
        return getattr(self._whole, name)


class NonUniformConfig(PretrainedConfig):
    """Mixed into a family's config.

    Args:
        layer_sizes: key of the config -> its value in each layer. per_layer_config: number of a layer -> key -> value,
            where there are no ``layer_sizes``; layers and keys that are not in it are as the config says.

    Raises:
        ShearingError: a key has another number of sizes than there are layers, or a layer is none of the model's.
    """

    layer_sizes: dict[str, list[int]]

    def __init__(
        self,
        layer_sizes: Mapping[str, Sequence[int]] | None = None,
        per_layer_config: Mapping[str | int, Mapping[str, int]] | None = None,
        **family: Any,
    ) -> None:
        from llmshearing.families.nonuniform.model import (
            register,  # brings the modelling code, which a config alone needs not
        )

        register(type(self))
        super().__init__(**family)
        if layer_sizes is None and per_layer_config:
            layer_sizes = self._sizes_of(per_layer_config)
        self.layer_sizes = {key: list(sizes) for key, sizes in (layer_sizes or {}).items()}
        if wrong := [key for key, sizes in self.layer_sizes.items() if len(sizes) != self.num_hidden_layers]:
            raise ShearingError(f"{SIZES} of {', '.join(wrong)}: must list {self.num_hidden_layers} sizes, one a layer")
        for key, sizes in self.layer_sizes.items():
            setattr(self, key, max(sizes))

    def _sizes_of(self, each: Mapping[str | int, Mapping[str, int]]) -> dict[str, list[int]]:
        own = {int(layer): dict(sizes) for layer, sizes in each.items()}
        if wrong := [layer for layer in own if not 0 <= layer < self.num_hidden_layers]:
            raise ShearingError(f"{PER_LAYER} of layer {wrong[0]}: there are layers 0 to {self.num_hidden_layers - 1}")
        keys = dict.fromkeys(key for sizes in own.values() for key in sizes)
        layers = range(self.num_hidden_layers)
        return {key: [own.get(layer, {}).get(key, getattr(self, key)) for layer in layers] for key in keys}

    @property
    def per_layer_config(self) -> list[LayerConfig]:
        """The config as each layer sees it. transformers 5 asks for it to know the heads of a static cache."""
        return [self.of_layer(layer) for layer in range(self.num_hidden_layers)]

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        return {**values, PER_LAYER: per_layer(self.layer_sizes)} if self.layer_sizes else values

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
        raise ShearingError(f"transformers {__version__} refuses a config of this shape: {of_config(error)}") from error


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
