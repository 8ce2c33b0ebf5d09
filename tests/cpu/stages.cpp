// The stages of the CPU kernels, one by one, for tests that compare each with its plain twin.
#include "backward.h"
#include "quantize.h"

using namespace attnbench;
using gradient::Element;
using gradient::Product;

extern "C" {

int stage_panel() { return PANEL; }

void stage_exp2(const float* x, int64_t n, bool fine, float* out) {
    for (int64_t i = 0; i < n; i += LANES)
        store(out + i, fine ? attnbench::exp2<true>(load(x + i)) : attnbench::exp2<false>(load(x + i)));
}

// Each n values alone, rounded and widened again.
void stage_round(const float* x, int64_t n, Value* narrow, float* out) {
    for (int64_t i = 0; i < n; i += LANES) {
        store_first(narrow + i, load_first(x + i, n - i), n - i);
        store_first(out + i, load_first(narrow + i, n - i), n - i);
    }
}

// from (rows, width) -> to (KEYS / PANEL, groups, PANEL, elements of a group)
void stage_pack_rows(const Value* from, int64_t rows, int64_t width, Element* to) {
    pack_rows<Product>(Dense<Value>{from, width}, rows, width, to);
}

void stage_pack_bytes(const uint8_t* from, int64_t rows, int64_t width, uint8_t* to) {
    pack_rows<Bytes<true>>(Dense<uint8_t>{from, width}, rows, width, to);
}

// from (rows, width) -> to (columns / PANEL, KEYS / elements of a group, PANEL, elements of a group)
void stage_pack_panels(const Value* from, int64_t rows, int64_t width, int64_t columns, Element* to) {
    pack_panels<Product>(Dense<Value>{from, width}, rows, width, columns, KEYS, 0, to);
}

// c (rows, columns) += a (rows, KEYS) b, of whose rows there are n; b: as stage_pack_panels makes it
void stage_accumulate(const Element* a, int64_t rows, const Element* b, int64_t n, int64_t columns, float* c) {
    const Tiles tiles;
    constexpr int ROWS = Product::ROWS;
    for (int64_t row = 0; row < rows; row += ROWS)
        with_constant<ROWS>(rows - row, [&](auto r) {
            accumulate<Product, r>(a + row * KEYS, KEYS, b, KEYS, 0, n, columns, c + row * columns, columns);
        });
}

void stage_hide(float* s, int64_t n, int64_t from, int64_t to) { hide(s, n, from, to); }

float stage_quantize(const Value* x, const float* mean, int64_t n, float levels, int8_t* to) {
    return quantize(x, mean, n, levels, to);
}

// The backward pass.

void stage_weights(float* s, float scale, const float* lse, Element* p) { gradient::weights(s, scale, lse, p); }

void stage_differences(const float* p, const float* dp, const float* delta, Element* ds) {
    gradient::differences(p, dp, delta, ds);
}

float stage_row_sum(const Value* a, const Value* b, int64_t n) { return gradient::row_sum(a, b, n); }

// from (rows, width) -> to (width, KEYS)
void stage_pack_turned(const Value* from, int64_t rows, int64_t width, Element* to) {
    gradient::pack_turned(from, width, rows, width, to, KEYS);
}

// from (width, KEYS) -> to (rows, width)
void stage_finish_turned(const float* from, int64_t width, float factor, int64_t rows, Value* to) {
    gradient::finish_turned(from, width, factor, rows, to, width);
}
}
