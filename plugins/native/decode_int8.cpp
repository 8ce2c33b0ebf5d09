// Few queries over a cache of int8 keys and values with a scale for each token: see decode.h. It reads half of what bf16
// would take.
//
// VPDPBUSD multiplies unsigned bytes by signed ones. Keys become unsigned by adding 128, which is flipping a bit, and 128
// times the sum of the query's integers is taken off again.
#include "decode.h"

namespace attnbench {

constexpr int BYTES = 64;  // in a register

inline __mmask64 first_bytes(int64_t n) { return n >= BYTES ? ~0ull : n > 0 ? (1ull << n) - 1 : 0; }

// Mirrored in attention.py: scales (batch, head, token) of query, key and value.
struct Scales {
    Tensor query, key, value;
};

// Integer products of one query with up to KEYS keys, `rows` of which exist, times the keys' scales. q: dim bytes.
inline void scores(const int8_t* q, const int8_t* k, int64_t k_row, const float* k_scale, int64_t scale_row,
                   int64_t rows, int64_t dim, float* s) {
    const __m512i flip = _mm512_set1_epi8(-128);
    int shift = 0;
    for (int64_t d = 0; d < dim; ++d) shift -= 128 * q[d];
    for (int64_t key = 0; key < KEYS; key += LANES) {
        __m512i sums[LANES];
        for (int i = 0; i < LANES; ++i) {
            const int64_t there = key + i < rows ? dim : 0;
            __m512i sum = _mm512_setzero_si512();
            for (int64_t d = 0; d < there; d += BYTES) {
                const __mmask64 mask = first_bytes(there - d);
                const __m512i bytes = _mm512_maskz_loadu_epi8(mask, k + (key + i) * k_row + d);
                sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(bytes, flip), _mm512_maskz_loadu_epi8(mask, q + d));
            }
            sums[i] = sum;
        }
        transpose(sums);  // so that the lanes of a key's sum stand in a column
        __m512i total = _mm512_set1_epi32(shift);
        for (int i = 0; i < LANES; ++i) total = _mm512_add_epi32(total, sums[i]);
        alignas(64) float scale[LANES] = {};
        for (int i = 0; i < LANES && key + i < rows; ++i) scale[i] = k_scale[(key + i) * scale_row];
        _mm512_store_ps(s + key, _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_load_ps(scale)));
    }
}

// O += P V for one row of P over `rows` keys, whose scales P takes in.
inline void accumulate(const float* p, const int8_t* v, int64_t v_row, const float* v_scale, int64_t scale_row,
                       int64_t rows, int64_t dim, float* o) {
    for (int64_t c = 0; c < dim; c += 4 * LANES) {
        const __mmask64 mask = first_bytes(dim - c);
        __m512 sum[4];
        for (int t = 0; t < 4; ++t) sum[t] = _mm512_maskz_loadu_ps(__mmask16(mask >> LANES * t), o + c + LANES * t);
        for (int64_t j = 0; j < rows; ++j) {
            const __m512 weight = _mm512_set1_ps(p[j] * v_scale[j * scale_row]);
            const __m512i bytes = _mm512_maskz_loadu_epi8(mask, v + j * v_row + c);
            const auto add = [&](int t, __m128i quarter) __attribute__((always_inline)) {
                sum[t] = _mm512_fmadd_ps(weight, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter)), sum[t]);
            };
            add(0, _mm512_extracti32x4_epi32(bytes, 0));
            add(1, _mm512_extracti32x4_epi32(bytes, 1));
            add(2, _mm512_extracti32x4_epi32(bytes, 2));
            add(3, _mm512_extracti32x4_epi32(bytes, 3));
        }
        for (int t = 0; t < 4; ++t) _mm512_mask_storeu_ps(o + c + LANES * t, __mmask16(mask >> LANES * t), sum[t]);
    }
}

class Int8Cache {
  public:
    Int8Cache(const Problem& p, const Scales& scales) : p_(p), scales_(scales) {}

    // V of these keys, and K of the next ones.
    void fetch(int64_t batch, int64_t head, int64_t key, int64_t rows, int64_t next) const {
        fetch_rows<int8_t>(p_.value, batch, head, key, rows, p_.value_dim);
        fetch_rows<int8_t>(p_.key, batch, head, key + KEYS, next, p_.head_dim);
    }

    // The products of one query with `rows` keys into s, and what they are still to be multiplied by, log2 e included.
    float scores(int64_t, int64_t row, int64_t batch, int64_t head, int64_t key, int64_t rows, float* s) const {
        const int64_t query_head = head * (p_.heads / p_.kv_heads) + row / p_.seq;
        attnbench::scores(p_.query.at<int8_t>(batch, query_head, row % p_.seq), p_.key.at<int8_t>(batch, head, key),
                          p_.key.row, scales_.key.at<float>(batch, head, key), scales_.key.row, rows, p_.head_dim, s);
        return *scales_.query.at<float>(batch, query_head, row % p_.seq) * p_.scale * float(M_LOG2E);
    }

    void accumulate(int64_t batch, int64_t head, int64_t key, int64_t rows, const float* weights, float* o) const {
        attnbench::accumulate(weights, p_.value.at<int8_t>(batch, head, key), p_.value.row,
                              scales_.value.at<float>(batch, head, key), scales_.value.row, rows, p_.value_dim, o);
    }

  private:
    const Problem& p_;
    const Scales& scales_;
};

}  // namespace attnbench

// query, key and value are int8, out is bf16; the rest as for `decode`.
extern "C" int decode_int8(const attnbench::Problem* problem, const attnbench::Scales* scales) {
    try {
        attnbench::decode(*problem, attnbench::Int8Cache(*problem, *scales));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
