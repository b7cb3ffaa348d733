# SPDX-License-Identifier: Apache-2.0
"""One comparison: every provider in one op, case and dtype, through the gate, the clock and the memory meter."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import gate
import measure
import torch
from cases import KINDS, Inputs, Setting, make_inputs
from providers import Loss, Provider, eager
from record import Row

ATTEMPTS = 3  # at a timing that other programs disturb; the last one stands, with their share in its row
Tick = Callable[[float], None]  # the share of the comparison that was just done


@dataclass(frozen=True)
class How:
    """What of each provider is measured, and for how long."""

    modes: tuple[str, ...] = ("both", "memory")
    kinds: tuple[str, ...] = KINDS
    seconds: float = 5.0  # of each timing
    rounds: int | None = None  # in the place of seconds
    patience: float = 3.0  # seconds of a call beyond which a provider is left out, with that time as its note


class Comparison:
    """All providers in one op, case and dtype; the rows go to `keep`."""

    def __init__(self, setting: Setting, providers: list[Provider], how: How, tick: Tick) -> None:
        torch._dynamo.reset()  # else the limit of recompilations ends in silent eager
        gc.collect()
        self.setting, self.how = setting, how
        self.providers = {p.name: p for p in providers if p.belongs(setting)}
        self.losses: dict[str, Loss] = {}
        self.errors: dict[tuple[str, str], gate.Error] = {}  # by kind and provider
        self.notes: dict[tuple[str, str], str] = {}  # the same, why there is no number
        self.slow: dict[str, str] = {}  # by provider
        for name, provider in self.providers.items():
            why = provider.refusal(setting)
            if why is None:
                self.losses[name] = provider.make(setting)
            else:
                self.notes |= {(kind, name): why for kind in how.kinds}
        parts = len(how.kinds) * (1 + len(set(how.modes) - {"memory"})) + ("memory" in how.modes)
        self.part = lambda share: tick(share / parts)

    def rows(self) -> Iterator[Row]:
        modes = [mode for mode in self.how.modes if mode != "memory"]
        for kind in self.how.kinds:
            setting = replace(self.setting, kind=kind)
            inputs = make_inputs(setting)
            passed = dict(self._gate(setting, inputs))
            turns = measure.rotation(inputs, measure.copies_of(setting))
            for mode in modes:
                yield from self._times(setting, mode, passed, turns)
            del inputs, turns
        if "memory" in self.how.modes:
            yield from self._memory(replace(self.setting, kind=self.how.kinds[0]))

    def _gate(self, setting: Setting, inputs: Inputs) -> Iterator[tuple[str, Loss]]:
        truth = gate.truth_of(setting, inputs)
        # PyTorch's own loss of the dtype sets the tolerance
        tolerated = gate.error_of(eager(setting), setting, truth)
        for name, loss in self.losses.items():
            self.part(1 / len(self.losses))
            if name in self.slow:
                self.notes[setting.kind, name] = self.slow[name]
                continue
            begin = time.perf_counter()
            try:
                error = gate.error_of(loss, setting, truth, self.providers[name].in_place)
            except Exception as failure:
                self.notes[setting.kind, name] = failed(failure)
                continue
            taken = time.perf_counter() - begin
            if taken > self.how.patience and not self.providers[name].compiled:
                self.slow[name] = f"too slow: {taken:.1f} s a call (--patience)"
            self.errors[setting.kind, name] = error
            why = gate.verdict(error, tolerated, setting, truth.nll) or self.slow.get(name)
            if why is None:
                yield name, loss
            else:
                self.notes[setting.kind, name] = why

    def _times(self, setting: Setting, mode: str, passed: dict[str, Loss], turns: Iterator[Inputs]) -> Iterator[Row]:
        least, many = measure.bare(mode, setting, turns)
        prepare = {"bare": least}
        for name, loss in passed.items():
            in_place = self.providers[name].in_place
            own = measure.not_leaves(turns, 2) if in_place else turns
            prepare[name] = measure.steps(mode, measure.small(loss) if in_place else loss, own)
        for _ in range(ATTEMPTS):
            meanwhile = measure.Others()
            seconds = measure.interleaved(
                prepare, device=setting.device, rounds=self.how.rounds, budget=self.how.seconds
            )
            others = meanwhile.share()
            if others is None or others <= measure.DISTURBED:
                break
        self.part(1)
        base = [s * many for s in seconds.pop("bare")]
        yield self._row(setting, "bare", mode, others=others, **timed(base, base, None))
        ours = seconds.get("fused_ppl")
        for name in self.providers:
            if name in seconds:
                yield self._row(setting, name, mode, others=others, **timed(seconds[name], base, ours))
            else:
                yield self._row(setting, name, mode, note=self.notes[setting.kind, name])

    def _memory(self, setting: Setting) -> Iterator[Row]:
        for name, provider in self.providers.items():
            note, peak = self.notes.get((setting.kind, name), ""), None
            if not note:
                try:
                    peak = measure.peak_bytes(provider, setting, torch.get_num_threads())
                except Exception as failure:
                    note = failed(failure)
            self.part(1 / len(self.providers))
            yield self._row(setting, name, "memory", note=note, peak_bytes=peak)

    def _row(self, setting: Setting, name: str, mode: str, **found: Any) -> Row:
        case, provider = setting.case, self.providers.get(name)
        error = self.errors.get((setting.kind, name))
        if error is not None:
            found |= {"value_error": error.value, "gradient_error": error.gradient}
            found |= {"checked_tokens": gate.checked_tokens(setting)}
        return Row(
            op=setting.op,
            case=case.name,
            num_tokens=case.num_tokens,
            num_classes=case.num_classes,
            hidden_size=case.hidden_size,
            softcap=case.softcap,
            dtype=setting.dtype,
            kind=setting.kind,
            objective=setting.objective,
            provider=name,
            ours=provider is not None and provider.ours,
            mode=mode,
            **found,
        )


def timed(seconds: list[float], base: list[float], ours: list[float] | None) -> dict[str, Any]:
    """The numbers of a row: quantiles, and the ratios round by round to the least that must be done and to ours."""
    p20, median, p80 = measure.quantiles(seconds)
    found = {"p20": p20, "median": median, "p80": p80, "rounds": len(seconds)}
    found["over_bare"] = measure.paired_ratio(seconds, base)
    if ours is not None:
        found["over_ours"] = measure.bootstrap_ratio(seconds, ours)
    return found


def failed(failure: Exception) -> str:
    words = str(failure).splitlines()
    return f"failed: {type(failure).__name__}: {words[0] if words else ''}"
