"""How a run is laid out over its ranks, such that every layout computes the same.

    replicas (DDP)    every rank holds all; gradients are averaged
    shards (FSDP 2)   every rank holds a part of weights, gradients and optimizer state: one unit per decoder layer, one
                      for the rest of the model (embedding, final norm, head)
    masks             whole on every rank in both, in no unit. They are small, every layer's gates come from them, and
                      FSDP would cast them to the weights' precision; so their gradients are averaged here

A rank's loss is the mean over its samples plus the penalty. Ranks have equally many samples, gates and penalty are the
same on all: the mean over ranks is the loss of the whole batch, the penalty counted once. With a loss mask ranks and
microbatches weigh by their tokens that count, and these weights add up to 1: the same holds of the mean over tokens.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable

import torch
from composer.utils import dist, get_device
from composer.utils.parallelism import FSDP2Config
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers.modeling_layers import GradientCheckpointingLayer

from llmshearing.config import Config

log = logging.getLogger(__name__)


# Layout ----------------------------------------------------------------------------------------------------------


def fsdp2(cfg: Config, ranks: int) -> FSDP2Config | None:
    """Composer's settings for sharding over ``ranks``; None for replicas.

    One rank has nothing to shard and trains as if ``fsdp_config`` were null, unless its checkpoints are to be sharded:
    only FSDP reads and writes those.
    """
    fsdp = cfg.fsdp_config
    if fsdp is None:
        return None
    if ranks == 1 and fsdp.state_dict_type == "full":
        log.warning("fsdp_config: nothing to shard on one rank, which holds the whole model")
        return None
    reshard = (
        fsdp.sharding_strategy == "FULL_SHARD" if fsdp.reshard_after_forward is None else fsdp.reshard_after_forward
    )
    with warnings.catch_warnings():  # "experimental"; the version is pinned
        warnings.simplefilter("ignore", UserWarning)
        return FSDP2Config(
            reshard_after_forward=reshard,
            mixed_precision=fsdp.mixed_precision,
            state_dict_type=fsdp.state_dict_type,
            load_monolith_rank0_only=fsdp.load_monolith_rank0_only,
            verbose=fsdp.verbose,
        )


def reads_source(cfg: Config) -> bool:
    """Whether this rank reads the source's weights; else it makes an empty model and is handed its shards."""
    return cfg.fsdp_config is None or cfg.model.init_device == "cpu" or dist.get_global_rank() == 0


def mark_units(model: nn.Module, masks: nn.Module | None) -> None:
    """Tell Composer what to shard: see the module's head."""
    model.fsdp_wrap_fn = lambda module: isinstance(module, GradientCheckpointingLayer)  # type: ignore[assignment]
    if masks is not None:
        masks._fsdp_wrap = False  # type: ignore[assignment]


def shard_frozen(model: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Shard a model that is not trained over all ranks: one unit a layer, one for the rest; call once, on every rank.

    It comes to ``device`` one unit at a time, so that no device holds more than its shards and one layer.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in (*layers, model):
        unit.to(device)
        fully_shard(unit, mesh=mesh)


def divide_sums(model: nn.Module) -> None:
    """Make the units' reduction a mean where the backend only sums; call once, after sharding.

    FSDP 2 asks for ReduceOp.AVG in float32 and bfloat16, and gloo takes that for SUM without a word (seen, torch 2.7):
    gradients came out as many times too large as there are ranks. In other dtypes FSDP divides by itself.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    factor = _average_of_ones() if units else 1.0
    if factor == 1.0:
        return

    def divide(reduced: Tensor) -> None:
        if reduced.dtype in (torch.float32, torch.bfloat16):
            reduced /= factor

    for unit in units:
        unit.set_all_reduce_hook(divide)


def _average_of_ones() -> float:
    """What the backend's AVG makes of a 1 from every rank: 1, or the number of ranks."""
    result = torch.zeros(1, device=get_device()._device)
    ones = torch.ones(dist.get_world_size(), device=result.device)
    torch.distributed.reduce_scatter_tensor(result, ones, op=torch.distributed.ReduceOp.AVG)
    return result.item()


# Gradients -------------------------------------------------------------------------------------------------------


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean over ranks of the gradients of parameters that are whole on every rank, in one transfer for each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in _gradients(parameters):
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, reduce_operation="SUM")
        flat /= dist.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """2-norm of all gradients together, sharded and whole ones, a scalar; the same on every rank."""
    gradients = _gradients(parameters)
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    shards = [_local(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
    squares = get_total_norm(whole).square()
    if shards:
        of_shards = get_total_norm(shards).square()
        dist.all_reduce(of_shards, reduce_operation="SUM")
        squares = squares + of_shards
    return squares.sqrt()


@torch.no_grad()
def clip_norm(parameters: Iterable[nn.Parameter], threshold: float) -> Tensor:
    """Scale all gradients down where their :func:`total_norm` is above ``threshold``; returns the norm.

    torch's own function, and Composer's GradientClipping by it, fail where shards and whole tensors meet.
    """
    parameters = list(parameters)
    norm = total_norm(parameters)
    scale = (threshold / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for gradient in _gradients(parameters):
        _local(gradient).mul_(scale.to(gradient.dtype))
    return norm


@torch.no_grad()
def clip_value(parameters: Iterable[nn.Parameter], threshold: float) -> None:
    """Clamp every element of all gradients to [-threshold, threshold]."""
    for gradient in _gradients(parameters):
        _local(gradient).clamp_(-threshold, threshold)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _local(gradient: Tensor) -> Tensor:
    """This rank's part, in the same memory."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
