r"""Our models from Megatron's shards, and shards of our models: any number of ranks and stages on either side.

    Hugging Face directory, checkpoint --\                        /--> Hugging Face directory, checkpoint
                                          >-- tensors by name ---<
    shards of T ranks, torch_dist -------/                        \--> shards of T' ranks

The tensors in the middle are lazy. Each is put together when it is asked for, and the last ones stay in memory for the
others that look at them, so that no tensor is read twice and none is held for long.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from llmshearing.checkpoints.checkpoint import CheckpointInfo, plain_config
from llmshearing.checkpoints.generation import constructible
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.megatron import (
    READ_SPECS,
    SPECS,
    Layout,
    Parallel,
    arguments_of,
    config_of_arguments,
    disagreements,
    layout_of,
)
from llmshearing.families.names import VOCAB
from llmshearing.families.table import Table
from llmshearing.megatron.shards import Shards, open_shards, write_shards
from llmshearing.megatron.split import Placed, Spread, place_all
from llmshearing.megatron.stacked import is_stacked, open_stacked
from llmshearing.progress import tqdm
from llmshearing.storage import LazyTensor, LazyTensors, Recent
from llmshearing.storage.dtypes import main_dtype

log = logging.getLogger(__name__)


# Shards in ---------------------------------------------------------------------------------------------------------


def read_megatron(
    path: Path | str, *, config: PretrainedConfig | None = None, vocabulary: int | None = None
) -> tuple[LazyTensors, CheckpointInfo, Parallel]:
    """Tensors by our names, what is known of the model, and how it was spread.

    Args:
        path: a checkpoint of ranks, or one of torch_dist. config: of the model, where Megatron's arguments are not
            enough. vocabulary: its tokens without padding, where neither tells them.

    Raises:
        ShearingError: files are missing or damaged; ranks, arguments and tensors do not belong together; or it is no
            model of ours.
    """
    shards = open_stacked(path) if is_stacked(path) else open_shards(path)
    info = _info(shards, config, vocabulary)
    table = table_for(info.config)
    try:
        layout = layout_of(table)
        spread = Parallel(len(shards.stages[0]), len(shards.stages))
        expected = arguments_of(info.config, table, replace(spread, pp=1))  # stages may have been cut unequally
    except ShearingError as error:
        raise ShearingError(f"{shards.path}: {error}") from error
    if off := disagreements(shards.arguments, expected):
        raise ShearingError(f"{shards.path}: its arguments and the config do not belong together: {'; '.join(off)}")
    spec, stages = _placed(shards, layout, table)
    weights = _joined(shards, stages, table)
    done = f"read from Megatron's checkpoint {shards.path} of {spread.tp} x {spread.pp} ranks"
    return weights, info.then(done), replace(spread, spec=spec if spec in SPECS else SPECS[0])


def _info(shards: Shards, config: PretrainedConfig | None, vocabulary: int | None) -> CheckpointInfo:
    """By the config that was given, else by what our own export told, else by Megatron's arguments alone."""
    info = _recorded(shards.record)
    try:
        told = config_of_arguments(shards.arguments, vocabulary or _tokens(config, info))
    except ShearingError as error:
        raise ShearingError(f"{shards.path}: {error}") from error
    if config is not None:
        return replace(info or CheckpointInfo({}), hf_config=plain_config(config))
    if info is not None:
        return info
    return CheckpointInfo(plain_config(constructible(AutoConfig.for_model(**told))))


def _recorded(record: Any) -> CheckpointInfo | None:
    known = {item.name for item in fields(CheckpointInfo)}
    if not isinstance(record, Mapping) or not isinstance(record.get("hf_config"), dict):
        return None
    return CheckpointInfo(**{key: value for key, value in record.items() if key in known})


def _tokens(config: PretrainedConfig | None, info: CheckpointInfo | None) -> int | None:
    known = config if config is not None else info.config if info is not None else None
    return None if known is None else table_for(known).sizes()[VOCAB]


def _placed(shards: Shards, layout: Layout, table: Table) -> tuple[str, list[dict[str, Placed]]]:
    """The spec that the names are of, and what each stage should hold.

    Raises:
        ShearingError: tensors are missing, unknown, or of another shape or dtype than the other ranks'.
    """
    numbers = [_layers_of(ranks[0], layout) for ranks in shards.stages]
    if sum(numbers) != table.layers:
        raise ShearingError(f"{shards.path}: its stages have {numbers} layers, its arguments say {table.layers}")
    best: tuple[str, list[dict[str, Placed]]] | None = None
    fewest: list[str] = []
    padded = _padded_rows(shards, layout)
    for spec in READ_SPECS:
        spread = Spread(layout, table, len(shards.stages[0]), spec, padded)
        stages = stages_of(spread, numbers)
        problems = _problems(shards, stages)
        if best is None or len(problems) < len(fewest):
            best, fewest = (spec, stages), problems
    if fewest or best is None:
        more = f"\n  and {len(fewest) - 8} more" if len(fewest) > 8 else ""
        raise ShearingError(f"{shards.path}: tensors and arguments differ:\n  " + "\n  ".join(fewest[:8]) + more)
    return best


def _padded_rows(shards: Shards, layout: Layout) -> int | None:
    """Rows of the embedding of all ranks together, padding included."""
    names = [name for tensor in layout.tensors if tensor.padded for name in tensor.names]
    found = [[rank[name].shape[0] for rank in shards.stages[0] if name in rank] for name in names]
    return next((sum(rows) for rows in found if rows), None)


def stages_of(spread: Spread, numbers: Sequence[int]) -> list[dict[str, Placed]]:
    """What each pipeline stage holds. numbers: of its layers."""
    stages, start = [], 0
    for stage, number in enumerate(numbers):
        layers = range(start, start + number)
        stages.append(place_all(spread, layers, stage == 0, stage == len(numbers) - 1))
        start += number
    return stages


def _layers_of(model: Mapping[str, LazyTensor], layout: Layout) -> int:
    """How many layers a rank's tensors are of."""
    prefix = next(tensor.names[0] for tensor in layout.tensors if tensor.per_layer).partition("{layer}")[0]
    return len({name[len(prefix) :].partition(".")[0] for name in model if name.startswith(prefix)})


def _problems(shards: Shards, stages: Sequence[Mapping[str, Placed]]) -> list[str]:
    problems = []
    for stage, (expected, ranks) in enumerate(zip(stages, shards.stages, strict=True)):
        for rank, model in enumerate(ranks):
            where = f"rank {rank}" + (f" of stage {stage}" if len(stages) > 1 else "")
            problems += [f"{where}: {name} is missing" for name in expected.keys() - model.keys()]
            problems += [f"{where}: {name} is unknown" for name in model.keys() - expected.keys()]
            for name in expected.keys() & model.keys():
                want, have, first = expected[name].shape, model[name], ranks[0].get(name)
                if have.shape != want:
                    problems.append(f"{where}: {name} has the shape {list(have.shape)}, not {list(want)}")
                elif first is not None and first.dtype != have.dtype:
                    problems.append(f"{where}: {name} is {have.dtype}, of rank 0 {first.dtype}")
    return sorted(problems)


def _joined(shards: Shards, stages: Sequence[Mapping[str, Placed]], table: Table) -> LazyTensors:
    """Our tensors, each put together from ranks when it is asked for."""
    recent, entries, tied = Recent(), dict[str, LazyTensor](), dict[str, LazyTensor]()
    for placed, ranks in zip(stages, shards.stages, strict=True):
        for name, tensor in placed.items():
            for row, shape in zip(tensor.rows, tensor.shapes, strict=True):
                parts = [model[name] for model in ranks]
                make = partial(_scattered, tensor, row, parts, recent)
                entries[row] = LazyTensor(shape, parts[0].dtype, make)
    for row, (spec, _) in table.by_name.items():
        if spec.alias is not None:  # a last stage that is not the first keeps the embedding once more
            tied |= {row: entries[row]} if row in entries else {}
            one = entries[spec.alias]
            same = LazyTensor(one.shape, one.dtype, partial(_same, row, one, tied[row], recent)) if tied else one
            entries[spec.alias] = entries[row] = same
    return LazyTensors({name: entries[name] for name in table.by_name})


def _scattered(tensor: Placed, row: str, parts: Sequence[LazyTensor], recent: Recent) -> torch.Tensor:
    return tensor.scattered(row, lambda rank: recent.make(parts[rank]))


def _same(name: str, one: LazyTensor, other: LazyTensor, recent: Recent) -> torch.Tensor:
    value = recent.make(one)
    if not torch.equal(value, recent.make(other)):
        raise ShearingError(f"{name}: the first and the last stage hold different values of what is tied")
    return value


# Shards out --------------------------------------------------------------------------------------------------------


def write_megatron(
    weights: LazyTensors, info: CheckpointInfo, output: Path | str, parallel: Parallel, **options: Any
) -> Path:
    """Write a model as shards of any number of ranks and stages.

    Args:
        weights: every tensor by our names. options: see :func:`~.shards.write_shards`.

    Raises:
        ShearingError: Megatron cannot hold the model, or not on so many ranks; or the output cannot be written.
    """
    config = info.config
    table = table_for(config)
    layout, arguments = layout_of(table), arguments_of(config, table, parallel)
    numbers = [table.layers // parallel.pp] * parallel.pp
    placed = stages_of(Spread(layout, table, parallel.tp, parallel.spec), numbers)
    stages = _spread(weights, placed, parallel.tp)
    dtype = main_dtype({name: entry.dtype for name, entry in weights.entries.items()})
    arguments |= {
        "params_dtype": dtype, "bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16,
        "padded_vocab_size": _padded(placed, layout),
        "make_vocab_size_divisible_by": layout.multiple,
        "world_size": parallel.tp * parallel.pp,
        "consumed_train_samples": 0, "consumed_valid_samples": 0,
    }  # fmt: skip
    with tqdm(total=sum(len(rank) for stage in stages for rank in stage), desc="writing shards", unit="part") as bar:
        write_shards(Path(output), stages, arguments, asdict(info), progress=bar.update, **options)
    log.info(
        "wrote %s parameters as %d x %d ranks of Megatron (tensor x pipeline, names of %s) to %s",
        *(f"{table.count():,}", parallel.tp, parallel.pp, parallel.spec, output),
    )
    return Path(output)


def _padded(stages: Sequence[Mapping[str, Placed]], layout: Layout) -> int:
    """Rows of the embedding with its padding."""
    names = {name for tensor in layout.tensors if tensor.padded for name in tensor.names}
    return next(tensor.length for name, tensor in stages[0].items() if name in names)


def _spread(weights: LazyTensors, stages: Sequence[Mapping[str, Placed]], tp: int) -> list[list[dict[str, LazyTensor]]]:
    """The parts of all ranks, each made when it is asked for."""
    recent, spread = Recent(), []
    for placed in stages:
        ranks: list[dict[str, LazyTensor]] = [{} for _ in range(tp)]
        for name, tensor in placed.items():
            dtypes = {weights.entries[row].dtype for row in tensor.rows}
            if len(dtypes) > 1:
                raise ShearingError(f"{', '.join(tensor.rows)} are one tensor in Megatron, and of {dtypes}")
            for rank, model in enumerate(ranks):
                model[name] = LazyTensor(
                    tensor.shape, dtypes.copy().pop(), partial(_gathered, tensor, rank, weights, recent)
                )
        spread.append(ranks)
    return spread


def _gathered(tensor: Placed, rank: int, weights: LazyTensors, recent: Recent) -> torch.Tensor:
    return tensor.gathered(rank, lambda row: recent.make(weights.entries[row]))
