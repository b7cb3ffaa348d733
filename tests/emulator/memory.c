// SPDX-License-Identifier: Apache-2.0
// Checks every access to memory: alignment, bounds to the element, and races.
//
// A race is two accesses of one place, at least one of them a write, that nothing orders. What orders them: the program of
// one thread; bar.sync among the threads of a CTA; bar.warp.sync among the lanes of a warp; and between CTAs an atomic
// that releases, read by one that acquires. Each CTA counts its barriers (its epoch), and knows for every other CTA up to
// which epoch its accesses happen before (a vector clock). Writing the value that is there already is no race.
#include "machine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SEVERAL -2  // threads, or CTAs, have read a place
#define CELL 2      // bytes of global memory that share a cell

typedef struct {
  u64 start, size;
  char name[64];
  u8 *elements;  // 1 for each byte that is part of an element; NULL: all are
  Cell *cells;
  u64 loaded, stored;  // bytes; what neighbouring lanes load from one place counts once
  u64 last_load;
} Region;
static Region regions[256];
static int num_regions;
EXPORT void emu_clear_regions(void) {
  for (int i = 0; i < num_regions; i++) free(regions[i].elements), free(regions[i].cells);
  num_regions = 0;
}
// Memory that a launch may touch. Returns the region's index, or -1 if there are too many.
EXPORT int emu_add_region(u64 start, u64 size, const u8 *elements, const char *name) {
  if (num_regions == 256) return -1;
  Region *region = &regions[num_regions];
  *region = (Region){.start = start, .size = size};
  snprintf(region->name, sizeof region->name, "%s", name);
  if (elements) region->elements = memcpy(malloc(size + 1), elements, size);
  if (emu_settings.check_races && size < 1u << 28) {
    u64 count = size / CELL + 1;
    region->cells = malloc(count * sizeof(Cell));
    for (u64 k = 0; k < count; k++) region->cells[k].write.epoch = region->cells[k].read.epoch = -1;
  }
  return num_regions++;
}
EXPORT void emu_traffic(int i, u64 *loaded, u64 *stored) { *loaded = regions[i].loaded, *stored = regions[i].stored; }

// ---- races
static bool happens_before(const Access *then, const Warp *warp, int thread) {
  const Cta *cta = warp->cta;
  if (then->cta == SEVERAL) return false;
  if (then->cta != cta->id) return !cta->acquired || then->epoch <= cta->acquired[then->cta];
  if (then->epoch < cta->epoch || then->thread == thread) return true;
  return then->thread >= 0 && then->thread / LANES == warp->id && then->warp_syncs < warp->warp_syncs;
}
static void complain(const Warp *warp, const Instruction *in, int lane, const Access *then, const char *what) {
  const Cta *cta = warp->cta;
  fault(warp, in, lane, "race: %s by CTA %d thread %d in epoch %d (now CTA %d, epoch %d)", what, then->cta, then->thread,
        then->epoch, cta->id, cta->epoch);
}
// Notes an access to the place of a cell. `same`: a write of what is there already.
static void note(Cell *cell, const Warp *warp, const Instruction *in, int lane, bool write, bool same) {
  int thread = warp->id * LANES + lane;
  Access now = {warp->cta->id, warp->cta->epoch, warp->warp_syncs, thread};
  if (cell->write.epoch >= 0 && !same && !happens_before(&cell->write, warp, thread))
    complain(warp, in, lane, &cell->write, write ? "write after a write" : "read after a write");
  Access *read = &cell->read;
  if (!write) {
    bool first = read->epoch < 0 || (read->cta == now.cta && read->epoch < now.epoch);
    if (!first && read->cta != now.cta) now.cta = SEVERAL;
    else if (!first && read->thread != thread && (read->thread < 0 || read->thread / LANES != warp->id)) now.thread = SEVERAL;
    *read = now;
    return;
  }
  if (read->epoch >= 0 && !same && !happens_before(read, warp, thread)) {
    // Triton relies on a warp's lanes reading in one instruction what a later one overwrites
    bool lockstep = read->cta == now.cta && read->thread >= 0 && read->thread / LANES == warp->id;
    if (!lockstep) complain(warp, in, lane, read, "write after a read");
  }
  if (same && cell->write.epoch >= 0 && cell->write.cta == now.cta && cell->write.epoch == now.epoch) return;
  cell->write = now;
  read->epoch = -1;
}

// ---- places
static Region *find(u64 address, int bytes) {
  static int last;  // the next access is mostly in the same region
  for (int k = 0; k < num_regions; k++) {
    int i = (last + k) % num_regions;
    if (address >= regions[i].start && address + bytes <= regions[i].start + regions[i].size) return &regions[last = i];
  }
  return NULL;
}
static Region *checked(Warp *warp, const Instruction *in, int lane, u64 address, int bytes, const char *what) {
  if (address % bytes) fault(warp, in, lane, "misaligned %s of %d bytes at %#llx", what, bytes, (unsigned long long)address);
  Region *region = find(address, bytes);
  bool inside = region != NULL;
  for (int k = 0; inside && region->elements && k < bytes; k++) inside = region->elements[address - region->start + k];
  if (inside) return region;
  char near[256] = "";
  for (int i = 0; i < num_regions; i++)
    if (address + 4096 >= regions[i].start && address < regions[i].start + regions[i].size + 4096)
      snprintf(near, sizeof near, ": byte %lld of the %llu of %s", (long long)(address - regions[i].start),
               (unsigned long long)regions[i].size, regions[i].name);
  fault(warp, in, lane, "%s of %d bytes out of bounds at %#llx%s", what, bytes, (unsigned long long)address, near);
}
// Where an access of a lane goes. `stored`: the bytes that it writes, or NULL if it reads.
u8 *global_address(Warp *warp, const Instruction *in, int lane, u64 address, const u8 *stored) {
  int bytes = in->bytes * in->count;
  Region *region = checked(warp, in, lane, address, bytes, stored ? "store" : "load");
  if (stored) region->stored += bytes;
  else if (region->last_load != address) region->loaded += bytes;
  region->last_load = stored ? 0 : address;
  if (region->cells) {
    u64 start = address - region->start;
    for (u64 k = start / CELL; k <= (start + bytes - 1) / CELL; k++) {
      const u8 *there = (u8 *)(region->start + k * CELL);
      bool same = stored && bytes >= CELL && !memcmp(there, stored + (k * CELL - start), CELL);
      note(&region->cells[k], warp, in, lane, stored != NULL, same);
    }
  }
  return (u8 *)address;
}
u8 *shared_address(Warp *warp, const Instruction *in, int lane, u64 address, const u8 *stored) {
  Cta *cta = warp->cta;
  int bytes = in->variant & 16 ? in->bytes : in->bytes * in->count;
  s64 offset = (s64)address - SHARED_BASE;
  if (address % bytes) fault(warp, in, lane, "misaligned access of %d bytes to shared memory", bytes);
  if (offset < 0 || offset + bytes > cta->shared_bytes)
    fault(warp, in, lane, "access of %d bytes out of the bounds of shared memory: byte %lld of %d", bytes, (long long)offset,
          cta->shared_bytes);
  if (cta->shared_cells)
    for (int k = 0; k < bytes; k++)
      note(&cta->shared_cells[offset + k], warp, in, lane, stored != NULL, stored && cta->shared[offset + k] == stored[k]);
  return cta->shared + offset;
}

// ---- atomics order the accesses of CTAs
typedef struct {
  u64 address;
  s32 *epochs;  // by CTA: up to where its accesses are released at this place
} Release;
static Release *releases;
static int num_releases, num_ctas;
void start_clocks(int count) { num_ctas = count; }
void stop_clocks(void) {
  for (int i = 0; i < num_releases; i++) free(releases[i].epochs);
  num_releases = 0;
}
static Release *release_at(u64 address) {
  for (int i = 0; i < num_releases; i++)
    if (releases[i].address == address) return &releases[i];
  releases = realloc(releases, (num_releases + 1) * sizeof *releases);
  releases[num_releases] = (Release){address, malloc(num_ctas * sizeof(s32))};
  for (int i = 0; i < num_ctas; i++) releases[num_releases].epochs[i] = -1;
  return &releases[num_releases++];
}
static void raise_to(s32 *epoch, s32 value) {
  if (value > *epoch) *epoch = value;
}
u8 *atomic_address(Warp *warp, const Instruction *in, int lane, u64 address) {
  Cta *cta = warp->cta;
  checked(warp, in, lane, address, in->bytes, "atomic");
  if (!cta->acquired || !(in->variant & (256 | 512))) return (u8 *)address;
  Release *release = release_at(address);
  for (int i = 0; i < num_ctas; i++) {
    // an acquire holds for the other threads of the CTA from the next barrier on
    if (in->variant & 512) raise_to(&cta->acquired_next[i], release->epochs[i]);
    // a release covers what all threads did before the last barrier, and what had been acquired by then
    if (in->variant & 256) raise_to(&release->epochs[i], i == cta->id ? cta->epoch - 1 : cta->acquired[i]);
  }
  return (u8 *)address;
}
