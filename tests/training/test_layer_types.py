"""A target of fewer layers, in families whose configs list something for each layer."""

import pytest
from helpers_prune import config_of
from helpers_runs import configured
from transformers import AutoModelForCausalLM

from llmshearing.families.nonuniform.config import config_of as of_values
from llmshearing.fold.fold import config_of_shape
from llmshearing.training.source import read_source


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_target_is_described_with_as_many_layer_types(family, lab, tmp_path):
    """What --dry-run shows: the parameters of transformers' own model of the target's shape."""
    config_of(family).save_pretrained(tmp_path / "source")
    target = {"d_model": 12, "n_layers": 3}
    changes = {"model__path": str(tmp_path / "source"), "model__l0_module__target_model": target}
    source = read_source(configured(lab, tmp_path, **changes))
    small = of_values(config_of_shape(source.config.to_dict(), source.table, source.target))
    assert len(small.layer_types) == small.num_hidden_layers == 3
    model = AutoModelForCausalLM.from_config(small)
    assert source.target_parameters() == sum(parameter.numel() for parameter in model.parameters())
