"""The layout language: which rows of a table make up a tensor of Megatron, and along which dimension ranks share it.

A :class:`MegatronTensor` names rows of the table. Their first dimensions follow one another as segments, once or in
runs, and each tensor-parallel rank holds an equal, contiguous part of the whole:

    name          rows          runs    split    rank 0 of 2              rank 1 of 2
    linear_qkv    q, k, v       GROUP   0        q q k v                  q q k v          a KV group, or more, a rank
    linear_fc1    gate, up      RANK    0        gate up                  gate up          the halves of both
    linear_proj   o             ONCE    1        left columns             right columns
    norm          norm          ONCE    None     all                      all

Both directions of a conversion, any change of the number of ranks, and all checks are computed from it
(`llmshearing.megatron`). With more ranks than KV groups a group's rows are shared by several ranks, as megatron-core
has it: the part is still contiguous.

Shape legend: T tensor-parallel ranks; G KV groups.
"""

from __future__ import annotations

from dataclasses import dataclass

ONCE, GROUP, RANK = "once", "group", "rank"
"""How often the rows alternate: not at all, for each KV group, or for each rank."""

FIRST, LAST = "first", "last"
"""The pipeline stage of a tensor that is in no layer."""

SPECS = ("local", "te", "te_grouped")
"""Names of megatron-core's sets of modules: its own, those of Transformer Engine, and those with its grouped product of
experts."""

READ_SPECS = (*SPECS, "stacked")
"""One more is only read: in distributed checkpoints megatron-core's own norms have other names."""


@dataclass(frozen=True)
class MegatronTensor:
    """One tensor of a Megatron model."""

    names: tuple[str, ...]
    """In the modules of each of READ_SPECS; the last one holds for the rest too. ``{layer}`` counts within the pipeline
    stage, ``{expert}`` the experts."""
    rows: tuple[str, ...]
    """Names of the table's rows."""
    runs: str = ONCE
    split: int | None = None
    """The dimension that ranks share; None: each rank holds all of it."""
    stage: str | None = None
    """FIRST or LAST; None: the stage of its layer."""
    partial: bool = False
    """Whether every rank's gradients of it are of its own heads alone, so that they have to be added up."""
    padded: bool = False
    """Whether rows of zeros fill it up, since every rank holds a multiple of some number of rows."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.names[0]

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.names[0]

    def name(self, spec: str) -> str:
        """Its name in the modules of a spec."""
        return self.names[min(READ_SPECS.index(spec), len(self.names) - 1)]


@dataclass(frozen=True)
class Layout:
    """All tensors of a Megatron model."""

    tensors: tuple[MegatronTensor, ...]
    head: str
    """The row of the output head. Where it is tied to the embedding, only a last stage that is not the first has it."""
    multiple: int = 128
    """Each rank's rows of a padded tensor are a multiple of this (Megatron's make_vocab_size_divisible_by)."""
