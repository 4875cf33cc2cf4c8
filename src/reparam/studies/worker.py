"""A process that does runs: one JSON command a line on standard input, events on standard output.

A process of its own, rather than a fork, so that a study may be started from any script or
notebook, and so that a run that dies takes nothing with it. It ends, keeping its state, on
SIGTERM, and when whoever started it is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

from ..errors import ReparamError

_stop = threading.Event()
_commands: SimpleQueue[str | None] = SimpleQueue()


def _end(number: int = 0, frame: FrameType | None = None) -> None:
    _stop.set()
    _commands.put(None)  # wakes the main thread where it waits for work


def _read_commands() -> None:
    for line in sys.stdin:
        _commands.put(line)
    _end()  # whoever started this process is gone


def main() -> None:
    """Serve until standard input ends."""
    # What a user's network prints must not be taken for an event.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_read_commands, daemon=True).start()

    def tell(event: str, **what: Any) -> None:
        try:
            events.write(json.dumps({"event": event, **what}) + "\n")
        except BrokenPipeError:
            _stop.set()

    while not _stop.is_set():
        line = _commands.get()
        if line is None:
            break
        _serve(json.loads(line), tell)


def _serve(command: dict[str, Any], tell: Any) -> None:
    import torch

    from ..training.memory import keep_freed_memory
    from .recipe import from_dict
    from .run import execute

    keep_freed_memory()
    torch.set_num_threads(command["threads"])
    run = command["run"]
    try:
        row = execute(
            run,
            from_dict(command["config"]),
            Path(command["folder"]),
            device=command["device"],
            digest=command["digest"],
            progress=lambda step: tell("progress", run=run, step=step),
            stop=_stop.is_set,
            save_every=command["save_every"],
        )
        tell("done" if row else "stopped", run=run, row=row)
    except ReparamError as e:
        tell("failed", run=run, message=str(e))
    except Exception as e:
        tell("failed", run=run, message=f"{type(e).__name__}: {e}", traceback=traceback.format_exc())


if __name__ == "__main__":
    main()
