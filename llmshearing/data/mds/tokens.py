"""Token ids out of a sample's column `tokens`: an `ndarray` of whole numbers, or `bytes` whose width is not recorded.

The predecessor packed ids of 16 bits into `bytes`; other tools pack 32 or 64 bits. Ids of 64 bits that are read as ids
of 16 are `id 0 0 0 id 0 0 0 ...`, which trains without an error. So the width is recognised by what the bytes can be:
small numbers in wide fields have upper halves of zeros, and in text not every second token is 0.

Shape legend: T ids of a sequence.
"""

from collections.abc import Sequence

import numpy as np

WIDTHS = tuple(np.dtype(name) for name in ("<u2", "<u4", "<u8"))
ENOUGH = 8  # ids that are not 0 and have an upper half of zeros: no accident, where ids are narrow
LARGEST_VOCABULARY = 1 << 20  # where the model's is not known


def recognise(samples: Sequence[bytes], length: int | None, vocab_size: int) -> np.dtype:
    """The type of the ids in samples of a `bytes` column.

    Where the bytes tell nothing (nearly all of them are 0) the length T decides; None: it is not known.

    Raises:
        ValueError: they are no ids below ``vocab_size`` in any width, or the width cannot be told.
    """
    # What fits in a width fits in all narrower ones: each is the upper half of the next.
    fitting = [width for width in WIDTHS if all(_fits(sample, width, vocab_size) for sample in samples)]
    if not fitting:
        read = ", ".join(_described(samples, width) for width in WIDTHS)
        raise ValueError(
            f"column tokens holds bytes that are no token ids below vocab_size = {vocab_size} in 16, 32 or 64 bits "
            f"({read}); they are of another tokenizer, have values below 0, or are stored in another way"
        )
    widest = fitting[-1]
    if len(fitting) == 1 or sum(np.count_nonzero(np.frombuffer(s, widest)) for s in samples) >= ENOUGH:
        return widest
    by_length = [width for width in fitting if length and all(len(s) == length * width.itemsize for s in samples)]
    if not by_length:
        sizes = ", ".join(f"{len(samples[0]) // width.itemsize} of {8 * width.itemsize} bits" for width in fitting)
        raise ValueError(
            f"column tokens holds bytes, nearly all 0, and max_seq_len is {length or 'not given'}: "
            f"whether a sequence is {sizes} cannot be told; prepare the data again"
        )
    return by_length[0]


def _fits(sample: bytes, width: np.dtype, vocab_size: int) -> bool:
    whole = len(sample) > 0 and len(sample) % width.itemsize == 0
    return whole and int(np.frombuffer(sample, width).max()) < vocab_size


def _described(samples: Sequence[bytes], width: np.dtype) -> str:
    """What samples would be in a width."""
    if any(not sample or len(sample) % width.itemsize for sample in samples):
        return f"{8 * width.itemsize} bits: not a whole number of ids"
    signed = np.dtype(width.str.replace("u", "i")) if width.itemsize > 2 else width
    read = [np.frombuffer(sample, signed) for sample in samples]
    lowest, highest = min(int(ids.min()) for ids in read), max(int(ids.max()) for ids in read)
    return f"{8 * width.itemsize} bits: from {lowest} to {highest}"


def as_ids(tokens: bytes | np.ndarray, width: np.dtype | None, vocab_size: int) -> np.ndarray:
    """The ids [T] of a sample. width: of a `bytes` column, as :func:`recognise` found it in the first samples.

    Raises:
        ValueError: they are no whole numbers in one row, or below 0; or they are stored in another width.
    """
    if isinstance(tokens, bytes):
        if width is None or not tokens or len(tokens) % width.itemsize:
            raise ValueError(f"column tokens holds {len(tokens)} bytes, not a whole number of ids")
        fitting = [wider for wider in WIDTHS if wider.itemsize > width.itemsize and _fits(tokens, wider, vocab_size)]
        if fitting and np.count_nonzero(np.frombuffer(tokens, fitting[-1])) >= ENOUGH:
            bits = 8 * fitting[-1].itemsize
            raise ValueError(f"its ids have {bits} bits, those of the first samples {8 * width.itemsize}")
        return np.frombuffer(tokens, width)
    if tokens.dtype.kind != "u" and (tokens.dtype.kind != "i" or int(tokens.min(initial=0)) < 0):
        raise ValueError(f"tokens are of {tokens.dtype}, or below 0: no token ids")
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(f"tokens have the shape {list(tokens.shape)}, not one row of ids")
    return tokens
