"""What a study shows while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from .estimate import in_words
from .leaderboard import number, of_calibration
from .pool import Watch


class Console(Watch):
    """A progress bar over all runs, weighted by what each is expected to cost.

    Attributes:
        rows: of the runs finished so far. failures: of those that ended in an error.
    """

    def __init__(self, seconds: dict[str, float], steps: dict[str, int], say: Callable[[str], None]) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        self._seconds, self._steps, self._say = seconds, steps, say
        self._done = dict.fromkeys(steps, 0)
        self._first: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> Console:
        self._began = time.perf_counter()
        self._bar: Any = tqdm(
            total=sum(self._seconds.values()),
            bar_format="{percentage:3.0f}%|{bar:24}| {elapsed} gone, {remaining} left{postfix}",
            file=sys.stderr,
            mininterval=0.2,
            maxinterval=1,
            dynamic_ncols=True,
            disable=not (self._seconds and sys.stderr.isatty()),  # in a log, a line a run says it
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def progress(self, run: str, step: int) -> None:
        now = time.perf_counter()
        self._first.setdefault(run, (now, step))
        self._advance(run, step)
        going = {
            name: (self._done[name] - start) / (now - since)
            for name, (since, start) in self._first.items()
            if self._done[name] < self._steps[name] and now - since > 0.5
        }
        if going:
            where = ", ".join(f"{name} {self._done[name]}/{self._steps[name]}" for name in going)
            self._bar.set_postfix_str(f"{sum(going.values()):.0f} it/s, {where}", refresh=False)

    def finished(self, row: dict[str, Any]) -> None:
        run = row["run"]
        self.rows[run] = row
        self._advance(run, self._steps[run])
        self._first.pop(run, None)
        told = [f"{name} {number(m['value'])}" for name, m in row["metrics"].items()]
        scores = ", ".join([*told, *of_calibration(row)])
        what = scores if row["status"] == "finished" else f"{row['status']}: {row.get('reason', '')}"
        self._line(f"{run}: {what} ({row['wall_s']:.0f} s)")

    def failed(self, run: str, message: str) -> None:
        self.failures[run] = message
        self._advance(run, self._steps[run])
        self._first.pop(run, None)
        self._line(f"{run}: failed: {message}")

    def _advance(self, run: str, step: int) -> None:
        share = (step - self._done[run]) / self._steps[run]
        self._done[run] = step
        self._bar.update(share * self._seconds[run])

    def _line(self, text: str) -> None:
        ended = len(self.rows) + len(self.failures)
        share = sum(self._seconds[run] * self._done[run] / self._steps[run] for run in self._steps)
        gone = time.perf_counter() - self._began
        left = gone / share * (sum(self._seconds.values()) - share) if share else 0
        remaining = f", about {in_words(left)} left" if ended < len(self._steps) else ""
        with tqdm.external_write_mode(file=sys.stderr):
            self._say(f"  [{ended}/{len(self._steps)}{remaining}] {text}")
