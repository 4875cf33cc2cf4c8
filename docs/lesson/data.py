"""Make the lesson's data: docs/lesson/data.json.

    python docs/lesson/data.py [--out FILE] [--cache FOLDER] [--jobs 2] [--only NAME …] [--list]

Trains some forty small networks, a few minutes on two cores. What a run returned is kept in the cache under its
arguments, so that a run of this program that was stopped goes on where it was. ``--only`` makes the named runs
(``--list`` shows their names) and writes no data.json.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import formulas
import results
import runs
import torch
from results import COMMAND, LOSSES, SPIRAL_TARGETS, TARGETS

import reparam as rp
from reparam.files import write_text

HERE = Path(__file__).parent
#: The largest data.json that the page has room for.
MOST_BYTES = 1_500_000
NARROW, WIDE = 48, 256
STEPS, CONFIDENCE_STEPS, EDM2_STEPS = 2500, 700, 1000
DIMS = (2, 8, 32, 128, 512)


@functools.cache
def _sources() -> str:
    """Of all code that a run comes from: the programs here, and the library."""
    here = [HERE / "runs.py", HERE / "formulas.py"]
    files = [*here, *sorted(Path(rp.__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class Job(NamedTuple):
    """A run: the function of :mod:`runs`, and its arguments, plain data."""

    function: str
    arguments: dict[str, Any]

    @property
    def file(self) -> str:
        """What its result is kept under: another name as soon as anything about it is another."""
        text = json.dumps([self.function, self.arguments, _sources()])
        return hashlib.sha256(text.encode()).hexdigest()[:16] + ".json"


def jobs() -> dict[str, Job]:
    """All runs, by name."""
    found = {"digits-floor": Job("digits_floor", {}), "spiral-truth": Job("spiral_truth", {})}
    for target in TARGETS:
        found[f"wide-{target}"] = Job(
            "digits_run",
            {"hidden": WIDE, "target": target, "loss": "velocity", "steps": STEPS, "peek": True},
        )
    for target in TARGETS:
        for name, loss in LOSSES.items():
            arguments = {"hidden": NARROW, "target": target, "loss": loss, "steps": STEPS}
            found[f"narrow-{target}-{name}"] = Job("digits_run", arguments)
    for dim in DIMS:
        found[f"spiral-{dim}-ideal"] = Job("spiral_ideal", {"dim": dim})
        for target in SPIRAL_TARGETS:
            found[f"spiral-{dim}-{target}"] = Job("spiral_run", {"dim": dim, "target": target, "steps": STEPS})
    found["confidence"] = Job("confidence_run", {"steps": CONFIDENCE_STEPS})
    found["confidence-longer"] = Job("confidence_run", {"steps": STEPS})
    found["edm2"] = Job("edm2_run", {"steps": EDM2_STEPS})
    return found


def _done(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    return runs.RUNS[job.function](**job.arguments)


def made(wanted: Mapping[str, Job], cache: Path, processes: int) -> dict[str, dict[str, Any]]:
    """What every wanted run returned: from the cache, or made now and kept there."""
    cache.mkdir(parents=True, exist_ok=True)
    kept = {name: cache / job.file for name, job in wanted.items()}
    missing = [name for name, file in kept.items() if not file.exists()]
    print(f"{len(kept) - len(missing)} of {len(kept)} runs are in {cache}; {len(missing)} to make", flush=True)
    begun = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_done, wanted[name]): name for name in missing}
        for count, future in enumerate(as_completed(futures), 1):
            name = futures[future]
            write_text(kept[name], json.dumps(future.result()))
            print(f"{count:3}/{len(missing)}  {name:24} {time.perf_counter() - begun:6.0f} s", flush=True)
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in kept.items()}


def assembled(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """data.json, but for when and where it was made."""
    u = torch.tensor(found["edm2"]["u"], dtype=torch.float64)
    return {
        "digits": formulas.scans(),
        "noise": formulas.noise(),
        "schedules": formulas.schedules(),
        "lambda": formulas.rounded(formulas.LAMBDA),
        "weightings": formulas.weightings(u),
        "dynamics": {"digits": _digits(found), "spiral": _spiral(found)},
        "sampling": _sampling(found),
        "confidence": {
            "command": _command("confidence", "confidence-longer"),
            "note": results.CONFIDENCE_NOTE,
            **found["confidence"],
            "longer": {k: v for k, v in found["confidence-longer"].items() if k != "examples"},
        },
        "results": results.table(found),
    }


def _command(*names: str) -> str:
    return f"{COMMAND} --only {' '.join(names)}"


def _digits(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    def entry(name: str) -> dict[str, Any]:
        return {k: v for k, v in found[name].items() if k != "peek"}

    return {
        "command": _command(*(f"wide-{t}" for t in TARGETS)),
        "levels": runs.LEVELS,
        "width": WIDE,
        "loss_space": "velocity",
        "targets": {t: entry(f"wide-{t}") for t in TARGETS},
        "narrow": {
            "command": _command(*(f"narrow-{t}-{loss}" for t in TARGETS for loss in LOSSES)),
            "width": NARROW,
            "losses": list(LOSSES),
            "targets": {t: {loss: entry(f"narrow-{t}-{loss}") for loss in LOSSES} for t in TARGETS},
        },
        "floor": found["digits-floor"],
        "note": results.DIGITS_NOTE,
    }


def _spiral(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    ideal = {str(d): found[f"spiral-{d}-ideal"]["error_by_level"] for d in DIMS}
    return {
        "command": _command(*(f"spiral-{d}-{t}" for d in DIMS for t in SPIRAL_TARGETS)),
        "dims": list(DIMS),
        "width": 256,
        "level": runs.SPIRAL_LEVEL,
        "levels": runs.LEVELS,
        **found["spiral-truth"],
        "ideal_by_dim": ideal,
        "runs": {str(d): {t: found[f"spiral-{d}-{t}"] for t in SPIRAL_TARGETS} for d in DIMS},
    }


def _sampling(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    peeks = {t: found[f"wide-{t}"]["peek"] for t in TARGETS}
    return {
        "command": _command(*(f"wide-{t}" for t in TARGETS)),
        "t": peeks["x0"]["t"],
        "runs": {t: {k: v for k, v in peek.items() if k != "t"} for t, peek in peeks.items()},
        "note": results.SAMPLING_NOTE,
    }


def _hardware() -> str:
    return f"CPU, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "data.json")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "_build" / "lesson-data")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    every = jobs()
    if args.list:
        print("\n".join(every))
        return
    if unknown := set(args.only or ()) - set(every):
        parser.error(f"no run is called {', '.join(sorted(unknown))}; --list shows the names.")
    found = made({name: every[name] for name in args.only or every}, args.cache, args.jobs)
    if args.only:
        print(json.dumps({name: _short(run) for name, run in found.items()}, indent=1))
        return
    seconds = round(sum(run.get("cpu_seconds", 0) for run in found.values()))
    head = {
        "command": COMMAND,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "hardware": _hardware(),
        "version": rp.__version__,
        "seconds": seconds,
        "seconds_are": "processor time of training",
    }
    text = json.dumps({"made": head} | assembled(found), ensure_ascii=False, separators=(",", ":")) + "\n"
    if len(text.encode()) > MOST_BYTES:
        raise SystemExit(f"data.json would have {len(text.encode()):,} bytes; the page has room for {MOST_BYTES:,}.")
    write_text(args.out, text)
    print(f"{args.out}: {len(text.encode()):,} bytes; {seconds} s of training in all")


def _short(run: dict[str, Any]) -> dict[str, Any]:
    """The scores of a run, for a reader."""
    return {k: v for k, v in run.items() if k not in ("samples", "peek", "points", "examples", "truth", "u")}


if __name__ == "__main__":
    main()
