# SPDX-License-Identifier: Apache-2.0
"""The state file of an evaluation: what is done, so that a killed run goes on where it was.

It is written beside itself and renamed, so that it is whole at every moment. A checksum tells a damaged file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fused_ppl.evaluation.records import Blocks, EvaluationError, Group, Score

SAVE_EVERY, SHARE = 2.0, 10  # seconds; and at least so many times what a save takes
FORMAT = "fused_ppl evaluation 1"


@dataclass
class Progress:
    """What is done of an evaluation."""

    documents: list[str] = field(default_factory=list)  # hashes of the finished ones
    groups: dict[str, Group] = field(default_factory=dict)  # of them, by domain
    replaced: int = 0
    warnings: list[str] = field(default_factory=list)
    at_work: str = ""  # hash of the document at work
    batches: int = 0  # of it
    nll: list[float] = field(default_factory=list)  # of its scored tokens, in their order
    handed_over: int = 0  # tokens, to `per_token`


class StateFile:
    """Keeps `Progress` for one run, which `identity` describes."""

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.next_save = 0.0  # a time that a save waits for, if it may

    def load(self) -> Progress:
        """What an earlier run of the same identity left, or nothing.

        Raises:
            EvaluationError: the file is damaged, or of another run. It is left as it is.
        """
        if self.path is None or not self.path.exists():
            return Progress()
        way_out = f"Delete {self.path}, or name another file, to start from the beginning."
        try:
            whole = json.loads(self.path.read_text())
            body, checksum = whole["body"], whole["sha256"]
        except (ValueError, KeyError, TypeError):
            raise EvaluationError(f"{self.path} is not a whole state file of an evaluation. {way_out}") from None
        if checksum != _checksum(body) or body.get("format") != FORMAT:
            raise EvaluationError(f"{self.path} is damaged, or was written by another version. {way_out}")
        if body["identity"] != self.identity:
            changed = [k for k, v in self.identity.items() if body["identity"].get(k) != v]
            was = ", ".join(f"{k} was {body['identity'].get(k)!r} and is {self.identity[k]!r}" for k in changed)
            raise EvaluationError(f"{self.path} is the state of another evaluation: {was}. {way_out}")
        found = body["progress"]
        groups = {k: Group(Score(**g["score"]), Blocks(**g["blocks"])) for k, g in found.pop("groups").items()}
        return Progress(groups=groups, **found)

    def save(self, progress: Progress, *, wait: bool = False) -> None:
        """Write it down. With `wait` only if the last time is long enough ago: a large state takes long to write."""
        begin = time.monotonic()
        if self.path is None or (wait and begin < self.next_save):
            return
        body = {"format": FORMAT, "identity": self.identity, "progress": dataclasses.asdict(progress)}
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w") as file:
            json.dump({"sha256": _checksum(body), "body": body}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
        end = time.monotonic()
        self.next_save = end + max(SAVE_EVERY, SHARE * (end - begin))


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
