// What the kernels do with a tile of scores: hide, find the maximum, weigh, and the online softmax.
#pragma once

#include "products.h"

namespace attnbench {

constexpr float LOWEST = -1e30f;  // a running maximum before any key was seen

// A row's scores outside [from, to) are hidden: they become -inf, whose power is nothing.
inline void hide(float* s, int64_t n, int64_t from, int64_t to) {
    std::fill(s, s + std::clamp<int64_t>(from, 0, n), -INFINITY);
    std::fill(s + std::clamp<int64_t>(to, 0, n), s + n, -INFINITY);
}

// s += x; n: a multiple of LANES.
inline void add(float* s, const float* x, int64_t n) {
    for (int64_t j = 0; j < n; j += LANES) store(s + j, load(s + j) + load(x + j));
}

inline float maximum(const float* s, int64_t n) {  // n: a multiple of PANEL
    Floats top[VECTORS];
    for (auto& x : top) x = splat(-INFINITY);
    for (int64_t j = 0; j < n; j += PANEL)
        for (int t = 0; t < VECTORS; ++t) top[t] = max(top[t], load(s + j + LANES * t));
    for (int t = 1; t < VECTORS; ++t) top[0] = max(top[0], top[t]);
    return greatest(top[0]);
}

// P = 2^(scale S - top) as the product takes it, and its sum before rounding. n: a multiple of 2 * LANES.
template <class Product, bool fine>
inline float powers(const float* s, int64_t n, float scale, float top, typename Product::Element* p) {
    const Floats factor = splat(scale), shift = splat(-top);
    Floats sum[2] = {zero(), zero()};
    for (int64_t j = 0; j < n; j += 2 * LANES) {
        const Floats low = exp2<fine>(fma(load(s + j), factor, shift));
        const Floats high = exp2<fine>(fma(load(s + j + LANES), factor, shift));
        sum[0] = sum[0] + low;
        sum[1] = sum[1] + high;
        Product::put(p + j, low, high);
    }
    return total(sum[0] + sum[1]);
}

// x *= factor; n: a multiple of LANES.
inline void rescale(float* x, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i += LANES) store(x + i, load(x + i) * splat(factor));
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

// A row of O * factor, n values.
template <class T>
inline void finish(const float* o, int64_t n, float factor, T* out) {
    for (int64_t i = 0; i < n; i += LANES) store_first(out + i, load(o + i) * splat(factor), n - i);
}

}  // namespace attnbench
