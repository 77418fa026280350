"""What a reader should not have to find out: said in plain words."""

from __future__ import annotations

from typing import Any

from llmshearing.evaluate.speed import PHASES, ratio

LOST = 0.75
"""A model counts as slower where it lost so large a share of the rounds, and in the median of their ratios."""


def remarks(model: dict[str, Any], source: dict[str, Any] | None) -> list[str]:
    """Sentences about a model: worse than its unigram baseline, slower or larger than its source."""
    said = _below_unigram(model)
    if source is not None and not model["is_source"]:
        said += _slower(model, source)
        if model["parameters"] >= source["parameters"]:
            said.append(
                f"{model['name']} is no smaller than its source {source['name']}: {model['parameters']:,} against "
                f"{source['parameters']:,} parameters."
            )
    return said


def _below_unigram(model: dict[str, Any]) -> list[str]:
    if "loss" not in model:
        return []
    parts = {"all data": model["loss"]["all"], **model["loss"]["domains"]}
    worse = [
        f"{each['loss']:.3f} against {each['unigram_loss']:.3f} nats per token on {name}"
        for name, each in parts.items()
        if each["loss"] > each["unigram_loss"]
    ]
    guess = "Guessing by the frequency of tokens alone predicts better."
    return [f"{model['name']} is worse than its own unigram baseline: {', '.join(worse)}. {guess}"] if worse else []


def _slower(model: dict[str, Any], source: dict[str, Any]) -> list[str]:
    said = []
    for phase in PHASES if "speed" in model and "speed" in source else ():
        times, lost = ratio(model["speed"], source["speed"], phase)
        if times < 1 and lost >= LOST:
            own, other = (each["speed"][phase]["tokens_per_second"] for each in (model, source))
            said.append(
                f"{model['name']} is slower than its source {source['name']} in {phase}: {own:,.1f} against "
                f"{other:,.1f} tokens per second ({times:.2f} times, median of the rounds)."
            )
    return said
