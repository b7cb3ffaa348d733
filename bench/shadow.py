# SPDX-License-Identifier: Apache-2.0
"""A shadow of the memory that one launch may touch, for sanitize.py: who wrote and who read each byte, and when.

A launch may touch the elements of the tensors that it was given, and nothing between or around them. Two accesses to a
byte, one of them a write, need an order: the program's own, with a barrier between them, because the threads of a
program do not wait for each other; or, between programs, a release and an acquire on the same atomic. Orders are kept
as vector clocks: `clock[p, q]` is the last epoch of program q that p has seen, and a barrier ends an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

NOBODY = -1


class Violation(Exception):
    """An access that a kernel must not make."""


@dataclass
class Region:
    """The shadow of one storage; arrays of one entry a byte."""

    start: int
    names: list[str]
    allowed: np.ndarray
    writer: np.ndarray = field(init=False)
    reader: np.ndarray = field(init=False)
    written: np.ndarray = field(init=False)  # the writer's epoch
    read: np.ndarray = field(init=False)
    shared: np.ndarray = field(init=False)  # read by several programs
    atomic: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        size = len(self.allowed)
        self.writer, self.reader = (np.full(size, NOBODY, np.int32) for _ in range(2))
        self.written, self.read = (np.zeros(size, np.int32) for _ in range(2))
        self.shared, self.atomic = (np.zeros(size, bool) for _ in range(2))


def element_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of the storage that the elements of a view take."""
    offsets = np.array([tensor.storage_offset()], np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = np.arange(size if stride else min(size, 1), dtype=np.int64) * stride
        offsets = (offsets[:, None] + steps).reshape(-1)
    return (offsets[:, None] * tensor.itemsize + np.arange(tensor.itemsize)).reshape(-1)


class Shadow:
    """What one launch of `grid` programs does to the tensors that it was given."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor], grid: tuple[int, int, int]) -> None:
        self.kernel, self.grid = kernel, grid
        self.accesses = 0
        self.program = 0
        count = grid[0] * grid[1] * grid[2]
        self.clock = np.zeros((count, count), np.int32)
        self.epoch = np.ones(count, np.int32)
        self.published = np.zeros(count, np.int32)  # the last epoch that a barrier ended
        self.released: dict[int, np.ndarray] = {}  # what an acquire at an address sees
        regions: dict[int, Region] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            if tensor.numel() == 0:
                continue
            found = regions.setdefault(
                storage.data_ptr(), Region(storage.data_ptr(), [], np.zeros(storage.nbytes(), bool))
            )
            found.names.append(name)
            found.allowed[element_bytes(tensor)] = True
        self.regions = [regions[start] for start in sorted(regions)]
        self.starts = np.array([r.start for r in self.regions], np.int64)

    # --- order ---------------------------------------------------------------------------------------------------

    def barrier(self) -> None:
        p = self.program
        self.published[p] = self.epoch[p]
        self.epoch[p] += 1

    def synchronize(self, addresses: np.ndarray, acquire: bool, release: bool) -> None:
        """A read-modify-write: it sees what was released there, and passes that on with what its program released."""
        p = self.program
        for address in addresses.tolist():
            seen = self.released.setdefault(address, np.zeros_like(self.epoch))
            if acquire:
                self.clock[p] = np.maximum(self.clock[p], seen)
            if release:
                mine = self.clock[p].copy()
                mine[p] = self.published[p]  # the thread that releases has waited for the others at a barrier
                self.released[address] = np.maximum(seen, mine)

    # --- accesses ------------------------------------------------------------------------------------------------

    def load(self, addresses: np.ndarray, itemsize: int) -> None:
        for region, at in self._bytes("load", addresses, itemsize):
            self._follows_writes(region, at, "loads")
            p, unseen = self.program, self._unseen(region.reader[at], region.read[at])
            region.shared[at] |= unseen
            region.reader[at], region.read[at] = p, self.epoch[p]

    def store(self, addresses: np.ndarray, itemsize: int) -> None:
        if len(np.unique(addresses)) != len(addresses):
            raise self._violation("store", addresses[0], "two lanes of one store write the same element")
        for region, at in self._bytes("store", addresses, itemsize):
            self._follows_writes(region, at, "stores")
            unseen = self._unseen(region.reader[at], region.read[at])
            self._reject(region, at, region.shared[at] | unseen, "stores", "which another program loads")
            region.writer[at], region.written[at] = self.program, self.epoch[self.program]

    def atomic(self, addresses: np.ndarray, itemsize: int, acquire: bool, release: bool) -> None:
        for region, at in self._bytes("atomic", addresses, itemsize):
            unseen = self._unseen(region.writer[at], region.written[at])
            unseen |= self._unseen(region.reader[at], region.read[at])
            self._reject(region, at, unseen, "changes atomically", "which another program accesses otherwise")
            region.atomic[at] = True
        self.synchronize(addresses, acquire, release)

    def _unseen(self, programs: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Accesses of other programs that this one is not ordered after."""
        others = (programs != NOBODY) & (programs != self.program)
        return others & (self.clock[self.program][programs] < epochs)

    def _follows_writes(self, region: Region, at: np.ndarray, verb: str) -> None:
        unseen = self._unseen(region.writer[at], region.written[at])
        self._reject(
            region, at, unseen | region.atomic[at], verb, "which another program writes: nothing orders the two"
        )
        own = (region.writer[at] == self.program) & (region.written[at] == self.epoch[self.program])
        self._reject(region, at, own, verb, "which this program has stored, with no barrier in between")

    def _reject(self, region: Region, at: np.ndarray, bad: np.ndarray, verb: str, why: str) -> None:
        if bad.any():
            raise self._violation(verb, region.start + int(at[bad][0]), why)

    def _bytes(self, verb: str, addresses: np.ndarray, itemsize: int) -> list[tuple[Region, np.ndarray]]:
        """The bytes of an access, by region; all of them within the elements of a tensor."""
        self.accesses += len(addresses)
        of = np.searchsorted(self.starts, addresses, side="right") - 1
        found = []
        for index in np.unique(of):
            mine = addresses[of == index]
            if index < 0:
                raise self._violation(verb, mine[0], "outside of every tensor of the launch")
            region = self.regions[index]
            at = ((mine - region.start)[:, None] + np.arange(itemsize)).reshape(-1)
            inside = at < len(region.allowed)
            if not inside.all() or not region.allowed[at].all():
                first = at[~inside][0] if not inside.all() else at[~region.allowed[at]][0]
                raise self._violation(verb, region.start + int(first), "outside of the elements of every tensor")
            found.append((region, at))
        return found

    def _violation(self, verb: str, address: int, why: str) -> Violation:
        index = int(np.searchsorted(self.starts, address, side="right")) - 1
        region = self.regions[max(index, 0)]
        program = tuple(int(i) for i in np.unravel_index(self.program, self.grid))
        where = f"byte {int(address) - region.start} of the storage of {' and '.join(region.names)}"
        return Violation(f"{self.kernel}, program {program}: {verb} {where}, {why}")
