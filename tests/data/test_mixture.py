"""The update against the reference vectors and DoReMi's formula; the interleaving against its stated bounds."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.data.mixture.mixture import (
    Interleaver,
    Mixture,
    check_proportion,
    doremi_update,
    update_proportion,
)
from llmshearing.errors import ShearingError

finite = st.floats(-5, 5)


@st.composite
def distributions(draw, size=None, least=1e-6):
    size = size or draw(st.integers(1, 9))
    weights = np.array(draw(st.lists(st.floats(least, 1), min_size=size, max_size=size)))
    return weights / weights.sum()


def test_update_agrees_with_reference_vectors(reference_vectors):
    for case in json.loads((reference_vectors / "doremi_updates.json").read_text()):
        found = update_proportion(case["update_type"], case["proportion"], case["losses"], case["target_loss"])
        np.testing.assert_allclose(found, case["new_proportion"], rtol=0, atol=1e-12)


@given(st.data(), st.booleans(), st.floats(0.1, 3), st.floats(0, 0.1))
def test_update_is_the_papers_formula(data, clamp, eta, c):
    q = data.draw(distributions(size=5, least=1e-3))
    losses, target = (np.array(data.draw(st.lists(finite, min_size=5, max_size=5))) for _ in range(2))
    excess = np.maximum(losses - target, 0) if clamp else losses - target
    expected = q * np.exp(eta * excess)
    expected = (1 - c) * expected / expected.sum() + c / 5
    found = doremi_update(q, losses, target, eta=eta, c=c, clamp_excess=clamp)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.sum() == pytest.approx(1, abs=1e-15)


@given(st.data(), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_loss_that_is_no_number_never_reaches_the_proportions(data, odd):
    q = data.draw(distributions(size=4))
    losses = data.draw(st.lists(st.one_of(finite, st.just(odd)), min_size=4, max_size=4))
    found = doremi_update(q, losses, [1.0] * 4)
    kept = doremi_update(q, np.where(np.isfinite(losses), losses, 1.0), [1.0] * 4)
    assert np.array_equal(found, kept)
    assert np.isfinite(found).all() and (found > 0).all()


@given(distributions())
def test_constant_keeps_the_proportions(q):
    found = update_proportion("constant", q, [math.nan] * len(q), [2.0] * len(q))
    np.testing.assert_allclose(found, q, rtol=2e-7)


@given(distributions(size=2))
def test_smoothing_keeps_every_domain_reachable(q):
    for _ in range(50):
        q = doremi_update(q, [5.0, 0.0], [0.0, 5.0])
    assert q.min() >= 1e-4 / 2 * 0.999


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bandit", [0.5, 0.5], [1, 1], [1, 1]), "'bandit'.*'doremi' and 'constant'"),
        (("doremi", [0.5, 0.4], [1, 1], [1, 1]), "sums to 0.9, not to 1"),
        (("doremi", [1.5, -0.5], [1, 1], [1, 1]), "negative"),
        (("doremi", [0.5, 0.5], [1, 1, 1], [1, 1, 1]), "2 values for 3 domains"),
        (("doremi", [0.5, 0.5], [1, 1], [1]), "target_loss has 1 values for 2"),
    ],
)
def test_bad_proportions_are_named(arguments, said):
    with pytest.raises(ShearingError, match=said):
        update_proportion(*arguments)


@given(distributions(), st.integers(1, 300))
def test_counts_stay_within_one_of_constant_proportions(q, steps):
    mixer, counts = Interleaver(q), np.zeros(len(q))
    bound = 1 - 1 / (2 * max(len(q), 2) - 2)
    for step in range(1, steps + 1):
        counts[mixer.next()] += 1
        assert np.abs(counts - step * q).max() <= bound + 1e-8


@given(st.data(), st.integers(2, 8))
def test_counts_stay_within_the_stated_bound_across_changes(data, size):
    mixer, counts, promised = Interleaver(np.full(size, 1 / size)), np.zeros(size), np.zeros(size)
    harmonic = sum(1 / k for k in range(1, size + 1))
    for _ in range(data.draw(st.integers(1, 60))):
        q = data.draw(distributions(size=size))
        mixer.set_proportion(q)
        for _ in range(data.draw(st.integers(1, 4))):
            counts[mixer.next()] += 1
            promised += q
            deficit = promised - counts
            assert deficit.min() > -1 and deficit.max() < harmonic
            np.testing.assert_allclose(mixer.deficits(), deficit, atol=1e-9)


def test_an_adversary_that_starves_the_neediest_stays_within_the_bound():
    for size in (2, 3, 5, 8):
        mixer = Interleaver(np.full(size, 1 / size))
        for step in range(2000):
            neediest = np.argsort(mixer.deficits())[-(size - step % size) :]
            q = np.full(size, 1e-9)
            q[neediest] = 1
            mixer.set_proportion(q / q.sum())
            mixer.next()
            assert min(mixer.deficits()) > -1
            assert max(mixer.deficits()) < sum(1 / k for k in range(1, size + 1))


def test_a_proportion_of_zero_brings_no_sample():
    mixer = Interleaver([0.5, 0.3, 0.2])
    for _ in range(7):
        mixer.next()
    mixer.set_proportion([0.6, 0.0, 0.4])
    assert {mixer.next() for _ in range(200)} == {0, 2}


def test_the_multinomial_option_draws_apart_and_by_proportion():
    mixture = Mixture(["a", "b", "c"], [5, 50, 500], [0.2, 0.0, 0.8], seed=4, mixing="multinomial")
    domains = [mixture.next()[0] for _ in range(4000)]
    counts = np.bincount(domains, minlength=3)
    assert counts[1] == 0 and abs(counts[0] - 800) < 5 * math.sqrt(4000 * 0.16)
    follows = sum(a == b == 0 for a, b in zip(domains, domains[1:], strict=False))  # exact mixing gives none
    assert abs(follows - 160) < 5 * math.sqrt(160)
    with pytest.raises(ShearingError, match="mixing is 'random'; known are 'exact' and 'multinomial'"):
        Mixture(["a"], [5], [1.0], seed=4, mixing="random")


@given(distributions())
def test_a_restored_mixture_is_not_a_changed_one(q):
    once = check_proportion(q, len(q))
    assert check_proportion(once.tolist(), len(q)).tolist() == once.tolist()


@given(st.integers(0, 200), st.data())
def test_state_continues_exactly_and_is_plain_json(position, data):
    mixing = data.draw(st.sampled_from(["exact", "multinomial"]))

    def mixture():
        return Mixture(["a", "b", "c"], [7, 30, 11], [0.2, 0.5, 0.3], seed=3, mixing=mixing)

    source = mixture()
    for _ in range(position):
        source.next()
    source.set_proportion(data.draw(distributions(size=3)))
    source.next()
    copy = mixture()
    copy.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert [copy.next() for _ in range(100)] == [source.next() for _ in range(100)]


def test_state_of_other_data_is_refused():
    state = Mixture(["a", "b"], [7, 30], [0.5, 0.5], seed=3).state_dict()
    with pytest.raises(ShearingError, match=r"seed: 3 in the checkpoint, 4 here\n  sizes: \[7, 30\]"):
        Mixture(["a", "b"], [7, 31], [0.5, 0.5], seed=4).load_state_dict(state)


def test_proportions_typed_by_hand_are_renormalised():
    assert check_proportion([0.3333333, 0.3333333, 0.3333334], 3).sum() == 1
