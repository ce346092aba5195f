"""SIGTERM and Ctrl-C ask for an orderly end; a second one ends the work at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from disam_peft.common.processes import is_main
from disam_peft.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A terminal sends Ctrl-C to every process, and a launcher passes it on besides: that is one wish, not two.
SAME_WISH_SECONDS = 1.0


class StopSignals:
    """``with StopSignals() as stop:`` notes a signal in ``stop.received`` instead of ending the process.

    A later signal raises Stopped where the program stands; whoever changes weights restores them on the way out, and
    nobody saves. Off the main thread, where Python cannot handle signals, and for a signal that this process was
    started to ignore, nothing changes. On exit the handlers are as before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
            if is_main():
                # not through sys.stderr: the signal may have come in the middle of a write to it
                os.write(2, f"\n{self.received.name}: this step, a checkpoint, then the end; again: at once\n".encode())
        elif time.monotonic() - self._since > SAME_WISH_SECONDS:
            raise Stopped(f"stopped at once by {signal.Signals(number).name}; nothing was saved", number)
