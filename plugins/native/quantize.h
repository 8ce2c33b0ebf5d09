// Rows to integers with a scale.
#pragma once

#include "vectors.h"

namespace attnbench {

constexpr float LEVELS = 127;             // of a signed byte
constexpr int OFFSET = 1 << (BYTE - 1);   // 128 or 64
constexpr float KEY_LEVELS = OFFSET - 1;  // on each side
constexpr float WEIGHTS = (1 << BYTE) - 1;  // of an unsigned byte
constexpr float TINIEST = 1e-30f;

// Equation 2: x - mean to integers with the scale peak / levels, which is returned. mean: nullptr for none.
template <class T>
inline float quantize(const T* x, const float* mean, int64_t n, float levels, int8_t* to) {
    const auto value = [&](int64_t i) {
        const Floats raw = load_first(x + i, n - i);
        return mean ? raw - load_first(mean + i, n - i) : raw;
    };
    Floats peak = zero();
    for (int64_t i = 0; i < n; i += LANES) peak = max(peak, abs(value(i)));
    const float scale = std::max(greatest(peak), TINIEST) / levels;
    for (int64_t i = 0; i < n; i += LANES) store_int8(to + i, to_ints(value(i) / splat(scale)), n - i);
    return scale;
}

}  // namespace attnbench
