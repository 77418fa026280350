"""Results in order while the next ones are being made: the one look-ahead of the package."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    items: Iterable[Item], submit: Callable[[Item], "Future[Result]"], ahead: int
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, in the items' order; at most ``ahead`` + 1 are begun and not yet handed over.

    Args:
        submit: begins an item's work in a pool of the caller's. An item is taken when its work is begun, so that what
            ``items`` does in between, such as looking at earlier results, is `ahead` items early.

    Raises:
        Whatever the work raises. What has not begun by then, or when the caller stops, is cancelled.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, submit(item)))
            if len(waiting) > ahead:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)
    finally:
        for _, future in waiting:
            future.cancel()


def _first(waiting: "deque[tuple[Item, Future[Result]]]") -> tuple[Item, Result]:
    item, future = waiting.popleft()
    return item, future.result()
