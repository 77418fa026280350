"""The one rule of grouped queries: which numbers of heads can be cut from which, and how. Plain data, no torch.

`queries per group = heads / groups`. A cut takes whole groups ("group": queries per group stay), or the same number of
query heads inside every group ("query": groups stay). Multi-head attention has one query a group: a cut takes heads.
"""

from __future__ import annotations


def complete_heads(
    heads: int | None, groups: int | None, source: tuple[int, int], *, keep_groups: bool
) -> tuple[int, int]:
    """(query heads, KV groups) that a target means where it names one of them or none.

    Fewer groups alone take their query heads with them. Fewer heads alone are cut inside every group where
    ``keep_groups`` (a one-shot target: what is absent stays), else as whole groups (a run's YAML, as published).

    Args:
        source: query heads and KV groups of the source.
    """
    source_heads, source_groups = source
    each = source_heads // source_groups
    if heads is None:
        groups = source_groups if groups is None else groups
        return groups * each, groups
    if groups is None:
        groups = source_groups if keep_groups and each > 1 else heads // each
    return heads, groups


def head_modes(heads: int, groups: int, source: tuple[int, int]) -> set[str]:
    """The head modes, of "group" and "query", in which the source's heads can be cut to these; none where it cannot."""
    source_heads, source_groups = source
    each = source_heads // source_groups
    modes = {"group": heads == groups * each, "query": groups == source_groups and heads % groups == 0}
    return {mode for mode, fits in modes.items() if fits}


def why_not(heads: int, groups: int, source: tuple[int, int], names: tuple[str, str]) -> str:
    """What is wrong with a target that has no head mode, and what would be right. names: of the two numbers."""
    source_heads, source_groups = source
    each, (of, in_groups), fits = source_heads // source_groups, names, max(1, groups)
    return (
        f"{of} = {heads} with {in_groups} = {groups} cannot be cut from {source_heads} and {source_groups}: cut whole "
        f"groups ({of} = {fits * each} for {in_groups} = {fits}: {each} query heads each), or keep {in_groups} = "
        f"{source_groups} with {of} a multiple of it"
    )
