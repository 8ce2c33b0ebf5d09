// The products of the kernels, all of 32-bit groups: a float, a pair of bf16, four bytes. C = A B for some rows of A, whose
// groups are read where they lie, and a panel of B, packed so that a register holds one group of LANES columns.
#pragma once

#include <type_traits>

#include "vectors.h"

namespace attnbench {

// How groups are multiplied in tiles, where the CPU has such; none: they are multiplied in registers.
enum class Dot { none, pairs, signed_unsigned, unsigned_signed };

}  // namespace attnbench

#ifdef __AMX_TILE__
#include "amx.h"
#else
namespace attnbench {

constexpr int TILE_ROWS = 0;
struct Tiles {};  // none are held

template <Dot dot, int R, int V, bool add>
void multiply_tiles(const void* a, int64_t a_row, const void* b, int64_t b_step, int64_t groups, void* c, int64_t c_row);

}  // namespace attnbench
#endif

namespace attnbench {

constexpr int rows_of(Dot dot) { return dot == Dot::none ? ROWS : TILE_ROWS; }  // that are multiplied together

// float32, to which narrower values are widened while they are packed.
struct Singles {
    using Element = float;
    static constexpr int GROUP = 1;  // elements
    static constexpr Dot DOT = Dot::none;
    static constexpr int ROWS = rows_of(DOT);

    static INLINE Floats dot(Floats sum, Ints b, Ints a) { return fma((Floats)a, (Floats)b, sum); }

    template <class T>
    static INLINE Ints along(const T* x, int64_t n) {  // the first n elements of a row
        return (Ints)load_first(x, n);
    }

    template <class T>
    static INLINE Ints across(const T* x, const T*, int64_t n) {  // n columns of a row
        return (Ints)load_first(x, n);
    }

    static INLINE void put(float* to, Floats low, Floats high) { store(to, low), store(to + LANES, high); }
};

#ifdef BF16_PAIRS
// Pairs of bf16, whose products are added to float32.
struct Pairs {
    using Element = bf16;
    static constexpr int GROUP = 2;
#ifdef __AMX_BF16__
    static constexpr Dot DOT = Dot::pairs;
#else
    static constexpr Dot DOT = Dot::none;
#endif
    static constexpr int ROWS = rows_of(DOT);

    static INLINE Floats dot(Floats sum, Ints b, Ints a) { return dot2(sum, b, a); }

    static INLINE Ints along(const bf16* x, int64_t n) { return load_bytes(x, 2 * n); }

    // n columns of a row and of the next one, where that exists.
    static INLINE Ints across(const bf16* x, const bf16* next, int64_t n) {
        return next ? load_shorts(x, n) | load_shorts(next, n) << 16 : load_shorts(x, n);
    }

    static INLINE void put(bf16* to, Floats low, Floats high) { store_ints(to, narrow_pair(low, high)); }
};
#endif

// What multiplies values of a type: by itself where this CPU can.
template <class T>
struct Multiplied {
    using Product = Singles;
};
#ifdef BF16_PAIRS
template <>
struct Multiplied<bf16> {
    using Product = Pairs;
};
#endif

// Bytes: four unsigned ones of the panel with four signed ones of the row, or the other way round.
template <bool unsigned_panel>
struct Bytes {
    using Element = uint8_t;
    static constexpr int GROUP = 4;
#if defined(__AMX_INT8__) && defined(VNNI)
    static constexpr Dot DOT = unsigned_panel ? Dot::signed_unsigned : Dot::unsigned_signed;
#else
    static constexpr Dot DOT = Dot::none;
#endif
    static constexpr int ROWS = rows_of(DOT);

    static INLINE Ints dot(Ints sum, Ints b, Ints a) { return unsigned_panel ? dot4(sum, b, a) : dot4(sum, a, b); }

    static INLINE Ints along(const uint8_t* x, int64_t n) { return load_bytes(x, n); }
};

// sum += A B for R rows and V registers of columns. Strides are in bytes: a_row and a_step from row to row and from group to
// group of A, b_step from group to group of B. In tiles groups of A lie one after the other.
template <class Product, int R, int V, class Sum>
INLINE void multiply(const void* a, int64_t a_row, int64_t a_step, const void* b, int64_t b_step, int64_t groups,
                     Sum (&sum)[R][V]) {
    if constexpr (Product::DOT != Dot::none)
        return multiply_tiles<Product::DOT, R, V, true>(a, a_row, b, b_step, groups, sum, 4 * V * LANES);
    auto *left = static_cast<const char*>(a), *right = static_cast<const char*>(b);
    for (int64_t group = 0; group < groups; ++group, left += a_step, right += b_step) {
        Ints columns[V];
#pragma GCC unroll 4
        for (int t = 0; t < V; ++t) columns[t] = load_ints(right + 4 * LANES * t);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const Ints row = spread(left + r * a_row);
#pragma GCC unroll 4
            for (int t = 0; t < V; ++t) sum[r][t] = Product::dot(sum[r][t], columns[t], row);
        }
    }
}

// C = A B, or += where `add`. a: rows a_row elements apart; b: [group][V * LANES]; c: R rows of floats,
// c_row apart.
template <class Product, int R, int V, bool add>
INLINE void product(const typename Product::Element* a, int64_t a_row, const typename Product::Element* b,
                    int64_t groups, float* c, int64_t c_row) {
    constexpr int64_t A = sizeof *a, B = 4 * V * LANES, C = sizeof *c;
    if constexpr (Product::DOT != Dot::none)
        return multiply_tiles<Product::DOT, R, V, add>(a, A * a_row, b, B, groups, c, C * c_row);
    Floats sum[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < V; ++t) sum[r][t] = add ? load(c + r * c_row + LANES * t) : zero();
    multiply<Product>(a, A * a_row, 4, b, B, groups, sum);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < V; ++t) store(c + r * c_row + LANES * t, sum[r][t]);
}

// f with min(n, most) as a constant: a loop over what is known at run time becomes one over registers.
template <int most, int least = 1, class F>
INLINE void with_constant(int64_t n, F f) {
    switch (n) {
        case least: f(std::integral_constant<int, std::min(least, most)>()); break;
        case least + 1: f(std::integral_constant<int, std::min(least + 1, most)>()); break;
        case least + 2: f(std::integral_constant<int, std::min(least + 2, most)>()); break;
        case least + 3: f(std::integral_constant<int, std::min(least + 3, most)>()); break;
        case least + 4: f(std::integral_constant<int, std::min(least + 4, most)>()); break;
        default:
            if constexpr (most > least + 5)
                with_constant<most, least + 5>(n, f);
            else
                f(std::integral_constant<int, most>());
    }
}

// C += A B for R rows and `columns` columns, a multiple of LANES, over n of the rows of B from `start` on. b: as pack_panels
// lays it out, of `length` rows.
template <class Product, int R>
INLINE void accumulate(const typename Product::Element* a, int64_t a_row, const typename Product::Element* b,
                       int64_t length, int64_t start, int64_t n, int64_t columns, float* c, int64_t c_row) {
    if constexpr (R > Product::ROWS) {  // as where keys are multiplied in tiles and values in registers
        constexpr int MOST = Product::ROWS;
        accumulate<Product, MOST>(a, a_row, b, length, start, n, columns, c, c_row);
        return accumulate<Product, R - MOST>(a + MOST * a_row, a_row, b, length, start, n, columns, c + MOST * c_row, c_row);
    }
    for (int64_t at = 0; at < columns; at += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, columns - at);
        with_constant<VECTORS>(width / LANES, [&](auto vectors) __attribute__((always_inline)) {
            product<Product, R, vectors, true>(a, a_row, b + at * length + start * width,
                                               round_up(n, Product::GROUP) / Product::GROUP, c + at, c_row);
        });
    }
}

// ---- packing ----------------------------------------------------------------------------------------------------

// A row of n elements, padded with zeros to whole registers.
template <class Product, class T>
inline void copy_row(const T* from, int64_t n, typename Product::Element* to) {
    for (int64_t i = 0; i < n; i += LANES * Product::GROUP) store_ints(to + i, Product::along(from + i, n - i));
}

// Rows of a matrix, one after the other.
template <class T>
struct Dense {
    const T* operator()(int64_t i) const { return data + i * row; }
    const T* data;
    int64_t row;
};

// KEYS rows to [panel of rows][group of elements][PANEL][GROUP], `rows` of which exist; the others become 0. from: what
// says where the i-th one lies.
template <class Product, class From>
inline void pack_rows(From from, int64_t rows, int64_t width, typename Product::Element* to) {
    constexpr int GROUP = Product::GROUP;
    const int64_t groups = round_up(width, GROUP) / GROUP;
    for (int64_t key = 0; key < KEYS; key += LANES) {
        typename Product::Element* panel = to + (key / PANEL * PANEL * groups + key % PANEL) * GROUP;
        for (int64_t at = 0; at < groups; at += LANES) {
            Ints r[LANES];
            for (int i = 0; i < LANES; ++i)
                r[i] = key + i < rows ? Product::along(from(key + i) + at * GROUP, width - at * GROUP) : Ints{};
            transpose(r);
            for (int i = 0; i < LANES && at + i < groups; ++i) store_ints(panel + (at + i) * PANEL * GROUP, r[i]);
        }
    }
}

// KEYS rows, of `length` from `start` on, to [panel of columns][group of rows][column][GROUP]; the last panel may be
// narrower. `columns`, a multiple of LANES, of which `width` exist; and so do `rows` rows. count: where not KEYS rows.
template <class Product, class From>
inline void pack_panels(From from, int64_t rows, int64_t width, int64_t columns, int64_t length,
                        int64_t start, typename Product::Element* to, int64_t count = KEYS) {
    constexpr int GROUP = Product::GROUP;
    for (int64_t panel = 0; panel < columns; panel += PANEL) {
        const int64_t end = std::min<int64_t>(panel + PANEL, columns);
        auto* at = to + panel * length + start * (end - panel);
        for (int64_t key = 0; key < count; key += GROUP) {
            const auto *row = key < rows ? from(key) : nullptr, *next = key + 1 < rows ? from(key + 1) : nullptr;
            for (int64_t c = panel; c < end; c += LANES, at += GROUP * LANES)
                store_ints(at, row ? Product::across(row + c, next ? next + c : nullptr, width - c) : Ints{});
        }
    }
}

}  // namespace attnbench
