"""Signals that ask this process to end: it stops what it does, saves, cleans up, and ends within a few seconds."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from types import FrameType

from ray_soup.errors import Stopped, explain

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RECORD_S = 2.0
"""Seconds after a signal at which the last words are called if cleaning up takes longer; `ray job stop` kills after 3."""
GRACE_S = 4.0
"""Seconds after a signal at which the process ends even if it has not finished cleaning up."""
SAME_S = 0.2
"""A second Ctrl-C within these seconds is the first one, sent to the process and to its group."""

REINSTALL_S = 0.01
"""Seconds between two installations of the handler in `under_handler`."""

_last_words: list[Callable[[], None]] = []
_delays = 0
_pending = False


@contextmanager
def catching_signals(as_said: Callable[[str], str] = str) -> Iterator[None]:
    """Within this context, the first SIGINT, SIGTERM or SIGHUP raises Stopped in the main thread.

    The process ends GRACE_S seconds later at the latest, and at once with a second Ctrl-C: a thread sees to that, because
    the main thread may be inside a library. Signals that are ignored, as under nohup, stay ignored. `as_said` puts the
    sentence of that thread into the format of stderr.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    caught = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    threading.Thread(target=_watch, args=(reader, frozenset(caught), as_said), daemon=True).start()
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in caught:
        signal.signal(number, _stop)
    hook, sys.unraisablehook = sys.unraisablehook, _raise_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if Stopped.signal is None:  # otherwise the process is about to end, and the thread waits for that
            signal.set_wakeup_fd(wakeup)
            for number in caught:
                signal.signal(number, before[number])
            writer.close()


@contextmanager
def keeping_handler() -> Iterator[None]:
    """Restore this process's handler of SIGTERM at the end: Ray replaces it when it connects."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before not in (signal.SIG_DFL, None) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def under_handler(work: Callable[[], object]) -> None:
    """Call `work` in another thread, and install this process's handler of SIGTERM again and again until it returns.

    When Ray disconnects, it sets the default action behind Python's back, and takes another second to end its processes: a
    SIGTERM would end this process without a word, then and afterwards. Stopped is raised at the end.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if handler in (signal.SIG_DFL, None) or threading.current_thread() is not threading.main_thread():
        work()
        return
    with uninterrupted(), ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        while not wait((done,), REINSTALL_S).done:
            signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGTERM, handler)
        done.result()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Raise Stopped no earlier than at the end of this context, which must be short."""
    global _delays, _pending  # noqa: PLW0603
    _delays += 1
    try:
        yield
    finally:
        _delays -= 1
        if _pending and not _delays:
            _pending = False
            raise Stopped


@contextmanager
def last_words(record: Callable[[], None]) -> Iterator[None]:
    """Call `record` from another thread if a signal comes within this context and cleaning up takes too long."""
    _last_words.append(record)
    try:
        yield
    finally:
        _last_words.remove(record)


def _raise_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Send a signal again whose Stopped was raised where Python drops errors, as in a destructor or while it forks."""
    if isinstance(unraisable.exc_value, Stopped) and Stopped.signal is not None:
        Stopped.handled = False
        threading.Timer(SAME_S / 4, os.kill, (os.getpid(), Stopped.signal)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _stop(number: int, frame: FrameType | None) -> None:
    """Handle a signal in the main thread."""
    global _pending  # noqa: PLW0603
    repeated, Stopped.signal = Stopped.handled, Stopped.signal or number
    Stopped.handled = True
    if repeated:
        return
    if _delays:
        _pending = True
    else:
        raise Stopped


def _watch(reader: socket.socket, caught: frozenset[int], as_said: Callable[[str], str]) -> None:
    """End this process in time after the first signal; `reader` gets a byte for every signal."""
    first = 0.0
    recorded = False
    while True:
        left = None if not first else first + (GRACE_S if recorded else RECORD_S) - time.monotonic()
        reader.settimeout(None if left is None else max(0.01, left))
        try:
            received = reader.recv(1)
        except TimeoutError:
            if recorded:
                _end(as_said)
            _record()
            recorded = True
            continue
        if not received:
            reader.close()
            return
        now = time.monotonic()
        if received[0] not in caught:
            continue
        if not first:
            first, Stopped.signal = now, Stopped.signal or received[0]
        elif received[0] == signal.SIGINT and now - first > SAME_S:
            _record()
            _end(as_said)


def _record() -> None:
    """Call the last words, at most half a second: the disk may be what hangs."""

    def call() -> None:
        for record in reversed(_last_words):
            with suppress(Exception):
                record()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(0.5)


def _end(as_said: Callable[[str], str]) -> None:
    sentence, code = explain(Stopped())
    with suppress(Exception):
        os.write(2, (as_said(f"\nray-soup: {sentence}") + "\n").encode())
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(code)
