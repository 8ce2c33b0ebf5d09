// What the backward pass does with a tile of scores, and how its operands are packed. See backward.cpp.
#pragma once

#include "attention.h"

namespace attnbench::gradient {

using Product = Multiplied<Value>::Product;
using Element = Product::Element;
constexpr int GROUP = Product::GROUP;
constexpr int ROWS = Product::ROWS;  // of its tile, not of Singles'
constexpr bool FINE = !std::is_same_v<Value, bf16>;

// Of one key with KEYS queries, where nothing else is said.

// P^T = 2^(scale S^T - L), in place and as the product takes it; scale and L have log2 e in them.
inline void weights(float* s, float scale, const float* lse, Element* p) {
    const auto power = [&](int t) {
        const Floats value = exp2<FINE>(fma(load(s + t), splat(scale), -load(lse + t)));
        store(s + t, value);
        return value;
    };
    for (int t = 0; t < KEYS; t += 2 * LANES) {
        const Floats low = power(t), high = power(t + LANES);
        Product::put(p + t, low, high);
    }
}

// dS^T = P^T * (dP^T - delta), as the product takes it.
inline void differences(const float* p, const float* dp, const float* delta, Element* ds) {
    const auto difference = [&](int t) { return load(p + t) * (load(dp + t) - load(delta + t)); };
    for (int t = 0; t < KEYS; t += 2 * LANES) Product::put(ds + t, difference(t), difference(t + LANES));
}

// delta = the sum of dO * O over one row.
template <class T>
inline float row_sum(const T* a, const T* b, int64_t n) {
    Floats sum = zero();
    for (int64_t i = 0; i < n; i += LANES) sum = fma(load_first(a + i, n - i), load_first(b + i, n - i), sum);
    return total(sum);
}

// KEYS rows of K to K^T: `width` rows, to_row apart; keys that are missing become 0.
template <class T>
inline void pack_turned(const T* from, int64_t row, int64_t rows, int64_t width, Element* to, int64_t to_row) {
    for (int64_t key = 0; key < KEYS; key += GROUP * LANES)
        for (int64_t c = 0; c < width; c += LANES) {
            Ints r[LANES];  // groups of keys, of LANES columns
            for (int i = 0; i < LANES; ++i) {
                const int64_t at = key + GROUP * i;
                const T *own = from + at * row + c, *next = at + 1 < rows ? own + row : nullptr;
                r[i] = at < rows ? Product::across(own, next, width - c) : Ints{};
            }
            transpose(r);
            for (int i = 0; i < LANES && c + i < width; ++i) store_ints(to + (c + i) * to_row + key, r[i]);
        }
}

// dQ^T (n rows of KEYS queries) * factor to `rows` rows of n values.
template <class T>
inline void finish_turned(const float* x, int64_t n, float factor, int64_t rows, T* out, int64_t out_row) {
    for (int64_t query = 0; query < rows; query += LANES)
        for (int64_t c = 0; c < n; c += LANES) {
            Ints r[LANES];
            for (int i = 0; i < LANES; ++i) r[i] = c + i < n ? load_ints(x + (c + i) * KEYS + query) : Ints{};
            transpose(r);
            for (int i = 0; i < LANES && query + i < rows; ++i)
                store_first(out + (query + i) * out_row + c, (Floats)r[i] * splat(factor), n - c);
        }
}

}  // namespace attnbench::gradient
