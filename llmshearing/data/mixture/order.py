"""The order of one domain's samples: a keyed shuffle with shard locality, in O(1) memory and start-up time.

N samples lie in blocks of L (a shard, or a part of one). A pass visits the blocks in a keyed random order, WINDOW
of them at a time, and shuffles the samples inside such a window:

    position in the pass -> (window's shuffle) -> slot, offset -> (blocks' permutation) -> sample id

Both steps are bijections, so a pass gives every sample once. At any time only WINDOW (+ 1, where the short last
block lies inside) blocks are being read. Numbers come from splitmix64 (Steele, Lea & Flood 2014) as a hash, so the
order is the same for every numpy version and platform.

Why two permutations: blocks have no upper bound, and a pass must start at any place of them at once, so theirs is
computed point by point, with its inverse (10^7 blocks laid out by `shuffled` take 4 s and 230 MB; a point takes 18 us).
A window is bounded, and each of its places is asked for, so it is laid out once, at 0.3 us a sample. Using either for
both would also move every sample of runs that are under way.
"""

import zlib

import numpy as np

WINDOW = 16  # blocks shuffled together
BLOCK_LIMIT = 8192  # samples; bounds a window's memory (1 MiB) and the time to shuffle it (10 ms)
ROUNDS = 4  # of the Feistel network; four make a strong pseudorandom permutation (Luby & Rackoff 1988)
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(*values: int) -> int:
    """Hash whole numbers to one of 64 bits."""
    state = 0
    for value in values:
        state = (state + GOLDEN + value) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def shuffled(key: int, size: int) -> np.ndarray:
    """A permutation [size] that `key` decides: 0..size-1 sorted by their hash."""
    state = np.arange(size, dtype=np.uint64) + np.uint64(key)
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable").astype(np.uint32)


class Permutation:
    """A keyed permutation of range(size) and its inverse, by a Feistel network that walks cycles until inside."""

    def __init__(self, key: int, size: int) -> None:
        self.key, self.size = key, size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits of one half
        self._low = (1 << self._half) - 1

    def __call__(self, index: int) -> int:
        while True:
            left, right = index >> self._half, index & self._low
            for turn in range(ROUNDS):
                left, right = right, left ^ (mix(self.key, turn, right) & self._low)
            index = left << self._half | right
            if index < self.size:
                return index

    def inverse(self, index: int) -> int:
        """The i with self(i) == index."""
        while True:
            left, right = index >> self._half, index & self._low
            for turn in reversed(range(ROUNDS)):
                left, right = right ^ (mix(self.key, turn, left) & self._low), left
            index = left << self._half | right
            if index < self.size:
                return index


class DomainOrder:
    """Sample id of each draw of one domain: a function of (seed, name, size, block, draw); passes without end.

    `block`: samples in a shard. Keeps the shuffle of the window that was asked for last.
    """

    def __init__(self, name: str, size: int, seed: int, shuffle: bool = True, block: int = BLOCK_LIMIT) -> None:
        self.name, self.size, self.shuffle = name, size, shuffle
        self.block = max(1, min(block, size, BLOCK_LIMIT))
        self._key = mix(seed, zlib.crc32(name.encode()))
        self._pass = -1
        self._window = -1

    def __call__(self, draw: int) -> int:
        """The sample id in [0, size) of draw 0, 1, 2, ...; none returns before the domain is exhausted."""
        number, position = divmod(draw, self.size)
        if not self.shuffle:
            return position
        if number != self._pass:
            self._start_pass(number)
        width = WINDOW * self.block
        window, inside = divmod(position, width)
        if window != self._window:
            first = window * width
            self._within = shuffled(mix(self._pass_key, 1, window), min(width, self.size - first))
            self._window = window
        return self._sample(window * width + int(self._within[inside]))

    def _start_pass(self, number: int) -> None:
        self._pass, self._window = number, -1
        self._pass_key = mix(self._key, number)
        blocks = -(-self.size // self.block)
        self._blocks = Permutation(mix(self._pass_key, 0), blocks)
        self._short = self.size - (blocks - 1) * self.block  # samples of the last block
        self._short_slot = self._blocks.inverse(blocks - 1)

    def _sample(self, place: int) -> int:
        """Sample at a place of the blocks laid out in this pass's order."""
        before_short = self._short_slot * self.block
        if place < before_short:
            slot, offset = divmod(place, self.block)
        elif place < before_short + self._short:
            slot, offset = self._short_slot, place - before_short
        else:
            slot, offset = divmod(place - self._short + self.block, self.block)
        return self._blocks(slot) * self.block + offset
