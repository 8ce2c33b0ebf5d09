// What the kernels share: the tile of scores that stays in registers, the online softmax, and how operands are packed.
//
// A tile is ROWS query rows x KEYS keys: 24 accumulators of AVX-512's 32 registers, 4 more for the keys and 1 for the
// query. bf16 products come from VDPBF16PS, which multiplies pairs of bf16 and adds both products to a float32; so all
// operands lie in pairs: of dims for Q K^T, of keys for P V.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace attnbench {

using bf16 = uint16_t;

constexpr int LANES = 16;              // float32 values in a register
constexpr int ROWS = 6;                // query rows of a tile
constexpr int VECTORS = 4;             // registers across a tile
constexpr int KEYS = VECTORS * LANES;  // keys of a tile, or value columns
constexpr float LOWEST = -1e30f;       // a running maximum before any key was seen

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline __mmask16 first(int64_t n) {  // the mask of the first n lanes; of all, or of none
    return n >= LANES ? 0xffff : n > 0 ? (1u << n) - 1 : 0;
}

inline __m512 load_float(const bf16* x, __mmask16 mask) {  // up to 16 values, widened
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

inline __m512 load_pair(const bf16* pair) {  // two bf16, into every lane
    int both;
    std::memcpy(&both, pair, sizeof both);
    return _mm512_castsi512_ps(_mm512_set1_epi32(both));
}

inline __m512 dot(__m512 sum, __m512 a, __m512 b) {  // sum + a.even * b.even + a.odd * b.odd, bf16 pairs in a and b
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// 2^x = 2^n 2^f with n = round(x) and |f| <= 1/2; 2^f by the cubic whose greatest relative error is least,
// 1e-4, which bf16 (4e-3) does not see; it is exact at 0.
inline __m512 exp2(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.f));
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.05500906f), _mm512_set1_ps(0.24221097f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.6932829f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(p, n);
}

// ---- packing ----------------------------------------------------------------------------------------------------

// The transpose of 16 x 16 values of 32 bits, in four rounds of exchanging halves: of pairs, quads, eights, sixteens.
inline void transpose(__m512i r[LANES]) {
    __m512i t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
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

// Rows of 4-byte groups (2 bf16 dims, or 4 int8 dims) to [group][KEYS], so that a register holds one group of 16 keys.
// rows: how many of the KEYS rows exist; the others become 0. width: bytes of a row.
inline void pack_groups(const void* from, int64_t row_bytes, int64_t rows, int64_t width, void* to) {
    const auto* source = static_cast<const char*>(from);
    auto* target = static_cast<char*>(to);
    for (int64_t key = 0; key < KEYS; key += LANES)
        for (int64_t at = 0; at < width; at += 64) {
            const int64_t bytes = width - at < 64 ? width - at : 64;
            const __mmask64 mask = bytes == 64 ? ~0ull : (1ull << bytes) - 1;
            __m512i r[LANES];
            for (int i = 0; i < LANES; ++i)
                r[i] = key + i < rows ? _mm512_maskz_loadu_epi8(mask, source + (key + i) * row_bytes + at)
                                      : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < LANES && 4 * i < bytes; ++i)
                _mm512_store_si512(target + ((at / 4 + i) * KEYS + key) * 4, r[i]);
        }
}

// Rows 2j and 2j + 1 of V to [pair of keys][columns][2], `columns` a multiple of LANES of which `width` exist.
inline void pack_pairs(const bf16* from, int64_t row, int64_t rows, int64_t width, int64_t columns, bf16* to) {
    for (int64_t key = 0; key < KEYS; key += 2)
        for (int64_t c = 0; c < columns; c += LANES, to += 2 * LANES) {
            const __mmask16 mask = first(width - c);
            __m512i pair[2];
            for (int i = 0; i < 2; ++i) {
                const __mmask16 there = key + i < rows ? mask : 0;
                pair[i] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from + (key + i) * row + c));
            }
            _mm512_store_si512(to, _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16)));
        }
}

// ---- stages -----------------------------------------------------------------------------------------------------

// C = A B, or += where `add`, for R rows and V registers of columns: S = Q K^T by pairs of dims, and O += P V by pairs of
// keys. a: R rows of bf16 pairs, a_row apart; b: [pair][V * LANES][2]; c: R rows, c_row apart.
template <int R, int V, bool add>
void product(const bf16* a, int64_t a_row, const bf16* b, int64_t pairs, float* c, int64_t c_row) {
    __m512 sum[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < V; ++t) sum[r][t] = add ? _mm512_load_ps(c + r * c_row + LANES * t) : _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; ++pair, b += 2 * V * LANES) {
        __m512 row[V];
#pragma GCC unroll 4
        for (int t = 0; t < V; ++t) row[t] = _mm512_load_ps(b + 2 * LANES * t);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m512 factor = load_pair(a + r * a_row + 2 * pair);
#pragma GCC unroll 4
            for (int t = 0; t < V; ++t) sum[r][t] = dot(sum[r][t], row[t], factor);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < V; ++t) _mm512_store_ps(c + r * c_row + LANES * t, sum[r][t]);
}

// A row's scores outside [from, to) are hidden: they become -inf, whose power is nothing.
inline void hide(float* s, int64_t n, int64_t from, int64_t to) {
    std::fill(s, s + std::clamp<int64_t>(from, 0, n), -INFINITY);
    std::fill(s + std::clamp<int64_t>(to, 0, n), s + n, -INFINITY);
}

inline float maximum(const float* s, int64_t n) {  // n: a multiple of KEYS
    __m512 top[VECTORS];
    for (int t = 0; t < VECTORS; ++t) top[t] = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < n; j += KEYS)
        for (int t = 0; t < VECTORS; ++t) top[t] = _mm512_max_ps(top[t], _mm512_load_ps(s + j + LANES * t));
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])));
}

// P = 2^(scale S - top) in bf16, and its sum before rounding. n: a multiple of 2 * LANES.
inline float powers(const float* s, int64_t n, float scale, float top, bf16* p) {
    const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(-top);
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t j = 0; j < n; j += 2 * LANES) {
        const __m512 low = exp2(_mm512_fmadd_ps(_mm512_load_ps(s + j), factor, shift));
        const __m512 high = exp2(_mm512_fmadd_ps(_mm512_load_ps(s + j + LANES), factor, shift));
        sum[0] = _mm512_add_ps(sum[0], low);
        sum[1] = _mm512_add_ps(sum[1], high);
        _mm512_store_si512(p + j, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
}

// x *= factor; n: a multiple of LANES.
inline void rescale(float* x, int64_t n, float factor) {
    const __m512 by = _mm512_set1_ps(factor);
    for (int64_t i = 0; i < n; i += LANES) _mm512_store_ps(x + i, _mm512_mul_ps(_mm512_load_ps(x + i), by));
}

// The online softmax (Milakov and Gimelshein 2018, algorithm 3): where `peak` raises a row's maximum from m to m', its O
// and its sum so far are multiplied by 2^(m - m').
inline void raise(float peak, float& top, float& sum, float* o, int64_t columns) {
    if (peak <= top) return;
    if (sum > 0) {
        const float factor = std::exp2(top - peak);
        sum *= factor;
        rescale(o, columns, factor);
    }
    top = peak;
}

// The log of sum 2^top, a row's sum of exponentials.
inline float log_sum_exp(float top, float sum) { return (top + std::log2(sum)) * float(M_LN2); }

// A row of O * factor in bf16, n values.
inline void finish(const float* o, int64_t n, float factor, bf16* out) {
    const __m512 by = _mm512_set1_ps(factor);
    for (int64_t i = 0; i < n; i += LANES) {
        const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(o + i), by));
        _mm256_mask_storeu_epi16(out + i, first(n - i), narrow);
    }
}

}  // namespace attnbench
