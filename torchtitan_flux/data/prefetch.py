"""The next element of an iterator, made by a thread while the caller is busy with this one."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """An iterator over the same elements, one of which is always under way.

    Torch computes, and PIL decodes, without Python's lock, so a thread is enough to hide most of
    the work. What the iterator raises is raised here in its turn, and again at every later call.

    Args:
        iterator: used by the thread alone from now on.
    """

    def __init__(self, iterator: Iterator[T]):
        self._iterator = iterator
        self._process = os.getpid()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flux-data")
        self._next = self._thread.submit(next, iterator)

    @property
    def lost(self) -> bool:
        """The thread is in the process that this one was forked from."""
        return self._process != os.getpid()

    def __iter__(self) -> "Ahead[T]":
        return self

    def __next__(self) -> T:
        element = self._next.result()
        self._next = self._thread.submit(next, self._iterator)
        return element

    def close(self) -> None:
        """End the thread, after the element that it is at."""
        if not self.lost:
            self._thread.shutdown(wait=True, cancel_futures=True)
