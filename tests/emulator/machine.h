// SPDX-License-Identifier: Apache-2.0
// The emulated GPU: what a program, a warp and a CTA are, and what the settings mean.
//
// A warp runs its 32 lanes in lockstep. The registers of a warp are one block of bytes: a register of 64 bits takes
// 32 * 8 bytes, every narrower one 32 * 4, and a predicate is one word with a bit for each lane. An instruction names its
// registers by their offsets in that block.
#pragma once
#include <stdbool.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;
typedef double f64;

#define EXPORT __attribute__((visibility("default")))
#define LANES 32
#define ALL 0xffffffffu
#define SHARED_BASE 1024  // the address of a CTA's shared memory; 0 would hide a null pointer

typedef struct Warp Warp;
typedef struct Cta Cta;
typedef struct Instruction Instruction;
typedef void Run(Warp *warp, const Instruction *in, u32 lanes);

struct Instruction {
  s32 op;                // row of the table in instructions.h
  s32 guard, negated;    // the predicate that switches lanes off, or -1
  s32 variant;           // what its function needs to know
  s32 d[8], s[10];       // registers of destinations and sources, or -1
  s64 immediate;         // target of a branch, or what is added to an address
  s32 bytes, count;      // of a memory access: bytes of an element, elements of a lane
  s32 poison;            // lanes that are off get NaN, because nothing else writes the destination
  s32 line;              // in the PTX
};

typedef struct {
  s32 offset, bytes;
  u64 value;
} Constant;

typedef struct {
  char name[256];
  Instruction *code;
  s32 length;
  Constant *constants;
  s32 num_constants;
  s32 register_bytes;
  s32 param_offset[128], param_bytes[128], num_params, params_size;
  s32 special[10];  // registers of SPECIAL in ptx.py, or -1
  s32 required_threads;
  s32 registers, max_shared;  // of a thread, from the cubin; what cuFuncSetAttribute has allowed
  u64 *hits;                  // how often each instruction ran
} Program;

// One access to memory, for the search for races.
typedef struct {
  s32 cta, epoch, warp_syncs;  // epoch: barriers of the CTA before it; -1: there was none
  s32 thread;
} Access;

typedef struct {
  Access write, read;
} Cell;  // of one byte of shared memory, or two bytes of global memory

struct Warp {
  u8 *registers;
  Cta *cta;
  int id;
  u32 alive;
  int warp_syncs;                          // bar.warp.sync passed
  enum { READY, AT_BARRIER, DONE } state;
  int groups, pc[LANES];                   // lanes at different places of the program
  u32 members[LANES];
};

struct Cta {
  int id, x, y, z, epoch;
  int num_warps, running, at_barrier;
  Warp *warps;
  u8 *shared;
  int shared_bytes;
  Cell *shared_cells;
  // by CTA: the last epoch of it that happens before what this CTA does now, and after its next barrier
  s32 *acquired, *acquired_next;
};

// Set from Python; device.py has the same fields.
typedef struct {
  s32 capability, sms;        // 90 and 132: an H100
  s32 resident;               // CTAs that run at the same time
  s32 quantum;                // most instructions of a warp before another one's turn; 0: until it waits
  s32 shuffle;                // CTAs start in random order
  s32 ulps_low, ulps_high;    // error of ex2, lg2, rsqrt, rcp, sqrt, tanh and div.full
  s32 check_races;
  u64 seed;
  s64 max_instructions;
} Settings;

typedef struct {
  u64 launches, ctas, warp_instructions, lane_instructions, barriers, shuffles, atomics, divergences;
} Counters;

extern Settings emu_settings;
extern Counters emu_counters;
extern const u8 *launch_params;

_Noreturn void fault(const Warp *warp, const Instruction *in, int lane, const char *format, ...);
u64 random_bits(void);

// memory.c
u8 *global_address(Warp *warp, const Instruction *in, int lane, u64 address, const u8 *stored);
u8 *shared_address(Warp *warp, const Instruction *in, int lane, u64 address, const u8 *stored);
u8 *atomic_address(Warp *warp, const Instruction *in, int lane, u64 address);
void start_clocks(int num_ctas);
void stop_clocks(void);

// run.c
void run_warp(Program *program, Warp *warp, s64 budget);
const char *launch(Program *program, const u32 grid[3], u32 threads, u32 shared_bytes, void **params);
