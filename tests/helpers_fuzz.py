"""Bytes changed at random, for the tests that read what others may have written."""

from hypothesis import strategies as st

mutations = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4)


def mutated(data: bytes, changes: list[tuple[float, int]]) -> bytes:
    """Some bytes, at fractions of the length, changed; the last of three changes cuts the rest off."""
    out = bytearray(data)
    for at, flip in changes:
        out[int(at * len(out))] ^= flip
    return bytes(out[: int(changes[-1][0] * len(out))] if len(changes) == 3 else out)
