"""The look-ahead pool: results in order, a bounded number in the making, nothing left behind."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from llmshearing.lookahead import in_order


@pytest.mark.parametrize("ahead", [0, 1, 5, 40])
def test_results_come_in_order_and_at_most_so_many_are_ahead(ahead):
    begun, taken = [0], [0]

    def work(item: int) -> int:
        time.sleep(0.001 * (item % 3))  # later ones are done earlier
        return item * item

    def submit(item: int) -> Future:
        begun[0] += 1
        assert begun[0] - taken[0] <= ahead + 1
        return pool.submit(work, item)

    with ThreadPoolExecutor(4) as pool:
        found = []
        for pair in in_order(iter(range(20)), submit, ahead):
            taken[0] += 1
            found.append(pair)
    assert found == [(i, i * i) for i in range(20)]


def test_what_has_not_begun_is_cancelled_when_work_fails_or_the_caller_stops():
    gate = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            raise KeyError("first")
        gate.wait(10)
        return item

    futures: list[Future] = []
    with ThreadPoolExecutor(1) as pool:
        submit = lambda item: futures.append(pool.submit(work, item)) or futures[-1]  # noqa: E731
        with pytest.raises(KeyError, match="first"):
            list(in_order(range(9), submit, 8))
        gate.set()
    assert sum(future.cancelled() for future in futures) >= 7  # one may run already

    with ThreadPoolExecutor(1) as pool:
        gate.clear()
        futures.clear()
        running = in_order(range(1, 9), lambda i: futures.append(pool.submit(work, i)) or futures[-1], 3)
        gate.set()
        assert next(running) == (1, 1)
        running.close()
    assert len(futures) == 4
