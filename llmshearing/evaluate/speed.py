"""Tokens per second: reading a prompt (prefill), and writing one token after another with a cache (decode).

All models are timed in turn, round after round, so that a machine that is slow for a while is slow to all of them; two
models are compared round by round. The first round warms up and does not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedModel

from llmshearing.errors import ShearingError
from llmshearing.progress import trange


@dataclass(frozen=True)
class SpeedOptions:
    """What is timed."""

    prompt: int = 256
    """Tokens of a prompt."""
    generate: int = 32
    """Tokens written after it."""
    batch: int = 1
    """Sequences at once."""
    rounds: int = 5


PHASES = ("prefill", "decode")


def measure_speed(models: Mapping[str, PreTrainedModel], options: SpeedOptions) -> dict[str, dict[str, Any]]:
    """Model -> `prefill` and `decode`, tokens per second of each round, and their medians.

    Raises:
        ShearingError: the options measure nothing, or a model knows too few positions.
    """
    values = asdict(options)
    if wrong := [f"{key} = {value}: must be at least 1" for key, value in values.items() if value < 1]:
        raise ShearingError("speed: " + "; ".join(wrong))
    for name, model in models.items():
        longest = getattr(model.config, "max_position_embeddings", None) or options.prompt + options.generate
        if options.prompt + options.generate > longest:
            raise ShearingError(
                f"speed: a prompt of {options.prompt} and {options.generate} tokens are more than the {longest} "
                f"positions of {name}; give a smaller --prompt"
            )
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in trange(options.rounds + 1, desc="speed", unit="round", leave=False):
        for name, model in models.items():
            seconds = _timed(model, options)
            if number:
                rounds[name].append(seconds)
    return {name: _rates(seconds, options) for name, seconds in rounds.items()}


@torch.no_grad()
def _timed(model: PreTrainedModel, options: SpeedOptions) -> tuple[float, float]:
    """Seconds of prefill and of decode."""
    ids = torch.randint(model.config.vocab_size, (options.batch, options.prompt), device=model.device)
    # Only the last position's logits are needed, where the model can be told so.
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    start = _now(model)
    out = model(input_ids=ids, use_cache=True, **last)
    following = out.logits[:, -1:].argmax(-1)
    middle = _now(model)
    for _ in range(options.generate):
        out = model(input_ids=following, past_key_values=out.past_key_values, use_cache=True)
        following = out.logits[:, -1:].argmax(-1)
    return middle - start, _now(model) - middle


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _rates(seconds: list[tuple[float, float]], options: SpeedOptions) -> dict[str, Any]:
    tokens = {"prefill": options.batch * options.prompt, "decode": options.batch * options.generate}
    found: dict[str, Any] = {}
    for at, phase in enumerate(PHASES):
        rates = [tokens[phase] / each[at] for each in seconds]
        found[phase] = {"tokens_per_second": statistics.median(rates), "rounds": rates}
    return found


def ratio(one: Mapping[str, Any], other: Mapping[str, Any], phase: str) -> tuple[float, float]:
    """How fast one is against the other: the median of the rounds' ratios, and the share of rounds that it lost."""
    ratios = [a / b for a, b in zip(one[phase]["rounds"], other[phase]["rounds"], strict=True)]
    return statistics.median(ratios), sum(value < 1 for value in ratios) / len(ratios)
