// What a register tile of the CPU kernels does from the first cache: the products of plugins/native, and nothing else.
#include "products.h"

using namespace attnbench;

namespace {

constexpr int64_t GROUPS = 64;  // of 4 bytes: the panel and the rows lie in the first cache together

template <class Product, class Sum>
void repeat(int64_t times) {
    constexpr int ROWS = Product::ROWS;
    const Tiles tiles;
    alignas(64) static thread_local char rows[ROWS * GROUPS * 4], panel[PANEL * GROUPS * 4], out[ROWS * PANEL * 4];
    volatile int64_t known_late = GROUPS;  // as in the kernels: the compiler would unroll all of it
    const int64_t groups = known_late;
    for (int64_t i = 0; i < times; ++i) {
        Sum sum[ROWS][VECTORS];
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < VECTORS; ++t) sum[r][t] = Sum{};
        multiply<Product>(rows, groups * 4, 4, panel, 4 * PANEL, groups, sum);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < VECTORS; ++t) store_ints(out + (r * VECTORS + t) * LANES * 4, (Ints)sum[r][t]);
        asm volatile("" ::: "memory");  // or the loop would be done once
    }
}

}  // namespace

extern "C" {
// Multiplications and additions of one repetition, by elements in a group.
int64_t tile_operations(int64_t elements) {
    const int64_t rows = elements == 1 ? ROWS : elements == 4 ? Bytes<true>::ROWS : Multiplied<bf16>::Product::ROWS;
    return 2 * rows * PANEL * GROUPS * elements;
}

void tile_float32(int64_t times) { repeat<Singles, Floats>(times); }
void tile_int8(int64_t times) { repeat<Bytes<true>, Ints>(times); }
#ifdef BF16_PAIRS
void tile_bfloat16(int64_t times) { repeat<Pairs, Floats>(times); }
#else
void tile_bfloat16(int64_t times) { repeat<Singles, Floats>(times); }
#endif
}
