// Few queries over a cache of floats of 8 bits, E4M3 or E5M2 (Micikevicius 2022, "FP8 formats for deep learning"): see
// packed.h.
//
// Sign, exponent and mantissa stand in the same order in bf16 and in float32, whose exponents are longer: a shift to the
// right, sign apart, gives the number times a power of two, which is put right at the end. Subnormal numbers are not kept.
#include "append.h"

namespace attnbench {

constexpr int BIAS = 127;  // of bf16 and float32
constexpr float UP = 0x1p64f, DOWN = 0x1p-64f;  // queries and weights are multiplied, so that products are not too small

// Two bytes of each lane, the even ones or the odd ones, as pairs of bf16; or each of its four as float32.
template <class Product, int MANTISSA>
struct Widened {
    static constexpr int SHIFT = MANTISSA + 1, PARTS = 2;  // SHIFT: by which exponents are shorter than 8 bits

    static INLINE Ints part(Ints x, int i) {
        const Ints word = i ? x : x << 8;
        return ((word & splat(0x7f007f00)) >> SHIFT) | (word & splat(int(0x80008000)));
    }
};
template <int MANTISSA>
struct Widened<Singles, MANTISSA> {
    static constexpr int SHIFT = MANTISSA + 1, PARTS = 4;
    static constexpr int ORDER[4] = {0, 2, 1, 3};  // of bytes in a lane

    static INLINE Ints part(Ints x, int i) {
        const Ints word = x << splat(24 - 8 * ORDER[i]);
        return word >> SHIFT & splat(int(0x80000000) | 0x7f000000 >> SHIFT);
    }
};

template <int MANTISSA>
class Eighths : public PackedCache {
    using Product = typename Multiplied<Value>::Product;
    using Element = typename Product::Element;
    using Wide = Widened<Product, MANTISSA>;
    static constexpr int PART = 4 / Wide::PARTS;                             // elements of a part
    static constexpr int EXPONENT = BIAS - ((1 << (6 - MANTISSA)) - 1);      // powers of two that widening takes away

  public:
    struct Weights {
        alignas(64) float p[BLOCK];
        alignas(64) Element data[TOGETHER][BLOCK];
    };

    Eighths(const Problem& p, const Scales& scales)
        : PackedCache(p, scales),
          width_(round_up(p.head_dim, 2 * LANES)),
          queries_(p.batch * p.kv_heads * group_.rows * width_) {
        alignas(64) float wide[MAX_DIM + 2 * LANES] = {};
        for (int64_t i = 0; i < p.batch * p.kv_heads * group_.rows; ++i) {
            const Value* from = group_.at<Value>(p, p.query, i / group_.rows, i % group_.rows);
            for (int64_t d = 0; d < p.head_dim; d += LANES)
                store(wide + d, load_first(from + d, p.head_dim - d) * splat(UP));
            for (int64_t d = 0; d < width_; d += 2 * LANES)
                Product::put(queries_ + i * width_ + d, load(wide + d), load(wide + d + LANES));
        }
    }

    float scale(const Head&, int64_t) const { return p_.scale * float(M_LOG2E) * factor(); }
    float factor() const { return std::ldexp(DOWN, EXPONENT); }

    template <int R>
    void scores(const Head& head, int64_t row, int64_t key, int64_t rows, float* s, Ahead& ahead) const {
        const Element* q = queries_ + (head.query + row) * width_;
        for (int64_t j = 0; j < rows; j += PANEL) {
            const Several<VECTORS> keys(head, key, j, rows);
            Floats sum[R][VECTORS] = {};
            for (int64_t d = 0; d < p_.head_dim; d += 4) {
                Ints x[VECTORS];
                ahead.ask<PANEL_LINES>();
#pragma GCC unroll 4
                for (int t = 0; t < VECTORS; ++t) x[t] = load_ints(keys.bytes[t] + d * TILE);
                products<R>(q + d, width_, x, sum);
            }
#pragma GCC unroll 4
            for (int t = 0; t < VECTORS; ++t)
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
                    store(s + r * BLOCK + j + LANES * t, sum[r][t] * head.key_scales(keys.key[t], 0));
        }
    }

    template <int R>
    void weigh(const Head& head, int64_t key, int64_t rows, const float* s, const float* scale, const float* top,
               float* sum, Weights& w) const {
        alignas(64) float scales[BLOCK];
        for (int64_t j = 0; j < BLOCK; j += LANES) store(scales + j, head.value_scales(key + j, 0, rows - j) * splat(UP));
        for (int r = 0; r < R; ++r) {
            sum[r] = powers<Singles, !std::is_same_v<Value, bf16>>(s + r * BLOCK, BLOCK, scale[r], top[r], w.p);
            for (int64_t j = 0; j < BLOCK; j += 2 * LANES)
                Product::put(w.data[r] + j, load(w.p + j) * load(scales + j),
                             load(w.p + j + LANES) * load(scales + j + LANES));
        }
    }

    template <int R>
    void accumulate(const Head& head, int64_t key, int64_t rows, const Weights& w, float* o, int64_t o_row,
                    Ahead& ahead) const {
        for (int64_t at = 0; at < columns(); at += PANEL)
            with_constant<VECTORS>((columns() - at) / LANES, [&](auto vectors) __attribute__((always_inline)) {
                constexpr int V = vectors;
                Floats sum[R][V];
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                    for (int t = 0; t < V; ++t) sum[r][t] = load(o + r * o_row + at + LANES * t);
                for (int64_t j = 0; j < rows; j += 4) {
                    const char* v = head.values(key) + j / 4 * head.value_row() + 4 * at;
                    Ints x[V];
                    ahead.ask<PANEL_LINES>();
#pragma GCC unroll 4
                    for (int t = 0; t < V; ++t) x[t] = load_ints(v + 4 * LANES * t);
                    products<R>(w.data[0] + j, BLOCK, x, sum);
                }
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                    for (int t = 0; t < V; ++t) store(o + r * o_row + at + LANES * t, sum[r][t]);
            });
    }

  private:
    // sum += four elements of each of R rows times registers of four bytes.
    template <int R, int V>
    static INLINE void products(const Element* row, int64_t stride, const Ints (&x)[V], Floats (&sum)[R][V]) {
#pragma GCC unroll 4
        for (int i = 0; i < Wide::PARTS; ++i) {
            Ints part[V];
#pragma GCC unroll 4
            for (int t = 0; t < V; ++t) part[t] = Wide::part(x[t], i);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const Ints element = spread(row + r * stride + PART * i);
#pragma GCC unroll 4
                for (int t = 0; t < V; ++t) sum[r][t] = Product::dot(sum[r][t], part[t], element);
            }
        }
    }

    int64_t width_;  // of a query with its padding
    Buffer<Element> queries_;
};

}  // namespace attnbench

// As `decode`, with the cache's bytes as key and value.
extern "C" int decode_e4m3(const attnbench::Problem* problem, const attnbench::Scales* scales) {
    using namespace attnbench;
    return run_decode<Eighths<3>>(*problem, *scales);
}

extern "C" int decode_e5m2(const attnbench::Problem* problem, const attnbench::Scales* scales) {
    using namespace attnbench;
    return run_decode<Eighths<2>>(*problem, *scales);
}

extern "C" int append_e4m3(const attnbench::Tokens* tokens) {
    using namespace attnbench;
    append<FloatForm<3>>(*tokens);
    return 0;
}

extern "C" int append_e5m2(const attnbench::Tokens* tokens) {
    using namespace attnbench;
    append<FloatForm<2>>(*tokens);
    return 0;
}
