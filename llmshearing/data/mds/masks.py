"""The loss mask of a sample, in its column `loss_mask`: which tokens count in the loss, one bit each.

    bit t % 8 of byte t // 8 is 1          token t is an answer: the loss of predicting it counts

Data of plain text have no such column: every token counts. The first token of a sequence, which nothing predicts,
counts nowhere, whatever its bit. Other tools store one number a token; both are read.

Shape legend: T tokens of a sequence.
"""

import numpy as np

COLUMN = "loss_mask"


def encoding(max_seq_len: int) -> str:
    """The column's type in MDS."""
    return f"ndarray:uint8:{-(-max_seq_len // 8)}"


def packed(mask: np.ndarray) -> np.ndarray:
    """What is stored, uint8 [T / 8 rounded up]; mask: bool [T]."""
    return np.packbits(mask, bitorder="little")


def unpacked(stored: bytes | np.ndarray, max_seq_len: int) -> np.ndarray:
    """The mask, bool [T]; stored: a bit a token, or a number a token that is 0 or 1.

    Raises:
        ValueError: it is neither.
    """
    values = np.frombuffer(stored, np.uint8) if isinstance(stored, bytes) else np.asarray(stored)
    if values.ndim != 1 or values.dtype.kind not in "uib":
        raise ValueError(f"column {COLUMN} holds {values.dtype} of the shape {list(values.shape)}, not one row of bits")
    if values.size == max_seq_len and np.isin(values, (0, 1)).all():
        return values.astype(bool)
    if values.dtype != np.uint8 or values.size != -(-max_seq_len // 8):
        raise ValueError(
            f"column {COLUMN} holds {values.size} numbers for {max_seq_len} tokens: it must hold a bit a token "
            f"({-(-max_seq_len // 8)} bytes), or a 0 or 1 a token"
        )
    return np.unpackbits(values, count=max_seq_len, bitorder="little").astype(bool)
