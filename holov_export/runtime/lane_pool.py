"""Lanes for the threads that run at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holov_export.errors import EnvironmentFaultError
from holov_export.runtime.lane import Lane


class LanePool:
    """Lanes for the threads that run at once: made when needed, up to a limit, and used again.

    Attributes:
        lanes: those that exist.
    """

    def __init__(self, make: Callable[[], Lane], limit: int) -> None:
        self._make, self._limit = make, limit
        self._free: list[Lane] = []
        self.lanes: list[Lane] = []
        self._making = 0
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """A lane for this thread; waits while all are in use.

        Raises:
            EnvironmentFaultError: the runner is closed, or a new lane finds no memory.
        """
        lane = self._taken()
        try:
            yield lane
        finally:
            with self._changed:
                self._free.append(lane)  # the one used last is taken next: its graphs are warm
                self._changed.notify()

    def _taken(self) -> Lane:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free or len(self.lanes) + self._making < self._limit)
            if self._closed:
                raise EnvironmentFaultError("the runner is closed.")
            if self._free:
                return self._free.pop()
            self._making += 1
        try:
            lane = self._make()
            with self._changed:
                self.lanes.append(lane)
            return lane
        finally:
            with self._changed:
                self._making -= 1
                self._changed.notify()

    def close(self) -> bool:
        """Wait for the runs under way and free all lanes. False if that was done before."""
        with self._changed:
            if self._closed:
                return False
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._making and len(self._free) == len(self.lanes))
            lanes, self.lanes, self._free = self.lanes, [], []
        for lane in lanes:
            lane.close()
        return True
