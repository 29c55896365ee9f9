"""Answers kept for edges that ask again: a task whose answer was lost on the way is not computed twice."""

from __future__ import annotations

import logging
import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from neurosurgeon.cloud.executor import CloudResult, Deliver
from neurosurgeon.utils.logs import internal_error
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import s_to_ms

log = logging.getLogger(__name__)

KEPT_S = 60.0
MAX_KEPT_BYTES = 64 * 1024 * 1024  # 16,000 answers of a thousand classes; beyond, the oldest go before their time
MAX_KEPT = 16_384  # whatever their size

Compute = Callable[[Deliver], None]
Chore = Callable[[], None]


class Asker(NamedTuple):
    """Who wants an answer."""

    compute: Compute  # starts the computation, as `CloudEngine.submit`
    deliver: Deliver
    release: Chore = lambda: None  # called behind ``deliver``: the question is not read any more
    later: Callable[[Chore, int], None] = lambda chore, result_bytes: chore()  # does what none waits for

    def answer(self, result: CloudResult | Exception) -> None:
        """Give the answer, of which nothing is needed here."""
        self.deliver(result)
        self.release()


class _Copy(NamedTuple):
    """A tensor in pages of its own.

    On the heap, small things that stay a minute pin the megabytes that the tensors of networks leave free around them;
    a tensor object is one.
    """

    pages: mmap.mmap
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> _Copy:
        copy = cls(mmap.mmap(-1, max(tensor.nbytes, 1), mmap.MAP_PRIVATE), tensor.dtype, tensor.shape)
        copy.tensor().copy_(tensor)
        return copy

    def tensor(self) -> Tensor:
        """Return the tensor that lives in the pages."""
        flat = torch.frombuffer(self.pages, dtype=torch.uint8)[: self.shape.numel() * self.dtype.itemsize]
        return flat.view(self.dtype).view(self.shape)


@dataclass(slots=True, eq=False)
class _Kept:
    """A task that is being computed, or has been."""

    request: object
    result: CloudResult | None = None  # but for its tensors
    copies: tuple[_Copy, ...] = ()
    size_bytes: int = 0
    done_ms: float = 0.0
    waiting: list[Asker] = field(default_factory=list)  # those who asked again meanwhile
    settle: Chore | None = None  # what is left to do for an answer that was delivered

    def keep(self, result: CloudResult) -> None:
        """Take in a result, and let go of it."""
        self.copies = tuple(map(_Copy.of, result.tensors))
        self.size_bytes = result.size_bytes
        self.done_ms = now_ms()
        self.result = result._replace(tensors=())  # last: whoever sees it finds the rest

    def answer(self) -> CloudResult | None:
        """Return the result, if there is one."""
        return self.result and self.result._replace(tensors=tuple(copy.tensor() for copy in self.copies))


class KeptAnswers:
    """Answers by task, for a minute and within bounded memory; any thread may ask.

    A task that failed, or was dropped with its edge, leaves nothing behind: whoever asks again has it computed.
    """

    def __init__(self, kept_s: float = KEPT_S, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._kept_ms, self._max_bytes = s_to_ms(kept_s), max_bytes
        self._lock = threading.Lock()
        self._computing: dict[bytes, _Kept] = {}
        self._done: OrderedDict[bytes, _Kept] = OrderedDict()  # the oldest answer is first
        self._size_bytes = 0

    def submit(self, key: bytes, request: object, asker: Asker) -> None:
        """Deliver a task's answer: the one that is kept, the one that is being computed, or a new one.

        Args:   key: the task's id, whatever connection it comes by. request: what is asked; an id that comes with
                another question is a task of its own.
        Raises: what ``asker.compute`` raises; nothing is delivered then.
        """
        with self._lock:
            if key in self._done:
                self._forget()
            known = self._done.get(key) or self._computing.get(key)
            if known is None or known.request != request:
                known = None
                mine = self._computing[key] = _Kept(request)
            elif known.result is None and known.settle is None:
                known.waiting.append(asker)
                return
        if known is None:
            self._start(key, mine, asker)
        elif answer := known.answer():
            asker.answer(answer)
        else:  # whoever is to settle it may be held up by a link that is gone
            self._settle(known)
            self.submit(key, request, asker)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Keep no answers of these tasks: what was asked may not have been what the edge meant to ask."""
        with self._lock:
            for key in keys:
                self._computing.pop(key, None)
                self._remove(key)

    def _start(self, key: bytes, kept: _Kept, asker: Asker) -> None:
        def done(result: CloudResult | Exception) -> None:
            asker.deliver(result)
            kept.settle = lambda: self._keep(key, kept, result, asker.release)
            result_bytes = result.size_bytes if isinstance(result, CloudResult) else 0
            asker.later(lambda: self._settle(kept), result_bytes)

        try:
            asker.compute(done)
        except Exception as exc:
            for other in self._take_in(key, kept, exc):
                other.answer(exc)
            raise

    def _settle(self, kept: _Kept) -> None:
        """Do what is left to do for an answer, if nobody has yet."""
        with self._lock:
            settle, kept.settle = kept.settle, None
        if settle:
            settle()

    def _keep(self, key: bytes, kept: _Kept, result: CloudResult | Exception, release: Chore) -> None:
        """Keep an answer that is on its way already, and give it to those who asked again meanwhile."""
        waiting = self._take_in(key, kept, result)
        release()
        for other in waiting:
            if answer := kept.answer():
                other.answer(answer)
                continue
            try:
                self.submit(key, kept.request, other)
            except Exception as exc:  # belongs to whoever asked
                other.answer(exc)

    def _take_in(self, key: bytes, kept: _Kept, result: CloudResult | Exception) -> list[Asker]:
        """Keep a result, in memory of its own; return who else waits for it."""
        if isinstance(result, CloudResult):
            try:
                kept.keep(result)  # before the lock: the next task must not wait for it
            except OSError:  # no memory for a copy: it is computed for whoever asks again
                pass
            except Exception as exc:
                internal_error(log, exc, "an answer could not be kept: it is computed for whoever asks again")
        with self._lock:
            is_wanted = self._computing.get(key) is kept
            if is_wanted:
                del self._computing[key]
            if kept.result and is_wanted:
                self._remove(key)
                self._done[key] = kept
                self._size_bytes += kept.size_bytes
                self._forget()
            waiting, kept.waiting = kept.waiting, []
            return waiting

    def _forget(self) -> None:
        oldest_ms = now_ms() - self._kept_ms
        while self._done:
            key, kept = next(iter(self._done.items()))
            if kept.done_ms >= oldest_ms and self._size_bytes <= self._max_bytes and len(self._done) <= MAX_KEPT:
                return
            self._remove(key)

    def _remove(self, key: bytes) -> None:
        kept = self._done.pop(key, None)
        self._size_bytes -= kept.size_bytes if kept else 0
