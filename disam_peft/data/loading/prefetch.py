"""The next items made ready by a thread while this one works."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
_END: Any = object()


def ahead(items: Iterable[Item], *, depth: int = 2, in_thread: Callable[[], object] = lambda: None) -> Iterator[Item]:
    """The same items in the same order, up to ``depth`` of them made before they are asked for.

    All are made in one thread, which ends with the iteration, also where that is given up early. What goes wrong there
    is raised here, when its turn has come. The thread must not draw from torch's own random streams: nobody could say
    when.

    Args:
        in_thread: called there first of all.
    """
    iterator = iter(items)
    pool = ThreadPoolExecutor(1, "ahead", initializer=in_thread)
    try:
        waiting: deque[Future[Item]] = deque(pool.submit(next, iterator, _END) for _ in range(depth))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, iterator, _END))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
