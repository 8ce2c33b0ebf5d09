// SageAttention's recipe (Zhang 2024, arXiv 2410.02367) on AVX-512 VNNI: Q and K quantized to int8 by row, K minus its
// mean over tokens; and V by column with P in 8 bits, or both in bf16.
//
// VPDPBUSD multiplies an unsigned byte by a signed one, four pairs at a time, and adds to int32. So K is stored with
// 128 added, and 128 times the sum of the query's integers is taken off again; P is never negative as it is.
#include "bf16_values.h"

namespace attnbench {

constexpr float LEVELS = 127;    // of a signed byte
constexpr float WEIGHTS = 255;   // of an unsigned one
constexpr float TINIEST = 1e-30f;

// sum + the products of four unsigned and four signed bytes in each lane. As an intrinsic, GCC 12 spills each sum.
inline __attribute__((always_inline)) __m512i dot4(__m512i sum, __m512i bytes, __m512i integers) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(integers));
    return sum;
}

inline __m512i load_four(const void* bytes) {  // four bytes, into every lane
    int all;
    std::memcpy(&all, bytes, sizeof all);
    return _mm512_set1_epi32(all);
}

// Equation 2: x - mean to int8 with the scale peak / 127, which is returned. mean: nullptr for none.
inline float quantize(const bf16* x, const float* mean, int64_t n, int8_t* to) {
    const auto value = [&](int64_t i) {
        const __m512 raw = load_float(x + i, first(n - i));
        return mean ? _mm512_sub_ps(raw, _mm512_maskz_loadu_ps(first(n - i), mean + i)) : raw;
    };
    __m512 peak = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES) peak = _mm512_max_ps(peak, _mm512_abs_ps(value(i)));
    const float scale = std::max(_mm512_reduce_max_ps(peak), TINIEST) / LEVELS;
    for (int64_t i = 0; i < n; i += LANES) {
        const __m512i integers = _mm512_cvtps_epi32(_mm512_div_ps(value(i), _mm512_set1_ps(scale)));  // ties to even
        _mm512_mask_cvtsepi32_storeu_epi8(to + i, first(n - i), integers);
    }
    return scale;
}

class Int8Keys {
  public:
    class Queries {
      public:
        explicit Queries(const Problem& p)
            : row_(round_up(p.head_dim, 4)), data_(p.strip_rows * row_), scale_(p.strip_rows), shift_(p.strip_rows) {}

        void pack(const Problem& p, int64_t batch, int64_t head, const Strip& strip) {
            for (int64_t i = 0; i < strip.end - strip.start; ++i) {
                int8_t* to = data_ + i * row_;
                std::fill(to + row_ - 4, to + row_, 0);
                const bf16* from = p.query.at<bf16>(batch, head, strip.start + i);
                scale_[i] = quantize(from, nullptr, p.head_dim, to) * p.scale * float(M_LOG2E);
                int sum = 0;
                for (int64_t d = 0; d < p.head_dim; ++d) sum += to[d];
                shift_[i] = -128 * sum;
            }
        }

        float scale(int64_t row) const { return scale_[row]; }
        int shift(int64_t row) const { return shift_[row]; }
        const int8_t* at(int64_t row) const { return data_ + row * row_; }
        int64_t row() const { return row_; }

      private:
        int64_t row_;
        Buffer<int8_t> data_;
        Buffer<float> scale_;  // of the query, of the scores, and log2 e
        Buffer<int> shift_;
    };

    explicit Int8Keys(const Problem& p)
        : fours_(round_up(p.head_dim, 4) / 4),
          data_(p.packed_keys() * 4 * fours_),
          scale_(p.packed_keys()),
          mean_(4 * fours_) {}

    // Equation 5's mean of K over tokens.
    void measure(const Problem& p, int64_t batch, int64_t head) {
        for (int64_t d = 0; d < p.head_dim; d += LANES) {
            const __mmask16 mask = first(p.head_dim - d);
            __m512 sum[4] = {};
            for (int64_t j = 0; j < p.kv_seq; ++j)
                sum[j % 4] = _mm512_add_ps(sum[j % 4], load_float(p.key.at<bf16>(batch, head, j) + d, mask));
            const __m512 total = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
            _mm512_mask_storeu_ps(mean_ + d, mask, _mm512_div_ps(total, _mm512_set1_ps(p.kv_seq)));
        }
    }

    // K to [block of keys][four dims][KEYS][4], unsigned.
    void pack(const Problem& p, int64_t batch, int64_t head, int64_t key, int64_t rows) {
        const int64_t width = 4 * fours_;
        alignas(64) uint8_t block[KEYS * MAX_DIM];
        for (int64_t j = 0; j < rows; ++j) {
            uint8_t* row = block + j * width;
            std::fill(row + width - 4, row + width, 0);
            scale_[key + j] = quantize(p.key.at<bf16>(batch, head, key + j), mean_, p.head_dim,
                                       reinterpret_cast<int8_t*>(row));
            for (int64_t d = 0; d < width; ++d) row[d] ^= 128;
        }
        std::fill(scale_ + key + rows, scale_ + key + KEYS, 0.f);
        pack_groups(block, width, rows, width, data_ + key * width);
    }

    template <int R>
    void scores(const Queries& queries, int64_t row, int64_t key, float* s, int64_t s_row) const {
        const int8_t* q = queries.at(row);
        const uint8_t* k = data_ + key * 4 * fours_;
        __m512i sum[R][VECTORS];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < VECTORS; ++t) sum[r][t] = _mm512_set1_epi32(queries.shift(row + r));
        for (int64_t four = 0; four < fours_; ++four, k += 4 * KEYS) {
            __m512i keys[VECTORS];
#pragma GCC unroll 4
            for (int t = 0; t < VECTORS; ++t) keys[t] = _mm512_load_si512(k + 4 * LANES * t);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const __m512i query = load_four(q + r * queries.row() + 4 * four);
#pragma GCC unroll 4
                for (int t = 0; t < VECTORS; ++t) sum[r][t] = dot4(sum[r][t], keys[t], query);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < VECTORS; ++t) {
                const __m512 scale = _mm512_load_ps(scale_ + key + LANES * t);
                _mm512_store_ps(s + r * s_row + LANES * t, _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][t]), scale));
            }
    }

  private:
    static constexpr int MAX_DIM = 256;

    int64_t fours_;
    Buffer<uint8_t> data_;
    Buffer<float> scale_, mean_;
};

class Int8Values {
  public:
    using Weight = uint8_t;

    explicit Int8Values(const Problem& p)
        : length_(p.packed_keys()), columns_(p.columns()), data_(length_ * columns_), scale_(columns_) {}

    // The scale of a column: its peak / 127.
    void measure(const Problem& p, int64_t batch, int64_t head) {
        for (int64_t c = 0; c < columns_; c += LANES) {
            const __mmask16 mask = first(p.value_dim - c);
            __m512 peak = _mm512_set1_ps(TINIEST);
            for (int64_t j = 0; j < p.kv_seq; ++j)
                peak = _mm512_max_ps(peak, _mm512_abs_ps(load_float(p.value.at<bf16>(batch, head, j) + c, mask)));
            _mm512_store_ps(scale_ + c, _mm512_div_ps(peak, _mm512_set1_ps(LEVELS)));
        }
    }

    // V to [group of columns][four keys][columns of the group][4].
    void pack(const Problem& p, int64_t batch, int64_t head, int64_t key, int64_t rows) {
        for (int64_t c = 0; c < columns_; c += KEYS) {
            int8_t* to = data_ + c * length_ + key * width(c);
            for (int64_t j = 0; j < KEYS; j += 4)
                for (int64_t at = c; at < c + width(c); at += LANES, to += 4 * LANES) {
                    const __m512 scale = _mm512_load_ps(scale_ + at);
                    __m512i four = _mm512_setzero_si512();
                    for (int i = 0; i < 4; ++i) {
                        const __mmask16 mask = j + i < rows ? first(p.value_dim - at) : 0;
                        const bf16* from = p.value.at<bf16>(batch, head, key + (mask ? j + i : 0)) + at;
                        const __m512i integers = _mm512_cvtps_epi32(_mm512_div_ps(load_float(from, mask), scale));
                        const __m512i byte = _mm512_and_si512(integers, _mm512_set1_epi32(255));
                        four = _mm512_or_si512(four, _mm512_sllv_epi32(byte, _mm512_set1_epi32(8 * i)));
                    }
                    _mm512_store_si512(to, four);
                }
        }
    }

    // As Bf16Values, but P is scaled by the maximum of these keys alone, so that it uses all 8 bits. Returns what
    // turns its integers into weights.
    float weigh(const float* s, int64_t n, float scale, float& top, float& sum, float* o, int64_t columns,
                uint8_t* p) const {
        const float peak = maximum(s, n) * scale;
        if (peak == -INFINITY) {  // the row sees none of these keys
            std::fill(p, p + n, 0);
            return 0;
        }
        raise(peak, top, sum, o, columns);
        const float weight = std::exp2(peak - top) / WEIGHTS;
        sum += weight * bytes(s, n, scale, peak - std::log2(WEIGHTS), p);
        return weight;
    }

    template <int R>
    void accumulate(const uint8_t* p, int64_t p_row, const float* factors, int64_t key, int64_t n, float* o,
                    int64_t o_row) const {
        for (int64_t c = 0; c < columns_; c += KEYS) {
            const int8_t* v = data_ + c * length_ + key * width(c);
            switch (width(c) / LANES) {
                case 1: product<R, 1>(p, p_row, factors, v, scale_ + c, n / 4, o + c, o_row); break;
                case 2: product<R, 2>(p, p_row, factors, v, scale_ + c, n / 4, o + c, o_row); break;
                case 3: product<R, 3>(p, p_row, factors, v, scale_ + c, n / 4, o + c, o_row); break;
                default: product<R, 4>(p, p_row, factors, v, scale_ + c, n / 4, o + c, o_row);
            }
        }
    }

  private:
    // P = 2^(scale S - top) as unsigned bytes, and its sum before rounding.
    static float bytes(const float* s, int64_t n, float scale, float top, uint8_t* p) {
        const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(-top);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < n; j += LANES) {
            const __m512 power = exp2(_mm512_fmadd_ps(_mm512_load_ps(s + j), factor, shift));
            sum = _mm512_add_ps(sum, power);
            _mm_store_si128(reinterpret_cast<__m128i*>(p + j), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(power)));
        }
        return _mm512_reduce_add_ps(sum);
    }

    // O += (P V) * factor of the row * scale of the column.
    template <int R, int V>
    static void product(const uint8_t* p, int64_t p_row, const float* factors, const int8_t* v, const float* scale,
                        int64_t fours, float* o, int64_t o_row) {
        __m512i sum[R][V];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < V; ++t) sum[r][t] = _mm512_setzero_si512();
        for (int64_t four = 0; four < fours; ++four, v += 4 * V * LANES) {
            __m512i values[V];
#pragma GCC unroll 4
            for (int t = 0; t < V; ++t) values[t] = _mm512_load_si512(v + 4 * LANES * t);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const __m512i weight = load_four(p + r * p_row + 4 * four);
#pragma GCC unroll 4
                for (int t = 0; t < V; ++t) sum[r][t] = dot4(sum[r][t], weight, values[t]);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < V; ++t) {
                float* to = o + r * o_row + LANES * t;
                const __m512 by = _mm512_mul_ps(_mm512_set1_ps(factors[r]), _mm512_load_ps(scale + LANES * t));
                _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][t]), by, _mm512_load_ps(to)));
            }
    }

    int64_t width(int64_t c) const { return std::min<int64_t>(KEYS, columns_ - c); }

    int64_t length_, columns_;
    Buffer<int8_t> data_;
    Buffer<float> scale_;
};

}  // namespace attnbench

extern "C" int int8_qk(const attnbench::Problem* problem) {
    using namespace attnbench;
    return run<Int8Keys, Bf16Values>(*problem);
}

extern "C" int int8_qkpv(const attnbench::Problem* problem) {
    using namespace attnbench;
    return run<Int8Keys, Int8Values>(*problem);
}
