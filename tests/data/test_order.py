"""The keyed shuffle: a bijection in every pass, shards that are read together, and no cost in the number of samples."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.data.mixture.order import WINDOW, DomainOrder, Permutation, mix, shuffled


@given(st.integers(1, 400), st.integers(0, 5), st.integers(1, 30))
def test_no_sample_returns_before_its_domain_is_exhausted(size, seed, block):
    order = DomainOrder("a", size, seed, block=block)
    for number in range(3):
        assert sorted(order(number * size + i) for i in range(size)) == list(range(size))


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_the_permutation_and_its_inverse(size, key):
    permutation = Permutation(key, size)
    image = [permutation(i) for i in range(size)]
    assert sorted(image) == list(range(size))
    assert [permutation.inverse(i) for i in image] == list(range(size))


def test_passes_domains_and_seeds_are_shuffled_apart_and_any_draw_can_be_asked_for():
    def first(name, seed, start=0):
        order = DomainOrder(name, 200, seed, block=10)
        return tuple(order(start + i) for i in range(200))

    assert len({first("a", 1), first("b", 1), first("a", 2), first("a", 1, 200)}) == 4
    order, there = DomainOrder("a", 200, 1, block=10), first("a", 1)
    for draw in (199, 0, 150, 7):
        assert order(draw) == there[draw]
    unshuffled = DomainOrder("a", 3, 1, shuffle=False)
    assert [unshuffled(i) for i in range(5)] == [0, 1, 2, 0, 1]


def test_few_shards_are_read_at_a_time():
    block, shards = 64, 100
    order = DomainOrder("a", block * shards - 17, 3, block=block)
    touched = [order(i) // block for i in range(block * shards - 17)]
    for start in range(0, len(touched), WINDOW * block):
        assert len(set(touched[start : start + WINDOW * block])) <= WINDOW + 1
    assert len(set(touched[:200])) > WINDOW // 2  # and yet mixed


def test_it_is_uniform():
    """Where sample 0 of 12 comes, over keys: every place equally often (chi-squared, 11 degrees of freedom)."""
    for block in (1, 3, 12):  # by the network alone, by both, by the window alone
        places = np.zeros(12)
        for seed in range(2400):
            order = DomainOrder("a", 12, seed, block=block)
            places[[order(i) for i in range(12)].index(0)] += 1
        assert ((places - 200) ** 2 / 200).sum() < 40
    assert shuffled(mix(5), 1000).tolist() != shuffled(mix(6), 1000).tolist()


def test_the_order_is_pinned():
    """The order is part of what a checkpoint means: these numbers may only change with the state's version."""
    assert [DomainOrder("cc", 10**9, 17, block=8192)(i) for i in (0, 1, 10**9 - 1, 10**9)] == PINNED
    assert mix(1, 2, 3) == PINNED_HASH


def test_a_billion_samples_cost_what_a_few_do():
    start = time.perf_counter()
    order = DomainOrder("a", 10**9, 0, block=8192)
    found = [order(i * 10**6) for i in range(5)]
    assert time.perf_counter() - start < 2 and len(set(found)) == 5


PINNED = [175835881, 741450312, 170554702, 297386922]
PINNED_HASH = 7702586659592502839
