// Few queries over keys and values as they are: see decode.h.
//
// A row is read by two registers of values at a time. Two of bf16 lie in 32 bits, those of even places and those of odd
// ones, and are widened so; sums of columns are kept in that order until the end, as `place` says.
#include "decode.h"

namespace attnbench {

constexpr int TWO = 2 * LANES;
constexpr int BLOCK = KEYS;  // keys and values that fit a first-level cache together

template <class T>
struct Two {
    static constexpr bool TANGLED = false;

    // The first n of a row's next values.
    static INLINE void read(const T* x, int64_t n, Floats& low, Floats& high) {
        low = load_first(x, n);
        high = load_first(x + LANES, n - LANES);
    }
    static INLINE void read(const T* x, Floats& low, Floats& high) { low = load(x), high = load(x + LANES); }
};

template <>
struct Two<bf16> {
    static constexpr bool TANGLED = true;

    static INLINE void widen(Ints pairs, Floats& even, Floats& odd) {
        even = (Floats)(pairs << 16);
        odd = (Floats)(pairs & splat(int(0xffff0000)));
    }
    static INLINE void read(const bf16* x, int64_t n, Floats& even, Floats& odd) { widen(load_bytes(x, 2 * n), even, odd); }
    static INLINE void read(const bf16* x, Floats& even, Floats& odd) { widen(load_ints(x), even, odd); }
};

// Cache lines that two registers take, or what is next to it.
template <class T>
constexpr int LINES = std::max<int>(TWO * sizeof(T) / 64, 1);

// A step's registers of a row, the last of which may be partly there: f(whole, at, n) with `whole` as a constant.
template <class F>
INLINE void along(int64_t n, F f) {
    int64_t at = 0;
    for (; at + TWO <= n; at += TWO) f(std::true_type(), at, int64_t(TWO));
    if (at < n) f(std::false_type(), at, n - at);
}

// Where the sum of a column is kept.
template <class T>
INLINE int64_t place(int64_t column) {
    return Two<T>::TANGLED ? column / TWO * TWO + column % 2 * LANES + column % TWO / 2 : column;
}

// How values multiply in float32: queries are widened, and laid out as keys are read.
template <class T>
struct Single {
    using Query = float;
    using Product = Singles;

    static void pack(const T* from, int64_t n, float* to) {
        alignas(64) float wide[WIDE_DIM + TWO];
        for (int64_t d = 0; d < n; d += LANES) store(wide + d, load_first(from + d, n - d));
        for (int64_t d = 0; d < n; ++d) to[place<T>(d)] = wide[d];
    }

    // sum[r][c] += the products of R rows with C keys, of n values.
    template <int R, int C>
    static INLINE void add(const float* q, int64_t q_row, const T* const (&k)[C], int64_t n, Floats* sum,
                           Ahead& ahead) {
        along(n, [&](auto whole, int64_t at, int64_t left) __attribute__((always_inline)) {
            Floats low[C], high[C];
            ahead.ask<C * LINES<T>>();
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c)
                if constexpr (whole) Two<T>::read(k[c] + at, low[c], high[c]);
                else Two<T>::read(k[c] + at, left, low[c], high[c]);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                Floats first = load(q + r * q_row + at), second = load(q + r * q_row + at + LANES);
                keep(first), keep(second);
#pragma GCC unroll 16
                for (int c = 0; c < C; ++c) sum[r * C + c] = fma(low[c], first, sum[r * C + c]);
#pragma GCC unroll 16
                for (int c = 0; c < C; ++c) sum[r * C + c] = fma(high[c], second, sum[r * C + c]);
            }
        });
    }

    // sum[r] += weights * V for two registers of columns, n of which exist.
    template <int R, bool whole>
    static INLINE void columns(const float* p, const T* v, int64_t v_row, int64_t rows, int64_t n, Floats (&sum)[R][2],
                               Ahead& ahead) {
#pragma GCC unroll 2
        for (int64_t j = 0; j < rows; ++j) {
            Floats low, high;
            ahead.ask<LINES<T>>();
            if constexpr (whole) Two<T>::read(v + j * v_row, low, high);
            else Two<T>::read(v + j * v_row, n, low, high);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const Floats weight = splat(p[r * BLOCK + j]);
                sum[r][0] = fma(weight, low, sum[r][0]);
                sum[r][1] = fma(weight, high, sum[r][1]);
            }
        }
    }
};

template <class T>
struct Multiply : Single<T> {};

#ifdef BF16_PAIRS
// In pairs: along a row as they lie, and of two rows the even columns and the odd ones.
template <>
struct Multiply<bf16> {
    using Query = bf16;
    using Product = Pairs;

    static void pack(const bf16* from, int64_t n, bf16* to) { std::copy(from, from + n, to); }

    template <int R, int C>
    static INLINE void add(const bf16* q, int64_t q_row, const bf16* const (&k)[C], int64_t n, Floats* sum,
                           Ahead& ahead) {
        along(n, [&](auto whole, int64_t at, int64_t left) __attribute__((always_inline)) {
            Ints keys[C];
            ahead.ask<C * LINES<bf16>>();
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) keys[c] = whole ? load_ints(k[c] + at) : load_bytes(k[c] + at, 2 * left);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                Ints query = load_ints(q + r * q_row + at);
                keep(query);
#pragma GCC unroll 16
                for (int c = 0; c < C; ++c) sum[r * C + c] = dot2(sum[r * C + c], keys[c], query);
            }
        });
    }

    template <int R, bool whole>
    static INLINE void columns(const bf16* p, const bf16* v, int64_t v_row, int64_t rows, int64_t n,
                               Floats (&sum)[R][2], Ahead& ahead) {
        const Ints lower = splat(0xffff), upper = splat(int(0xffff0000));
        for (int64_t j = 0; j < rows; j += 2) {  // a last row without another stands for it, with a weight of nothing
            const bf16 *one = v + j * v_row, *other = j + 1 < rows ? one + v_row : one;
            ahead.ask<2>();
            const Ints a = whole ? load_ints(one) : load_bytes(one, 2 * n);
            const Ints b = whole ? load_ints(other) : load_bytes(other, 2 * n);
            const Ints even = (a & lower) | b << 16, odd = (a >> 16 & lower) | (b & upper);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const Ints weight = spread(p + r * BLOCK + j);
                sum[r][0] = dot2(sum[r][0], even, weight);
                sum[r][1] = dot2(sum[r][1], odd, weight);
            }
        }
    }
};
#endif

template <class T>
class AsTheyAre {
    using Product = typename Multiply<T>::Product;
    using Query = typename Multiply<T>::Query;

  public:
    static constexpr int BLOCK = attnbench::BLOCK;

    struct Weights {
        alignas(64) typename Product::Element data[TOGETHER * BLOCK];
    };

    struct Head {
        const Query* queries;
        Rows<T> key, value;
    };

    explicit AsTheyAre(const Problem& p)
        : p_(p), group_(p), width_(round_up(p.head_dim, TWO)), queries_(p.batch * p.kv_heads * group_.rows * width_) {
        const int64_t rows = p.batch * p.kv_heads * group_.rows;
        std::fill(queries_ + 0, queries_ + rows * width_, Query{});
        for (int64_t i = 0; i < rows; ++i)
            Multiply<T>::pack(group_.at<T>(p, p.query, i / group_.rows, i % group_.rows), p.head_dim,
                              queries_ + i * width_);
    }

    int64_t columns() const { return round_up(p_.value_dim, TWO); }
    int64_t place(int64_t column) const { return attnbench::place<T>(column); }
    float scale(const Head&, int64_t) const { return p_.scale * float(M_LOG2E); }  // log2 e, as powers are of 2
    float factor() const { return 1; }  // of the output
    Head head(int64_t i) const {
        const int64_t batch = i / p_.kv_heads, own = i % p_.kv_heads;
        return {queries_ + i * group_.rows * width_, p_.rows<T>(p_.key, batch, own, 0),
                p_.rows<T>(p_.value, batch, own, 0)};
    }

    Ahead keys_ahead(const Head& head, int64_t key, int64_t rows) const { return ahead(head.key, key, rows, p_.head_dim); }
    Ahead values_ahead(const Head& head, int64_t key, int64_t rows) const {
        return ahead(head.value, key, rows, p_.value_dim);
    }

    // The products of R rows with a block's keys: s[R][BLOCK].
    template <int R>
    void scores(const Head& head, int64_t row, int64_t key, int64_t rows, float* s, Ahead& ahead) const {
        constexpr int C = LANES / (R == 3 ? 4 : R);  // keys at a time
        for (int64_t j = 0; j < rows; j += C) {
            const T* keys[C];
            const T* first = head.key(key + j);  // no page ends among C keys
            for (int c = 0; c < C; ++c) keys[c] = first + std::min<int64_t>(c, rows - 1 - j) * p_.key.row;
            Floats sum[LANES];
            for (auto& x : sum) x = zero();
            Multiply<T>::template add<R, C>(head.queries + row * width_, width_, keys, p_.head_dim, sum, ahead);
            alignas(64) float all[LANES];
            store(all, totals(sum));
            for (int r = 0; r < R; ++r) std::memcpy(s + r * BLOCK + j, all + r * C, sizeof(float) * C);
        }
    }

    // P of a block for R rows, and their sums.
    template <int R>
    void weigh(const Head&, int64_t, int64_t, const float* s, const float* scale, const float* top, float* sum,
               Weights& weights) const {
        for (int r = 0; r < R; ++r) {
            const int64_t at = r * BLOCK;
            sum[r] = powers<Product, !std::is_same_v<T, bf16>>(s + at, BLOCK, scale[r], top[r], weights.data + at);
        }
    }

    // O += P V for R rows over a block's keys.
    template <int R>
    void accumulate(const Head& head, int64_t key, int64_t rows, const Weights& weights, float* o, int64_t o_row,
                    Ahead& ahead) const {
        along(p_.value_dim, [&](auto whole, int64_t at, int64_t left) __attribute__((always_inline)) {
            Floats sum[R][2];
            for (int r = 0; r < R; ++r)
                for (int t = 0; t < 2; ++t) sum[r][t] = load(o + r * o_row + at + LANES * t);
            for (int64_t j = 0; j < rows; j += p_.run())
                Multiply<T>::template columns<R, whole>(weights.data + j, head.value(key + j) + at, p_.value.row,
                                                        std::min(rows - j, p_.run()), left, sum, ahead);
            for (int r = 0; r < R; ++r)
                for (int t = 0; t < 2; ++t) store(o + r * o_row + at + LANES * t, sum[r][t]);
        });
    }

  private:
    Ahead ahead(const Rows<T>& x, int64_t key, int64_t rows, int64_t dim) const {
        constexpr int64_t SIZE = sizeof(T);
        const int64_t run = p_.run();
        if (rows <= 0) return {nullptr, 0, 0, 0};
        Ahead made(x(key), x.x.row * SIZE, std::min(rows, run), dim * SIZE);
        for (int64_t j = run; j < rows; j += run) made.then(x(key + j));
        return made;
    }

    const Problem& p_;
    Group group_;
    int64_t width_;
    Buffer<Query> queries_;
};

}  // namespace attnbench

extern "C" int decode(const attnbench::Problem* problem) {
    using namespace attnbench;
    return run_decode<AsTheyAre<Value>>(*problem);
}
