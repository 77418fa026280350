"""Muon for the matrices inside the layers, AdamW for all other parameters.

    m <- beta m + (1 - beta) g                   u = (1 - beta) g + beta m                (Nesterov)
    X = u / ||u||_F, then five times             X <- a X + b (X X^T) X + c (X X^T)^2 X
    w <- w (1 - (lr / lr_0) decay)               w <- w - lr 0.2 sqrt(max(rows, columns)) X

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon): steps of Newton and Schulz bring all singular values
near 1, so that a step goes equally far in every direction. Liu et al. 2025 (arXiv:2502.16982): the factor gives an
element the root mean square that it has in AdamW's steps, about 0.2, so that both take like rates. torch 2.9 calls this
``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``.

Relative steps take the root mean square of the matrix itself in place of 0.2. A pretrained model whose norms were
multiplied into their readers has matrices of very different size (SmolLM2-135M, turned and cut: down 0.3, gate 0.04,
the first values 0.002), and one rate then moves some hardly, others at once. Steps relative to the size of each layer
are those of Bernstein et al. 2020 (Fromage, arXiv:2002.03432).

What a matrix is stands in the family's table. Projections that one tensor fuses (queries, keys, values) are orthogonal
each for itself, and so are the experts in a stack.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from composer.utils import dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from llmshearing.families.table import Segments, Table, TensorSpec
from llmshearing.training.devices import has_bfloat16
from llmshearing.training.optimizer import FusedDecoupledAdamW

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c. They grow small singular values fast, and leave all between about 0.7 and 1.2 (Jordan et al.)."""
STEPS = 5
ADAMW_RMS = 0.2
TINY = 1e-30
"""Least size to divide by: a matrix without momentum stays where it is."""
BATCH = 2**26
"""Elements that are orthogonalised at once."""


class Layout(NamedTuple):
    """Where the matrices of a tensor lie: along dimension ``dim`` (-2 or -1) come ``runs`` equal runs of segments that
    have ``sizes`` elements in each."""

    dim: int
    runs: int
    sizes: tuple[int, ...]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Views of the segments, [..., runs, rows, columns] or [..., rows, runs, columns]."""
        return list(tensor.unflatten(self.dim, (self.runs, -1)).split(self.sizes, dim=self.dim))

    def matrix(self, segment: Tensor) -> Tensor:
        """The matrix [..., rows, columns] that a segment is."""
        return segment.flatten(self.dim - 1, self.dim)


def layout_of(table: Table, spec: TensorSpec, layer: int | None) -> Layout | None:
    """Layout of a tensor; None: it is no matrix between two axes inside a layer."""
    if not spec.per_layer or len(spec.matrix) != 2 or spec.module.form not in ("linear", "conv1d"):
        return None
    for dim, dimension in zip((-2, -1), spec.matrix, strict=True):
        if isinstance(dimension, Segments):
            sizes = [table.length(axis, layer) // dimension.runs for axis in dimension.axes]
            return Layout(dim, dimension.runs, tuple(sizes))
    return Layout(-2, 1, (table.length(spec.matrix[0], layer),))


def muon_groups(
    model: torch.nn.Module, table: Table, lr: float, momentum: float, relative: bool = False
) -> list[dict[str, Any]]:
    """The optimizer's groups of a model's weights: AdamW's, then one of matrices for each layout.

    Args:
        lr: peak rate of the matrices. momentum: beta above. relative: steps are parts of each matrix's own size.
    """
    others: list[Tensor] = []
    matrices: dict[Layout, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        layout = layout_of(table, *table.by_name[name])
        (others if layout is None else matrices[layout]).append(parameter)
    groups: list[dict[str, Any]] = [{"name": "weights", "params": others}]
    for layout, parameters in matrices.items():
        plain = {"dim": layout.dim, "runs": layout.runs, "sizes": layout.sizes}  # a checkpoint holds plain data
        groups.append(
            {"name": "matrices", "params": parameters, "lr": lr, "momentum": momentum, "relative": relative, **plain}
        )
    return groups


class Muon(FusedDecoupledAdamW):
    """Groups that have a ``momentum`` are :func:`muon_groups`'; the others are AdamW's. A rate of 0 changes nothing.

    Under FSDP 2 momenta are sharded like the weights, and every rank gathers each matrix whole, one after another.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = [parameter.grad for parameter in parameters]
            if parameters and "momentum" in group:
                self._step_matrices(group, parameters, gradients)
            elif parameters:
                self._step_others(group, parameters, gradients)
        return loss

    def _step_others(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
        first, second, steps = (
            [self.state[parameter][key] for parameter in parameters] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        options = {"beta1": group["betas"][0], "beta2": group["betas"][1], "amsgrad": False}
        options |= {key: group[key] for key in ("lr", "initial_lr", "weight_decay", "eps")}
        self.adamw(parameters, gradients, first, second, [], steps, **options)

    def _step_matrices(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] += 1
        local = [_local(gradient) for gradient in gradients]
        momenta = [_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        torch._foreach_lerp_(momenta, local, 1 - group["momentum"])
        updates = torch._foreach_lerp(local, momenta, group["momentum"])
        torch._foreach_mul_(updates, _moving(gradients))
        whole = (_whole(update, like) for update, like in zip(updates, parameters, strict=True))
        layout = Layout(group["dim"], group["runs"], tuple(group["sizes"]))
        changes = orthogonal(whole, layout)
        if group.get("relative", False):  # absent from older checkpoints
            weights = (_whole(_local(parameter), parameter) for parameter in parameters)
            changes = relative_to(weights, changes, layout)
        decay = group["weight_decay"] * (group["lr"] / group["initial_lr"] if group["initial_lr"] else 0.0)
        for parameter, change in zip(parameters, changes, strict=True):
            _local(parameter).mul_(1 - decay).sub_(_shard(change, parameter), alpha=group["lr"])

    def report_per_parameter_metrics(
        self, param: Tensor, name: str, optimizer_metrics: dict[str, Any]
    ) -> dict[str, Any]:
        """Norms for Composer's OptimizerMonitor; of matrices those of momentum, weights and gradient."""
        state = self.state.get(param, {})
        if "momentum_buffer" not in state:
            return super().report_per_parameter_metrics(param, name, optimizer_metrics)  # type: ignore[no-any-return]
        values = {"moment": state["momentum_buffer"], "param": param, "grad": param.grad}
        norms = {f"l2_norm/{key}/{name}": torch.linalg.vector_norm(value) for key, value in values.items()}
        return {**optimizer_metrics, **norms}


# Orthogonal steps ------------------------------------------------------------------------------------------------


def orthogonal(updates: Iterable[Tensor], layout: Layout) -> Iterator[Tensor]:
    """The scaled steps of whole tensors of one layout, in their order; equal shapes are worked at together."""
    chunk: list[Tensor] = []
    for update in updates:
        if chunk and sum(map(Tensor.numel, chunk)) + update.numel() > BATCH:
            yield from _orthogonal(chunk, layout)
            chunk = []
        chunk.append(update)
    yield from _orthogonal(chunk, layout)


def _orthogonal(updates: list[Tensor], layout: Layout) -> list[Tensor]:
    results = [torch.empty_like(update) for update in updates]
    places: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for update, result in zip(updates, results, strict=True):
        for segment, place in zip(layout.split(update), layout.split(result), strict=True):
            matrix = layout.matrix(segment)
            places[matrix.shape[-2:]].append((matrix.reshape(-1, *matrix.shape[-2:]), place))
    for shape, pairs in places.items():
        made = newton_schulz(torch.cat([matrix for matrix, _ in pairs])) * (ADAMW_RMS * math.sqrt(max(shape)))
        for step, (_, place) in zip(made.split([len(matrix) for matrix, _ in pairs]), pairs, strict=True):
            place.copy_(step.reshape(place.shape))
    return results


def relative_to(weights: Iterable[Tensor], changes: Iterable[Tensor], layout: Layout) -> Iterator[Tensor]:
    """The steps, each matrix's times the root mean square of its weights, in place of AdamW's; 0 stays 0."""
    for weight, change in zip(weights, changes, strict=True):
        for segment, place in zip(layout.split(weight), layout.split(change), strict=True):
            dims = (layout.dim - 1, layout.dim, -1 if layout.dim == -2 else -3)  # runs, theirs, and the other side
            place.mul_(segment.square().mean(dims, keepdim=True).sqrt_().div_(ADAMW_RMS))
        yield change


def newton_schulz(matrices: Tensor) -> Tensor:
    """Near-orthogonal matrices with the singular vectors of ``matrices`` [number, rows, columns]; 0 stays 0.

    They are computed in bfloat16 where the device has it, else in float32; of float64 in float64.
    """
    dtype = torch.bfloat16 if has_bfloat16(matrices.device.type) else torch.float32
    x = matrices / matrices.abs().amax((-2, -1), keepdim=True).clamp(min=TINY)  # squares of small gradients underflow
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=TINY)
    x = x.to(torch.float64 if x.dtype == torch.float64 else dtype)
    if taller := x.size(-2) > x.size(-1):
        x = x.mT
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if taller else x


# Shards ----------------------------------------------------------------------------------------------------------


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which this rank has a part, laid out as ``like``."""
    if not isinstance(like, DTensor):
        return part
    options = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(part, like.device_mesh, like.placements, **options).full_tensor()


def _shard(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that is whole on all ranks; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    replicas = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicas.redistribute(placements=like.placements).to_local()


def _moving(gradients: Sequence[Tensor]) -> list[Tensor]:
    """1 for each gradient that is not all 0, on any rank.

    A closed layer has a gradient of 0. Scaling the momentum that fades there to norm 1 would move it on at full speed.
    """
    flags = torch.stack([_local(gradient).any() for gradient in gradients]).to(gradients[0].dtype)
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        dist.all_reduce(flags, reduce_operation="MAX")
    return list(flags.unbind())
