# SPDX-License-Identifier: Apache-2.0
"""Runs steps in a child process, one at a time, so that no step can take the results of another with it.

The parent sends the key of a step, and the child answers with one line of JSON. A child whose device no longer
computes (a sticky CUDA error) says so and ends; one that crashes or hangs is killed. The next step gets a new child.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gpu_device import Card, Skipped, StandIn

READY = "ready"


@dataclass(frozen=True)
class Found:
    """What a step ended with: numbers to report (`rows`), or words."""

    detail: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """Something to check or to time. `seconds` is an estimate for an H100, kernels compiled anew."""

    key: str
    group: str
    seconds: float
    run: Callable[[], Found]
    ours: bool = True  # a failure of somebody else's is told, and does not fail the whole


@dataclass(frozen=True)
class Result:
    status: str  # "ok", "failed", "skipped"
    detail: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False  # the process that ran it takes no other step


# --- the child ---------------------------------------------------------------------------------------------------


def serve(steps: Mapping[str, Step], card: Card | StandIn) -> None:
    """Answers on standard output for every key on standard input; all else that is printed goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    print(READY, file=answers, flush=True)
    for line in sys.stdin:
        result = run_step(steps[line.strip()], card)
        print(json.dumps(asdict(result)), file=answers, flush=True)
        if result.ended:
            os._exit(1)  # a broken context also breaks the ordinary way out


def run_step(step: Step, card: Card | StandIn) -> Result:
    start, status, rows = time.perf_counter(), "ok", []
    try:
        found = step.run()
        card.synchronize()
        detail, rows = found.detail, found.rows
    except Skipped as why:
        status, detail = "skipped", str(why)
    except Exception as error:
        status, detail = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"--- {step.key}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    healthy = card.is_healthy()
    if healthy:
        try:
            gc.collect()
            card.release()
        except Exception as error:
            healthy, detail = False, f"{detail}; then {type(error).__name__}: {error}".splitlines()[0]
    if not healthy:
        status, detail = "failed", f"{detail or 'no error was raised'}; the device computes no more in this process"
    return Result(status, detail, time.perf_counter() - start, rows, ended=not healthy)


# --- the parent --------------------------------------------------------------------------------------------------


class Worker:
    """A child process, started when the first step comes, and again after one that has ended."""

    def __init__(self, command: list[str], env: Mapping[str, str] | None = None, start_seconds: float = 120.0) -> None:
        self.command, self.env, self.start_seconds = command, env, start_seconds
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str | None] = queue.Queue()

    def run(self, key: str, patience: float) -> Result:
        """The result of a step, which has `patience` seconds, and a new child those that its start takes as well."""
        start = time.perf_counter()
        try:
            if self.process is None:
                self._start()
            assert self.process is not None and self.process.stdin is not None
            self.process.stdin.write(key + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=patience)
        except (queue.Empty, BrokenPipeError, OSError) as error:
            hung = isinstance(error, queue.Empty)
            return self._failed(f"no answer in {patience:.0f} s" if hung else f"the process ended: {error}", start)
        if line is None:
            return self._failed(f"the process ended with code {self.process.wait()}", start)
        result = Result(**json.loads(line))
        if result.ended:
            self.stop()
        return result

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _failed(self, why: str, start: float) -> Result:
        self.stop()
        return Result("failed", why, time.perf_counter() - start, ended=True)

    def _start(self) -> None:
        self.lines = lines = queue.Queue()
        self.process = process = subprocess.Popen(
            self.command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line.strip())
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        if lines.get(timeout=self.start_seconds) != READY:
            raise BrokenPipeError("it never became ready")
