"""Divergence from a teacher, with cross-entropy beside it, that holds nothing of the logits' size but the logits.

    dense      divergence = T^2 sum_v p_v (ln p_v - ln q_v)         d / d logits_v = T (q_v - p_v)
    sparse     divergence = T^2 sum_i p_i (ln p_i - ln q_v(i))      d / d logits_v = T (q_v sum_i p_i - p_v)
               + T^2 r (ln r - ln s)                                               + T r (q_v - [v in the rest] q_v / s)

p: the teacher's probabilities, q: the student's, both at temperature T (Hinton et al. 2015); r, s: what the teacher and
the student give to all tokens that have no entry, where the targets tell r. Cross-entropy is that of temperature 1.

As in `llmshearing.training.loss`, both passes go by in chunks of rows, and the backward pass overwrites the logits.

Shape legend: B sequences, T tokens, N = B T, V vocabulary, k entries of a sparse target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmshearing.training.loss import chunks
from llmshearing.training.targets import Dense, Sparse, Targets


@dataclass(frozen=True)
class _Options:
    weight: float
    ce: float
    temperature: float


class _DenseDivergence(torch.autograd.Function):
    """Per-row objective, cross-entropy and divergence. logits, teacher: [N, V]; labels: int64 [N]; results: [N]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, labels: Tensor, teacher: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        normaliser, soft, theirs, divergence = _rows_of(logits, 4)
        for rows in chunks(logits):
            own, other = logits[rows].to(soft.dtype), teacher[rows].to(soft.dtype) / options.temperature
            normaliser[rows] = own.logsumexp(-1)
            own = own / options.temperature
            soft[rows], theirs[rows] = own.logsumexp(-1), other.logsumexp(-1)
            probability = (other - theirs[rows, None]).exp()
            gap = (other - theirs[rows, None]) - (own - soft[rows, None])
            # a token that the teacher rules out has probability 0 and counts for nothing
            divergence[rows] = torch.where(probability > 0, probability * gap, 0.0).sum(-1)
        ctx.save_for_backward(logits, teacher, labels, normaliser, soft, theirs)
        return _results(ctx, logits, labels, normaliser, divergence, options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, teacher, labels, normaliser, soft, theirs = ctx.saved_tensors
        temperature = ctx.options.temperature
        for rows in chunks(logits):
            own = logits[rows].to(normaliser.dtype)
            other = teacher[rows].to(normaliser.dtype) / temperature
            part = (own / temperature - soft[rows, None]).exp_().sub_((other - theirs[rows, None]).exp_())
            part = _with_cross_entropy(part, own, normaliser[rows], labels[rows], ctx.options)
            logits[rows] = part.mul_(gradient[rows, None])  # in place, as cross-entropy does
        return logits, None, None, None


class _SparseDivergence(torch.autograd.Function):
    """The same; ids: int64 [N, k]; probs: [N, k]; rest: [N] or None."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, labels: Tensor, ids: Tensor, probs: Tensor, rest: Tensor | None, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        normaliser, soft, outer, divergence = _rows_of(logits, 4)
        for rows in chunks(logits):
            own, q = logits[rows].to(soft.dtype), probs[rows].to(soft.dtype)
            normaliser[rows] = soft[rows] = own.logsumexp(-1)
            if options.temperature != 1:
                own = own / options.temperature
                soft[rows] = own.logsumexp(-1)
            divergence[rows] = _excess(q, own.gather(1, ids[rows]) - soft[rows, None]).sum(-1)
            if rest is not None:
                outer[rows] = _without(own, ids[rows], q).logsumexp(-1)
                divergence[rows] += _excess(rest[rows].to(q), outer[rows] - soft[rows])
        ctx.save_for_backward(logits, labels, ids, probs, rest, normaliser, soft, outer)
        return _results(ctx, logits, labels, normaliser, divergence, options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, labels, ids, probs, rest, normaliser, soft, outer = ctx.saved_tensors
        temperature, ce = ctx.options.temperature, ctx.options.ce
        weight = ctx.options.weight * temperature
        # At temperature 1 the student's probabilities serve the cross-entropy too: one pass less.
        shared = ce if temperature == 1 else 0.0
        for rows in chunks(logits):
            own, q = logits[rows].to(normaliser.dtype), weight * probs[rows].to(normaliser.dtype)
            scaled = own if temperature == 1 else own / temperature
            others = torch.zeros_like(soft[rows]) if rest is None else weight * rest[rows].to(q)
            part = (scaled - soft[rows, None]).exp_().mul_((q.sum(-1) + others + shared)[:, None])
            if rest is not None:
                # A student that gives the rest nothing has no say in how to share it out.
                known = torch.where(outer[rows].isfinite(), outer[rows], torch.inf)
                share = _without(scaled, ids[rows], q).sub_(known[:, None]).exp_()
                part.sub_(share.mul_(others[:, None]))
            part.scatter_add_(1, ids[rows], -q)
            if ce:
                part.scatter_add_(1, labels[rows, None], part.new_full((len(part), 1), -ce))
            if ce and not shared:
                part.add_((own - normaliser[rows, None]).exp_(), alpha=ce)
            logits[rows] = part.mul_(gradient[rows, None])
        return logits, None, None, None, None, None


def _rows_of(logits: Tensor, number: int) -> list[Tensor]:
    """Empty vectors [N], in float32 or wider."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return [torch.empty(len(logits), dtype=wide, device=logits.device) for _ in range(number)]


def _excess(probability: Tensor, log_student: Tensor) -> Tensor:
    """p (ln p - ln q), 0 where p is 0."""
    gap = probability.clamp(min=torch.finfo(probability.dtype).tiny).log() - log_student
    return torch.where(probability > 0, probability * gap, 0.0)


def _without(logits: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
    """The logits [N, V] of tokens without an entry; -inf at the others."""
    bound = torch.where(probs > 0, -torch.inf, torch.inf).to(logits.dtype)
    return logits.scatter_reduce(1, ids, bound, "amin")


def _results(
    ctx: Any, logits: Tensor, labels: Tensor, normaliser: Tensor, divergence: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Objective, cross-entropy and divergence of all rows, of which the first alone has a gradient."""
    cross_entropy = normaliser - logits.gather(1, labels[:, None]).squeeze(1).to(normaliser.dtype)
    divergence = divergence * options.temperature**2
    ctx.options = options
    ctx.mark_non_differentiable(cross_entropy, divergence)
    return options.weight * divergence + options.ce * cross_entropy, cross_entropy, divergence


def _with_cross_entropy(part: Tensor, own: Tensor, normaliser: Tensor, labels: Tensor, options: _Options) -> Tensor:
    """The gradient of the objective of some rows. part: q - p; it and ``own`` [R, V] are overwritten."""
    part.mul_(options.weight * options.temperature)
    if options.ce:
        hard = own.sub(normaliser[:, None]).exp_()
        hard.scatter_add_(1, labels[:, None], hard.new_full((len(hard), 1), -1.0))
        part.add_(hard, alpha=options.ce)
    return part


def distillation_losses(
    logits: Tensor,
    targets: Targets | Tensor,
    input_ids: Tensor,
    *,
    weight: float = 1.0,
    ce: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(objective, cross-entropy, divergence), each [B, T-1]; only the objective has a gradient, to ``logits``.

        objective  = weight divergence + ce cross-entropy

    Neither side is widened to float32 as a whole. The backward pass overwrites ``logits`` with their gradient: it can
    run once. With a sampled tail the divergence is too high by what the sample does not tell of the teacher's entropy,
    a number without gradient.

    Args: logits: [B, T, V]; targets: what the teacher gives (a tensor: its logits [B, T, V]); input_ids: [B, T].
    """
    batch, length = input_ids.shape
    options = _Options(weight, ce, temperature)
    # The last position has no next token: it is computed with any label and dropped, which copies no logits.
    flat, labels = logits.flatten(0, 1), input_ids.roll(-1, dims=1).flatten()
    if isinstance(targets, Sparse):
        rest = None if targets.rest is None else targets.rest.flatten()
        ids, probs = (values.flatten(0, 1) for values in (targets.ids.long(), targets.probs))
        losses = _SparseDivergence.apply(flat, labels, ids, probs, rest, options)
    else:
        theirs = targets.logits if isinstance(targets, Dense) else targets
        losses = _DenseDivergence.apply(flat, labels, theirs.flatten(0, 1), options)
    objective, cross_entropy, divergence = (loss.view(batch, length)[:, :-1] for loss in losses)
    return objective, cross_entropy, divergence
