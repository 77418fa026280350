"""`fsdp_config` as read and as handed on; clipping of whole tensors against torch (of shards: distributed/)."""

import logging

import pytest
import torch
from helpers_runs import settings, write_yaml
from torch import nn

from llmshearing.config import load_config
from llmshearing.config.load import ConfigError
from llmshearing.training.distributed import clip_norm, clip_value, fsdp2, total_norm


@pytest.fixture
def config(lab, tmp_path):
    path = write_yaml(tmp_path / "run.yaml", settings(lab, None))
    return lambda *overrides: load_config(path, overrides)


# Configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["fsdp_config.shardin_strategy=FULL_SHARD"], ["fsdp_config.shardin_strategy", "sharding_strategy"]),
        (["fsdp_config.sharding_strategy=NO_SHARD"], ["NO_SHARD", "FULL_SHARD, SHARD_GRAD_OP"]),
        (["fsdp_config.mixed_precision=HALF"], ["HALF", "DEFAULT, PURE, FULL"]),
        (["fsdp_config.state_dict_type=local"], ["local", "full, sharded"]),
        (["fsdp_config=yes"], ["fsdp_config", "sharding_strategy"]),
        (["fsdp_config.activation_cpu_offload=true"], ["activation_cpu_offload"]),
        (
            ["fsdp_config={reshard_after_forward: true, sharding_strategy: SHARD_GRAD_OP}"],
            ["reshard_after_forward = true", "SHARD_GRAD_OP"],
        ),
        (
            ["fsdp_config.activation_checkpointing=true", "model.activation_checkpointing=false"],
            ["fsdp_config.activation_checkpointing = true", "model.activation_checkpointing = false"],
        ),
        (["fsdp_config.state_dict_type=sharded", "fsdp_config.load_monolith_rank0_only=true"], ["sharded", "full"]),
        (
            ["fsdp_config.load_monolith_rank0_only=true", "model.init_device=cpu"],
            ["load_monolith_rank0_only", "init_device"],
        ),
        (["fsdp_config={}", "precision=amp_fp16"], ["amp_fp16", "amp_bf16"]),
        (["fsdp_config={}", "algorithms.gradient_clipping.clipping_type=adaptive"], ["adaptive", "norm or value"]),
        (["fsdp_config={}", "device=gpu", "device_train_microbatch_size=auto"], ["auto", "give a number"]),
    ],
)
def test_what_fsdp_config_refuses(config, overrides, wanted):
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    [problem] = caught.value.problems
    assert all(text in problem for text in wanted), problem


def test_the_predecessors_settings(config):
    """Its place for activation checkpointing is heeded; what only FSDP 1 had has no effect."""
    old = "{sharding_strategy: SHARD_GRAD_OP, activation_checkpointing: true, backward_prefetch: BACKWARD_POST}"
    cfg = config(f"fsdp_config={old}")
    assert cfg.model.activation_checkpointing is True
    sharding = fsdp2(cfg, 2)
    assert sharding.reshard_after_forward is False and not sharding.activation_checkpointing  # transformers does that
    assert config().model.activation_checkpointing is False and fsdp2(config(), 2) is None


def test_one_rank_has_nothing_to_shard(config, caplog):
    with caplog.at_level(logging.WARNING):
        assert fsdp2(config("fsdp_config={}"), 1) is None
    assert "one rank" in caplog.text
    assert fsdp2(config("fsdp_config.state_dict_type=sharded"), 1).state_dict_type == "sharded"
    assert fsdp2(config("fsdp_config={}"), 2).state_dict_type == "full"  # Composer's own default is sharded


# Clipping --------------------------------------------------------------------------------------------------------


def parameters(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (1,), (2, 2))]
    for parameter in made[:-1]:  # the last has no gradient
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("threshold", [0.1, 1e6])
def test_clipping_whole_tensors_is_torchs(threshold):
    ours, theirs = parameters(), parameters()
    norm = clip_norm(ours, threshold)
    assert norm == torch.nn.utils.clip_grad_norm_(theirs, threshold)
    assert total_norm(ours) == pytest.approx(min(norm.item(), threshold), rel=1e-4)
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is other.grad is None or torch.equal(one.grad, other.grad)
    clip_value(ours, threshold / 10), torch.nn.utils.clip_grad_value_(theirs, threshold / 10)
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours[:-1], theirs[:-1], strict=True))


def test_nothing_to_clip():
    assert clip_norm([nn.Parameter(torch.zeros(2))], 1.0) == 0
