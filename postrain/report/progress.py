"""The progress of a run: one live line on a terminal, a plain line every 15 seconds in a file."""

import sys
import time
from collections.abc import Mapping

CLEAR = "\r\x1b[K"  # to the start of the line, erase it


class ProgressLine:
    """``step 120/600  loss 1.2345  1,034 tokens/s  MFU 41.2%  3m12s left``.

    The time left is estimated from the steps after the first update, which compiles.
    """

    def __init__(self, total_steps: int, *, stream=None, plain_every: float = 15.0, clock=time.monotonic):
        """``plain_every``: seconds between lines where ``stream`` (default: stdout) is not a terminal."""
        self._total, self._stream, self._clock = total_steps, stream or sys.stdout, clock
        self._plain_every, self._live = plain_every, self._stream.isatty()
        self._first: tuple[int, float] | None = None
        self._printed_at, self._line = float("-inf"), ""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows ``train/loss``, ``perf/tokens_per_second``, ``perf/mfu`` as far as they are in ``metrics``."""
        now = self._clock()
        if self._first is None:
            self._first = step, now
        self._line = self._format_line(step, metrics, now)
        if self._live:
            self._stream.write(CLEAR + self._line)
        elif now - self._printed_at >= self._plain_every or step >= self._total:
            self._printed_at = now
            self._stream.write(self._line + "\n")
        self._stream.flush()

    def _format_line(self, step: int, metrics: Mapping[str, float], now: float) -> str:
        parts = [f"step {step:>{len(str(self._total))}}/{self._total}"]
        if "train/loss" in metrics:
            parts.append(f"loss {float(metrics['train/loss']):.4f}")
        if "perf/tokens_per_second" in metrics:
            parts.append(f"{float(metrics['perf/tokens_per_second']):,.0f} tokens/s")
        if "perf/mfu" in metrics:
            parts.append(f"MFU {float(metrics['perf/mfu']):.1%}")
        first_step, first_time = self._first
        if step > first_step:
            left = (now - first_time) / (step - first_step) * (self._total - step)
            parts.append(f"{format_seconds(left)} left")
        return "  ".join(parts)

    def print(self, text: str) -> None:
        """A line of its own above the live one."""
        if self._live and self._line:
            self._stream.write(f"{CLEAR}{text}\n{self._line}")
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the live line, which stays on the screen."""
        if self._live and self._line:
            self._stream.write("\n")
            self._stream.flush()
        self._line = ""

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()


def format_seconds(seconds: float) -> str:
    """``42s``, ``3m12s``, ``5h04m``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
