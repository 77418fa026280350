"""Which layers to leave out, on any decoder of transformers.

    window      the contiguous layers whose removal leaves the lowest perplexity (AMD Quark's method)
    greedy      one layer at a time, the one whose removal leaves the lowest loss (SLEB, arXiv 2402.09025); the first
                and the last layer are protected
    influence   the layers that turn their input least: 1 - E[cos(x_in, x_out)] (ShortGPT, arXiv 2403.03853)
    given       the layers that the target's drop_layers lists

Shape legend: L layers, k of them dropped; B sequences, T tokens, d hidden.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from llmshearing.errors import ShearingError
from llmshearing.families.family import COMMON_LAYERS
from llmshearing.families.names import LAYERS
from llmshearing.families.table import Table
from llmshearing.fold.gating import attach, detach
from llmshearing.fold.selection import Selection, layer_gates
from llmshearing.progress import tqdm
from llmshearing.prune.calibration import Calibration
from llmshearing.prune.method import Choice, Method
from llmshearing.prune.methods.decoder import Decoder, find_decoder, first, weight

WAYS = ("window", "greedy", "influence")


def choose(
    model: PreTrainedModel,
    table: Table | None,
    target: Mapping[str, int],
    calibration: Calibration | None,
    *,
    by: str = "window",
    model_decoder_layers: str | None = None,
    layer_norm_field: str | None = None,
    layer_num_field: str = COMMON_LAYERS,
    drop_layers: Sequence[int] | None = None,
) -> Choice:
    """Choose layers. ``table`` gives the key of their number only. by: one of WAYS, unless ``drop_layers`` gives them.

    Raises:
        ShearingError: there is no calibration, or the model has no such layer list.
    """
    decoder = find_decoder(model, model_decoder_layers, layer_norm_field, layer_num_field)
    about: dict[str, Any] = {"by": "given"}
    if drop_layers is None:
        if calibration is None:
            raise ShearingError(f"choosing layers by {by} needs sequences to look at: --calibration")
        number = len(decoder.layers) - target[layer_num_field if table is None else table.layers_key]
        drop_layers, scores = _by(by, decoder, calibration, number)
        about = {"by": by, "scores": scores}
    selection = Selection(blocks=layer_gates(len(decoder.layers), drop_layers))
    return Choice(selection, {**about, "drop_layers": sorted(drop_layers), "model_decoder_layers": decoder.path})


def _by(by: str, decoder: Decoder, calibration: Calibration, number: int) -> tuple[list[int], Any]:
    if by == "window":
        losses = window_losses(decoder, calibration, number)
        start = int(losses.argmin())
        return list(range(start, start + number)), losses.tolist()
    if by == "greedy":
        return greedy(decoder, calibration, number)
    if by == "influence":
        influence = block_influence(decoder.model, calibration, decoder)
        return drop_least(influence, number), influence.tolist()
    raise ShearingError(f"by = {by}: must be one of {', '.join(WAYS)}")


def window_losses(decoder: Decoder, calibration: Calibration, number: int) -> Tensor:
    """[L - k + 1] float64: loss without the ``number`` layers from each start on, nats per token."""
    starts = len(decoder.layers) - number + 1
    total, sequences = torch.zeros(starts, dtype=torch.float64), 0.0
    for batch, labels in tqdm([*calibration.labelled()], desc=f"windows of {number} layers", unit="batch"):
        states = decoder.recorded(batch)
        for start in range(starts):
            with decoder.resumed(start + number - 1, states[start]):
                total[start] += decoder.loss(batch, labels) * weight(labels)
        sequences += weight(labels)
    return total / sequences


def greedy(decoder: Decoder, calibration: Calibration, number: int) -> tuple[list[int], list[float]]:
    """Layers in the order of their removal, and the loss after each.

    Raises:
        ShearingError: fewer layers than that are unprotected.
    """
    free = range(1, len(decoder.layers) - 1)
    if number > len(free):
        raise ShearingError(f"greedy depth pruning protects the first and last layer: {number} of {len(free)} to drop")
    dropped: list[int] = []
    losses: list[float] = []
    with tqdm(total=number, desc="greedy", unit="layer") as bar:
        for _ in range(number):
            total = _losses_without_one(decoder, calibration, dropped)
            total[[0, -1, *dropped]] = math.inf
            dropped.append(int(total.argmin()))
            losses.append(total.min().item())
            bar.update()
    return dropped, losses


def _losses_without_one(decoder: Decoder, calibration: Calibration, dropped: Sequence[int]) -> Tensor:
    """[L] float64: loss without the dropped layers and each one more; 0 for the first, the last and the dropped."""
    total, sequences = torch.zeros(len(decoder.layers), dtype=torch.float64), 0.0
    for batch, labels in calibration.labelled():
        with decoder.without(dropped):
            states = decoder.recorded(batch)
        for layer in range(1, len(decoder.layers) - 1):
            if layer not in dropped:
                with decoder.resumed(layer, states[layer], dropped):
                    total[layer] += decoder.loss(batch, labels) * weight(labels)
        sequences += weight(labels)
    return total / sequences


@torch.no_grad()
def block_influence(model: PreTrainedModel, calibration: Calibration, decoder: Decoder | None = None) -> Tensor:
    """[L] float64: 1 - the mean over all tokens of the cosine between what a layer reads and writes."""
    decoder = decoder or find_decoder(model)
    total = torch.zeros(len(decoder.layers), dtype=torch.float64)

    def hook(layer: int) -> Any:
        def add(module: Any, args: Any, kwargs: Any, output: Any) -> None:  # [B, T, d]
            before = args[0] if args else kwargs["hidden_states"]
            cosine = F.cosine_similarity(before.double(), first(output).double(), dim=-1)
            total[layer] += cosine.mean(-1).sum().cpu()

        return decoder.layers[layer].register_forward_hook(add, with_kwargs=True)

    hooks = [hook(layer) for layer in range(len(decoder.layers))]
    try:
        for batch in tqdm([*calibration.batches()], desc="block influence", unit="batch"):
            decoder.model.base_model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return 1 - total / len(calibration.select)


def drop_least(score: Tensor, number: int) -> list[int]:
    """The ``number`` layers of least score, in order."""
    return sorted(score.argsort(stable=True)[:number].tolist())


@contextmanager
def narrowed(model: PreTrainedModel, table: Table, selection: Selection) -> Iterator[None]:
    """Run the model that a selection folds to, without folding."""
    gating = attach(model, table)
    try:
        gating.set(selection)
        yield
    finally:
        detach(model)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by",
        choices=WAYS,
        default="window",
        help="contiguous window by perplexity (Quark), greedy by loss (SLEB), block influence (ShortGPT); not looked "
        "at where the target gives drop_layers (%(default)s)",
    )
    parser.add_argument("--model_decoder_layers", metavar="PATH", help="of the layer list, as model.decoder.layers")
    parser.add_argument("--layer_norm_field", metavar="PATH", help="of the final norm, checked to exist")
    parser.add_argument(
        "--layer_num_field", default=COMMON_LAYERS, metavar="KEY", help="of the config (%(default)s)"
    )


def _needs_calibration(options: Mapping[str, Any]) -> bool:
    return options.get("drop_layers") is None


METHOD = Method(
    name="depth",
    choose=choose,
    help="whole layers: a window by perplexity, greedy by loss, by block influence, or given ones",
    sizes=(LAYERS,),
    ratio=(LAYERS,),
    add_options=_add_options,
    needs_calibration=_needs_calibration,
    any_decoder=True,
)
