// AMX: a product's sums in tiles of 16 rows x 64 bytes, beside AVX-512, which does all else. A panel packed for registers is
// the right operand of a tile as it is, and so are rows of groups the left one. Nobody has run this on a CPU that has it.
#pragma once

#include <immintrin.h>

namespace attnbench {

constexpr int TILE_ROWS = 16;  // rows of one, and groups of 32 bits in a row

// How this thread's tiles are laid out: rows of sums, and of what is no whole tile the groups; 0: not at all.
struct Layout {
    int rows = 0, rest = 0;
};
static thread_local Layout layout;

// For the compiler, which isn't told that tiles are loaded from memory: what was written to it is there.
INLINE void written(const void* x) { asm volatile("" : : "r"(x) : "memory"); }

// Tiles 0 to 3 are sums, 4 and 5 a left and a right operand of 16 groups; 6 and 7 are those of the rest.
__attribute__((noinline)) inline void lay_out(int rows, int rest) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};  // of a row
        uint8_t rows[16] = {};
    } shape;
    const auto tile = [&](int i, int height, int groups) {
        shape.bytes[i] = uint16_t(height * groups ? 4 * groups : 0);
        shape.rows[i] = uint8_t(height * groups ? height : 0);
    };
    for (int i = 0; i < 4; ++i) tile(i, rows, TILE_ROWS);
    tile(4, rows, TILE_ROWS), tile(5, TILE_ROWS, TILE_ROWS);
    tile(6, rows, rest), tile(7, rest, TILE_ROWS);
    written(&shape);
    _tile_loadconfig(&shape);
    layout = {rows, rest};
}

// What a thread holds while it multiplies. Others lay out tiles of their own in between (oneDNN does), and a thread that
// holds some is slower to switch: so none are taken over from before, and all are given back.
struct Tiles {
    Tiles() { layout = {}; }
    ~Tiles() {
        if (layout.rows) _tile_release();
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// c = A B, or += where `add`, for R rows and V registers of columns. Strides are in bytes: of rows of A and of c, and of
// groups of B; those of A lie one after the other.
template <Dot dot, int R, int V, bool add>
INLINE void multiply_tiles(const void* a, int64_t a_row, const void* b, int64_t b_step, int64_t groups, void* c,
                           int64_t c_row) {
    static_assert(R <= TILE_ROWS && V <= 4);
    auto *left = static_cast<const char*>(a), *right = static_cast<const char*>(b);
    auto* sums = static_cast<char*>(c);
    const int rest = int(groups % TILE_ROWS);
    if (layout.rows != R || (rest && layout.rest != rest)) lay_out(R, rest);
    written(a), written(b), written(c);
// The intrinsics take a tile's number by its digit alone.
#define EACH(word) \
    word(0); \
    if constexpr (V > 1) { word(1); } \
    if constexpr (V > 2) { word(2); } \
    if constexpr (V > 3) { word(3); }
#define START(t) \
    if constexpr (add) { _tile_loadd(t, sums + 64 * t, c_row); } \
    else { _tile_zero(t); }
#define DOT(t, l, r) \
    _tile_loadd(r, right + 64 * t, b_step); \
    if constexpr (dot == Dot::pairs) { _tile_dpbf16ps(t, l, r); } \
    else if constexpr (dot == Dot::signed_unsigned) { _tile_dpbsud(t, l, r); } \
    else { _tile_dpbusd(t, l, r); }
#define WHOLE(t) DOT(t, 4, 5)
#define REST(t) DOT(t, 6, 7)
#define STORE(t) _tile_stored(t, sums + 64 * t, c_row)
    EACH(START)
    for (int64_t group = TILE_ROWS; group <= groups; group += TILE_ROWS, left += 4 * TILE_ROWS, right += b_step * TILE_ROWS) {
        _tile_loadd(4, left, a_row);
        EACH(WHOLE)
    }
    if (rest) {
        _tile_loadd(6, left, a_row);
        EACH(REST)
    }
    EACH(STORE)
#undef EACH
#undef START
#undef DOT
#undef WHOLE
#undef REST
#undef STORE
}

}  // namespace attnbench
