// AMX on a CPU without it: such an instruction is illegal there, so its signal is caught, the instruction read and done in
// plain C++, as the instruction set reference defines it, faults included. So compiled kernels are executed as they are.
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Tile {
    int rows = 0, bytes = 0;  // as laid out; the latter of a row
    alignas(64) uint8_t data[16][64] = {};
};

thread_local Tile tiles[8];
thread_local bool laid_out = false;
std::atomic<int64_t> holding{0}, multiplied{0};  // threads, and instructions

void fault(bool is, const char* what) {
    if (!is) return;
    std::fprintf(stderr, "AMX: %s\n", what);
    std::abort();
}

Tile& used(int i) {
    fault(!laid_out || tiles[i].rows == 0, "#UD, a tile that is not laid out");
    return tiles[i];
}

void release() {
    for (auto& tile : tiles) tile = {};
    holding -= laid_out;
    laid_out = false;
}

// LDTILECFG, palette 1.
void configure(const uint8_t* from) {
    uint8_t x[64];
    std::memcpy(x, from, sizeof x);
    fault(x[0] != 1 || x[1] != 0, "#GP, the palette, or a row to start at");
    for (int i = 2; i < 64; ++i) fault((i < 16 || (i > 31 && i < 48) || i > 55) && x[i] != 0, "#GP, what is reserved");
    release();
    for (int i = 0; i < 8; ++i) {
        const int bytes = x[16 + 2 * i] | x[17 + 2 * i] << 8, rows = x[48 + i];
        fault(bytes > 64 || rows > 16 || (bytes == 0) != (rows == 0), "#GP, the size of a tile");
        tiles[i].rows = rows, tiles[i].bytes = bytes;
    }
    ++holding;
    laid_out = true;
}

void zero(int i) { std::memset(used(i).data, 0, sizeof used(i).data); }

void load(int i, const uint8_t* base, int64_t stride) {
    zero(i);
    for (int row = 0; row < tiles[i].rows; ++row) std::memcpy(tiles[i].data[row], base + row * stride, tiles[i].bytes);
}

void store(int i, uint8_t* base, int64_t stride) {
    const Tile& tile = used(i);
    for (int row = 0; row < tile.rows; ++row) std::memcpy(base + row * stride, tile.data[row], tile.bytes);
}

void check(const Tile& c, const Tile& a, const Tile& b) {
    fault(&c == &a || &c == &b || &a == &b, "#UD, a tile twice");
    fault(c.rows != a.rows || c.bytes != b.bytes || a.bytes / 4 != b.rows, "#UD, sizes that do not fit");
    fault(a.bytes % 4 || b.bytes % 4, "#UD, parts of groups");
    ++multiplied;
}

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }  // denormals become 0

float widened(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return flushed(x);
}

// TDPBF16PS: even products and odd ones are summed apart, then added to each other, and that to the sum.
void dot_pairs(int ci, int ai, int bi) {
    Tile &c = used(ci), &a = used(ai), &b = used(bi);
    check(c, a, b);
    for (int row = 0; row < c.rows; ++row) {
        uint16_t left[32], right[32];
        float even[16] = {}, odd[16] = {}, sum[16];
        std::memcpy(left, a.data[row], 64), std::memcpy(sum, c.data[row], 64);
        for (int k = 0; k < a.bytes / 4; ++k) {
            std::memcpy(right, b.data[k], 64);
            for (int n = 0; n < c.bytes / 4; ++n) {
                even[n] = flushed(std::fma(widened(left[2 * k]), widened(right[2 * n]), even[n]));
                odd[n] = flushed(std::fma(widened(left[2 * k + 1]), widened(right[2 * n + 1]), odd[n]));
            }
        }
        for (int n = 0; n < c.bytes / 4; ++n) sum[n] = flushed(flushed(sum[n]) + flushed(even[n] + odd[n]));
        std::memcpy(c.data[row], sum, c.bytes);
    }
}

// TDPBSUD and TDPBUSD: signed or unsigned bytes of A, and of B.
template <class A, class B>
void dot_bytes(int ci, int ai, int bi) {
    Tile &c = used(ci), &a = used(ai), &b = used(bi);
    check(c, a, b);
    for (int row = 0; row < c.rows; ++row) {
        uint32_t sum[16];  // wraps around
        std::memcpy(sum, c.data[row], 64);
        for (int k = 0; k < a.bytes / 4; ++k)
            for (int n = 0; n < c.bytes / 4; ++n)
                for (int i = 0; i < 4; ++i) sum[n] += uint32_t(int(A(a.data[row][4 * k + i])) * int(B(b.data[k][4 * n + i])));
        std::memcpy(c.data[row], sum, c.bytes);
    }
}

// The operand in memory of an instruction, whose ModRM byte is its fifth (volume 2 of the reference, section 2.1.5).
struct Operand {
    Operand(const uint8_t* code, const greg_t* registers) {
        static constexpr int ORDER[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                        REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        const int mod = code[4] >> 6, rm = code[4] & 7, high_base = ~code[1] >> 5 & 1, high_index = ~code[1] >> 6 & 1;
        int low = rm;
        const uint8_t* end = code + 5;
        if (rm == 4) {
            const int sib = *end++, index = (sib >> 3 & 7) | high_index << 3;
            low = sib & 7;
            if (index != 4) stride = registers[ORDER[index]] << (sib >> 6);
        }
        const bool without_base = mod == 0 && low == 5;
        int32_t far = 0;
        if (mod == 2 || without_base)
            std::memcpy(&far, end, 4), end += 4;
        else if (mod == 1)
            far = int8_t(*end++);
        length = end - code;
        greg_t from = without_base ? (rm == 4 ? 0 : greg_t(end)) : registers[ORDER[low | high_base << 3]];
        data = reinterpret_cast<uint8_t*>(from + far);
    }
    uint8_t* data;
    int64_t stride = 0, length;
};

// The instruction's length; 0 where it is none of AMX's. All have VEX of three bytes: C4, R X B map, W vvvv L prefix.
int64_t execute(const uint8_t* code, const greg_t* registers) {
    enum { NONE, P66, F3, F2 };
    if (code[0] != 0xc4 || (code[1] & 0x9f) != 0x82 || (code[2] & 0x84) != 0) return 0;
    const int prefix = code[2] & 3, last = ~code[2] >> 3 & 15, reg = code[4] >> 3 & 7, rm = code[4] & 7;
    const auto is = [&](int opcode, int with) { return code[3] == opcode && prefix == with; };
    if (code[4] >> 6 != 3) {
        const Operand memory(code, registers);
        if (is(0x49, NONE) && reg == 0) return configure(memory.data), memory.length;
        if (is(0x4b, F2) && rm == 4) return load(reg, memory.data, memory.stride), memory.length;
        if (is(0x4b, F3) && rm == 4) return store(reg, memory.data, memory.stride), memory.length;
        return 0;
    }
    if (is(0x49, NONE) && code[4] == 0xc0) return release(), 5;
    if (is(0x49, F2) && rm == 0) return zero(reg), 5;
    if (is(0x5c, F3)) return dot_pairs(reg, rm, last), 5;
    if (is(0x5e, F3)) return dot_bytes<int8_t, uint8_t>(reg, rm, last), 5;
    if (is(0x5e, P66)) return dot_bytes<uint8_t, int8_t>(reg, rm, last), 5;
    return 0;
}

struct sigaction before;

void illegal(int, siginfo_t*, void* context) {
    auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const int64_t length = execute(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
    if (length == 0) sigaction(SIGILL, &before, nullptr);  // it comes again, and is theirs
    registers[REG_RIP] += length;
}

}  // namespace

extern "C" {
void tiles_emulate() {
    struct sigaction action {};
    action.sa_sigaction = illegal;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &before);
}
void tiles_stop() { sigaction(SIGILL, &before, nullptr); }
int tiles_held() { return int(holding); }  // threads that hold some: none but during a call
int tiles_multiplied() { return int(multiplied); }  // instructions so far
}
