"""A target against the programs that are to read the result: who refuses it, and the nearest shape that all take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llmshearing.errors import ShearingError
from llmshearing.families import family_of
from llmshearing.families.readers import check_readers, nearest_said, refusals, verdicts, with_shape

if TYPE_CHECKING:
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
        said.append(nearest_said(_config(plan), plan.table, plan.target.shape, names))
        raise ShearingError("\n".join(said))


def lines_of(plan: Plan, names: Iterable[str] = ()) -> Iterator[str]:
    """What every reader says of the target, line by line. names: see :func:`llmshearing.families.readers.verdicts`."""
    if not plan.table.tensors:
        yield f"model_type {plan.config.model_type} has no table: what readers say of its shape is not known"
        return
    _, table = with_shape(_config(plan), plan.table, plan.target.shape)
    yield "target: " + ", ".join(f"{key} {size}" for key, size in plan.target.shape.items())
    yield f"parameters: {plan.table.count():,} -> {table.count():,}"
    yield from verdicts(_config(plan), plan.table, plan.target.shape, names)


def _config(plan: Plan) -> dict[str, Any]:
    """The source's config, for the layers that stay where these are known."""
    values, gone = plan.config.to_dict(), plan.target.drop_layers or ()
    kept = [layer for layer in range(plan.table.layers) if layer not in gone]
    return {**values, **family_of(plan.config.model_type).kept_config(values, kept)} if gone else values
