// NEON, as 64-bit ARM has it; dot products of bytes and bf16 are used where the compiler is told of them.
#pragma once

#include <arm_neon.h>

namespace attnbench {

constexpr int LANES = 4;
constexpr int VECTORS = 4;  // 24 sums of 32 registers, 4 for columns, 1 for a row

using Floats = float32x4_t;
using Ints = int32x4_t;

INLINE Ints load_ints(const void* x) { return vld1q_s32((const int32_t*)x); }
INLINE Ints first(int64_t n) {  // all bits of the first n lanes
    static constexpr int32_t ladder[2 * LANES] = {-1, -1, -1, -1};
    return load_ints(ladder + LANES - std::clamp<int64_t>(n, 0, LANES));
}

INLINE Floats splat(float x) { return vdupq_n_f32(x); }
INLINE Ints splat(int x) { return vdupq_n_s32(x); }
INLINE Floats load(const float* x) { return vld1q_f32(x); }
INLINE Ints load_shorts(const void* x) { return (Ints)vmovl_u16(vld1_u16((const uint16_t*)x)); }
INLINE Floats load(const f16* x) { return vcvt_f32_f16((float16x4_t)vld1_u16((const uint16_t*)x)); }
INLINE void store(float* x, Floats value) { vst1q_f32(x, value); }
INLINE void store_ints(void* x, Ints value) { vst1q_s32((int32_t*)x, value); }

INLINE Ints load_bytes(const void* x, int64_t n) { return n >= 16 ? load_ints(x) : load_ints(Tail<16>(x, n).bytes); }
INLINE Floats load_first(const float* x, int64_t n) { return (Floats)load_bytes(x, 4 * n); }
INLINE Ints load_shorts(const void* x, int64_t n) {
    return n >= LANES ? load_shorts(x) : load_shorts(Tail<8>(x, 2 * n).bytes);
}
INLINE Floats load_first(const f16* x, int64_t n) {
    return n >= LANES ? load(x) : load((const f16*)Tail<8>(x, 2 * n).bytes);
}
INLINE void store_first(float* x, Floats value, int64_t n) {
    Tail<16> tail;
    vst1q_f32((float*)tail.bytes, value);
    tail.put(x, 4 * n);
}
INLINE void store_shorts(void* x, Ints value, int64_t n) {
    Tail<8> tail;
    vst1_u16((uint16_t*)tail.bytes, vmovn_u32((uint32x4_t)value));
    tail.put(x, 2 * n);
}
INLINE void store_int8(void* x, Ints value, int64_t n) {  // beyond -128 .. 127: the nearer of them
    Tail<8> tail;
    const int16x4_t shorts = vqmovn_s32(value);
    vst1_s8((int8_t*)tail.bytes, vqmovn_s16(vcombine_s16(shorts, shorts)));
    tail.put(x, std::min<int64_t>(n, LANES));
}
INLINE void store_uint8(void* x, Ints value) {  // all of it, up to 255
    Tail<8> tail;
    const int16x4_t shorts = vqmovn_s32(value);
    vst1_u8((uint8_t*)tail.bytes, vqmovun_s16(vcombine_s16(shorts, shorts)));
    tail.put(x, LANES);
}

// Four registers of values up to 255, as bytes, the middle ones of each four exchanged.
INLINE void store_bytes_crossed(void* x, Ints a, Ints b, Ints c, Ints d) {
    const Ints four[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i)
        store_uint8(static_cast<uint8_t*>(x) + 4 * i, (Ints)__builtin_shufflevector(four[i], four[i], 0, 2, 1, 3));
}

INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }  // a b + c
INLINE Floats max(Floats a, Floats b) { return vmaxq_f32(a, b); }
INLINE Floats min(Floats a, Floats b) { return vminq_f32(a, b); }
INLINE float greatest(Floats x) { return vmaxvq_f32(x); }
INLINE float total(Floats x) { return vaddvq_f32(x); }
INLINE int total(Ints x) { return vaddvq_s32(x); }
INLINE Floats to_floats(Ints x) { return vcvtq_f32_s32(x); }
INLINE Ints to_ints(Floats x) { return vcvtnq_s32_f32(x); }  // ties to even
INLINE Floats nearest(Floats x) { return vrndnq_f32(x); }
INLINE Floats times_power(Floats x, Floats n) {  // x 2^n for x from 0.5 to 2 and whole n from -126: into its exponent
    return (Floats)((Ints)x + (to_ints(n) << 23));
}
INLINE Ints narrow_f16(Floats x) { return (Ints)vmovl_u16((uint16x4_t)vcvt_f16_f32(x)); }

// The transpose of 4 x 4 values of 32 bits, in two rounds of exchanging halves: of pairs, quads.
inline void transpose(Ints r[LANES]) {
    const int64x2_t a = (int64x2_t)vtrn1q_s32(r[0], r[1]), b = (int64x2_t)vtrn2q_s32(r[0], r[1]);
    const int64x2_t c = (int64x2_t)vtrn1q_s32(r[2], r[3]), d = (int64x2_t)vtrn2q_s32(r[2], r[3]);
    r[0] = (Ints)vtrn1q_s64(a, c);
    r[1] = (Ints)vtrn1q_s64(b, d);
    r[2] = (Ints)vtrn2q_s64(a, c);
    r[3] = (Ints)vtrn2q_s64(b, d);
}

// Lane i is the total of x[i].
INLINE Floats totals(Floats x[LANES]) { return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])); }

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define BF16_PAIRS
INLINE Ints narrow_bf16(Floats x) { return (Ints)vmovl_u16((uint16x4_t)vcvt_bf16_f32(x)); }
INLINE Ints narrow_pair(Floats low, Floats high) { return (Ints)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high); }
// sum + a.even b.even + a.odd b.odd
INLINE Floats dot2(Floats sum, Ints a, Ints b) { return vbfdotq_f32(sum, (bfloat16x8_t)a, (bfloat16x8_t)b); }
#endif

INLINE Ints upper_bytes(Ints x) { return (Ints)vshrq_n_s16((int16x8_t)x, 8); }  // of each 16 bits, as 16 bits

// As in x86.h. Signed bytes are multiplied as such, and so are small ones.
constexpr int RAISED = 0, SMALL = 1 << 20;
INLINE Ints dot2(Ints sum, Ints a, Ints b) {
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return sum + vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}
INLINE Ints raised(Ints x) { return x; }
INLINE Ints dot4_raised(Ints sum, Ints x, Ints integers) {
    const int8x16_t a = (int8x16_t)x, b = (int8x16_t)integers;
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(sum, a, b);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
}
INLINE Ints settle(Ints sum) { return sum; }
#ifdef __ARM_FEATURE_MATMUL_INT8
constexpr int BYTE = 8, SMALL_BITS = 8;  // bits of the unsigned ones that may be used
INLINE Ints dot4(Ints sum, Ints bytes, Ints integers) {
    return vusdotq_s32(sum, (uint8x16_t)bytes, (int8x16_t)integers);
}
#else
constexpr int BYTE = 7, SMALL_BITS = 7;  // as they are multiplied as signed
INLINE Ints dot4(Ints sum, Ints bytes, Ints integers) { return dot4_raised(sum, bytes, integers); }
#endif
INLINE Ints dot4_small(Ints sum, Ints bytes, Ints integers) { return dot4(sum, bytes, integers); }

}  // namespace attnbench
