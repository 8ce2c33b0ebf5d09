// The stages of the CPU kernels, one by one, for tests that compare each with its plain twin.
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
}
