// SPDX-License-Identifier: Apache-2.0
// What each arithmetic instruction computes, a row for each: name, types of destination and sources, value of one lane.
//
// A name is PTX's with _ for . and without what changes nothing (ptx.py: `canonical`). The type z32 is a float32 of
// which subnormal numbers are read and written as 0: PTX's .ftz. f16 and bf16 are read as float and rounded when
// written. A and B are macros below that write rows for several types at once.

// ---- integers; bits stand for either sign where the sign does not matter
#define BITS(n) \
  V2(add_b##n, u##n, u##n, u##n, a + b) \
  V2(sub_b##n, u##n, u##n, u##n, a - b) \
  V2(mul_b##n, u##n, u##n, u##n, (u64)a * b) \
  V3(mad_b##n, u##n, u##n, u##n, u##n, (u64)a * b + c) \
  V2(and_b##n, u##n, u##n, u##n, a & b) \
  V2(or_b##n, u##n, u##n, u##n, a | b) \
  V2(xor_b##n, u##n, u##n, u##n, a ^ b) \
  V1(not_b##n, u##n, u##n, ~a) \
  V1(neg_b##n, u##n, u##n, 0 - a) \
  V1(mov_b##n, u##n, u##n, a) \
  V3(selp_b##n, u##n, u##n, u##n, pred, c ? a : b) \
  V2(shl_b##n, u##n, u##n, u32, b < n ? (u64)a << b : 0) \
  V2(shr_u##n, u##n, u##n, u32, b < n ? a >> b : 0) \
  V2(shr_s##n, s##n, s##n, u32, a >> (b < n ? b : n - 1)) \
  V2(min_s##n, s##n, s##n, s##n, a < b ? a : b) \
  V2(max_s##n, s##n, s##n, s##n, a > b ? a : b) \
  V2(min_u##n, u##n, u##n, u##n, a < b ? a : b) \
  V2(max_u##n, u##n, u##n, u##n, a > b ? a : b) \
  V2(div_s##n, s##n, s##n, s##n, b == 0 ? -1 : b == -1 ? (s##n)(0 - (u64)a) : a / b) \
  V2(div_u##n, u##n, u##n, u##n, b == 0 ? (u##n)~0 : a / b) \
  V2(rem_s##n, s##n, s##n, s##n, b == 0 ? a : b == -1 ? 0 : a % b) \
  V2(rem_u##n, u##n, u##n, u##n, b == 0 ? a : a % b) \
  V1(abs_s##n, s##n, s##n, a < 0 ? (s##n)(0 - (u64)a) : a) \
  COMPARES(s##n) COMPARES(u##n)
#define COMPARES(T) \
  P2(setp_eq_##T, T, a == b) P2(setp_ne_##T, T, a != b) P2(setp_lt_##T, T, a < b) \
  P2(setp_le_##T, T, a <= b) P2(setp_gt_##T, T, a > b) P2(setp_ge_##T, T, a >= b)
BITS(16) BITS(32) BITS(64)
V2(mul_wide_s16, s32, s16, s16, a * b)
V2(mul_wide_u16, u32, u16, u16, (u32)a * b)
V2(mul_wide_s32, s64, s32, s32, (s64)a * b)
V2(mul_wide_u32, u64, u32, u32, (u64)a * b)
V3(mad_wide_s32, s64, s32, s32, s64, (u64)((s64)a * b) + (u64)c)
V3(mad_wide_u32, u64, u32, u32, u64, (u64)a * b + c)
V2(mul_hi_s32, s32, s32, s32, (s64)a * b >> 32)
V2(mul_hi_u32, u32, u32, u32, (u64)a * b >> 32)
V2(mul_hi_s64, s64, s64, s64, (__int128)a * b >> 64)
V2(mul_hi_u64, u64, u64, u64, (unsigned __int128)a * b >> 64)
V3(bfe_u32, u32, u32, u32, u32, field(a, b & 255, c & 255))
V3(bfe_s32, s32, s32, u32, u32, signed_field(a, b & 255, c & 255))
V3(bfe_u64, u64, u64, u32, u32, field(a, b & 255, c & 255))
V3(prmt_b32, u32, u32, u32, u32, permuted(a | (u64)b << 32, c))
V1(popc_b32, u32, u32, __builtin_popcount(a))
V1(clz_b32, u32, u32, a ? __builtin_clz(a) : 32)

// ---- packing; b of `part` is the index of the part
V2(pack_2x16, u32, u16, u16, a | (u32)b << 16)
V2(pack_2x32, u64, u32, u32, a | (u64)b << 32)
V4(pack_4x16, u64, u16, u16, u16, u16, a | (u64)b << 16 | (u64)c << 32 | (u64)d << 48)
V2(part_16_of_32, u16, u32, u32, a >> 16 * b)
V2(part_16_of_64, u16, u64, u32, a >> 16 * b)
V2(part_32_of_64, u32, u64, u32, a >> 32 * b)

// ---- conversions
#define WIDEN(T) V1(cvt_b16_##T, u16, T, a) V1(cvt_b32_##T, u32, T, a) V1(cvt_b64_##T, u64, T, a)
WIDEN(u8) WIDEN(s8) WIDEN(u16) WIDEN(s16) WIDEN(u32) WIDEN(s32) WIDEN(u64) WIDEN(s64)
V1(cvt_b8_u16, u8, u16, a)
V1(cvt_b8_u32, u8, u32, a)
V1(cvt_f32_f16, f32, f16, a)
V1(cvt_f32_bf16, f32, bf16, a)
V1(cvt_rn_f16_f32, f16, f32, a)
V1(cvt_rn_bf16_f32, bf16, f32, a)
V2(cvt_rn_f16x2_f32, u32, f32, f32, (u32)f16_bits(a) << 16 | f16_bits(b))
V2(cvt_rn_bf16x2_f32, u32, f32, f32, (u32)bf16_bits(a) << 16 | bf16_bits(b))
V1(cvt_f64_f32, f64, f32, a)
V1(cvt_ftz_f64_f32, f64, z32, a)
V1(cvt_rn_f32_f64, f32, f64, a)
V1(cvt_rn_ftz_f32_f64, z32, f64, a)
#define OF_INTEGER(T) V1(cvt_rn_f32_##T, f32, T, a) V1(cvt_rn_f64_##T, f64, T, a)
OF_INTEGER(s32) OF_INTEGER(u32) OF_INTEGER(s64) OF_INTEGER(u64) V1(cvt_f64_s32, f64, s32, a) V1(cvt_f64_u32, f64, u32, a)
V1(cvt_rzi_s32_f32, s32, f32, (s32)clamped(truncf(a), INT32_MIN, INT32_MAX, 0))
V1(cvt_rni_s32_f32, s32, f32, (s32)clamped(rintf(a), INT32_MIN, INT32_MAX, 0))
V1(cvt_rzi_u32_f32, u32, f32, (u32)clamped(truncf(a), 0, UINT32_MAX, 0))
V1(cvt_rzi_s64_f32, s64, f32, clamped(truncf(a), INT64_MIN, INT64_MAX, INT64_MIN))
V1(cvt_rzi_s32_f64, s32, f64, (s32)clamped(trunc(a), INT32_MIN, INT32_MAX, 0))
V1(cvt_rzi_s64_f64, s64, f64, clamped(trunc(a), INT64_MIN, INT64_MAX, INT64_MIN))

// ---- floats
#define FLOATS(T, name, fused) \
  V2(add_##name, T, T, T, a + b) \
  V2(sub_##name, T, T, T, a - b) \
  V2(mul_##name, T, T, T, a * b) \
  V3(fma_##name, T, T, T, T, fused(a, b, c)) \
  V2(div_##name, T, T, T, a / b) \
  V2(min_##name, T, T, T, smaller(a, b)) \
  V2(max_##name, T, T, T, larger(a, b)) \
  V1(rcp_##name, T, T, 1 / a) \
  P2(setp_eq_##name, T, a == b) P2(setp_ne_##name, T, !unordered(a, b) && a != b) \
  P2(setp_lt_##name, T, a < b) P2(setp_le_##name, T, a <= b) P2(setp_gt_##name, T, a > b) P2(setp_ge_##name, T, a >= b) \
  P2(setp_equ_##name, T, unordered(a, b) || a == b) P2(setp_neu_##name, T, a != b) \
  P2(setp_ltu_##name, T, !(a >= b)) P2(setp_leu_##name, T, !(a > b)) \
  P2(setp_gtu_##name, T, !(a <= b)) P2(setp_geu_##name, T, !(a < b)) \
  P2(setp_num_##name, T, !unordered(a, b)) P2(setp_nan_##name, T, unordered(a, b))
#define SINGLES(T, name) \
  FLOATS(T, name, fmaf) \
  V1(neg_##name, T, T, -a) \
  V1(abs_##name, T, T, fabsf(a)) \
  V1(sqrt_##name, T, T, sqrtf(a)) \
  V2(min_NaN_##name, T, T, T, unordered(a, b) ? NAN : smaller(a, b)) \
  V2(max_NaN_##name, T, T, T, unordered(a, b) ? NAN : larger(a, b)) \
  V3(min3_##name, T, T, T, T, smaller(smaller(a, b), c)) \
  V3(max3_##name, T, T, T, T, larger(larger(a, b), c)) \
  V2(copysign_##name, T, T, T, copysignf(b, a)) \
  V1(cvt_rni_##name##_f32, T, T, rintf(a)) V1(cvt_rzi_##name##_f32, T, T, truncf(a)) \
  V1(cvt_rmi_##name##_f32, T, T, floorf(a)) V1(cvt_rpi_##name##_f32, T, T, ceilf(a)) \
  V1(lg2_approx_##name, T, T, off(log2(a), a)) \
  V1(rsqrt_approx_##name, T, T, off(1 / sqrt(a), a)) \
  V1(rcp_approx_##name, T, T, off(1 / (f64)a, a)) \
  V1(sqrt_approx_##name, T, T, off(sqrt(a), a)) \
  V2(div_full_##name, T, T, T, off((f64)a / b, b))
SINGLES(f32, f32)
SINGLES(z32, ftz_f32)
V1(tanh_approx_f32, f32, f32, off(tanh(a), a))
FLOATS(f64, f64, fma)
V1(neg_f64, f64, f64, -a)
V1(abs_f64, f64, f64, fabs(a))
V1(sqrt_f64, f64, f64, sqrt(a))
// from sm_100 on: a float32 operation of which an operand is in half precision, and two float32 in one register
#define MIXED(T) \
  V2(add_f32_##T, f32, T, f32, a + b) V2(sub_f32_##T, f32, T, f32, a - b) V3(fma_f32_##T, f32, T, T, f32, fmaf(a, b, c))
MIXED(f16) MIXED(bf16)
#define PAIRS(name, of) \
  V2(add_##name, u64, u64, u64, pair(of(low(a)) + of(low(b)), of(high(a)) + of(high(b)))) \
  V2(sub_##name, u64, u64, u64, pair(of(low(a)) - of(low(b)), of(high(a)) - of(high(b)))) \
  V2(mul_##name, u64, u64, u64, pair(of(low(a)) * of(low(b)), of(high(a)) * of(high(b)))) \
  V3(fma_##name, u64, u64, u64, u64, pair(fmaf(of(low(a)), of(low(b)), of(low(c))), fmaf(of(high(a)), of(high(b)), of(high(c)))))
PAIRS(f32x2, )

// ---- predicates
M2(and_pred, a & b)
M2(or_pred, a | b)
M2(xor_pred, a ^ b)
M1(not_pred, ~a)
M1(mov_pred, a)

// ---- written by hand in run.c
HAND(ex2_approx_f32) HAND(ex2_approx_ftz_f32)
HAND(ret) HAND(bra) HAND(trap) HAND(nop) HAND(barrier) HAND(warp_barrier)
HAND(load_param) HAND(load_global) HAND(store_global) HAND(load_shared) HAND(store_shared)
HAND(load_matrix) HAND(store_matrix) HAND(atomic) HAND(shuffle) HAND(reduce) HAND(vote)
