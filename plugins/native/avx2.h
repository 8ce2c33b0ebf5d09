// AVX2 with FMA and F16C; AVX-VNNI is used where the compiler is told of it.
#pragma once

#include <immintrin.h>

namespace attnbench {

constexpr int LANES = 8;
constexpr int VECTORS = 2;  // 12 sums of 16 registers, 2 for columns, 1 for a row

using Floats = float __attribute__((vector_size(32), may_alias));
using Ints = int32_t __attribute__((vector_size(32), may_alias));

INLINE Ints load_ints(const void* x) { return (Ints)_mm256_loadu_si256((const __m256i*)x); }
INLINE Ints first(int64_t n) {  // all bits of the first n lanes
    static constexpr int32_t ladder[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return load_ints(ladder + LANES - std::clamp<int64_t>(n, 0, LANES));
}

INLINE Floats splat(float x) { return _mm256_set1_ps(x); }
INLINE Ints splat(int x) { return (Ints)_mm256_set1_epi32(x); }
INLINE Floats load(const float* x) { return _mm256_loadu_ps(x); }
INLINE Ints load_shorts(const void* x) { return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)); }
INLINE Floats load(const f16* x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)); }
INLINE void store(float* x, Floats value) { _mm256_storeu_ps(x, value); }
INLINE void store_ints(void* x, Ints value) { _mm256_storeu_si256((__m256i*)x, (__m256i)value); }

INLINE Floats load_first(const float* x, int64_t n) { return _mm256_maskload_ps(x, (__m256i)first(n)); }
INLINE Ints load_bytes(const void* x, int64_t n) { return n >= 32 ? load_ints(x) : load_ints(Tail<32>(x, n).bytes); }
INLINE Ints load_shorts(const void* x, int64_t n) {
    return n >= LANES ? load_shorts(x) : load_shorts(Tail<16>(x, 2 * n).bytes);
}
INLINE Floats load_first(const f16* x, int64_t n) {
    return n >= LANES ? load(x) : _mm256_cvtph_ps(_mm_load_si128((const __m128i*)Tail<16>(x, 2 * n).bytes));
}
INLINE void store_first(float* x, Floats value, int64_t n) { _mm256_maskstore_ps(x, (__m256i)first(n), value); }
INLINE __m128i low_shorts(Ints x) {  // of values up to 65535
    return _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
}
INLINE void store_shorts(void* x, Ints value, int64_t n) {
    Tail<16> tail;
    _mm_store_si128((__m128i*)tail.bytes, low_shorts(value));
    n >= LANES ? tail.put(x, 16) : tail.put(x, 2 * n);
}
INLINE __m128i narrow_shorts(Ints x) {  // to 16 bits, the nearest that there is
    return _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
}
INLINE void store_int8(void* x, Ints value, int64_t n) {  // beyond -128 .. 127: the nearer of them
    Tail<16> tail;
    _mm_store_si128((__m128i*)tail.bytes, _mm_packs_epi16(narrow_shorts(value), __m128i{}));
    n >= LANES ? tail.put(x, 8) : tail.put(x, n);
}
// Four registers of values up to 255, as bytes, the middle ones of each four exchanged.
INLINE void store_bytes_crossed(void* x, Ints a, Ints b, Ints c, Ints d) {
    const __m256i low = _mm256_packs_epi32((__m256i)a, (__m256i)b), high = _mm256_packs_epi32((__m256i)c, (__m256i)d);
    // Four of a, of b, of c, of d, and the same once more.
    const __m256i bytes = _mm256_packus_epi16(low, high);
    const __m256i cross = _mm256_broadcastsi128_si256(_mm_set_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i*)x, _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(bytes, cross), order));
}
INLINE void store_uint8(void* x, Ints value) {  // all of it, up to 255
    _mm_storel_epi64((__m128i*)x, _mm_packus_epi16(narrow_shorts(value), __m128i{}));
}

INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }  // a b + c
INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
INLINE float greatest(Floats x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
INLINE float total(Floats x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
INLINE int total(Ints x) {
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
INLINE Floats to_floats(Ints x) { return _mm256_cvtepi32_ps((__m256i)x); }
INLINE Ints to_ints(Floats x) { return (Ints)_mm256_cvtps_epi32(x); }  // ties to even
INLINE Floats nearest(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Floats times_power(Floats x, Floats n) {  // x 2^n for x from 0.5 to 2 and whole n from -126: into its exponent
    return (Floats)((Ints)x + (to_ints(n) << 23));
}
INLINE Ints narrow_f16(Floats x) {
    return (Ints)_mm256_cvtepu16_epi32(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The last round of a transpose, of eights.
INLINE void exchange_far(Ints x[LANES]) {
    auto* r = reinterpret_cast<__m256i*>(x);
    __m256i t[LANES];
    for (int j = 0; j < 4; ++j) {
        t[j] = _mm256_permute2x128_si256(r[j], r[j + 4], 0x20);
        t[j + 4] = _mm256_permute2x128_si256(r[j], r[j + 4], 0x31);
    }
    std::copy(t, t + LANES, r);
}

// Lane i is the total of x[i]: in three rounds, each of which halves what is left of pairs, quads, eights.
INLINE Floats totals(Floats x[LANES]) {
    Floats y[4], z[2];
    for (int i = 0; i < 4; ++i)
        y[i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]) + _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 2; ++i) {
        const __m256d a = (__m256d)y[2 * i], b = (__m256d)y[2 * i + 1];
        z[i] = (Floats)_mm256_unpacklo_pd(a, b) + (Floats)_mm256_unpackhi_pd(a, b);
    }
    return _mm256_permute2f128_ps(z[0], z[1], 0x20) + _mm256_permute2f128_ps(z[0], z[1], 0x31);
}

INLINE Ints upper_bytes(Ints x) { return (Ints)_mm256_srai_epi16((__m256i)x, 8); }  // of each 16 bits, as 16 bits

INLINE Ints lower_of_pairs(Ints a, Ints b) { return (Ints)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b); }
INLINE Ints upper_of_pairs(Ints a, Ints b) { return (Ints)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b); }
INLINE Ints lower_of_quads(Ints a, Ints b) { return (Ints)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b); }
INLINE Ints upper_of_quads(Ints a, Ints b) { return (Ints)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b); }
INLINE Ints pair_bytes(Ints bytes, Ints integers) { return (Ints)_mm256_maddubs_epi16((__m256i)bytes, (__m256i)integers); }
INLINE Ints pair_shorts(Ints a, Ints b) { return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
INLINE Ints add_shorts(Ints a, Ints b) {  // as an intrinsic, GCC 12 spills it
    asm("vpaddw %1, %0, %0" : "+x"(a) : "x"(b));
    return a;
}
INLINE Ints abs_bytes(Ints x) { return (Ints)_mm256_abs_epi8((__m256i)x); }
INLINE Ints turn_bytes(Ints x, Ints sign) { return (Ints)_mm256_sign_epi8((__m256i)x, (__m256i)sign); }
#ifdef __AVXVNNI__
#define VNNI "%{vex%} "  // in extended asm bare braces mean dialects
#endif

}  // namespace attnbench

#include "x86.h"
