// The stages of the CPU kernels, one by one, for tests that compare each with its plain twin.
#include "backward.cpp"
#include "int8.cpp"

using namespace attnbench;

extern "C" {

void stage_exp2(const float* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += LANES) _mm512_storeu_ps(out + i, attnbench::exp2(_mm512_loadu_ps(x + i)));
}

// from (rows, width bytes) -> to (width / 4, KEYS, 4 bytes)
void stage_pack_groups(const uint8_t* from, int64_t rows, int64_t width, uint8_t* to) {
    Buffer<uint8_t> packed(round_up(width, 4) * KEYS);
    pack_groups(from, width, rows, width, packed);
    std::memcpy(to, packed, round_up(width, 4) * KEYS);
}

// from (rows, width) -> to (KEYS / 2, columns, 2)
void stage_pack_pairs(const bf16* from, int64_t rows, int64_t width, int64_t columns, bf16* to) {
    Buffer<bf16> packed(KEYS * columns);
    pack_pairs(from, width, rows, width, columns, packed);
    std::memcpy(to, packed, KEYS * columns * sizeof(bf16));
}

void stage_hide(float* s, int64_t n, int64_t from, int64_t to) { hide(s, n, from, to); }

float stage_quantize(const bf16* x, const float* mean, int64_t n, int8_t* to) { return quantize(x, mean, n, to); }

// The backward pass. torch's memory is aligned for these.

void stage_weights(float* s, float scale, const float* lse, bf16* p) { gradient::weights(s, scale, lse, p); }

void stage_differences(const float* p, const float* dp, const float* delta, bf16* ds) {
    gradient::differences(p, dp, delta, ds);
}

void stage_interleave(const bf16* even, const bf16* odd, bf16* to) { gradient::interleave(even, odd, to); }

float stage_row_sum(const bf16* a, const bf16* b, int64_t n) { return gradient::row_sum(a, b, n); }

// from (rows, width) -> to (width, KEYS)
void stage_pack_turned(const bf16* from, int64_t rows, int64_t width, bf16* to) {
    gradient::pack_turned(from, width, rows, width, to, KEYS);
}

// from (width, KEYS) -> to (rows, width)
void stage_finish_turned(const float* from, int64_t width, float factor, int64_t rows, bf16* to) {
    gradient::finish_turned(from, width, factor, rows, to, width);
}
}
