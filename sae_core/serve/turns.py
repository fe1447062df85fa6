"""Many streams from one model: it serves one thread, which takes one item of each stream in turn."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Generic, TypeVar

from sae_core.errors import MindAtlasError

T = TypeVar("T")


class BusyError(MindAtlasError):
    """All places are taken."""


class Turns:
    """Runs iterators in a thread of its own, one item of each in turn, so that none waits for another's end.

    The thread ends when there is nothing to do, and is started again by the next stream.
    """

    def __init__(self, places: int = 32) -> None:
        """With so many places; who comes when all are taken is sent away at once."""
        self._places, self._inside = places, set[Stream]()
        self._lock = threading.Lock()
        self._next: deque[Stream] = deque()
        self._running = False

    def start(self, items: Iterator[T]) -> "Stream[T]":
        """The stream of an iterator, of which nothing is run yet; to be called, and read, inside an event loop.

        Raises BusyError when all places are taken.
        """
        with self._lock:
            if len(self._inside) >= self._places:
                raise BusyError(f"the model is busy: all {self._places} places are taken; try again in a moment")
            stream = Stream(items, self._leave)
            self._inside.add(stream)
            self._next.append(stream)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="live-model", daemon=True).start()
        return stream

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._next:
                    self._running = False
                    return
                stream = self._next.popleft()
            goes_on = stream.step()
            if goes_on:
                with self._lock:
                    self._next.append(stream)
            else:
                self._leave(stream)

    def _leave(self, stream: "Stream") -> None:
        with self._lock:
            self._inside.discard(stream)


class Stream(Generic[T]):
    """What one iterator yields, or raises, for one reader. Closed, it takes no further turn."""

    def __init__(self, items: Iterator[T], leave: "Callable[[Stream[T]], None]") -> None:
        self._items, self._leave = items, leave
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Queue[tuple[T | None, BaseException | None]] = asyncio.Queue()
        self._closed = threading.Event()

    def step(self) -> bool:
        """Make one item, in the model's thread; returns whether another turn is wanted."""
        if self._closed.is_set():
            return False
        try:
            made: tuple[T | None, BaseException | None] = next(self._items), None
        except BaseException as error:  # noqa: BLE001  it is raised where the stream is read
            made = None, error
        try:
            self._loop.call_soon_threadsafe(self._ready.put_nowait, made)
        except RuntimeError:  # the loop has ended, and the reader with it
            return False
        return made[1] is None

    def close(self) -> None:
        """Nobody reads any further: the place is free."""
        self._closed.set()
        self._leave(self)

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        item, error = await self._ready.get()
        if isinstance(error, StopIteration):
            raise StopAsyncIteration
        if error is not None:
            raise error
        return item  # type: ignore[return-value]
