// Few queries over keys and values in bf16: see decode.h.
#include "decode.h"

namespace attnbench {

constexpr int PAIRS = 2 * LANES;  // bf16 values in a register

inline __mmask32 first_pairs(int64_t n) { return first(n) | __mmask32(first(n - LANES)) << LANES; }

// The scores of one query with up to KEYS keys, `rows` of which exist. q: padded with zeros to a multiple of PAIRS.
inline void scores(const bf16* q, const bf16* k, int64_t k_row, int64_t rows, int64_t dim, float* s) {
    for (int64_t key = 0; key < KEYS; key += LANES) {
        __m512i sums[LANES];
        for (int i = 0; i < LANES; ++i) {
            const int64_t there = key + i < rows ? dim : 0;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; d < there; d += PAIRS) {
                const __m512i part = _mm512_maskz_loadu_epi16(first_pairs(there - d), k + (key + i) * k_row + d);
                sum = dot(sum, _mm512_castsi512_ps(part), _mm512_load_ps(q + d));
            }
            sums[i] = _mm512_castps_si512(sum);
        }
        transpose(sums);  // so that the lanes of a key's sum stand in a column
        __m512 total = _mm512_setzero_ps();
        for (int i = 0; i < LANES; ++i) total = _mm512_add_ps(total, _mm512_castsi512_ps(sums[i]));
        _mm512_store_ps(s + key, total);
    }
}

// O += P V for one row of P over `rows` keys. A register of 32 bf16 values is widened by halves, those of even columns and
// those of odd ones; the sums are kept that way meanwhile.
inline void accumulate(const float* p, const bf16* v, int64_t v_row, int64_t rows, int64_t dim, float* o) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512i upper = _mm512_set1_epi32(0xffff0000);
    for (int64_t c = 0; c < dim; c += 2 * PAIRS) {
        __m512 even[2], odd[2];
        __mmask32 mask[2];
        for (int t = 0; t < 2; ++t) {
            const int64_t at = c + PAIRS * t;
            mask[t] = first_pairs(dim - at);
            const __m512 left = _mm512_maskz_loadu_ps(mask[t], o + at);
            const __m512 right = _mm512_maskz_loadu_ps(mask[t] >> LANES, o + at + LANES);
            even[t] = _mm512_permutex2var_ps(left, evens, right);
            odd[t] = _mm512_permutex2var_ps(left, odds, right);
        }
        for (int64_t j = 0; j < rows; ++j) {
            const __m512 weight = _mm512_set1_ps(p[j]);
            for (int t = 0; t < 2; ++t) {
                const __m512i both = _mm512_maskz_loadu_epi16(mask[t], v + j * v_row + c + PAIRS * t);
                even[t] = _mm512_fmadd_ps(weight, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), even[t]);
                odd[t] = _mm512_fmadd_ps(weight, _mm512_castsi512_ps(_mm512_and_si512(both, upper)), odd[t]);
            }
        }
        for (int t = 0; t < 2; ++t) {
            const int64_t at = c + PAIRS * t;
            _mm512_mask_storeu_ps(o + at, mask[t], _mm512_permutex2var_ps(even[t], low, odd[t]));
            _mm512_mask_storeu_ps(o + at + LANES, mask[t] >> LANES, _mm512_permutex2var_ps(even[t], high, odd[t]));
        }
    }
}

class Bf16Cache {
  public:
    explicit Bf16Cache(const Problem& p)
        : p_(p),
          width_(round_up(p.head_dim, PAIRS)),
          rows_(p.heads / p.kv_heads * p.seq),
          queries_(p.batch * p.kv_heads * rows_ * width_) {
        const int64_t heads = p.batch * p.kv_heads, group = p.heads / p.kv_heads;
        std::fill(queries_ + 0, queries_ + heads * rows_ * width_, bf16(0));
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t row = 0; row < rows_; ++row)
                std::memcpy(queries_ + (head * rows_ + row) * width_,
                            p.query.at<bf16>(head / p.kv_heads, head % p.kv_heads * group + row / p.seq, row % p.seq),
                            p.head_dim * sizeof(bf16));
    }

    // V of these keys, and K of the next ones.
    void fetch(int64_t batch, int64_t head, int64_t key, int64_t rows, int64_t next) const {
        fetch_rows<bf16>(p_.value, batch, head, key, rows, p_.value_dim);
        fetch_rows<bf16>(p_.key, batch, head, key + KEYS, next, p_.head_dim);
    }

    // The products of one query with `rows` keys into s, and what they are still to be multiplied by, log2 e included.
    float scores(int64_t of, int64_t row, int64_t batch, int64_t head, int64_t key, int64_t rows, float* s) const {
        attnbench::scores(queries_ + (of * rows_ + row) * width_, p_.key.at<bf16>(batch, head, key), p_.key.row, rows,
                          p_.head_dim, s);
        return p_.scale * float(M_LOG2E);
    }

    void accumulate(int64_t batch, int64_t head, int64_t key, int64_t rows, const float* weights, float* o) const {
        attnbench::accumulate(weights, p_.value.at<bf16>(batch, head, key), p_.value.row, rows, p_.value_dim, o);
    }

  private:
    const Problem& p_;
    int64_t width_, rows_;
    Buffer<bf16> queries_;
};

}  // namespace attnbench

// `high` of the problem is the causal mask's: row i sees the keys up to i + high. Strips and ranges are not read.
extern "C" int decode(const attnbench::Problem* problem) {
    try {
        attnbench::decode(*problem, attnbench::Bf16Cache(*problem));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
