"""One progress display for all long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.utils import disp_trim


class Progress:
    """Counts `unit`s towards `total` (None: unknown), with rate and time left.

    On a terminal this is tqdm's bar. Elsewhere one plain line is printed at most every
    `interval` seconds and one at the end, so that logs stay readable.

        with Progress("Capturing", total=2000, unit="samples") as progress:
            progress.update(32)
            progress.note(tokens_per_s=1234)
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        unit: str = "it",
        initial: int = 0,
        interval: float = 15.0,
        stream: TextIO | None = None,
        quiet: bool = False,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.initial = initial, initial
        self.stream = stream or sys.stderr
        self.interval, self.quiet = interval, quiet
        self._notes, self._shown = "", ""
        self._start = self._last = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if not quiet and self.stream.isatty():
            self._bar = tqdm(
                desc=label, total=total, unit=f" {unit}", initial=initial, file=self.stream
            )

    def update(self, n: int = 1) -> None:
        """Count `n` more units as done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif not self.quiet and time.monotonic() - self._last >= self.interval:
            self._line()

    def note(self, **values: object) -> None:
        """Show `values` behind the counts from now on; floats are shortened to 4 digits."""
        shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items()}
        self._notes = " ".join(f"{name}={value}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(disp_trim(self._notes, 120), refresh=False)

    def _line(self) -> None:
        now = time.monotonic()
        rate = (self.done - self.initial) / max(now - self._start, 1e-9)
        of = f"/{self.total}" if self.total is not None else ""
        left = ""
        if self.total is not None and rate > 0:
            left = f", {tqdm.format_interval((self.total - self.done) / rate)} left"
        line = f"{self.label}: {self.done}{of} {self.unit} ({rate:.1f}/s{left}) {self._notes}"
        print(line.rstrip(), file=self.stream, flush=True)
        self._last, self._shown = now, f"{self.done} {self._notes}"

    def close(self) -> None:
        """End the display; off a terminal, print the last line."""
        if self._bar is not None:
            self._bar.close()
        elif not self.quiet and self._shown != f"{self.done} {self._notes}":
            self._line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
