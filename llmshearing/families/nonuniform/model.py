"""The causal LM of a non-uniform config: the family's own from transformers, with each layer made in its own size."""

from __future__ import annotations

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llmshearing.families import table_for
from llmshearing.families.nonuniform.config import NonUniformConfig
from llmshearing.families.nonuniform.table import CLASS
from llmshearing.families.stored import as_stored


class NonUniformForCausalLM(PreTrainedModel):
    """Mixed into a family's causal LM, whose layers are where its table says."""

    def __init__(self, config: NonUniformConfig) -> None:
        super().__init__(config)  # layers of the largest size: nothing while loading, which builds on the meta device
        path = table_for(config).layers_path
        parent, _, name = path.rpartition(".")
        layers = self.get_submodule(path)
        layer_class = type(layers[0])  # type: ignore[index]
        own = [layer_class(config.of_layer(layer), layer) for layer in range(len(layers))]  # type: ignore[arg-type]
        setattr(self.get_submodule(parent), name, nn.ModuleList(own))
        as_stored(self)  # transformers converts checkpoints of the family's own model type alone
        self.post_init()


def register(config_class: type[NonUniformConfig]) -> None:
    """Make the model of a config's class known to `AutoModelForCausalLM`, once."""
    if config_class in MODEL_FOR_CAUSAL_LM_MAPPING or config_class.__mro__[1] is not NonUniformConfig:
        return
    family = MODEL_FOR_CAUSAL_LM_MAPPING[config_class.__mro__[2]]
    name = CLASS + family.__name__
    globals()[name] = type(
        name,
        (NonUniformForCausalLM, family),
        {"__module__": __name__, "config_class": config_class, "__doc__": __doc__},
    )
    AutoModelForCausalLM.register(config_class, globals()[name])
