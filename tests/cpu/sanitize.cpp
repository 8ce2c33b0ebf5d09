// The kernels over odd shapes, with operands that end where their memory ends: for AddressSanitizer and UBSan.
// Each result is compared with attention in double; the program ends with 1 where one is off.
#include <cstdio>
#include <random>

#include "decode.cpp"
#include "int8.cpp"
#include "linear.cpp"
#include "tiled.cpp"

using namespace attnbench;

namespace {

float widen(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bf16((bits + 0x8000) >> 16);
}

struct Shape {
    int64_t batch, heads, kv_heads, seq, kv_seq, head_dim, value_dim, threads, strip, keys;
    int window;  // of keys around the query's position; 0: all
    bool causal;
};

double elu(double x) { return x > 0 ? x + 1 : std::exp(x); }

// Relative L2. features: linear attention, whose weight is elu(q) . elu(k) with elu + 1.
double error(const Shape& c, int (*kernel)(const Problem*), bool features = false) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const auto make = [&](int64_t n) {
        std::vector<bf16> x(n);
        for (auto& value : x) value = narrow(normal(random));
        x.shrink_to_fit();
        return x;
    };
    auto q = make(c.batch * c.heads * c.seq * c.head_dim);
    auto k = make(c.batch * c.kv_heads * c.kv_seq * c.head_dim), v = make(c.batch * c.kv_heads * c.kv_seq * c.value_dim);
    std::vector<bf16> out(c.batch * c.heads * c.seq * c.value_dim);
    const auto tensor = [](std::vector<bf16>& x, int64_t heads, int64_t length, int64_t dim) {
        return Tensor{x.data(), heads * length * dim, length * dim, dim};
    };
    const int64_t offset = c.kv_seq - c.seq, high = c.causal ? offset : c.window ? offset + c.window - 1 : c.kv_seq;
    const int64_t low = c.window ? offset - c.window + 1 : -c.seq;
    std::vector<Strip> strips;
    std::vector<Range> ranges;
    for (int64_t start = 0; start < c.seq; start += c.strip) {
        const int64_t end = std::min(start + c.strip, c.seq);
        const int at = int(ranges.size());
        ranges.push_back({int32_t(std::max<int64_t>(0, start + low)), int32_t(std::min(c.kv_seq, end + high)), 0});
        strips.push_back({int32_t(start), int32_t(end), at, at + 1});
    }
    const float scale = 1 / std::sqrt(float(c.head_dim));
    Problem p{tensor(q, c.heads, c.seq, c.head_dim), tensor(k, c.kv_heads, c.kv_seq, c.head_dim),
              tensor(v, c.kv_heads, c.kv_seq, c.value_dim), tensor(out, c.heads, c.seq, c.value_dim),
              c.batch, c.heads, c.kv_heads, c.seq, c.kv_seq, c.head_dim, c.value_dim, low, high, c.keys, c.strip,
              c.threads, scale, strips.data(), int64_t(strips.size()), ranges.data()};
    if (kernel(&p)) return 1;
    double off = 0, all = 0;
    for (int64_t bh = 0; bh < c.batch * c.heads; ++bh) {
        const int64_t kv = bh / c.heads * c.kv_heads + bh % c.heads / (c.heads / c.kv_heads);
        for (int64_t i = 0; i < c.seq; ++i) {
            std::vector<double> o(c.value_dim), s(c.kv_seq, -INFINITY);
            double top = -INFINITY, sum = 0;
            for (int64_t j = std::max<int64_t>(0, i + low); j < std::min(c.kv_seq, i + high + 1); ++j) {
                s[j] = 0;
                for (int64_t d = 0; d < c.head_dim; ++d) {
                    const double x = widen(q[(bh * c.seq + i) * c.head_dim + d]);
                    const double y = widen(k[(kv * c.kv_seq + j) * c.head_dim + d]);
                    s[j] += features ? elu(x) * elu(y) : x * y * scale;
                }
                top = std::max(top, s[j]);
            }
            for (int64_t j = 0; j < c.kv_seq; ++j) {
                const double weight = !features ? std::exp(s[j] - top) : s[j] > 0 ? s[j] : 0;
                sum += weight;
                for (int64_t d = 0; d < c.value_dim; ++d)
                    o[d] += weight * widen(v[(kv * c.kv_seq + j) * c.value_dim + d]);
            }
            for (int64_t d = 0; d < c.value_dim; ++d) {
                const double exact = o[d] / sum, found = widen(out[(bh * c.seq + i) * c.value_dim + d]);
                off += (found - exact) * (found - exact);
                all += exact * exact;
            }
        }
    }
    return std::sqrt(off / all);
}

}  // namespace

int main() {
    const Shape shapes[] = {
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 64, 0, false},        {1, 2, 1, 5, 67, 33, 17, 2, 4, 64, 0, true},
        {2, 3, 3, 70, 130, 64, 64, 2, 13, 128, 0, true},  {1, 4, 2, 97, 97, 16, 80, 3, 96, 64, 0, false},
        {1, 1, 1, 130, 200, 256, 256, 2, 48, 192, 0, false}, {1, 2, 2, 150, 211, 40, 24, 2, 7, 128, 9, true},
        {1, 2, 2, 150, 211, 40, 24, 2, 50, 128, 70, false},  {1, 3, 1, 65, 65, 2, 128, 2, 64, 64, 1, true},
    };
    const Shape few[] = {
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 64, 0, false},     {2, 6, 2, 1, 301, 33, 17, 2, 1, 64, 0, true},
        {1, 2, 1, 5, 999, 64, 80, 3, 5, 64, 0, true},  {1, 1, 1, 3, 2049, 256, 256, 2, 3, 64, 0, true},
    };
    const struct {
        const char* name;
        int (*kernel)(const Problem*);
        double limit;
    } kernels[] = {{"tiled", tiled, 6e-3}, {"int8_qk", int8_qk, 4e-2}, {"int8_qkpv", int8_qkpv, 6e-2}};
    int bad = 0;
    const auto check = [&](const char* name, int (*kernel)(const Problem*), double limit, const Shape& shape,
                           bool features = false) {
        const double off = error(shape, kernel, features);
        std::printf("%s, %ld x %ld, dims %ld, %ld: %.1e\n", name, shape.seq, shape.kv_seq, shape.head_dim,
                    shape.value_dim, off);
        bad |= !(off < limit);
    };
    for (const auto& kernel : kernels)
        for (const auto& shape : shapes) check(kernel.name, kernel.kernel, kernel.limit, shape);
    for (const auto& shape : few) check("decode", decode, 6e-3, shape);
    for (const auto& shape : shapes)
        if (!shape.window) check("linear", linear_bfloat16, 6e-3, shape, true);
    return bad;
}
