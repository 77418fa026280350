"""Which programs read a model of which shape: one place for their rules. Plain data, no torch.

A reader refuses a shape for a reason, which names keys and values. So a target can be held against all of them before
the work, and the nearest shape that all of them take can be named. What was run with which versions stands in
docs/readers.md (`python -m benchmarks.readers`).

    transformers4, transformers5    AutoModelForCausalLM, with this package imported where layers differ in size
    ctranslate2                     its converter of transformers' models
    gguf                            llama.cpp (`llmshearing.families.gguf`)
    megatron, megatron-tp8          GPTModel of megatron-core, on one rank, or on 8 tensor-parallel ranks
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

from llmshearing.errors import ShearingError
from llmshearing.families import family_of
from llmshearing.families.family import size_problems
from llmshearing.families.gguf import problems_of
from llmshearing.families.heads import head_modes
from llmshearing.families.megatron.layouts import LAYOUTS
from llmshearing.families.names import GROUPS, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, VOCAB
from llmshearing.families.nonuniform.table import TYPE, without_sizes
from llmshearing.families.table import Table

TENSOR_PARALLEL = (2, 4, 8)
"""Numbers of ranks that are looked at without being asked."""
TILES = (128, 64, 8)
"""Products of matrices are fastest in multiples of these, of 16-bit numbers on a GPU."""
CONFIGS_DIVIDE = ("llama", "gemma2", "gemma3_text", "gpt_neox")
"""Families whose configs of transformers 5.24 refuse hidden units that are no multiple of heads."""
CTRANSLATE2 = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt")
"""Families that ctranslate2 4.8.5 converts. Its converter of Phi-3 fails with transformers 4.57 (docs/readers.md)."""
CTRANSLATE2_APART = ("mistral", "qwen3", "gemma2", "gemma3_text")
"""Those of them whose width of heads it reads apart from hidden / heads."""
SCALE, WINDOW = "query_pre_attn_scalar", "sliding_window"
CTRANSLATE2_LEAVES_OUT = {
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping", SCALE, WINDOW),
    "gemma3_text": ("final_logit_softcapping", SCALE),
    "qwen2": (WINDOW,),
    "qwen3": (WINDOW,),
}
"""Family -> keys that its converter of it does not read, so that the result is another function without a word. Seen
with 4.8.5: 0.01 nats for the caps of a tiny Gemma 2, 1 and more for a scale or a window that says something."""

Rule = Callable[[Any, Table], Iterator[str]]


def _said(table: Table, size: str) -> str:
    return f"{table.keys.get(size, size)} = {table.sizes()[size]}"


def _transformers4(config: Any, table: Table) -> Iterator[str]:
    yield from ()


def _transformers5(config: Any, table: Table) -> Iterator[str]:
    sizes = table.sizes()
    if _family(table) in CONFIGS_DIVIDE and sizes[HIDDEN] % sizes[HEADS]:
        yield f"{_said(table, HIDDEN)} is no multiple of {_said(table, HEADS)}, which its configs ask for"


def _ctranslate2(config: Any, table: Table) -> Iterator[str]:
    family, sizes = _family(table), table.sizes()
    if family not in CTRANSLATE2:
        yield f"it has no converter for the {family} family"
    elif table.of_layer:
        yield "layers differ in size"
    elif family not in CTRANSLATE2_APART and sizes[HEADS] * sizes[HEAD_DIM] != sizes[HIDDEN]:
        yield f"{_said(table, HIDDEN)} is not {_said(table, HEADS)} of {sizes[HEAD_DIM]} each, as it takes heads to be"
    if left_out := [
        f"{key} = {getattr(config, key)}"
        for key in CTRANSLATE2_LEAVES_OUT.get(family, ())
        if _changes_something(key, config, table)
    ]:
        yield f"its converter leaves out {', '.join(left_out)}: it would compute another function"


def _changes_something(key: str, config: Any, table: Table) -> bool:
    """Whether a key of the config makes the function another than it is without the key."""
    value = getattr(config, key, None)
    if key == SCALE:
        return value is not None and value != table.sizes()[HEAD_DIM]
    if key == WINDOW:
        kinds = getattr(config, "layer_types", None) or ()
        return value is not None and value < config.max_position_embeddings and "sliding_attention" in kinds
    return value is not None


def _gguf(config: Any, table: Table) -> Iterator[str]:
    yield from problems_of(config, table)


def _megatron(ranks: int) -> Rule:
    def rule(config: Any, table: Table) -> Iterator[str]:
        sizes = table.sizes()
        if table.family not in LAYOUTS:
            yield "layers differ in size" if table.of_layer else f"there is no layout for the {table.family} family"
            return
        for size in (HEADS, INTERMEDIATE):
            if sizes[size] % ranks:
                yield f"{_said(table, size)} does not divide by {ranks} tensor-parallel ranks"
        if sizes[GROUPS] % ranks and ranks % sizes[GROUPS]:
            yield f"{_said(table, GROUPS)} is neither a multiple nor a divisor of {ranks} tensor-parallel ranks"

    return rule


MEGATRON = "megatron"
READERS: dict[str, Rule] = {
    "transformers4": _transformers4,
    "transformers5": _transformers5,
    "ctranslate2": _ctranslate2,
    "gguf": _gguf,
    MEGATRON: _megatron(1),
    **{f"{MEGATRON}-tp{ranks}": _megatron(ranks) for ranks in TENSOR_PARALLEL},
}
"""Name of a reader -> its rule: (config, table) -> why it refuses."""


def _family(table: Table) -> str:
    return table.family.removeprefix(TYPE)


def check_readers(names: Iterable[str]) -> None:
    """Refuse names that no reader has.

    Raises:
        ShearingError: naming them.
    """
    if unknown := [name for name in names if name not in READERS]:
        raise ShearingError(f"reader {', '.join(unknown)} is unknown; there are {', '.join(READERS)}")


def refusals(config: Any, table: Table, names: Iterable[str] = tuple(READERS)) -> dict[str, list[str]]:
    """Reader -> why it refuses a model; those that take it are left out."""
    found = {name: list(READERS[name](config, table)) for name in names}
    return {name: reasons for name, reasons in found.items() if reasons}


def hints(table: Table) -> list[str]:
    """What would be faster: sizes that are no multiple of a tile. No reader refuses them."""
    sizes, said = table.sizes(), []
    for size in (HIDDEN, INTERMEDIATE, VOCAB):
        number = sizes[size]
        tile = next((tile for tile in TILES if number % tile == 0), 1)
        if tile < TILES[0]:
            step = TILES[-1] if tile < TILES[-1] else TILES[0]
            said.append(f"{_said(table, size)} is a multiple of {tile}; of {step} are {_around(number, step)}")
    return said


def _around(number: int, step: int) -> str:
    below = number // step * step
    return f"{below} and {below + step}" if below else f"{below + step}"


def with_shape(config: Any, table: Table, shape: Mapping[str, int | list[int]]) -> tuple[Any, Table]:
    """A config as plain values with these sizes, and its table; no class of transformers looks at it.

    table: of the source. shape: key of the config -> value, or a list with one of each layer.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    kind = str(values["model_type"]).removeprefix(TYPE)
    apart = {table.keys[HEAD_DIM]: table.head_dim} if HEAD_DIM in table.keys else {}
    plain = {**without_sizes(values), **apart, "model_type": kind}
    layers = max(len(size) if isinstance(size, list) else 1 for size in shape.values())
    each = [{key: _of(size, layer) for key, size in shape.items()} for layer in range(layers)]
    changed, *own = (SimpleNamespace(**table.with_mirrors({**plain, **sizes})) for sizes in (_widest(shape), *each))
    make = family_of(kind).table
    whole = make(changed, "group")
    if layers == 1:
        return changed, whole
    return changed, replace(whole, family=TYPE + kind, of_layer=tuple(make(layer, "group") for layer in own))


def _of(size: int | list[int], layer: int) -> int:
    return size[layer] if isinstance(size, list) else size


def nearest(config: Any, table: Table, shape: Mapping[str, int], names: Iterable[str]) -> dict[str, int] | None:
    """The shape closest to the one asked for that all the readers take; None where none near it does.

    Hidden units, heads and intermediate units are moved, to no more than the source has and in a way that its heads can
    be cut. The distance is the sum of the logarithms of the ratios of sizes.

    Args:
        table: of the source. shape: key of the config -> value.
    """
    names, keys, source = list(names), table.keys, table.sizes()
    best: tuple[float, dict[str, int]] | None = None
    for candidate in _candidates(table, shape):
        distance = sum(abs(math.log(candidate[key] / shape[key])) for key in candidate)
        if best is not None and distance >= best[0]:
            continue
        tried = {**shape, **candidate}
        counts = tried[keys[HEADS]], tried.get(keys.get(GROUPS, ""), tried[keys[HEADS]])
        if not head_modes(*counts, (source[HEADS], source[GROUPS])) or table.shape_problems(tried):
            continue
        changed, small = with_shape(config, table, tried)
        if not size_problems(changed, keys) and not refusals(changed, small, names):
            best = distance, {key: tried[key] for key in shape}
    return None if best is None else best[1]


def _candidates(table: Table, shape: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Shapes near the one asked for."""
    keys, source = table.keys, table.sizes()
    hidden, heads, wide = (shape[keys[size]] for size in (HIDDEN, HEADS, INTERMEDIATE))
    grouped = GROUPS in keys
    groups = shape[keys[GROUPS]] if grouped else heads
    each = {heads // groups, source[HEADS] // source[GROUPS]}  # query heads of a group, as asked for or as they were
    counts = sorted((number * queries, number) for number in range(1, source[GROUPS] + 1) for queries in each)
    for (number, of), step in product(counts, (1, *TENSOR_PARALLEL)):
        widths = {hidden, number * table.head_dim, hidden // number * number, -(-hidden // number) * number}
        mlps = {wide, wide // step * step, -(-wide // step) * step}
        for units, mlp in product(widths, mlps):
            if 0 < units <= source[HIDDEN] and 0 < mlp <= source[INTERMEDIATE]:
                moved = {keys[HIDDEN]: units, keys[HEADS]: number, keys[INTERMEDIATE]: mlp}
                yield {**moved, **({keys[GROUPS]: of} if grouped else {})}


def verdicts(
    config: Any, table: Table, shape: Mapping[str, int | list[int]], names: Iterable[str] = ()
) -> Iterator[str]:
    """What every reader says of a target, line by line.

    Args:
        config, table: of the source. shape: as of :func:`with_shape`. names: of readers that the nearest shape is to
            satisfy; none: all that take some shape near it.
    """
    refused = refusals(*with_shape(config, table, shape))
    for name in READERS:
        yield f"  {name}: " + (f"refuses: {'; '.join(refused[name])}" if name in refused else "takes it")
    yield from (f"  hint: {hint}" for hint in hints(with_shape(config, table, shape)[1]))
    wanted = [*names] or [name for name in READERS if nearest(config, table, _widest(shape), [name]) is not None]
    if set(wanted) & set(refused):
        yield nearest_said(config, table, shape, wanted)


def nearest_said(config: Any, table: Table, shape: Mapping[str, int | list[int]], names: Iterable[str]) -> str:
    """:func:`nearest` in words: the sizes that change."""
    names = list(names)
    found = nearest(config, table, _widest(shape), names)
    if found is None:
        return f"no shape near it is taken by {', '.join(names)}"
    changed = {key: size for key, size in found.items() if size != shape[key]} or found
    return f"nearest shape that {', '.join(names)} take: {' '.join(f'{key}={size}' for key, size in changed.items())}"


def _widest(shape: Mapping[str, int | list[int]]) -> dict[str, int]:
    return {key: max(size) if isinstance(size, list) else size for key, size in shape.items()}
