"""What every row shares: the source, the texts, the target and the budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HIDDEN, HEADS, MLP, LAYERS = "hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"
GROUPS = "num_key_value_heads"
YAML = {HIDDEN: "d_model", HEADS: "n_heads", GROUPS: "n_kv_heads", MLP: "intermediate_size", LAYERS: "n_layers"}
"""Keys of a target: of the config.json, which `prune` takes -> of the YAML's target_model, which `train` takes."""


@dataclass(frozen=True)
class Setting:
    """A source and what is asked of it."""

    name: str
    source: Path
    """Hugging Face directory."""
    corpus: Path
    """Folders of text to train and to choose by."""
    held_out: Path | None
    """Folders of text to evaluate on; None: documents of `corpus`, by hash."""
    target: Mapping[str, int]
    """Keys of the config.json."""
    budgets: tuple[int, ...]
    """Tokens of all training, masks included."""
    eval_seqs: int
    """Sequences of each domain that are evaluated."""
    samples: int
    """Sequences to choose by, which training never sees."""
    length: int = 256
    """Tokens of a sequence."""
    microbatch: int = 16
    """Sequences of a forward pass."""
    largest_batch: int = 16
    """Sequences of a step, where a row asks for more."""
    turning: tuple[str, ...] = ()
    """Further options of `prune turn`."""
    separator: str | None = None
    """BOS and EOS where the tokenizer's own are for something else."""

    @property
    def mask_target(self) -> dict[str, int]:
        """The target in the YAML's keys."""
        return {YAML[key]: size for key, size in self.target.items()}


def lab(path: Path) -> Setting:
    """The lab: 8.4 M parameters, seven domains; to half of each width and six of eight layers: 2.2 M."""
    target = {HIDDEN: 128, HEADS: 4, MLP: 344, LAYERS: 6}
    corpus = path / "corpus"
    return Setting(
        "lab", path / "source", corpus / "train", corpus / "eval", target, (1_638_400, 409_600), eval_seqs=48,
        samples=128,
    )  # fmt: skip


def smollm2(path: Path) -> Setting:
    """SmolLM2-135M in the folder of `make smollm2`: to the shape and tokens of its table."""
    target = {HIDDEN: 384, HEADS: 6, GROUPS: 2, MLP: 1024, LAYERS: 22}
    return Setting(
        "smollm2", path / "source", path / "corpus", None, target, (174_080,), eval_seqs=16, samples=32, microbatch=2,
        largest_batch=4, turning=("--untie",), separator="<|endoftext|>",
    )  # fmt: skip
