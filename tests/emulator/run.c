// SPDX-License-Identifier: Apache-2.0
// Runs instructions: the functions that instructions.h and this file define, and the loop over a warp's program.
#include "machine.h"

#include <math.h>
#include <string.h>

// ---- the types of a lane: how a value is read from its register and written to it
typedef f32 z32;
static inline u32 bits_of(f32 x) {
  u32 u;
  memcpy(&u, &x, 4);
  return u;
}
static inline f32 float_of(u32 u) {
  f32 x;
  memcpy(&x, &u, 4);
  return x;
}
static inline f32 flushed(f32 x) { return bits_of(x) & 0x7f800000 ? x : float_of(bits_of(x) & 0x80000000); }
static inline u16 bf16_bits(f32 x) {
  u32 u = bits_of(x);
  return x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static inline u16 f16_bits(f32 x) {
  _Float16 h = (_Float16)x;
  u16 u;
  memcpy(&u, &h, 2);
  return x != x ? 0x7fff : u;
}
static inline f32 f16_value(u16 u) {
  _Float16 h;
  memcpy(&h, &u, 2);
  return (f32)h;
}
// TYPE(name, type of a value, type in the register, reading x, writing x, bytes of an operand)
#define TYPES \
  TYPE(u8, u8, u32, x, x, 4) TYPE(s8, s8, u32, (s8)x, (u16)x, 4) TYPE(u16, u16, u32, x, x, 4) \
  TYPE(s16, s16, u32, (s16)x, (u16)x, 4) TYPE(u32, u32, u32, x, x, 4) TYPE(s32, s32, s32, x, x, 4) \
  TYPE(u64, u64, u64, x, x, 8) TYPE(s64, s64, s64, x, x, 8) TYPE(f32, f32, f32, x, x, 4) \
  TYPE(z32, f32, f32, flushed(x), flushed(x), 4) TYPE(f64, f64, f64, x, x, 8) \
  TYPE(f16, f32, u32, f16_value(x), f16_bits(x), 4) TYPE(bf16, f32, u32, float_of(x << 16), bf16_bits(x), 4)
#define TYPE(name, value, lane, read, write, bytes) \
  typedef value value_##name; \
  enum { BYTES_##name = bytes }; \
  static inline value get_##name(const u8 *registers, s32 offset, int i) { \
    lane x = ((const lane *)(registers + offset))[i]; \
    return read; \
  } \
  static inline void put_##name(u8 *registers, s32 offset, int i, value x) { ((lane *)(registers + offset))[i] = write; }
TYPES
#undef TYPE
typedef bool value_pred;
enum { BYTES_pred = 0 };
static inline u32 *mask_at(u8 *registers, s32 offset) { return (u32 *)(registers + offset); }
static inline bool get_pred(const u8 *registers, s32 offset, int i) { return *(const u32 *)(registers + offset) >> i & 1; }
static inline void put_mask(u8 *registers, s32 offset, u32 lanes, u32 bits) {
  u32 *mask = mask_at(registers, offset);
  *mask = (*mask & ~lanes) | (bits & lanes);
}

// ---- what the rows of instructions.h call
static inline bool unordered(f64 a, f64 b) { return a != a || b != b; }
static inline f64 larger(f64 a, f64 b) {
  if (unordered(a, b)) return a != a ? (b != b ? NAN : b) : a;
  return a > b || (a == b && !signbit(a)) ? a : b;
}
static inline f64 smaller(f64 a, f64 b) {
  if (unordered(a, b)) return a != a ? (b != b ? NAN : b) : a;
  return a < b || (a == b && signbit(a)) ? a : b;
}
static inline s64 clamped(f64 x, f64 low, f64 high, s64 of_nan) {
  if (x != x) return of_nan;
  return x <= low ? (s64)low : x >= high ? (high >= 0x1p63 ? INT64_MAX : (s64)high) : (s64)x;
}
static inline u64 field(u64 x, u32 start, u32 length) {
  u64 moved = start > 63 ? 0 : x >> start;
  return length > 63 ? moved : moved & (((u64)1 << length) - 1);
}
static inline s64 signed_field(s64 x, u32 start, u32 length) {
  s64 moved = x >> (start > 63 ? 63 : start);
  return length == 0 ? 0 : length > 63 ? moved : (s64)((u64)moved << (64 - length)) >> (64 - length);
}
static inline u32 permuted(u64 bytes, u32 selectors) {
  u32 result = 0;
  for (int k = 0; k < 4; k++) {
    u32 selector = selectors >> 4 * k & 15, byte = bytes >> 8 * (selector & 7) & 255;
    result |= (selector & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * k;
  }
  return result;
}
static inline f32 low(u64 x) { return float_of((u32)x); }
static inline f32 high(u64 x) { return float_of(x >> 32); }
static inline u64 pair(f32 a, f32 b) { return bits_of(a) | (u64)bits_of(b) << 32; }
// `exact` as a function unit of a GPU gives it for the input: rounded, and some ulps beside it, the same ones every time.
static inline f32 off(f64 exact, f32 input) {
  f32 rounded = (f32)exact;
  int low = emu_settings.ulps_low, high = emu_settings.ulps_high;
  u32 bits = bits_of(rounded), size = bits & 0x7fffffff;
  // PTX: ex2 of an integer is exact, and so are zeros, infinities and NaN
  if ((low == 0 && high == 0) || size == 0 || size >= 0x7f800000 || (size & 0x7fffff) == 0) return rounded;
  u32 hash = bits_of(input) * 0x7feb352du;
  hash = (hash ^ hash >> 15) * 0x846ca68bu;
  return float_of(bits + low + (s32)((hash >> 16) % (u32)(high - low + 1)));
}

// ---- the functions of the rows
#define EACH_LANE(...) \
  if (lanes == ALL) { \
    _Pragma("GCC ivdep") for (int i = 0; i < LANES; i++) { __VA_ARGS__; } \
  } else { \
    for (int i = 0; i < LANES; i++) \
      if (lanes >> i & 1) { __VA_ARGS__; } \
  }
#define FUNCTION(name, body) \
  static void run_##name(Warp *warp, const Instruction *in, u32 lanes) { \
    u8 *registers = warp->registers; \
    body \
  }
#define OPERAND(T, x, k) value_##T x = get_##T(registers, in->s[k], i)
#define V1(name, D, A, value) FUNCTION(name, EACH_LANE(OPERAND(A, a, 0); put_##D(registers, in->d[0], i, value)))
#define V2(name, D, A, B, value) \
  FUNCTION(name, EACH_LANE(OPERAND(A, a, 0); OPERAND(B, b, 1); put_##D(registers, in->d[0], i, value)))
#define V3(name, D, A, B, C, value) \
  FUNCTION(name, EACH_LANE(OPERAND(A, a, 0); OPERAND(B, b, 1); OPERAND(C, c, 2); put_##D(registers, in->d[0], i, value)))
#define V4(name, D, A, B, C, E, value) \
  FUNCTION(name, EACH_LANE(OPERAND(A, a, 0); OPERAND(B, b, 1); OPERAND(C, c, 2); OPERAND(E, d, 3); \
                           put_##D(registers, in->d[0], i, value)))
#define P2(name, A, value) \
  FUNCTION(name, u32 bits = 0; for (int i = 0; i < LANES; i++) { \
    OPERAND(A, a, 0); OPERAND(A, b, 1); bits |= (u32)(value) << i; } put_mask(registers, in->d[0], lanes, bits);)
#define M1(name, value) FUNCTION(name, u32 a = *mask_at(registers, in->s[0]); put_mask(registers, in->d[0], lanes, value);)
#define M2(name, value) \
  FUNCTION(name, u32 a = *mask_at(registers, in->s[0]); u32 b = *mask_at(registers, in->s[1]); \
           put_mask(registers, in->d[0], lanes, value);)
#define HAND(name) static Run run_##name;
#include "instructions.h"
#undef V1
#undef V2
#undef V3
#undef V4
#undef P2
#undef M1
#undef M2
#undef HAND

typedef struct {
  const char *name;
  Run *run;
  s32 operands, bytes[5];  // of destination and sources: 8, 4, or 0 for a predicate; operands: -1 if written by hand
} Row;
static const Row rows[] = {
#define V1(name, D, A, value) {#name, run_##name, 2, {BYTES_##D, BYTES_##A}},
#define V2(name, D, A, B, value) {#name, run_##name, 3, {BYTES_##D, BYTES_##A, BYTES_##B}},
#define V3(name, D, A, B, C, value) {#name, run_##name, 4, {BYTES_##D, BYTES_##A, BYTES_##B, BYTES_##C}},
#define V4(name, D, A, B, C, E, value) {#name, run_##name, 5, {BYTES_##D, BYTES_##A, BYTES_##B, BYTES_##C, BYTES_##E}},
#define P2(name, A, value) {#name, run_##name, 3, {0, BYTES_##A, BYTES_##A}},
#define M1(name, value) {#name, run_##name, 2, {0, 0}},
#define M2(name, value) {#name, run_##name, 3, {0, 0, 0}},
#define HAND(name) {#name, run_##name, -1, {0}},
#include "instructions.h"
};
EXPORT int emu_rows(void) { return sizeof rows / sizeof *rows; }
EXPORT const char *emu_row(int i, s32 *operands, s32 *bytes) {
  *operands = rows[i].operands;
  memcpy(bytes, rows[i].bytes, sizeof rows[i].bytes);
  return rows[i].name;
}

// ---- e^x by base 2, the most frequent one of the function units, without a call of the C library
static inline f64 power_of_2(f64 x) {
  f64 bounded = x > 300 ? 300 : x < -300 ? -300 : x, whole = rint(bounded);
  f64 part = (bounded - whole) * 0.69314718055994530942, sum = 1;
  for (int k = 13; k > 0; k--) sum = 1 + sum * part / k;
  u64 bits = (u64)((whole == whole ? (s64)whole : 0) + 1023) << 52;
  f64 scale;
  memcpy(&scale, &bits, 8);
  return sum * scale;
}
static void run_ex2_approx_f32(Warp *warp, const Instruction *in, u32 lanes) {
  u8 *registers = warp->registers;
  EACH_LANE(f32 a = get_f32(registers, in->s[0], i); put_f32(registers, in->d[0], i, off(power_of_2(a), a)))
}
static void run_ex2_approx_ftz_f32(Warp *warp, const Instruction *in, u32 lanes) {
  u8 *registers = warp->registers;
  EACH_LANE(f32 a = get_z32(registers, in->s[0], i); put_z32(registers, in->d[0], i, off(power_of_2(a), a)))
}

// ---- control
static void run_nop(Warp *warp, const Instruction *in, u32 lanes) { (void)warp, (void)in, (void)lanes; }
static void run_trap(Warp *warp, const Instruction *in, u32 lanes) {
  if (lanes) fault(warp, in, __builtin_ctz(lanes), "trap");
}
static void remove_group(Warp *warp, int group) {
  warp->groups--;
  warp->pc[group] = warp->pc[warp->groups];
  warp->members[group] = warp->members[warp->groups];
}
// `group` is the first one here and in branches: run_warp puts the running one there.
static void run_ret(Warp *warp, const Instruction *in, u32 lanes) {
  (void)in;
  warp->alive &= ~lanes;
  warp->members[0] &= ~lanes;
  if (warp->members[0] == 0) remove_group(warp, 0);
  if (warp->groups == 0) warp->state = DONE;
}
static void run_bra(Warp *warp, const Instruction *in, u32 lanes) {
  if (lanes == warp->members[0]) {
    warp->pc[0] = (int)in->immediate;
  } else if (lanes) {
    emu_counters.divergences++;
    warp->members[0] &= ~lanes;
    warp->pc[warp->groups] = (int)in->immediate;
    warp->members[warp->groups++] = lanes;
  }
}
static void need_all(Warp *warp, const Instruction *in, u32 lanes, const char *what) {
  if (lanes != warp->alive) fault(warp, in, 0, "%s of a diverged warp: lanes %08x of %08x", what, lanes, warp->alive);
}
static void run_barrier(Warp *warp, const Instruction *in, u32 lanes) {
  if (!lanes) return;
  need_all(warp, in, lanes, "bar.sync");
  warp->state = AT_BARRIER;
  warp->cta->at_barrier++;
  emu_counters.barriers++;
}
static void run_warp_barrier(Warp *warp, const Instruction *in, u32 lanes) {
  if (!lanes) return;
  need_all(warp, in, lanes, "bar.warp.sync");
  warp->warp_syncs++;
}

// ---- memory. variant: 1 sign-extended, 2 an element widened to 64 bits, 4 a shared address of 64 bits, 8 a transposed
// matrix, 16 rows of matrices
static void put_element(u8 *registers, s32 offset, int i, const u8 *from, const Instruction *in) {
  if (offset < 0) return;
  u64 value = 0;
  memcpy(&value, from, in->bytes);
  int unused = 64 - 8 * in->bytes;
  if (in->variant & 1) value = (u64)((s64)(value << unused) >> unused);
  if (in->bytes == 8 || in->variant & 2) ((u64 *)(registers + offset))[i] = value;
  else ((u32 *)(registers + offset))[i] = (u32)value;
}
static void poison(Warp *warp, const Instruction *in, int i) {
  for (int k = 0; k < in->count; k++) {
    if (in->d[k] < 0) continue;
    u64 noise = random_bits();
    if (in->bytes == 8 || in->variant & 2) ((u64 *)(warp->registers + in->d[k]))[i] = 0x7ff8000000000000 | (noise & 0xffff);
    else ((u32 *)(warp->registers + in->d[k]))[i] = in->bytes == 2 ? 0x7fff : 0x7fc00000 | (noise & 0x3fffff);
  }
}
static void load(Warp *warp, const Instruction *in, u32 lanes, bool shared) {
  u8 *registers = warp->registers;
  bool wide = !shared || in->variant & 4;
  for (int i = 0; i < LANES; i++) {
    if (!(lanes >> i & 1)) {
      if (in->poison && warp->members[0] >> i & 1) poison(warp, in, i);
      continue;
    }
    u64 address = (wide ? get_u64(registers, in->s[0], i) : get_u32(registers, in->s[0], i)) + in->immediate;
    const u8 *from = (shared ? shared_address : global_address)(warp, in, i, address, NULL);
    u8 elements[32];
    memcpy(elements, from, in->bytes * in->count);
    for (int k = 0; k < in->count; k++) put_element(registers, in->d[k], i, elements + k * in->bytes, in);
  }
}
static void store(Warp *warp, const Instruction *in, u32 lanes, bool shared) {
  u8 *registers = warp->registers;
  bool wide = !shared || in->variant & 4;
  EACH_LANE(
    u64 address = (wide ? get_u64(registers, in->s[0], i) : get_u32(registers, in->s[0], i)) + in->immediate;
    u8 elements[32];
    for (int k = 0; k < in->count; k++)
      memcpy(elements + k * in->bytes, registers + in->s[1 + k] + (in->bytes == 8 ? 8 : 4) * i, in->bytes);
    memcpy((shared ? shared_address : global_address)(warp, in, i, address, elements), elements, in->bytes * in->count))
}
static void run_load_global(Warp *warp, const Instruction *in, u32 lanes) { load(warp, in, lanes, false); }
static void run_load_shared(Warp *warp, const Instruction *in, u32 lanes) { load(warp, in, lanes, true); }
static void run_store_global(Warp *warp, const Instruction *in, u32 lanes) { store(warp, in, lanes, false); }
static void run_store_shared(Warp *warp, const Instruction *in, u32 lanes) { store(warp, in, lanes, true); }
static void run_load_param(Warp *warp, const Instruction *in, u32 lanes) {
  EACH_LANE(for (int k = 0; k < in->count; k++)
              put_element(warp->registers, in->d[k], i, launch_params + in->immediate + k * in->bytes, in))
}
// ldmatrix and stmatrix: 8 x 8 matrices of 16 bits; lane 8 k + r has the address of row r of matrix k
static u8 *matrix_row(Warp *warp, const Instruction *in, int i, const u8 *stored) {
  u8 *registers = warp->registers;
  u64 address = in->variant & 4 ? get_u64(registers, in->s[0], i) : get_u32(registers, in->s[0], i);
  return shared_address(warp, in, i, address + in->immediate, stored);
}
static u16 *matrix_element(u16 (*matrix)[8], const Instruction *in, int i, int half) {
  int row = i / 4, column = 2 * (i % 4) + half;
  return in->variant & 8 ? &matrix[column][row] : &matrix[row][column];
}
static void run_load_matrix(Warp *warp, const Instruction *in, u32 lanes) {
  need_all(warp, in, lanes, "ldmatrix");
  u16 rows_[LANES][8];
  for (int i = 0; i < 8 * in->count; i++) memcpy(rows_[i], matrix_row(warp, in, i, NULL), 16);
  for (int k = 0; k < in->count; k++)
    for (int i = 0; i < LANES; i++)
      put_u32(warp->registers, in->d[k], i,
              *matrix_element(rows_ + 8 * k, in, i, 0) | (u32)*matrix_element(rows_ + 8 * k, in, i, 1) << 16);
}
static void run_store_matrix(Warp *warp, const Instruction *in, u32 lanes) {
  need_all(warp, in, lanes, "stmatrix");
  u16 rows_[LANES][8];
  for (int k = 0; k < in->count; k++)
    for (int i = 0; i < LANES; i++)
      for (int half = 0; half < 2; half++)
        *matrix_element(rows_ + 8 * k, in, i, half) = get_u32(warp->registers, in->s[1 + k], i) >> 16 * half;
  for (int i = 0; i < 8 * in->count; i++) memcpy(matrix_row(warp, in, i, (u8 *)rows_[i]), rows_[i], 16);
}
// variant: the index in ATOMICS of ptx.py, + 256 if it releases, + 512 if it acquires (memory.c)
static void run_atomic(Warp *warp, const Instruction *in, u32 lanes) {
  u8 *registers = warp->registers;
  for (int i = 0; i < LANES; i++) {
    if (!(lanes >> i & 1)) {
      if (in->poison && warp->members[0] >> i & 1) poison(warp, in, i);
      continue;
    }
    u8 *place = atomic_address(warp, in, i, get_u64(registers, in->s[0], i) + in->immediate);
    u64 old = 0, b = in->bytes == 8 ? get_u64(registers, in->s[1], i) : get_u32(registers, in->s[1], i), new = b;
    memcpy(&old, place, in->bytes);
    switch (in->variant & 255) {
      case 0: new = old + b; break;
      case 1: new = bits_of(float_of((u32)old) + float_of((u32)b)); break;
      case 2: break;
      case 3: new = (s32)old > (s32)b ? old : b; break;
      case 4: new = (s32)old < (s32)b ? old : b; break;
      case 5: new = old == b ? get_u32(registers, in->s[2], i) : old; break;
    }
    memcpy(place, &new, in->bytes);
    put_element(registers, in->d[0], i, (u8 *)&old, in);
    emu_counters.atomics++;
  }
}

// ---- between the lanes of a warp
// variant: 0 xor, 1 index, 2 up, 3 down. Sources: value, lane, segment mask << 8 | clamp, members
static void run_shuffle(Warp *warp, const Instruction *in, u32 lanes) {
  u8 *registers = warp->registers;
  u32 values[LANES], inside = 0;
  memcpy(values, registers + in->s[0], sizeof values);
  emu_counters.shuffles++;
  EACH_LANE(
    u32 needed = get_u32(registers, in->s[3], i) & warp->alive;
    if (needed & ~lanes) fault(warp, in, i, "shfl.sync: lanes %08x of %08x do not take part", needed & ~lanes, needed);
    int b = get_u32(registers, in->s[1], i) & 31;
    u32 c = get_u32(registers, in->s[2], i), segment = c >> 8 & 31, clamp = c & 31;
    int first = i & segment, last = (i & segment) | (clamp & ~segment);
    int from = in->variant == 0 ? i ^ b : in->variant == 1 ? first | (b & ~segment) : in->variant == 2 ? i - b : i + b;
    bool ok = in->variant == 2 ? from >= last : from <= last;
    if (!ok) from = i;
    if (!(lanes >> from & 1)) fault(warp, in, i, "shfl.sync reads lane %d, which does not take part", from);
    inside |= (u32)ok << i;
    put_u32(registers, in->d[0], i, values[from]))
  if (in->d[1] >= 0) put_mask(registers, in->d[1], lanes, inside);
}
// variant: the index in REDUCTIONS of ptx.py. The last source has the members.
static void run_reduce(Warp *warp, const Instruction *in, u32 lanes) {
  u8 *registers = warp->registers;
  if (!lanes) return;
  need_all(warp, in, lanes, "redux.sync");
  u32 total = get_u32(registers, in->s[0], __builtin_ctz(lanes));
  for (int i = __builtin_ctz(lanes) + 1; i < LANES; i++) {
    if (!(lanes >> i & 1)) continue;
    u32 x = get_u32(registers, in->s[0], i);
    f32 a = float_of(total), b = float_of(x);
    switch (in->variant) {
      case 0: total += x; break;
      case 1: total = (s32)x < (s32)total ? x : total; break;
      case 2: total = (s32)x > (s32)total ? x : total; break;
      case 3: total = x < total ? x : total; break;
      case 4: total = x > total ? x : total; break;
      case 5: total &= x; break;
      case 6: total |= x; break;
      case 7: total ^= x; break;
      case 8: total = bits_of(smaller(a, b)); break;
      case 9: total = bits_of(larger(a, b)); break;
      case 10: total = bits_of(unordered(a, b) ? NAN : smaller(a, b)); break;
      case 11: total = bits_of(unordered(a, b) ? NAN : larger(a, b)); break;
    }
  }
  EACH_LANE(put_u32(registers, in->d[0], i, total))
}
// variant: 0 ballot, 1 any, 2 all
static void run_vote(Warp *warp, const Instruction *in, u32 lanes) {
  u8 *registers = warp->registers;
  u32 yes = *mask_at(registers, in->s[0]) & lanes;
  if (in->variant == 0) {
    EACH_LANE(put_u32(registers, in->d[0], i, yes))
  } else {
    put_mask(registers, in->d[0], lanes, (in->variant == 1 ? yes != 0 : yes == lanes) ? ALL : 0);
  }
}

// ---- a warp
// Puts the lanes that are furthest behind first, and joins groups that have met again.
static void choose_group(Warp *warp) {
  for (int k = 1; k < warp->groups; k++) {
    if (warp->pc[k] > warp->pc[0]) continue;
    if (warp->pc[k] == warp->pc[0]) {
      warp->members[0] |= warp->members[k];
      remove_group(warp, k--);
      continue;
    }
    int pc = warp->pc[0];
    u32 members = warp->members[0];
    warp->pc[0] = warp->pc[k], warp->members[0] = warp->members[k];
    warp->pc[k] = pc, warp->members[k] = members;
    k = 0;  // the groups before it may have the same place
  }
}
// Runs a warp until it waits, ends, or has run `budget` instructions.
void run_warp(Program *program, Warp *warp, s64 budget) {
  while (budget-- > 0 && warp->state == READY) {
    if (warp->groups > 1) choose_group(warp);
    const Instruction *in = &program->code[warp->pc[0]];
    u32 lanes = warp->members[0];
    program->hits[warp->pc[0]++]++;
    emu_counters.warp_instructions++;
    emu_counters.lane_instructions += __builtin_popcount(lanes);
    if (in->guard >= 0) {
      u32 on = *mask_at(warp->registers, in->guard);
      lanes &= in->negated ? ~on : on;
    }
    if (lanes || in->poison) rows[in->op].run(warp, in, lanes);
  }
}
