// A cache of integers of 8 or 4 bits: see packed.h. Queries become int8, a row by its peak. P times the scales of V becomes
// integers by its peak over a block: of 15 bits, or for 4 bits and outputs in bf16, which show no more, of 8.
//
// In 4 bits a byte holds n + 8 for two numbers n: of K its low half four dims and its high half the next four, of V a
// column and the 16th from there.
#pragma once

#include "packed.h"
#include "quantize.h"

namespace attnbench {

template <int BITS>
class Integers : public PackedCache {
    static constexpr bool HALVES = BITS == 4;
    static constexpr int GROUP = HALVES ? 64 : MAX_DIM;  // dims, or columns, that share a scale; quantized_cache.py
    static constexpr int GROUPS = MAX_DIM / GROUP;
    static constexpr int OFFSET = HALVES ? 8 : RAISED;  // what numbers are stored, or multiplied, with more
    static constexpr bool COARSE = HALVES && std::is_same_v<Value, bf16> && SMALL_BITS == 8;
    static constexpr int MOST = COARSE ? 255 : 32767;  // of P
    using Weight = std::conditional_t<COARSE, uint8_t, int16_t>;

  public:
    struct Weights {
        alignas(64) float p[BLOCK];
        alignas(64) Weight integers[GROUPS][TOGETHER][BLOCK];
        float unit[GROUPS][TOGETHER];
        int sum[GROUPS][TOGETHER];  // what a sum of columns begins with
    };

    Integers(const Problem& p, const Scales& scales)
        : PackedCache(p, scales),
          width_(round_up(p.head_dim, 8)),
          queries_(p.batch * p.kv_heads * group_.rows * width_),
          scale_(p.batch * p.kv_heads * group_.rows),
          shift_(scale_.size() * GROUPS) {
        for (int64_t i = 0; i < int64_t(scale_.size()); ++i)
            pack(group_.at<Value>(p, p.query, i / group_.rows, i % group_.rows), i);
    }

    float scale(const Head& head, int64_t row) const { return scale_[head.query + row]; }
    float factor() const { return 1; }

    template <int R>
    void scores(const Head& head, int64_t row, int64_t key, int64_t rows, float* s, Ahead& ahead) const {
        const int64_t first = head.query + row;
        for (int64_t j = 0; j < rows; j += 2 * LANES) {
            const Pair pair(head, key, j, rows);
            for (int64_t d = 0; d < p_.head_dim; d += GROUP) {
                const int64_t end = std::min<int64_t>(d + GROUP, width_);
                Ints sum[R][2];
                for (int r = 0; r < R; ++r)
                    sum[r][0] = sum[r][1] = splat(shift_[(first + r) * GROUPS + d / GROUP]);
                products<R>(queries_ + first * width_, pair, d, end, sum, ahead);
                for (int t = 0; t < 2; ++t) {
                    const Floats scale = head.key_scales(pair.key[t], d / GROUP);
                    for (int r = 0; r < R; ++r) {
                        float* to = s + r * BLOCK + j + LANES * t;
                        store(to, fma(to_floats(sum[r][t]), scale, d ? load(to) : zero()));
                    }
                }
            }
        }
    }

    float weigh(const Head& head, int64_t key, int64_t rows, const float* s, float scale, float top, int r,
                Weights& w) const {
        const float sum = powers<Singles, !std::is_same_v<Value, bf16>>(s, BLOCK, scale, top, w.p);
        for (int64_t g = 0; g * GROUP < p_.value_dim; ++g) {
            const auto weight = [&](int64_t j) { return load(w.p + j) * head.value_scales(key + j, g, rows - j); };
            Floats peak = zero();
            for (int64_t j = 0; j < rows; j += LANES) peak = max(peak, weight(j));
            w.unit[g][r] = std::max(greatest(peak), TINIEST) / MOST;
            const Floats factor = splat(1 / w.unit[g][r]);
            Ints sums = {};
            for (int64_t j = 0; j < rows; j += LANES) {
                const Ints n = to_ints(weight(j) * factor);
                put(w.integers[g][r] + j, n);
                sums = sums + n;
            }
            w.sum[g][r] = HALVES ? -OFFSET * total(sums) : 0;
        }
        return sum;
    }

    template <int R>
    void accumulate(const Head& head, int64_t key, int64_t rows, const Weights& w, float* o, int64_t o_row,
                    Ahead& ahead) const {
        const char* v = head.values(key);
        for (int64_t at = 0; at < columns(); at += 2 * LANES) {
            // Registers of columns, of which the second lies in the high halves of the first's bytes, or behind them.
            const int64_t column = HALVES ? at / 32 * 32 + at % 32 / 2 : at, g = column / GROUP;
            float* to[2] = {o + column, o + column + (HALVES ? 16 : LANES)};
            Ints sum[R][2];
            for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = splat(w.sum[g][r]);
            weighted<R>(w.integers[g][0], v + (HALVES ? 2 : 4) * at, head.value_row(), round_up(rows, 4) / 4, sum, ahead);
            for (int r = 0; r < R; ++r)
                for (int t = 0; t < 2; ++t) {
                    float* out = to[t] + r * o_row;
                    store(out, fma(to_floats(sum[r][t]), splat(w.unit[g][r]), load(out)));
                }
        }
    }

  private:
    // A query to integers, of which two dims of each four change places, as in keys.
    void pack(const Value* from, int64_t i) {
        int8_t* to = queries_ + i * width_;
        std::fill(to, to + width_, 0);
        scale_[i] = quantize(from, nullptr, p_.head_dim, LEVELS, to) * p_.scale * float(M_LOG2E);
        for (int64_t d = 0; d < p_.head_dim; ++d) shift_[i * GROUPS + d / GROUP] -= OFFSET * to[d];
        for (int64_t d = 0; d < width_; d += 4) std::swap(to[d + 1], to[d + 2]);
    }

    // sum += the products of R queries with two registers of keys, over the dims [d, end).
    template <int R>
    INLINE void products(const int8_t* q, const Pair& pair, int64_t d, int64_t end, Ints (&sum)[R][2],
                         Ahead& ahead) const {
        if constexpr (HALVES) {
            const Ints low = splat(0x0f0f0f0f);
            while (d < end) {
                Ints part[R][2] = {};
                const int64_t stop = std::min<int64_t>(d + 4 * SMALL, end);  // two products of each are added
                for (; d < stop; d += 8) {
                    Ints x[2][2];
                    ahead.ask<2 * LINE>();
                    for (int t = 0; t < 2; ++t) {
                        const Ints both = load_ints(pair.bytes[t] + d / 8 * 4 * TILE);
                        x[t][0] = both & low, x[t][1] = both >> 4 & low;
                    }
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                        for (int half = 0; half < 2; ++half) {
                            const Ints row = spread(q + r * width_ + d + 4 * half);
#pragma GCC unroll 2
                            for (int t = 0; t < 2; ++t) part[r][t] = dot4_small(part[r][t], x[t][half], row);
                        }
                }
                for (int r = 0; r < R; ++r)
                    for (int t = 0; t < 2; ++t) set_aside(sum[r][t]), sum[r][t] = sum[r][t] + settle(part[r][t]);
            }
        } else {
            for (; d < end; d += 4) {
                Ints x[2];
                ahead.ask<2 * LINE>();
                for (int t = 0; t < 2; ++t) x[t] = raised(load_ints(pair.bytes[t] + d * TILE));
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const Ints row = spread(q + r * width_ + d);
#pragma GCC unroll 2
                    for (int t = 0; t < 2; ++t) sum[r][t] = dot4_raised(sum[r][t], x[t], row);
                }
            }
        }
    }

    static INLINE void put(uint8_t* to, Ints n) { store_uint8(to, crossed(n)); }  // as keys lie
    static INLINE void put(int16_t* to, Ints n) { store_shorts(to, n, LANES); }

    // sum += weights times two registers of columns, over so many fours of keys.
    template <int R>
    INLINE void weighted(const uint8_t* p, const char* v, int64_t v_row, int64_t fours, Ints (&sum)[R][2],
                         Ahead& ahead) const {
        const Ints low = splat(0x0f0f0f0f);
        for (int64_t j = 0; j < fours;) {
            Ints part[R][2] = {};
            const int64_t stop = std::min<int64_t>(j + SMALL / 2, fours);  // of up to 255, not 127
            for (; j < stop; ++j) {
                ahead.ask<LINE>();
                const Ints both = load_ints(v + j * v_row), x[2] = {both & low, both >> 4 & low};
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const Ints row = spread(p + r * BLOCK + 4 * j);
#pragma GCC unroll 2
                    for (int t = 0; t < 2; ++t) part[r][t] = dot4_small(part[r][t], row, x[t]);
                }
            }
            for (int r = 0; r < R; ++r)
                for (int t = 0; t < 2; ++t) set_aside(sum[r][t]), sum[r][t] = sum[r][t] + settle(part[r][t]);
        }
    }

    // The same in 16 bits, the even bytes and the odd ones.
    template <int R>
    INLINE void weighted(const int16_t* p, const char* v, int64_t v_row, int64_t fours, Ints (&sum)[R][2],
                         Ahead& ahead) const {
        for (int64_t j = 0; j < fours; ++j) {
            const char* at = v + j * v_row;
            ahead.ask<(HALVES ? 1 : 2) * LINE>();
            Ints x[2][2];
            if constexpr (HALVES) {
                const Ints both = load_ints(at), low = splat(0x000f000f);
                for (int t = 0; t < 2; ++t) x[t][0] = both >> 4 * t & low, x[t][1] = both >> (4 * t + 8) & low;
            } else {
                for (int t = 0; t < 2; ++t) {
                    const Ints four = load_ints(at + 4 * LANES * t);
                    x[t][0] = upper_bytes(four << 8), x[t][1] = upper_bytes(four);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int odd = 0; odd < 2; ++odd) {
                    const Ints row = spread(p + r * BLOCK + 4 * j + 2 * odd);
#pragma GCC unroll 2
                    for (int t = 0; t < 2; ++t) sum[r][t] = dot2(sum[r][t], x[t][odd], row);
                }
        }
    }

    int64_t width_;  // of a query with its padding
    Buffer<int8_t> queries_;
    std::vector<float> scale_;  // of the query, of the scores, and log2 e
    std::vector<int> shift_;    // what OFFSET has added to a group's products, to be taken off
};

}  // namespace attnbench
