"""A target against the programs that are to read the result: who refuses it, and the nearest shape that all take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llmshearing.errors import ShearingError
from llmshearing.families import family_of
from llmshearing.families.readers import READERS, check_readers, hints, nearest, refusals, with_shape
from llmshearing.prune.run import Plan


def check_target(plan: Plan, names: Iterable[str]) -> None:
    """Refuse a target that one of these readers refuses.

    Raises:
        ShearingError: naming readers, reasons, and the nearest shape that all of them take.
    """
    names = list(names)
    check_readers(names)
    if not names or not plan.table.tensors:
        return
    config, table = with_shape(_config(plan), plan.table, plan.target.shape)
    if refused := refusals(config, table, names):
        said = [f"{name} would refuse the result: {'; '.join(reasons)}" for name, reasons in refused.items()]
        raise ShearingError("\n".join([*said, _nearest(plan, names)]))


def lines_of(plan: Plan, names: Iterable[str] = ()) -> Iterator[str]:
    """What every reader says of the target, line by line. names: those that a nearest shape is to satisfy; none: all
    that take some shape of the family."""
    if not plan.table.tensors:
        yield f"model_type {plan.config.model_type} has no table: what readers say of its shape is not known"
        return
    config, table = with_shape(_config(plan), plan.table, plan.target.shape)
    yield "target: " + ", ".join(f"{key} {size}" for key, size in plan.target.shape.items())
    yield f"parameters: {plan.table.count():,} -> {table.count():,}"
    refused = refusals(config, table)
    for name in READERS:
        yield f"  {name}: " + (f"refuses: {'; '.join(refused[name])}" if name in refused else "takes it")
    yield from (f"  hint: {hint}" for hint in hints(table))
    if wanted := [*names] or [name for name in refused if nearest_shape(plan, [name]) is not None]:
        others = [name for name in READERS if name not in refused]
        yield _nearest(plan, [*names] or [*wanted, *others])


def nearest_shape(plan: Plan, names: Iterable[str]) -> dict[str, int] | None:
    """The nearest uniform shape that the readers take."""
    shape = {key: max(size) if isinstance(size, list) else size for key, size in plan.target.shape.items()}
    return nearest(_config(plan), plan.table, shape, names)


def _config(plan: Plan) -> dict[str, Any]:
    """The source's config, for the layers that stay where these are known."""
    values, gone = plan.config.to_dict(), plan.target.drop_layers or ()
    kept = [layer for layer in range(plan.table.layers) if layer not in gone]
    return {**values, **family_of(plan.config.model_type).kept_config(values, kept)} if gone else values


def _nearest(plan: Plan, names: list[str]) -> str:
    found = nearest_shape(plan, names)
    if found is None:
        return f"no shape near it is taken by {', '.join(names)}"
    changed = {key: size for key, size in found.items() if size != plan.target.shape[key]}
    said = " ".join(f"{key}={size}" for key, size in (changed or found).items())
    return f"nearest shape that {', '.join(names)} take: {said}"
