"""Ctrl-C and SIGTERM always reach the top, wherever they strike."""

import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from merge_adapter.interrupts import interruptible

BOTH = pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
LONG = 60.0
"""Seconds in which an interrupt surely comes: a failing test takes as long."""


@BOTH
def test_it_ends_what_is_under_way(how: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), how)
        time.sleep(LONG)


@BOTH
def test_an_import_is_finished_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    """Extension modules that an exception leaves half made swallow it, or abort the process."""
    name = f"interrupted_by_{how.name.lower()}"
    (tmp_path / f"{name}.py").write_text(
        f"import os\nos.kill(os.getpid(), {int(how)})\n"
        "try:\n    sum(range(10_000))\nexcept BaseException:\n    pass\nWHOLE = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt), interruptible():
        import_module(name)
        time.sleep(LONG)
    assert sys.modules[name].WHOLE


@BOTH
def test_it_is_not_lost_in_a_destructor(how: signal.Signals) -> None:
    """What a `__del__` raises, Python shows and drops."""

    class Owner:
        def __del__(self) -> None:
            os.kill(os.getpid(), how)
            sum(range(10_000))

    with pytest.raises(KeyboardInterrupt), interruptible():
        owner = Owner()
        del owner
        time.sleep(LONG)


@BOTH
def test_an_error_that_it_was_turned_into_is_no_error(how: signal.Signals) -> None:
    """safetensors, interrupted in the middle of a tensor, raises ValueError: a bug of ours, it seemed."""
    with pytest.raises(KeyboardInterrupt) as ended, interruptible():
        try:
            os.kill(os.getpid(), how)
            time.sleep(LONG)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type") from None
    assert isinstance(ended.value.__cause__, ValueError)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="of its own"), interruptible():
        raise ValueError("of its own")


def test_afterwards_signals_mean_what_they_did() -> None:
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(name) for name in names], sys.unraisablehook
    with interruptible():
        assert signal.getsignal(signal.SIGTERM) is not before[0][1]
    assert ([signal.getsignal(name) for name in names], sys.unraisablehook) == before
