// AVX-512: its foundation with BW, DQ and VL; bf16 and VNNI are used where the compiler is told of them.
#pragma once

#include <immintrin.h>

namespace attnbench {

constexpr int LANES = 16;
constexpr int VECTORS = 4;  // 24 sums of 32 registers, 4 for columns, 1 for a row

using Floats = float __attribute__((vector_size(64), may_alias));
using Ints = int32_t __attribute__((vector_size(64), may_alias));

INLINE __mmask16 lanes(int64_t n) { return n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0; }
INLINE __mmask64 places(int64_t n) { return n >= 64 ? ~0ull : n > 0 ? (1ull << n) - 1 : 0; }
INLINE Ints first(int64_t n) { return (Ints)_mm512_movm_epi32(lanes(n)); }  // all bits of the first n lanes

INLINE Floats splat(float x) { return _mm512_set1_ps(x); }
INLINE Ints splat(int x) { return (Ints)_mm512_set1_epi32(x); }
INLINE Floats load(const float* x) { return _mm512_loadu_ps(x); }
INLINE Ints load_ints(const void* x) { return (Ints)_mm512_loadu_si512(x); }
INLINE Ints load_shorts(const void* x) { return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)); }
INLINE Floats load(const f16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)); }
INLINE void store(float* x, Floats value) { _mm512_storeu_ps(x, value); }
INLINE void store_ints(void* x, Ints value) { _mm512_storeu_si512(x, (__m512i)value); }

INLINE Floats load_first(const float* x, int64_t n) { return _mm512_maskz_loadu_ps(lanes(n), x); }
INLINE Ints load_bytes(const void* x, int64_t n) { return (Ints)_mm512_maskz_loadu_epi8(places(n), x); }
INLINE Ints load_shorts(const void* x, int64_t n) {
    return (Ints)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), x));
}
INLINE Floats load_first(const f16* x, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), x)); }
INLINE void store_first(float* x, Floats value, int64_t n) { _mm512_mask_storeu_ps(x, lanes(n), value); }
INLINE void store_shorts(void* x, Ints value, int64_t n) {
    _mm256_mask_storeu_epi16(x, lanes(n), _mm512_cvtepi32_epi16((__m512i)value));
}
INLINE void store_int8(void* x, Ints value, int64_t n) {  // beyond -128 .. 127: the nearer of them
    _mm512_mask_cvtsepi32_storeu_epi8(x, lanes(n), (__m512i)value);
}
// Four registers of values up to 255, as bytes, the middle ones of each four exchanged.
INLINE void store_bytes_crossed(void* x, Ints a, Ints b, Ints c, Ints d) {
    const __m512i low = _mm512_packs_epi32((__m512i)a, (__m512i)b), high = _mm512_packs_epi32((__m512i)c, (__m512i)d);
    // Four of a, of b, of c, of d, and so on.
    const __m512i bytes = _mm512_packus_epi16(low, high);
    const __m512i cross = _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(x, _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(bytes, cross)));
}
INLINE void store_uint8(void* x, Ints value) {  // all of it, up to 255
    _mm_storeu_si128((__m128i*)x, _mm512_cvtusepi32_epi8((__m512i)value));
}

INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c
INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE float greatest(Floats x) { return _mm512_reduce_max_ps(x); }
INLINE float total(Floats x) { return _mm512_reduce_add_ps(x); }
INLINE int total(Ints x) { return _mm512_reduce_add_epi32((__m512i)x); }
INLINE Floats to_floats(Ints x) { return _mm512_cvtepi32_ps((__m512i)x); }
INLINE Ints to_ints(Floats x) { return (Ints)_mm512_cvtps_epi32(x); }  // ties to even
INLINE Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }  // x 2^n
INLINE Ints narrow_f16(Floats x) {
    return (Ints)_mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The last rounds of a transpose, of eights and of sixteens.
INLINE void exchange_far(Ints x[LANES]) {
    auto* r = reinterpret_cast<__m512i*>(x);
    __m512i t[LANES];
    for (int i = 0; i < LANES; i += 8)
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

// Lane i is the total of x[i]: in four rounds, each of which halves what is left of pairs, quads, eights, sixteens.
INLINE Floats totals(Floats x[LANES]) {
    Floats y[8], z[4], w[2];
    for (int i = 0; i < 8; ++i)
        y[i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]) + _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 4; ++i) {
        const __m512d a = (__m512d)y[2 * i], b = (__m512d)y[2 * i + 1];
        z[i] = (Floats)_mm512_unpacklo_pd(a, b) + (Floats)_mm512_unpackhi_pd(a, b);
    }
    for (int i = 0; i < 2; ++i)
        w[i] = _mm512_shuffle_f32x4(z[2 * i], z[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(z[2 * i], z[2 * i + 1], 0xdd);
    return _mm512_shuffle_f32x4(w[0], w[1], 0x88) + _mm512_shuffle_f32x4(w[0], w[1], 0xdd);
}

#ifdef __AVX512BF16__
#define BF16_PAIRS
INLINE Ints narrow_bf16(Floats x) { return (Ints)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }
INLINE Ints narrow_pair(Floats low, Floats high) { return (Ints)_mm512_cvtne2ps_pbh(high, low); }
// sum + a.even b.even + a.odd b.odd
INLINE Floats dot2(Floats sum, Ints a, Ints b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#endif

INLINE Ints upper_bytes(Ints x) { return (Ints)_mm512_srai_epi16((__m512i)x, 8); }  // of each 16 bits, as 16 bits

INLINE Ints lower_of_pairs(Ints a, Ints b) { return (Ints)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b); }
INLINE Ints upper_of_pairs(Ints a, Ints b) { return (Ints)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b); }
INLINE Ints lower_of_quads(Ints a, Ints b) { return (Ints)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b); }
INLINE Ints upper_of_quads(Ints a, Ints b) { return (Ints)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b); }
INLINE Ints pair_bytes(Ints bytes, Ints integers) { return (Ints)_mm512_maddubs_epi16((__m512i)bytes, (__m512i)integers); }
INLINE Ints pair_shorts(Ints a, Ints b) { return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
INLINE Ints add_shorts(Ints a, Ints b) { return (Ints)_mm512_add_epi16((__m512i)a, (__m512i)b); }
INLINE Ints abs_bytes(Ints x) { return (Ints)_mm512_abs_epi8((__m512i)x); }
INLINE Ints turn_bytes(Ints x, Ints sign) {
    return (Ints)_mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)sign), __m512i{}, (__m512i)x);
}
#ifdef __AVX512VNNI__
#define VNNI ""
#endif

}  // namespace attnbench

#include "x86.h"
