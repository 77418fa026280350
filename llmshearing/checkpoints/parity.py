"""The certificate of an export: what was written is loaded in its reader and compared with what was to be written.

    weights and config -------------------> model --> log-probabilities --\\
        |                                                                  > largest difference --> parity.json
        +--> files --> the reader's own loading --> model --> the same ---/

Both run on the same few token sequences. A model that does not fit into memory beside what runs already is compared
tensor by tensor instead, and the certificate says so. An export that fails keeps its files under another name.

Shape legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llmshearing.checkpoints.hf_read import build_model, causal_lm, load_hf_model
from llmshearing.checkpoints.output import PARITY
from llmshearing.errors import ShearingError
from llmshearing.families import FAMILIES, table_for
from llmshearing.files import move, write_text
from llmshearing.storage import LazyTensor, open_weights

SEQUENCES, TOKENS, SEED = 2, 16, 0
TOLERANCE = 1e-3
"""Nats, in float32: another order of additions."""
FAILED = ".failed"
"""Behind the name of an export that is not what it should be."""
SHARE = 0.5
"""Of the free memory, that a model in float32 may take to be compared whole."""
FUNCTIONS, TENSORS = "log-probabilities", "tensors"


class ParityError(ShearingError):
    """What was written is not what was to be written."""


@dataclass(frozen=True)
class Parity:
    """What a check of an export found."""

    reader: str
    """The program that read the files."""
    version: str
    compared: str
    """FUNCTIONS, or TENSORS where the model was too large."""
    largest_difference: float
    """Of log-probabilities in nats, or of elements; inf where one side is not finite and the other is."""
    tolerance: float
    tokens: list[list[int]]
    """The sequences; empty for tensors."""

    @property
    def passed(self) -> bool:
        return self.largest_difference <= self.tolerance

    def write(self, path: Path) -> None:
        """As JSON, which has no infinity: null then."""
        values = {**asdict(self), "passed": self.passed}
        if not math.isfinite(self.largest_difference):
            values["largest_difference"] = None
        write_text(path, json.dumps(values, indent=1) + "\n")

    def said(self) -> str:
        unit = "nats" if self.compared == FUNCTIONS else "of an element"
        return (
            f"{self.compared} differ by {self.largest_difference:.3g} {unit} (tolerance {self.tolerance:g}), read by "
            f"{self.reader} {self.version}"
        )


def token_ids(config: PretrainedConfig, longest: int | None = None) -> Tensor:
    """[B, T], the same for every model of the same vocabulary."""
    text = config.get_text_config()
    limits = (TOKENS, longest, getattr(text, "max_position_embeddings", None))
    length = min(limit for limit in limits if isinstance(limit, int))
    return torch.randint(text.vocab_size, (SEQUENCES, length), generator=torch.Generator().manual_seed(SEED))


@torch.no_grad()
def scores_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[B, T] -> [B, T, V], on the CPU."""
    model.eval()
    config, asked = model.config, model.config.return_dict
    config.return_dict = True  # models of transformers fail in their own middle where a config says false
    try:
        return model(input_ids=ids.to(model.device), use_cache=False).logits.float().log_softmax(-1).cpu()
    finally:
        config.return_dict = asked


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Of elements that are finite; inf where one side alone is finite, or the shapes differ."""
    if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
        return math.inf
    both = one.isfinite()
    return (one - other)[both].abs().max().item() if bool(both.any()) else 0.0


def hf_parity(
    folder: Path, weights: Mapping[str, LazyTensor], config: PretrainedConfig, model: PreTrainedModel | None = None
) -> Parity:
    """Check a Hugging Face directory in transformers.

    Args:
        weights: what was to be written, by name. model: of them, in float32, where there is one already.

    Raises:
        ShearingError: transformers does not load the directory.
    """
    if not fits(config):
        differ = _tensors_differ(folder, weights, config)
        return Parity("safetensors", version("safetensors"), TENSORS, differ, 0.0, [])
    ids = token_ids(config)
    if model is None:
        table = table_for(config)
        made = {name: weights[spec.alias or name].make() for name, (spec, _) in table.by_name.items()}
        wanted = scores_of(build_model(made, type(config).from_dict(config.to_dict()), torch.float32), ids)
        del made
    else:
        wanted = scores_of(model, ids)
    found = scores_of(load_hf_model(folder, torch.float32), ids)
    differ = largest_difference(wanted, found)
    return Parity("transformers", version("transformers"), FUNCTIONS, differ, TOLERANCE, ids.tolist())


def fits(config: PretrainedConfig, models: int = 1) -> bool:
    """Whether so many of the model may be built in float32; one without a table is built already."""
    if config.model_type not in FAMILIES:
        return True
    return 4 * models * table_for(config).count() <= SHARE * free_memory()


def free_memory() -> int:
    """Bytes that the machine can give without swapping; where it does not tell, 8 GiB."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 8 << 30


def _tensors_differ(folder: Path, weights: Mapping[str, LazyTensor], config: PretrainedConfig) -> float:
    """Largest difference of an element, one tensor at a time. The model of the config is made without its weights."""
    stored = open_weights(folder).entries
    with torch.device("meta"):
        expected = causal_lm(config)(config).state_dict()
    aliases = {name: spec.alias for name, (spec, _) in table_for(config).by_name.items()}
    worst = 0.0
    for name in expected:
        read, wanted = stored.get(aliases.get(name) or name), weights.get(aliases.get(name) or name)
        if read is None or wanted is None or read.shape != tuple(expected[name].shape):
            return math.inf
        worst = max(worst, largest_difference(read.make().float(), wanted.make().float()))
    return worst


def certify(parity: Parity, written: Path, target: Path, certificate: Path) -> None:
    """Write the certificate; where it fails, keep what was written as ``target`` with FAILED behind its name.

    Args:
        written: file or folder under its temporary name. certificate: beside it, or in it.

    Raises:
        ParityError: the check failed.
    """
    parity.write(certificate)
    if parity.passed:
        return
    kept = keep_failed(written, target)
    if certificate.exists():  # beside it, not in it
        move(certificate, certificate.with_name(certificate.name + FAILED))
    other = "what was written is another function than what was to be written"
    raise ParityError(f"{other}: {parity.said()}. It is kept as {kept}")


def keep_failed(written: Path, target: Path) -> Path:
    """Give what was written the name of a failed export, in place of an earlier one."""
    kept = target.with_name(target.name + FAILED)
    if kept.is_dir():
        shutil.rmtree(kept)
    move(written, kept)
    return kept


def parity_file(path: Path) -> Path:
    """Where the certificate of a file goes: beside it."""
    return path.with_name(f"{path.stem}.{PARITY}")
