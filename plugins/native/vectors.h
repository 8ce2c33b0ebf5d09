// The words that the kernels are written in: registers of LANES values of 32 bits, and what is done with them. Each
// instruction set says its own in a file, with the tile that suits its registers; + - * / & | << are the compiler's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace attnbench {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// The last values of a row, where no part of a register can be read or written: they go through a buffer.
template <int SIZE>
struct Tail {
    Tail() = default;
    Tail(const void* x, int64_t size) {
        if (size > 0) std::memcpy(bytes, x, std::min<int64_t>(size, SIZE));
    }
    void put(void* x, int64_t size) const {
        if (size > 0) std::memcpy(x, bytes, std::min<int64_t>(size, SIZE));
    }
    alignas(32) char bytes[SIZE] = {};
};

}  // namespace attnbench

// Each says: load, load_first, load_shorts, load_bytes and their stores, where `first n` of what is there are meant and
// the others become 0, or stay as they are.
#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#else
#include "neon.h"
#endif

namespace attnbench {

constexpr int ROWS = 6;                 // of a tile in registers
constexpr int PANEL = VECTORS * LANES;  // columns of a tile
constexpr int KEYS = 64;                // that are packed together, a multiple of PANEL; mirrored in attention.py

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE Ints spread(const void* four) {  // four bytes, into every lane
    int value;
    std::memcpy(&value, four, sizeof value);
    return splat(value);
}

// In a register from here on: the compiler would read it from memory anew wherever it is used.
template <class T>
INLINE void keep(T& x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__AVX2__)
    asm("" : "+x"(x));
#else
    asm("" : "+w"(x));
#endif
}

// In memory until it is needed: there are registers for better things.
template <class T>
INLINE void set_aside(T& x) {
    asm("" : "+m"(x));
}

INLINE Floats zero() { return splat(0.f); }
INLINE Floats kept(Floats x, int64_t n) { return (Floats)((Ints)x & first(n)); }  // the first n values, and zeros
INLINE Floats abs(Floats x) { return (Floats)((Ints)x & splat(0x7fffffff)); }

#ifndef BF16_PAIRS
INLINE Ints narrow_bf16(Floats x) {  // rounded to even where it is a tie
    const Ints bits = (Ints)x, rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
    return x == x ? rounded : splat(0x7fc0);
}
#endif

INLINE Floats load(const bf16* x) { return (Floats)(load_shorts(x) << 16); }
INLINE Floats load_first(const bf16* x, int64_t n) { return (Floats)(load_shorts(x, n) << 16); }
INLINE void store_first(bf16* x, Floats value, int64_t n) { store_shorts(x, narrow_bf16(value), n); }
INLINE void store_first(f16* x, Floats value, int64_t n) { store_shorts(x, narrow_f16(value), n); }

// 2^x = 2^n 2^f with n = round(x) and |f| <= 1/2; 2^f by the polynomial of its degree whose greatest relative error is
// least: a cubic, 1e-4, which bf16 (4e-3) does not see, or where that is too coarse the fifth degree, 2e-7. Both are
// exact at 0.
template <bool fine>
INLINE Floats exp2(Floats x) {
    x = max(x, splat(-126.f));
    const Floats n = nearest(x), f = x - n;
    Floats p;
    if constexpr (fine) {
        p = fma(f, splat(1.3264720e-3f), splat(9.6715130e-3f));
        p = fma(f, p, splat(5.5507340e-2f));
        p = fma(f, p, splat(0.24022242f));
        p = fma(f, p, splat(0.69314700f));
    } else {
        p = fma(f, splat(0.05500906f), splat(0.24221097f));
        p = fma(f, p, splat(0.6932829f));
    }
    p = fma(f, p, splat(1.f));
    return times_power(p, n);
}

}  // namespace attnbench
