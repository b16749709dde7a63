"""Ctrl-C and SIGTERM end a run as one KeyboardInterrupt, raised where it can travel to the top.

It cannot from everywhere. In the middle of an import it meets extension modules that drop it, turn it into another
error, or abort the process; and what a `__del__` raises, Python drops. From there it is raised again a moment later.
Extension modules turn it into other errors elsewhere, too: an error that ends a run after an interrupt is taken for it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_MOMENT = 0.02
"""Seconds."""
_IMPORTING = "<frozen importlib._bootstrap>"
"""The file of Python's own frames under whatever runs in an import."""


@contextmanager
def interruptible() -> Iterator[None]:
    """While the context lasts, in the main thread; afterwards signals mean again what they did before."""
    hook = sys.unraisablehook
    raised = False

    def interrupt(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 -- the form of a handler
        nonlocal raised
        if _is_importing(frame):
            _again_soon()
        else:
            raised = True
            raise KeyboardInterrupt

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _again_soon()
        else:
            hook(unraisable)

    names = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    handlers = {name: signal.signal(name, interrupt) for name in names}
    sys.unraisablehook = dropped
    try:
        yield
    except Exception as error:
        if raised:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for name, handler in handlers.items():
            signal.signal(name, handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False


def _again_soon() -> None:
    signal.setitimer(signal.ITIMER_REAL, _MOMENT)
