// SageAttention's recipe (Zhang 2024, arXiv 2410.02367): Q and K quantized to int8 by row, K minus its mean over tokens;
// and V by column with P in unsigned bytes, or both as exact attention has them.
//
// The product takes unsigned bytes with signed ones, and adds four of them to int32. So K is stored with OFFSET added, and
// OFFSET times the sum of the query's integers is taken off again; P is never negative as it is. Where the CPU adds pairs in
// 16 bits, an unsigned byte may have BYTE = 7 bits: K has 63 levels and P 127 then.
#include "quantize.h"
#include "values.h"

namespace attnbench {

template <class T>
class Int8Keys {
  public:
    static constexpr int ROWS = Bytes<true>::ROWS;

    class Queries {
      public:
        explicit Queries(const Problem& p)
            : row_(round_up(p.head_dim, 4)), data_(p.strip_rows * row_), scale_(p.strip_rows), shift_(p.strip_rows) {}

        void pack(const Problem& p, int64_t batch, int64_t head, const Strip& strip) {
            for (int64_t i = 0; i < strip.end - strip.start; ++i) {
                int8_t* to = data_ + i * row_;
                std::fill(to + row_ - 4, to + row_, 0);
                const T* from = p.query.at<T>(batch, head, strip.start + i);
                scale_[i] = quantize(from, nullptr, p.head_dim, LEVELS, to) * p.scale * float(M_LOG2E);
                int sum = 0;
                for (int64_t d = 0; d < p.head_dim; ++d) sum += to[d];
                shift_[i] = -OFFSET * sum;
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
        const auto keys = p.rows<T>(p.key, batch, head, 0);
        for (int64_t d = 0; d < p.head_dim; d += LANES) {
            Floats sum[4] = {};
            for (int64_t j = 0; j < p.kv_seq; ++j) sum[j % 4] = sum[j % 4] + load_first(keys(j) + d, p.head_dim - d);
            const Floats total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            store_first(mean_ + d, total / splat(float(p.kv_seq)), p.head_dim - d);
        }
    }

    // K to [panel of keys][four dims][PANEL][4], unsigned.
    void pack(const Problem& p, int64_t batch, int64_t head, int64_t key, int64_t rows) {
        const auto keys = p.rows<T>(p.key, batch, head, key);
        const int64_t width = 4 * fours_;
        alignas(64) uint8_t block[KEYS * MAX_DIM];
        for (int64_t j = 0; j < rows; ++j) {
            uint8_t* row = block + j * width;
            std::fill(row + width - 4, row + width, 0);
            scale_[key + j] = quantize(keys(j), mean_ + 0, p.head_dim, KEY_LEVELS, reinterpret_cast<int8_t*>(row));
            for (int64_t d = 0; d < width; ++d) row[d] += OFFSET;
        }
        std::fill(scale_ + key + rows, scale_ + key + KEYS, 0.f);
        pack_rows<Bytes<true>>(Dense<uint8_t>{block, width}, rows, width, data_ + key * width);
    }

    template <int R>
    void scores(const Queries& queries, int64_t row, int64_t key, float* s, int64_t s_row) const {
        Ints sum[R][VECTORS];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < VECTORS; ++t) sum[r][t] = splat(queries.shift(row + r));
        multiply<Bytes<true>>(queries.at(row), queries.row(), 4, data_ + key * 4 * fours_, 4 * PANEL, fours_, sum);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < VECTORS; ++t)
                store(s + r * s_row + LANES * t, to_floats(sum[r][t]) * load(scale_ + key + LANES * t));
    }

  private:
    int64_t fours_;
    Buffer<uint8_t> data_;
    Buffer<float> scale_, mean_;
};

template <class T>
class Int8Values {
  public:
    using Value = T;
    using Weight = uint8_t;
    // Trained models lay much of a row's weight on the first tokens (Xiao 2023, arXiv 2309.17453): beside that maximum a
    // byte has little left for the keys that share it.
    static constexpr int64_t APART = KEYS;
    static constexpr int ROWS = Bytes<false>::ROWS;

    explicit Int8Values(const Problem& p)
        : length_(p.packed_keys()), columns_(p.columns()), data_(length_ * columns_), scale_(columns_) {}

    // The scale of a column: its peak / 127.
    void measure(const Problem& p, int64_t batch, int64_t head) {
        const auto values = p.rows<T>(p.value, batch, head, 0);
        for (int64_t c = 0; c < columns_; c += LANES) {
            Floats peak = splat(TINIEST);
            for (int64_t j = 0; j < p.kv_seq; ++j) peak = max(peak, abs(load_first(values(j) + c, p.value_dim - c)));
            store(scale_ + c, peak / splat(LEVELS));
        }
    }

    // V to [panel of columns][four keys][column][4].
    void pack(const Problem& p, int64_t batch, int64_t head, int64_t key, int64_t rows) {
        const auto values = p.rows<T>(p.value, batch, head, key);
        for (int64_t c = 0; c < columns_; c += PANEL) {
            int8_t* to = data_ + c * length_ + key * width(c);
            for (int64_t j = 0; j < KEYS; j += 4)
                for (int64_t at = c; at < c + width(c); at += LANES, to += 4 * LANES) {
                    Ints four = {};
                    for (int64_t i = 0; i < 4 && j + i < rows; ++i) {
                        const Floats value = load_first(values(j + i) + at, p.value_dim - at);
                        four |= (to_ints(value / load(scale_ + at)) & 255) << splat(int(8 * i));
                    }
                    store_ints(to, four);
                }
        }
    }

    // As FloatValues, but P is scaled by the maximum of these keys alone, so that it uses all its bits. Returns what
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
        for (int64_t c = 0; c < columns_; c += PANEL)
            with_constant<VECTORS>(width(c) / LANES, [&](auto vectors) __attribute__((always_inline)) {
                product<R, vectors>(p, p_row, factors, data_ + c * length_ + key * width(c), scale_ + c, n / 4, o + c,
                                    o_row);
            });
    }

  private:
    // P = 2^(scale S - top) as unsigned bytes, and its sum before rounding.
    static float bytes(const float* s, int64_t n, float scale, float top, uint8_t* p) {
        const Floats factor = splat(scale), shift = splat(-top);
        Floats sum = zero();
        for (int64_t j = 0; j < n; j += LANES) {
            const Floats power = exp2<false>(fma(load(s + j), factor, shift));
            sum = sum + power;
            store_uint8(p + j, to_ints(power));
        }
        return total(sum);
    }

    // O += (P V) * factor of the row * scale of the column.
    template <int R, int V>
    static INLINE void product(const uint8_t* p, int64_t p_row, const float* factors, const int8_t* v,
                               const float* scale, int64_t fours, float* o, int64_t o_row) {
        Ints sum[R][V] = {};
        multiply<Bytes<false>>(p, p_row, 4, v, 4 * V * LANES, fours, sum);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < V; ++t) {
                float* to = o + r * o_row + LANES * t;
                const Floats by = splat(factors[r]) * load(scale + LANES * t);
                store(to, fma(to_floats(sum[r][t]), by, load(to)));
            }
    }

    int64_t width(int64_t c) const { return std::min<int64_t>(PANEL, columns_ - c); }

    int64_t length_, columns_;
    Buffer<int8_t> data_;
    Buffer<float> scale_;
};

}  // namespace attnbench

extern "C" int int8_qk(const attnbench::Problem* problem) {
    using namespace attnbench;
    return run<Int8Keys<Value>, FloatValues<Value>>(*problem);
}

extern "C" int int8_qkpv(const attnbench::Problem* problem) {
    using namespace attnbench;
    return run<Int8Keys<Value>, Int8Values<Value>>(*problem);
}
