// Tokens into a packed cache: what quantized_cache.py does of itself, to the bit, and in no time for a single one. Where
// things lie is said in packed.h.
//
// A `Form` says how numbers are kept: BITS, of which 4 share a byte with others; GROUP, how many numbers of a row share a
// scale, 0 for all; levels(), the largest number; code(), numbers as bytes.
#pragma once

#include "packed.h"

namespace attnbench {

// Mirrored in attention.py: `count` tokens, key and value, that become those from `start` on of a cache. Strides of what is
// in the cache as in Problem and Scales.
struct Tokens {
    Tensor key, value, keys, values, key_scales, value_scales;
    const float* mean;  // of keys, (batch, kv_heads, head_dim), dense
    int64_t batch, kv_heads, count, start, head_dim, value_dim, threads;
};

// A row of a token, as bytes and scales.
template <class Form>
struct Narrow {
    Narrow(const Value* from, const float* mean, int64_t n) {
        alignas(64) float x[WIDTH] = {};
        for (int64_t i = 0; i < n; i += LANES) {
            const Floats raw = load_first(from + i, n - i);
            store(x + i, mean ? raw - load_first(mean + i, n - i) : raw);
        }
        const int64_t group = Form::GROUP ? Form::GROUP : round_up(n, LANES);
        for (int64_t start = 0; start < n; start += group, ++groups) {
            Floats peak = zero();
            for (int64_t i = start; i < start + group; i += LANES) peak = max(peak, abs(load(x + i)));
            store_first(scales + groups, splat(std::max(greatest(peak), 1e-30f) / Form::levels()), 1);
            const Floats scale = load_first(scales + groups, 1);
            const Floats factor = splat(total(scale));  // the one lane that is there
            for (int64_t i = start; i < start + group; i += LANES) store_ints(codes + i, Form::code(load(x + i) / factor));
        }
        std::fill(codes + n, codes + WIDTH, 0);  // what is beyond is as torch pads it
    }

    static constexpr int WIDTH = MAX_DIM + 64;
    alignas(64) int32_t codes[WIDTH];
    bf16 scales[WIDTH / 64];
    int64_t groups = 0;
};

// The place of the i-th of four bytes.
INLINE int64_t crossed(int64_t i) { return i == 1 || i == 2 ? 3 - i : i; }

template <class Form>
void append(const Tokens& t, int64_t entry, int64_t head, int64_t i) {
    constexpr bool HALVES = Form::BITS == 4;
    const int64_t at = t.start + i, tile = at / TILE, within = at % TILE;
    const auto put_scales = [&](const Tensor& to, const auto& row) {
        for (int64_t g = 0; g < row.groups; ++g) to.at<bf16>(entry, head, tile)[g * TILE + within] = row.scales[g];
    };
    const float* mean = t.mean + (entry * t.kv_heads + head) * t.head_dim;
    const Narrow<Form> key(t.key.at<Value>(entry, head, i), mean, t.head_dim);
    uint8_t* to = t.keys.at<uint8_t>(entry, head, tile) + within * 4;
    for (int64_t d = 0, end = round_up(t.head_dim, 8); d < end; d += HALVES ? 8 : 4, to += TILE * 4)
        for (int64_t j = 0; j < 4; ++j) to[crossed(j)] = key.codes[d + j] | (HALVES ? key.codes[d + 4 + j] << 4 : 0);
    put_scales(t.key_scales, key);
    const Narrow<Form> value(t.value.at<Value>(entry, head, i), nullptr, t.value_dim);
    to = t.values.at<uint8_t>(entry, head, at / 4) + crossed(at % 4);
    for (int64_t c = 0, end = round_up(t.value_dim, 32); c < end; c += HALVES ? 32 : 16, to += 64)
        for (int64_t j = 0; j < 16; ++j) to[4 * j] = value.codes[c + j] | (HALVES ? value.codes[c + 16 + j] << 4 : 0);
    put_scales(t.value_scales, value);
}

// All of them: a head to a thread, or none to many where there is little to do.
template <class Form>
void append(const Tokens& t) {
    const int64_t heads = t.batch * t.kv_heads;
#pragma omp parallel for num_threads(t.threads) if (t.count > 8)
    for (int64_t n = 0; n < heads; ++n)
        for (int64_t i = 0; i < t.count; ++i) append<Form>(t, n / t.kv_heads, n % t.kv_heads, i);
}

// Integers of so many bits.
template <int SIZE>
struct WholeForm {
    static constexpr int BITS = SIZE, GROUP = SIZE == 4 ? 64 : 0, OFFSET = SIZE == 4 ? 8 : 0;
    static float levels() { return SIZE == 4 ? 7 : 127; }
    static INLINE Ints code(Floats x) { return (to_ints(x) + splat(OFFSET)) & splat(0xff); }
};

// Floats with so many bits of mantissa, of 7 beside the sign; what would be subnormal becomes 0.
template <int MANTISSA>
struct FloatForm {
    static constexpr int BITS = 8, GROUP = 0, BIAS = (1 << (6 - MANTISSA)) - 1, SHIFT = 23 - MANTISSA;
    static float levels() { return MANTISSA == 3 ? 448 : 57344; }
    static INLINE Ints code(Floats x) {
        const Ints bits = (Ints)x, sign = (bits >> 24) & splat(0x80), size = bits & splat(0x7fffffff);
        const Ints even = size + splat((1 << (SHIFT - 1)) - 1) + ((size >> SHIFT) & splat(1));  // rounded, ties to even
        const Ints number = (even >> SHIFT) - splat((127 - BIAS) << MANTISSA);
        return (number | sign) & (size >= splat((127 - BIAS + 1) << 23));
    }
};

}  // namespace attnbench
