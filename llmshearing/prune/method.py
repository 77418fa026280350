"""What every pruner has in common: a method is a function that chooses.

    choose(model, table, target, calibration, **options) -> Choice

    model        transformers causal LM in float32, eval mode, unwrapped; a method that only chooses leaves it as it
                 was, one that also updates weights (OBS) changes them in place, and the fold then cuts the changed ones
    table        its family's table, in the head mode that the target asks for (see targets.py); None for a decoder
                 without a table, which only methods with ``any_decoder`` accept
    target       the whole shape wanted, in the config's keys; keys that nobody asked to change are the source's
    calibration  sequences to choose by, or None where there are none; never the ones that the report is made of
    options      what the method's ``add_options`` declared, by destination (``drop_layers`` comes from the target)

A method is listed in METHODS of `llmshearing.prune.methods`; the command line, the Python call, the fold, the report
and the files are the same for all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from llmshearing.families.names import HIDDEN, LAYERS, WIDTHS
from llmshearing.fold.selection import Selection

ALL_SIZES = (HIDDEN, *WIDTHS, LAYERS)


@dataclass(frozen=True)
class Choice:
    """What a method returns."""

    selection: Selection
    about: Mapping[str, Any] = field(default_factory=dict)
    """How it was chosen (scores, seed, ...): anything that JSON can hold; saved with the selection."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the config that change, such as special token ids."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the generation config that change."""
    write_tokenizer: Callable[[Path], None] | None = None
    """Writes the new tokenizer's files into a directory; None: the source's tokenizer stays."""
    reencode: Callable[[list[int]], list[int]] | None = None
    """Ids of the source's tokenizer -> ids of the new one for the same text; needed where the vocabulary is cut."""


@dataclass(frozen=True)
class Method:
    """A pruner as the command line and the Python call see it."""

    name: str
    choose: Callable[..., Choice]
    help: str
    """One line."""
    sizes: tuple[str, ...]
    """Sizes (`llmshearing.families.names`) that it can change."""
    ratio: tuple[str, ...] = WIDTHS
    """Sizes that a ratio spreads over: widths, or layers, or the vocabulary."""
    add_options: Callable[[argparse.ArgumentParser], None] | None = None
    """Declares its own options; their destinations are keyword arguments of ``choose``."""
    needs_calibration: Callable[[Mapping[str, Any]], bool] = lambda options: True
    """Whether it needs sequences, given its options."""
    any_decoder: bool = False
    """Whether it works on decoders without a table, by the name of their layer list."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter asks for gradients: those of gates and states are wanted alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
