// What AVX2 and AVX-512 say in the same words, each with those of its own file.
#pragma once

namespace attnbench {

// The transpose of LANES x LANES values of 32 bits, in rounds of exchanging halves: of pairs, quads, and so on.
inline void transpose(Ints r[LANES]) {
    Ints t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        t[i] = lower_of_pairs(r[i], r[i + 1]);
        t[i + 1] = upper_of_pairs(r[i], r[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        r[i] = lower_of_quads(t[i], t[i + 2]);
        r[i + 1] = upper_of_quads(t[i], t[i + 2]);
        r[i + 2] = lower_of_quads(t[i + 1], t[i + 3]);
        r[i + 3] = upper_of_quads(t[i + 1], t[i + 3]);
    }
    exchange_far(r);
}

// dot4: sum + the products of four unsigned and four signed bytes in each lane. dot2: of two signed 16 bits. dot4_raised
// takes signed bytes from -127 up in both, the first of which `raised` has made RAISED more. dot4_small is for bytes of
// SMALL_BITS or signed ones with others up to 15: it may add them in 16 bits, SMALL times those up to 127, after which
// `settle` gives the sum.
#ifdef VNNI
constexpr int BYTE = 8;  // bits of the unsigned ones that may be used
constexpr int RAISED = 128, SMALL = 1 << 20, SMALL_BITS = 8;
INLINE Ints dot4(Ints sum, Ints bytes, Ints integers) {  // as an intrinsic, GCC 12 spills each sum
    asm(VNNI "vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(integers));
    return sum;
}
INLINE Ints dot2(Ints sum, Ints a, Ints b) {
    asm(VNNI "vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
INLINE Ints raised(Ints x) { return x ^ splat(int(0x80808080)); }
INLINE Ints dot4_raised(Ints sum, Ints x, Ints integers) { return dot4(sum, x, integers); }
INLINE Ints dot4_small(Ints sum, Ints bytes, Ints integers) { return dot4(sum, bytes, integers); }
INLINE Ints settle(Ints sum) { return sum; }
#else
constexpr int BYTE = 7;  // as pairs are added in 16 bits
constexpr int RAISED = 0, SMALL = 8, SMALL_BITS = 8;
INLINE Ints settle(Ints sum) { return pair_shorts(sum, splat(0x10001)); }
INLINE Ints dot4(Ints sum, Ints bytes, Ints integers) { return sum + settle(pair_bytes(bytes, integers)); }
INLINE Ints dot2(Ints sum, Ints a, Ints b) { return sum + pair_shorts(a, b); }
INLINE Ints raised(Ints x) { return x; }
INLINE Ints dot4_raised(Ints sum, Ints x, Ints integers) {  // |x| times what has the sign of x
    return dot4(sum, abs_bytes(x), turn_bytes(integers, x));
}
INLINE Ints dot4_small(Ints sum, Ints bytes, Ints integers) { return add_shorts(sum, pair_bytes(bytes, integers)); }
#endif

}  // namespace attnbench
