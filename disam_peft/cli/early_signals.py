"""SIGTERM and Ctrl-C outside of the steps of training: a message and the exit code of a shell, no traceback."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from disam_peft.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def orderly_end() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the verb as ``Stopped``; training puts its own handlers in their place meanwhile.

    Libraries that are being imported do not live through an exception from a signal: then the process ends at once, as
    nothing has been begun.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        owner = os.getpid()

        def receive(number: int, frame: FrameType | None) -> None:
            name = signal.Signals(number).name
            if os.getpid() != owner:  # a child that was forked, to which this does not belong
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            elif _is_importing(frame):
                os.write(2, f"\nstopped by {name} while loading; nothing was begun\n".encode())
                os._exit(128 + number)
            else:
                raise Stopped(f"stopped by {name}; what was finished before stays", number)

        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
