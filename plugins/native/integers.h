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
    static constexpr bool SETTLES = SMALL < MAX_DIM;  // whether what dot4_small adds has to be settled on the way
    // Registers of keys at a time. Of whole bytes there are few to keep memory busy: tiles that lie far apart would be
    // waited for.
    static constexpr int WIDE = HALVES ? VECTORS : 2;
    using Weight = std::conditional_t<COARSE, uint8_t, int16_t>;

  public:
    struct Weights {
        alignas(64) float p[TOGETHER][BLOCK];
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
        for (int64_t j = 0; j < rows; j += WIDE * LANES) {
            const Several<WIDE> keys(head, key, j, rows);
            for (int64_t d = 0; d < p_.head_dim; d += GROUP) {
                const int64_t end = std::min<int64_t>(d + GROUP, width_);
                Ints sum[R][WIDE];
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                    for (auto& x : sum[r]) x = splat(shift_[(first + r) * GROUPS + d / GROUP]);
                products<R>(queries_ + first * width_, keys, d, end, sum, ahead);
#pragma GCC unroll 4
                for (int t = 0; t < WIDE; ++t) {
                    const Floats scale = head.key_scales(keys.key[t], d / GROUP);
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) {
                        float* to = s + r * BLOCK + j + LANES * t;
                        store(to, fma(to_floats(sum[r][t]), scale, d ? load(to) : zero()));
                    }
                }
            }
        }
    }

    template <int R>
    void weigh(const Head& head, int64_t key, int64_t rows, const float* s, const float* scale, const float* top,
               float* sum, Weights& w) const {
        for (int r = 0; r < R; ++r)
            sum[r] = powers<Singles, !std::is_same_v<Value, bf16>>(s + r * BLOCK, BLOCK, scale[r], top[r], w.p[r]);
        for (int64_t g = 0; g * GROUP < p_.value_dim; ++g) {
            alignas(64) float scales[BLOCK];
            for (int64_t j = 0; j < BLOCK; j += LANES) store(scales + j, head.value_scales(key + j, g, rows - j));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                Floats weight[BLOCK / LANES], peak[2] = {};
#pragma GCC unroll 32
                for (int j = 0; j < BLOCK / LANES; ++j) {
                    weight[j] = load(w.p[r] + j * LANES) * load(scales + j * LANES);
                    peak[j % 2] = max(peak[j % 2], weight[j]);
                }
                const float most = std::max(greatest(max(peak[0], peak[1])), TINIEST);
                w.unit[g][r] = most * (1.f / MOST);
                const Floats factor = splat(MOST / most);
                Ints n[BLOCK / LANES];
#pragma GCC unroll 32
                for (int j = 0; j < BLOCK / LANES; ++j) n[j] = to_ints(weight[j] * factor);
                w.sum[g][r] = HALVES ? -OFFSET * total_of(n) : 0;
                put(w.integers[g][r], n);
            }
        }
    }

    template <int R>
    void accumulate(const Head& head, int64_t key, int64_t rows, const Weights& w, float* o, int64_t o_row,
                    Ahead& ahead) const {
        for (int64_t at = 0; at < columns(); at += PANEL)
            with_constant<VECTORS / 2>((columns() - at) / (2 * LANES), [&](auto pairs) __attribute__((always_inline)) {
                // Pairs of registers of columns, of which the second lies in the high halves of the first's bytes, or
                // behind them.
                constexpr int V = 2 * pairs;
                const char* v = head.values(key) + (HALVES ? 2 : 4) * at;
                const int64_t g = at / GROUP, fours = round_up(rows, 4) / 4;
                Ints sum[R][V];
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                    for (auto& x : sum[r]) x = splat(w.sum[g][r]);
                weighted<R, V>(w.integers[g][0], v, head.value_row(), fours, sum, ahead);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                    for (int t = 0; t < V; ++t) {
                        float* out = o + r * o_row + column(at, t);
                        store(out, fma(to_floats(sum[r][t]), splat(w.unit[g][r]), load(out)));
                    }
            });
    }

  private:
    // The first column of the t-th register from `at` on.
    static int64_t column(int64_t at, int t) {
        if (!HALVES) return at + LANES * t;
        at += t / 2 * 2 * LANES;
        return at / 32 * 32 + at % 32 / 2 + t % 2 * 16;
    }

    // A query to integers, of which two dims of each four change places, as in keys.
    void pack(const Value* from, int64_t i) {
        int8_t* to = queries_ + i * width_;
        std::fill(to, to + width_, 0);
        scale_[i] = quantize(from, nullptr, p_.head_dim, LEVELS, to) * p_.scale * float(M_LOG2E);
        for (int64_t d = 0; d < p_.head_dim; ++d) shift_[i * GROUPS + d / GROUP] -= OFFSET * to[d];
        for (int64_t d = 0; d < width_; d += 4) std::swap(to[d + 1], to[d + 2]);
    }

    // sum += the products of R queries with registers of keys, over the dims [d, end).
    template <int R>
    INLINE void products(const int8_t* q, const Several<WIDE>& keys, int64_t d, int64_t end, Ints (&sum)[R][WIDE],
                         Ahead& ahead) const {
        if constexpr (HALVES) {
            const Ints low = splat(0x0f0f0f0f);
            while (d < end) {
                Ints apart[R][WIDE] = {};
                auto& part = SETTLES ? apart : sum;
                const int64_t stop = std::min<int64_t>(d + 4 * SMALL, end);  // two products of each are added
                for (; d < stop; d += 8) {
                    Ints x[WIDE][2];
                    ahead.ask<std::max(4 * WIDE * LANES / 64, 1)>();
#pragma GCC unroll 4
                    for (int t = 0; t < WIDE; ++t) {
                        Ints both = load_ints(keys.bytes[t] + d * (TILE / 2));
                        keep(both);
                        x[t][0] = both & low, x[t][1] = both >> 4 & low;
                    }
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
                        for (int r = 0; r < R; ++r) {
                            const Ints row = spread(q + r * width_ + d + 4 * half);
#pragma GCC unroll 4
                            for (int t = 0; t < WIDE; ++t) part[r][t] = dot4_small(part[r][t], x[t][half], row);
                        }
                }
                if (SETTLES) settle_all(sum, part);
            }
        } else {
            for (; d < end; d += 4) {
                Ints x[WIDE];
                ahead.ask<std::max(4 * WIDE * LANES / 64, 1)>();
#pragma GCC unroll 4
                for (int t = 0; t < WIDE; ++t) x[t] = raised(load_ints(keys.bytes[t] + d * TILE));
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const Ints row = spread(q + r * width_ + d);
#pragma GCC unroll 4
                    for (int t = 0; t < WIDE; ++t) sum[r][t] = dot4_raised(sum[r][t], x[t], row);
                }
            }
        }
    }

    // sum += what dot4_small has added.
    template <int R, int V>
    static INLINE void settle_all(Ints (&sum)[R][V], const Ints (&part)[R][V]) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < V; ++t) set_aside(sum[r][t]), sum[r][t] = sum[r][t] + settle(part[r][t]);
    }

    // Weights as V lies.
    static INLINE void put(uint8_t* to, const Ints (&n)[BLOCK / LANES]) {
#pragma GCC unroll 32
        for (int j = 0; j < BLOCK / LANES; j += 4) store_bytes_crossed(to + j * LANES, n[j], n[j + 1], n[j + 2], n[j + 3]);
    }
    static INLINE void put(int16_t* to, const Ints (&n)[BLOCK / LANES]) {
#pragma GCC unroll 32
        for (int j = 0; j < BLOCK / LANES; ++j) store_shorts(to + j * LANES, n[j], LANES);
    }
    static INLINE int total_of(const Ints (&n)[BLOCK / LANES]) {
        Ints sum[2] = {};
#pragma GCC unroll 32
        for (int j = 0; j < BLOCK / LANES; ++j) sum[j % 2] = sum[j % 2] + n[j];
        return total(sum[0] + sum[1]);
    }

    // sum += weights times registers of columns, over so many fours of keys.
    template <int R, int V>
    INLINE void weighted(const uint8_t* p, const char* v, int64_t v_row, int64_t fours, Ints (&sum)[R][V],
                         Ahead& ahead) const {
        const Ints low = splat(0x0f0f0f0f);
        for (int64_t j = 0; j < fours;) {
            Ints apart[R][V] = {};
            auto& part = SETTLES ? apart : sum;
            const int64_t stop = std::min<int64_t>(j + SMALL / 2, fours);  // of up to 255, not 127
            for (; j < stop; ++j) {
                ahead.ask<std::max(PANEL_LINES / 2, 1)>();
                Ints x[V];
#pragma GCC unroll 2
                for (int t = 0; t < V; t += 2) {
                    Ints both = load_ints(v + j * v_row + 2 * LANES * t);
                    keep(both);
                    x[t] = both & low, x[t + 1] = both >> 4 & low;
                }
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const Ints row = spread(p + r * BLOCK + 4 * j);
#pragma GCC unroll 4
                    for (int t = 0; t < V; ++t) part[r][t] = dot4_small(part[r][t], row, x[t]);
                }
            }
            if (SETTLES) settle_all(sum, part);
        }
    }

    // The same in 16 bits, the even bytes and the odd ones.
    template <int R, int V>
    INLINE void weighted(const int16_t* p, const char* v, int64_t v_row, int64_t fours, Ints (&sum)[R][V],
                         Ahead& ahead) const {
        const Ints low = splat(0x000f000f);
        for (int64_t j = 0; j < fours; ++j) {
            const char* at = v + j * v_row;
            ahead.ask<HALVES ? std::max(PANEL_LINES / 2, 1) : PANEL_LINES>();
            Ints x[2][V];
#pragma GCC unroll 4
            for (int t = 0; t < V; ++t) {
                Ints four = load_ints(at + (HALVES ? t / 2 * 4 * LANES : t * 4 * LANES));
                keep(four);
                x[0][t] = HALVES ? four >> t % 2 * 4 & low : upper_bytes(four << 8);
                x[1][t] = HALVES ? four >> (t % 2 * 4 + 8) & low : upper_bytes(four);
            }
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; ++odd)
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const Ints row = spread(p + r * BLOCK + 4 * j + 2 * odd);
#pragma GCC unroll 4
                    for (int t = 0; t < V; ++t) sum[r][t] = dot2(sum[r][t], x[odd][t], row);
                }
        }
    }

    int64_t width_;  // of a query with its padding
    Buffer<int8_t> queries_;
    std::vector<float> scale_;  // of the query, of the scores, and log2 e
    std::vector<int> shift_;    // what OFFSET has added to a group's products, to be taken off
};

}  // namespace attnbench
