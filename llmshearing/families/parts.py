"""Parts of tables that many families share: kinds and axes of a decoder, and its ends.

Axes: hidden; intermediate; query (query heads x head_dim); kv (KV groups x head_dim); vocab.
The hidden gate acts on what a module writes to the residual stream (embeddings, projections out of a branch) and on
what the norms write. The head gate acts on what the projection out of the attention reads, the intermediate gate on
what the projection out of the MLP reads. Between the final norm and the logits the hidden gate acts once: untied on the
final norm, tied on the shared embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmshearing.compat import FEWEST_HEADS
from llmshearing.families.family import KEYS, sizes_of
from llmshearing.families.names import GROUPS, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, LAYERS, VOCAB
from llmshearing.families.table import (
    LAYER_NORM,
    LINEAR,
    Attribute,
    Axis,
    Coupling,
    Dimension,
    Kind,
    Table,
    TensorSpec,
    axes_of,
    bias,
    linear,
    norm,
)

HEAD_WIDTH = Coupling("hidden", "query", "a head of this family is as wide as hidden units / heads")


def decoder_table(
    family: str,
    config: Any,
    rows: Sequence[TensorSpec],
    head_mode: str = "group",
    keys: Mapping[str, str] = KEYS,
    minimum: int = FEWEST_HEADS,
    mlp_factor: int | None = None,
    **more: Any,
) -> Table:
    """A table of these rows, with the kinds, axes and config keys of a decoder.

    Args:
        minimum: heads that each row needs. mlp_factor: see :func:`~.family.sizes_of`. more: further fields of the
            table.
    """
    sizes = sizes_of(config, keys, mlp_factor)
    return Table(
        family=family,
        layers=sizes[LAYERS],
        kinds=decoder_kinds(sizes, head_mode, minimum),
        axes=decoder_axes(sizes, head_mode),
        tensors=tuple(rows),
        keys=keys,
        config_axes=config_axes(keys, sizes[HEAD_DIM]),
        head_dim=sizes[HEAD_DIM],
        **more,
    )


def decoder_kinds(sizes: Mapping[str, int], head_mode: str, minimum: int = 0) -> dict[str, Kind]:
    """Kinds of units of a decoder. minimum: of heads, in each row."""
    groups, repeat = sizes[GROUPS], sizes[HEADS] // sizes[GROUPS]
    head = Kind("head", groups, 1, minimum) if head_mode == "group" else Kind("head", repeat, groups, minimum)
    kinds = (
        Kind("hidden", sizes[HIDDEN], None),
        head,
        Kind("intermediate", sizes[INTERMEDIATE], 1),
        Kind("vocab", sizes[VOCAB], None),
    )
    return {kind.name: kind for kind in kinds}


def decoder_axes(sizes: Mapping[str, int], head_mode: str) -> dict[str, Axis]:
    """Axes of a decoder."""
    whole, size, groups = head_mode == "group", sizes[HEAD_DIM], sizes[GROUPS]
    return {
        "hidden": Axis(sizes[HIDDEN], "hidden"),
        "intermediate": Axis(sizes[INTERMEDIATE], "intermediate"),
        "query": Axis(sizes[HEADS] * size, "head", size * (sizes[HEADS] // groups if whole else 1)),
        "kv": Axis(groups * size, "head" if whole else None, size),
        "vocab": Axis(sizes[VOCAB], "vocab"),
    }


def config_axes(keys: Mapping[str, str], head_dim: int) -> dict[str, tuple[str, int]]:
    """Key of the config -> its axis and the elements for each unit of that key."""
    axes = {
        HIDDEN: ("hidden", 1),
        INTERMEDIATE: ("intermediate", 1),
        HEADS: ("query", head_dim),
        GROUPS: ("kv", head_dim),
        VOCAB: ("vocab", 1),
    }
    return {keys[size]: axis for size, axis in axes.items() if size in keys}


def ends(embed: TensorSpec, final: Sequence[TensorSpec], head: str, tied: bool) -> list[TensorSpec]:
    """Embedding, final norm and output head, with the hidden gate acting once between the last two.

    final: the norm's rows, as they are where the head is the embedding.
    """
    if tied:  # the head reads what the embedding writes
        return [embed, *final, replace(embed, name=head, alias=embed.name, reads=1, writes=0, module=LINEAR)]
    gated = [replace(spec, gates=("hidden",), rescale=0.0) for spec in final]
    return [embed, *gated, linear(head, "vocab", "hidden", counted=False)]


def layer_norm(name: str, **row: Any) -> list[TensorSpec]:
    """Weight and bias of an ``nn.LayerNorm`` of hidden units."""
    return [norm(f"{name}.{part}", "hidden", LAYER_NORM, **row) for part in ("weight", "bias")]


def projection(name: str, out: Dimension, read: Dimension, biased: bool, **row: Any) -> list[TensorSpec]:
    """Weight and, where it has one, bias of an ``nn.Linear``; the bias carries the gates of what is written."""
    weight = linear(f"{name}.weight", out, read, **row)
    return [weight, bias(f"{name}.bias", out, **bias_row(out, row))] if biased else [weight]


def bias_row(out: Dimension, row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a weight's row holds for its bias."""
    return {**row, "gates": tuple(axis for axis in row.get("gates", ()) if axis in axes_of(out))}


def with_axes(table: Table, axes: Mapping[str, Axis], **more: Any) -> Table:
    """The table with further axes, and with other values of some fields."""
    return replace(table, axes={**table.axes, **axes}, **more)


def query_groups(attention: str) -> Attribute:
    """The number of query heads for each KV head, as transformers' attention keeps it."""
    return Attribute(attention, "num_key_value_groups", "query", "kv")
