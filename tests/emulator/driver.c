// SPDX-License-Identifier: Apache-2.0
// A libcuda.so.1 whose launches run on the CPU: the functions of the CUDA driver that Triton calls, and the scheduler.
#include "machine.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

EXPORT Settings emu_settings = {
    .capability = 90, .sms = 132, .resident = 1, .check_races = 1, .seed = 1, .max_instructions = 20000000000};
EXPORT Counters emu_counters;
const u8 *launch_params;

// ---- faults end a launch
static Program *running;
static char fault_text[2048];
static jmp_buf end_of_launch;
EXPORT const char *emu_fault(void) { return fault_text; }
_Noreturn void fault(const Warp *warp, const Instruction *in, int lane, const char *format, ...) {
  int n = snprintf(fault_text, sizeof fault_text, "%s: ", running->name);
  if (warp)
    n += snprintf(fault_text + n, sizeof fault_text - n, "CTA (%d, %d, %d) thread %d, ptx line %d: ", warp->cta->x,
                  warp->cta->y, warp->cta->z, warp->id * LANES + lane, in->line);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(fault_text + n, sizeof fault_text - n, format, arguments);
  va_end(arguments);
  longjmp(end_of_launch, 1);
}

static u64 random_state;
u64 random_bits(void) {  // xorshift64*
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state * 0x2545F4914F6CDD1D;
}

// ---- programs, from ptx.py
EXPORT Program *emu_program(const Program *from) {
  Program *program = memcpy(malloc(sizeof *program), from, sizeof *from);
  u64 code = sizeof(Instruction) * from->length, constants = sizeof(Constant) * from->num_constants;
  program->code = memcpy(malloc(code), from->code, code);
  program->constants = memcpy(malloc(constants + 1), from->constants, constants);
  program->hits = calloc(from->length, sizeof(u64));
  return program;
}
EXPORT int emu_sizes(int which) { return which == 0 ? sizeof(Instruction) : which == 1 ? sizeof(Program) : sizeof(Settings); }

// ---- a launch
typedef struct {
  u32 grid[3], threads;
  int shared_bytes, ctas, resident, warps;
  int *order;  // in which CTAs start
  Cta *slots;
} Launch;
static Launch now;
static void start_warp(Program *program, Warp *warp, Cta *cta, int id) {
  u8 *registers = warp->registers;
  *warp = (Warp){.registers = registers, .cta = cta, .id = id, .warp_syncs = 1, .groups = 1};
  u32 threads = now.threads - LANES * id;
  warp->members[0] = warp->alive = threads >= LANES ? ALL : (1u << threads) - 1;
  u64 noise = random_bits();
  for (int k = 0; k < program->register_bytes; k += 4) {  // registers begin as NaN
    u32 garbage = 0x7fc00000 | (u32)(noise >> 40 & 0xfffff);
    memcpy(registers + k, &garbage, 4);
    noise = noise * 6364136223846793005 + 1442695040888963407;
  }
  for (int k = 0; k < program->num_constants; k++) {
    const Constant *constant = &program->constants[k];
    for (int i = 0; i < (constant->bytes ? LANES : 1); i++)
      memcpy(registers + constant->offset + constant->bytes * i, &constant->value, constant->bytes ? constant->bytes : 4);
  }
  u32 special[10] = {0, now.threads, cta->x, cta->y, cta->z, now.grid[0], now.grid[1], now.grid[2], 0, id};
  for (int k = 0; k < 10; k++)
    for (u32 i = 0; program->special[k] >= 0 && i < LANES; i++) {
      u32 value = k == 0 ? LANES * id + i : k == 8 ? i : special[k];
      memcpy(registers + program->special[k] + 4 * i, &value, 4);
    }
}
static void start_cta(Program *program, Cta *cta, int id) {
  cta->id = id;
  cta->x = id % now.grid[0], cta->y = id / now.grid[0] % now.grid[1], cta->z = id / (now.grid[0] * now.grid[1]);
  cta->epoch = 1, cta->at_barrier = 0, cta->running = cta->num_warps = now.warps;
  memset(cta->shared, 0xff, now.shared_bytes);  // NaN in every format
  for (int k = 0; cta->shared_cells && k < now.shared_bytes; k++)
    cta->shared_cells[k].write.epoch = cta->shared_cells[k].read.epoch = -1;
  for (int k = 0; cta->acquired && k < now.ctas; k++) cta->acquired[k] = cta->acquired_next[k] = -1;
  for (int k = 0; k < now.warps; k++) start_warp(program, &cta->warps[k], cta, k);
}
static void allocate(Program *program) {
  now.order = malloc(now.ctas * sizeof(int));
  for (int i = 0; i < now.ctas; i++) now.order[i] = i;
  for (int i = now.ctas - 1; emu_settings.shuffle && i > 0; i--) {
    int j = random_bits() % (i + 1), at = now.order[i];
    now.order[i] = now.order[j], now.order[j] = at;
  }
  now.slots = calloc(now.resident, sizeof(Cta));
  // vector clocks cost memory squared; no launch that orders its programs by atomics has so many of them
  bool clocks = emu_settings.check_races && now.ctas > 1 && now.ctas <= 4096;
  start_clocks(now.ctas);
  for (int i = 0; i < now.resident; i++) {
    Cta *cta = &now.slots[i];
    cta->shared_bytes = now.shared_bytes;
    cta->shared = malloc(now.shared_bytes + 1);
    cta->shared_cells = emu_settings.check_races ? malloc(sizeof(Cell) * (now.shared_bytes + 1)) : NULL;
    cta->acquired = clocks ? malloc(2 * now.ctas * sizeof(s32)) : NULL;
    cta->acquired_next = clocks ? cta->acquired + now.ctas : NULL;
    cta->warps = calloc(now.warps, sizeof(Warp));
    for (int k = 0; k < now.warps; k++) cta->warps[k].registers = malloc(program->register_bytes + 8);
  }
}
static void release(void) {
  for (int i = 0; now.slots && i < now.resident; i++) {
    Cta *cta = &now.slots[i];
    for (int k = 0; k < now.warps; k++) free(cta->warps[k].registers);
    free(cta->warps), free(cta->shared), free(cta->shared_cells), free(cta->acquired);
  }
  free(now.slots), free(now.order), free((void *)launch_params);
  now = (Launch){0};
  launch_params = NULL;
  stop_clocks();
}
static void check_limits(const Program *program) {
  const u32 *grid = now.grid;
  if (program->required_threads && program->required_threads != (int)now.threads)
    fault(NULL, NULL, 0, "a block of %u threads, and the program asks for %d", now.threads, program->required_threads);
  if (!now.threads || now.threads > 1024) fault(NULL, NULL, 0, "a block of %u threads", now.threads);
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > INT32_MAX || grid[1] > 65535 || grid[2] > 65535)
    fault(NULL, NULL, 0, "a grid of %u x %u x %u", grid[0], grid[1], grid[2]);
  if ((program->registers + 7) / 8 * 8 * ((now.threads + 127) / 128 * 128) > 65536)
    fault(NULL, NULL, 0, "%d registers for each of %u threads", program->registers, now.threads);
  int most = program->max_shared > 49152 ? program->max_shared : 49152;
  if (now.shared_bytes > most) fault(NULL, NULL, 0, "%d bytes of shared memory of %d", now.shared_bytes, most);
}
static void pass_barrier(Cta *cta) {
  cta->at_barrier = 0, cta->epoch++;
  if (cta->acquired) memcpy(cta->acquired, cta->acquired_next, now.ctas * sizeof(s32));
  for (int k = 0; k < cta->num_warps; k++)
    if (cta->warps[k].state == AT_BARRIER) cta->warps[k].state = READY;
}
static void run_grid(Program *program) {
  int started = 0, running_ctas = now.resident;
  for (int i = 0; i < now.resident; i++) start_cta(program, &now.slots[i], now.order[started++]);
  u64 begin = emu_counters.warp_instructions;
  while (running_ctas) {
    Cta *cta = &now.slots[now.resident > 1 ? random_bits() % now.resident : 0];
    if (!cta->running) continue;
    Warp *warp = NULL;
    int first = emu_settings.quantum ? random_bits() % now.warps : 0;
    for (int k = 0; k < now.warps && !warp; k++) {
      Warp *candidate = &cta->warps[(first + k) % now.warps];
      if (candidate->state == READY) warp = candidate;
    }
    if (!warp) fault(NULL, NULL, 0, "a deadlock: no warp of CTA (%d, %d, %d) can run", cta->x, cta->y, cta->z);
    run_warp(program, warp, emu_settings.quantum ? 1 + (s64)(random_bits() % emu_settings.quantum) : emu_settings.max_instructions + 1);
    if (warp->state == DONE) cta->running--;
    if (cta->running && cta->at_barrier == cta->running) pass_barrier(cta);
    if (!cta->running && started < now.ctas) start_cta(program, cta, now.order[started++]);
    else if (!cta->running) running_ctas--;
    if ((s64)(emu_counters.warp_instructions - begin) > emu_settings.max_instructions)
      fault(NULL, NULL, 0, "more than %lld instructions", (long long)emu_settings.max_instructions);
  }
}
// Runs a grid. Returns what went wrong, or an empty string.
const char *launch(Program *program, const u32 grid[3], u32 threads, u32 shared_bytes, void **params) {
  running = program;
  fault_text[0] = 0;
  random_state = emu_settings.seed * 0x9E3779B97F4A7C15 + emu_counters.launches * 7919 + 1;
  random_bits();
  now = (Launch){.grid = {grid[0], grid[1], grid[2]}, .threads = threads, .shared_bytes = (int)shared_bytes};
  now.ctas = grid[0] * grid[1] * grid[2];
  now.warps = (threads + LANES - 1) / LANES;
  now.resident = emu_settings.resident < now.ctas ? emu_settings.resident : now.ctas;
  emu_counters.launches++;
  emu_counters.ctas += now.ctas;
  if (!setjmp(end_of_launch)) {
    check_limits(program);
    u8 *copy = calloc(1, program->params_size + 16);
    launch_params = copy;
    for (int k = 0; k < program->num_params; k++) memcpy(copy + program->param_offset[k], params[k], program->param_bytes[k]);
    allocate(program);
    run_grid(program);
  }
  release();
  return fault_text;
}

// ---- the driver's functions
typedef int Result;
enum { OK, INVALID = 1, INVALID_IMAGE = 200, NOT_FOUND = 500, LAUNCH_FAILED = 719, UNSUPPORTED = 801 };
static Program *loading;  // the program whose cubin is loaded next
EXPORT void emu_load(Program *program) { loading = program; }
EXPORT Result cuModuleLoadData(void **module, const void *image) {
  // an ELF file: the registers of a thread stand in the header of the section .text.<kernel>
  const u8 *elf = image;
  u64 headers, names;
  u16 size, count, names_index;
  if (!loading || memcmp(elf, "\177ELF", 4)) return INVALID_IMAGE;
  memcpy(&headers, elf + 0x28, 8), memcpy(&size, elf + 0x3a, 2), memcpy(&count, elf + 0x3c, 2);
  memcpy(&names_index, elf + 0x3e, 2), memcpy(&names, elf + headers + (u64)names_index * size + 0x18, 8);
  for (int i = 0; i < count; i++) {
    u32 name, info;
    memcpy(&name, elf + headers + i * size, 4), memcpy(&info, elf + headers + i * size + 0x2c, 4);
    if (!strncmp((const char *)elf + names + name, ".text.", 6)) loading->registers = info >> 24;
  }
  *module = loading;
  return OK;
}
EXPORT Result cuModuleGetFunction(void **function, void *module, const char *name) {
  Program *program = module;
  if (strncmp(program->name, name, sizeof program->name - 1)) return NOT_FOUND;
  *function = program;
  return OK;
}
EXPORT Result cuFuncGetAttribute(int *value, int attribute, void *function) {
  Program *program = function;
  int per_thread = program->registers ? (program->registers + 7) / 8 * 8 : 32, threads = 65536 / per_thread / LANES * LANES;
  *value = attribute == 4 ? program->registers : attribute == 0 ? (threads > 1024 ? 1024 : threads) : 0;
  return OK;
}
EXPORT Result cuFuncSetAttribute(void *function, int attribute, int value) {
  if (attribute == 8) ((Program *)function)->max_shared = value;
  return OK;
}
EXPORT Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  int major = emu_settings.capability / 10, minor = emu_settings.capability % 10;
  int optin = major == 8 ? 166912 : major == 12 ? 101376 : 232448;  // shared memory of a block
  struct { int attribute, value; } known[] = {{75, major}, {76, minor}, {97, optin}, {12, 65536}, {16, emu_settings.sms},
                                              {10, LANES}, {13, 1980000}, {36, 2619000}, {37, 5120}, {81, optin + 1024}};
  *value = 0;
  for (unsigned k = 0; k < sizeof known / sizeof *known; k++)
    if (known[k].attribute == attribute) *value = known[k].value;
  return OK;
}
typedef struct {
  u32 grid[3], block[3], shared_bytes;
  void *stream, *attributes;
  u32 num_attributes;
} LaunchConfig;
EXPORT Result cuLaunchKernelEx(const LaunchConfig *config, void *function, void **params, void **extra) {
  (void)extra;
  if (config->block[1] != 1 || config->block[2] != 1) return INVALID;
  return *launch(function, config->grid, config->block[0], config->shared_bytes, params) ? LAUNCH_FAILED : OK;
}
EXPORT Result cuGetErrorString(Result error, const char **text) {
  *text = error == OK ? "no error" : *fault_text ? fault_text : "not emulated";
  return OK;
}
EXPORT Result cuGetErrorName(Result error, const char **text) { return cuGetErrorString(error, text); }
EXPORT Result cuDriverGetVersion(int *version) { return *version = 13000, OK; }
EXPORT Result cuDeviceGetCount(int *count) { return *count = 1, OK; }
EXPORT Result cuDeviceGet(int *device, int index) { return *device = index, OK; }
EXPORT Result cuInit(unsigned flags) { return (void)flags, OK; }
static int the_context;
static void *context;
EXPORT Result cuCtxGetCurrent(void **current) { return *current = context, OK; }
EXPORT Result cuCtxSetCurrent(void *current) { return context = current, OK; }
EXPORT Result cuCtxGetDevice(int *device) { return *device = 0, OK; }
EXPORT Result cuCtxGetLimit(size_t *value, int limit) { return (void)limit, *value = 1 << 20, OK; }
EXPORT Result cuCtxSetLimit(int limit, size_t value) { return (void)limit, (void)value, OK; }
EXPORT Result cuDevicePrimaryCtxRetain(void **retained, int device) { return (void)device, *retained = &the_context, OK; }
EXPORT Result cuStreamIsCapturing(void *stream, int *status) { return (void)stream, *status = 0, OK; }
EXPORT Result cuModuleUnload(void *module) { return (void)module, OK; }
EXPORT Result cuFuncSetCacheConfig(void *function, int config) { return (void)function, (void)config, OK; }
EXPORT Result cuPointerGetAttribute(void *data, int attribute, u64 pointer) { return (void)attribute, *(u64 *)data = pointer, OK; }
EXPORT Result cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) {
  return (void)function, (void)config, *count = 1, OK;
}
EXPORT Result cuTensorMapEncodeTiled(void) { return UNSUPPORTED; }
EXPORT Result cuTensorMapEncodeIm2col(void) { return UNSUPPORTED; }
