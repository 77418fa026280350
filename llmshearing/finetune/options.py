"""What a finetuning can be told, checked at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmshearing.errors import ShearingError

FULL_RATE, LORA_RATE = 2e-5, 2e-4
"""Learning rates where none is given; LoRA's is the one of Hu et al. (2021) for GPT-2 and GPT-3."""
AUTO, BF16, FLOAT32 = "auto", "bf16", "float32"
SCHEDULES = ("cosine", "linear", "constant_with_warmup")


@dataclass(frozen=True)
class LoraOptions:
    """W + alpha / rank * B A for each target (Hu et al., arXiv:2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    """Of a target's input."""
    targets: tuple[str, ...] = ()
    """Names of modules, or ends of such names; none: every linear module inside the layers, as the table lists them."""


@dataclass(frozen=True)
class Options:
    """How to train."""

    lora: LoraOptions | None = None
    """None: all weights are trained."""
    learning_rate: float | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    """In place of epochs."""
    batch_size: int = 8
    """Sequences at once on one process."""
    accumulate: int = 1
    """Batches of a step."""
    max_length: int | None = None
    """Tokens of the longest sequence; None: 1024, or what the model can read."""
    pad_multiple: int = 8
    """Batches are filled up to a multiple of so many tokens."""
    warmup: float = 0.03
    """Part of all steps in which the learning rate rises."""
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of a step's gradient; 0: any."""
    precision: str = AUTO
    """auto: bf16 autocast on GPUs that have it, else float32. Weights and their updates are float32."""
    gradient_checkpointing: bool = False
    eval_fraction: float = 0.0
    """Part of the records that is held out, to measure loss on."""
    save_every: int = 200
    """Steps between checkpoints; the held-out loss is measured as often."""
    seed: int = 0
    device: str = AUTO
    """auto, or cpu."""

    @property
    def rate(self) -> float:
        """The learning rate at its highest."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LORA_RATE if self.lora is not None else FULL_RATE

    def check(self) -> None:
        """Raises ShearingError with all that is wrong."""
        if problems := list(self._problems()):
            raise ShearingError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        least = {"batch_size": 1, "accumulate": 1, "pad_multiple": 1, "save_every": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                yield f"{name} = {getattr(self, name)}: must be at least {bound}"
        for name in ("max_steps", "max_length"):
            value, bound = getattr(self, name), 2 if name == "max_length" else 1
            if value is not None and value < bound:
                yield f"{name} = {value}: must be at least {bound}"
        if not self.rate > 0:
            yield f"learning_rate = {self.rate}: must be above 0"
        if self.max_steps is None and not self.epochs > 0:
            yield f"epochs = {self.epochs}: must be above 0"
        for name, value in (("warmup", self.warmup), ("eval_fraction", self.eval_fraction)):
            if not 0 <= value < 1:
                yield f"{name} = {value}: must be from 0 up to below 1"
        for name, value in (("weight_decay", self.weight_decay), ("clip", self.clip)):
            if not value >= 0:
                yield f"{name} = {value}: must be 0 or more"
        if self.schedule not in SCHEDULES:
            yield f"schedule = {self.schedule}: must be one of {', '.join(SCHEDULES)}"
        if self.precision not in (AUTO, BF16, FLOAT32):
            yield f"precision = {self.precision}: must be {AUTO}, {BF16} or {FLOAT32}"
        if self.lora is not None and (self.lora.rank < 1 or not 0 <= self.lora.dropout < 1 or not self.lora.alpha > 0):
            yield f"{self.lora}: rank and alpha must be above 0, dropout from 0 up to below 1"
