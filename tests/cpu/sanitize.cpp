// The kernels over odd shapes, with operands that end where their memory ends: for AddressSanitizer and UBSan.
// Each result is compared with attention in double; the program ends with 1 where one is off.
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <random>

#include "backward.cpp"
#include "decode.cpp"
#include "decode_fp8.cpp"
#include "decode_int4.cpp"
#include "decode_int8.cpp"
#include "int8.cpp"
#include "linear.cpp"
#include "tiled.cpp"

using namespace attnbench;

extern "C" __attribute__((weak)) void tiles_emulate();  // tiles.cpp, where that is compiled with it

namespace {

float widen(Value x) {
    float value;
    store_first(&value, load_first(&x, 1), 1);
    return value;
}

Value narrow(float x) {
    Value value;
    store_first(&value, load_first(&x, 1), 1);
    return value;
}

struct Shape {
    int64_t batch, heads, kv_heads, seq, kv_seq, head_dim, value_dim, threads, strip, keys;
    int window;  // of keys around the query's position; 0: all
    bool causal;
    double slope = 0;  // of the first head: what is taken off scores for each key of distance

    double bias(int64_t head, int64_t i, int64_t j) const {
        return -slope / double(1 + head) * std::abs(double(i + kv_seq - seq - j));
    }
    Shape level() const {
        Shape same = *this;
        same.slope = 0;
        return same;
    }
};

double elu(double x) { return x > 0 ? x + 1 : std::exp(x); }

std::vector<Value> make(int64_t n, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<Value> x(n);
    for (auto& value : x) value = narrow(normal(random));
    x.shrink_to_fit();
    return x;
}

Tensor tensor(std::vector<Value>& x, int64_t heads, int64_t length, int64_t dim) {
    return Tensor{x.data(), heads * length * dim, length * dim, dim};
}

// The keys [low, high) that row i sees.
std::pair<int64_t, int64_t> seen(const Shape& c, int64_t i) {
    const int64_t at = i + c.kv_seq - c.seq, window = c.window ? c.window : c.kv_seq + c.seq;
    const int64_t high = c.causal ? at : at + window - 1;
    return {std::max<int64_t>(0, at - window + 1), std::min(c.kv_seq, high + 1)};
}

// The problem of a shape, with its strips and ranges.
struct Case {
    Case(const Shape& c, Tensor q, Tensor k, Tensor v, Tensor out) {
        for (int64_t start = 0; start < c.seq; start += c.strip) {
            const int64_t end = std::min(start + c.strip, c.seq);
            const int at = int(ranges.size());
            ranges.push_back({int32_t(seen(c, start).first), int32_t(seen(c, end - 1).second), 0});
            strips.push_back({int32_t(start), int32_t(end), at, at + 1});
        }
        const int64_t offset = c.kv_seq - c.seq, far = c.window ? c.window : c.kv_seq + c.seq;
        problem = {q, k, v, out, c.batch, c.heads, c.kv_heads, c.seq, c.kv_seq, c.head_dim, c.value_dim,
                   offset - far + 1, c.causal ? offset : offset + far - 1, c.keys, c.strip, c.threads,
                   1 / std::sqrt(float(c.head_dim)), strips.data(), int64_t(strips.size()), ranges.data(), nullptr};
        if (!c.slope) return;
        const int64_t row = c.seq + c.kv_seq - 1 + KEYS;
        for (auto* line : {&bias, &from_key}) line->resize(c.heads * row);
        for (int64_t h = 0; h < c.heads; ++h)
            for (int64_t i = 0; i < c.seq; ++i)
                for (int64_t j = 0; j < c.kv_seq; ++j) {
                    bias[h * row + j - i + c.seq - 1] = float(c.bias(h, i, j)) / problem.scale;
                    from_key[h * row + i - j + c.kv_seq - 1] = float(c.bias(h, i, j)) / problem.scale;
                }
        problem.bias = bias.data();
        problem.bias_row = row;
    }

    std::vector<Strip> strips;
    std::vector<Range> ranges;
    std::vector<float> bias, from_key;
    Problem problem;
};

// Relative L2. features: linear attention, whose weight is elu(q) . elu(k) with elu + 1.
double error(const Shape& c, int (*kernel)(const Problem*), bool features = false) {
    std::mt19937 random(1);
    auto q = make(c.batch * c.heads * c.seq * c.head_dim, random);
    auto k = make(c.batch * c.kv_heads * c.kv_seq * c.head_dim, random);
    auto v = make(c.batch * c.kv_heads * c.kv_seq * c.value_dim, random);
    std::vector<Value> out(c.batch * c.heads * c.seq * c.value_dim);
    const Case made(c, tensor(q, c.heads, c.seq, c.head_dim), tensor(k, c.kv_heads, c.kv_seq, c.head_dim),
                    tensor(v, c.kv_heads, c.kv_seq, c.value_dim), tensor(out, c.heads, c.seq, c.value_dim));
    const Problem& p = made.problem;
    if (kernel(&p)) return 1;
    double off = 0, all = 0;
    for (int64_t bh = 0; bh < c.batch * c.heads; ++bh) {
        const int64_t kv = bh / c.heads * c.kv_heads + bh % c.heads / (c.heads / c.kv_heads);
        for (int64_t i = 0; i < c.seq; ++i) {
            std::vector<double> o(c.value_dim), s(c.kv_seq, -INFINITY);
            double top = -INFINITY, sum = 0;
            for (int64_t j = seen(c, i).first; j < seen(c, i).second; ++j) {
                s[j] = c.bias(bh % c.heads, i, j);
                for (int64_t d = 0; d < c.head_dim; ++d) {
                    const double x = widen(q[(bh * c.seq + i) * c.head_dim + d]);
                    const double y = widen(k[(kv * c.kv_seq + j) * c.head_dim + d]);
                    s[j] += features ? elu(x) * elu(y) : x * y * p.scale;
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

// Of the gradient of query, key or value, whichever is furthest off.
double gradient_error(const Shape& c) {
    std::mt19937 random(1);
    const int64_t rows = c.batch * c.heads * c.seq, keys = c.batch * c.kv_heads * c.kv_seq;
    auto q = make(rows * c.head_dim, random), k = make(keys * c.head_dim, random), v = make(keys * c.value_dim, random);
    auto up = make(rows * c.value_dim, random);
    std::vector<Value> out(up.size()), dq(q.size()), dk(k.size()), dv(v.size());
    std::vector<float> lse(rows);
    const auto query = [&](auto& x, int64_t dim) { return tensor(x, c.heads, c.seq, dim); };
    const auto key = [&](auto& x, int64_t dim) { return tensor(x, c.kv_heads, c.kv_seq, dim); };
    Case made(c, query(q, c.head_dim), key(k, c.head_dim), key(v, c.value_dim), query(out, c.value_dim));
    made.problem.lse = lse.data();
    const gradient::Gradients gradients{query(up, c.value_dim), query(dq, c.head_dim), key(dk, c.head_dim),
                                        key(dv, c.value_dim)};
    if (tiled(&made.problem)) return 1;
    if (c.slope) made.problem.bias = made.from_key.data();
    if (backward(&made.problem, &gradients)) return 1;
    std::vector<double> exact_q(q.size()), exact_k(k.size()), exact_v(v.size());
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t bh = row / c.seq, kv = bh / c.heads * c.kv_heads + bh % c.heads / (c.heads / c.kv_heads);
        const auto [from, to] = seen(c, row % c.seq);
        std::vector<double> p(to - from), dp(to - from);
        double sum = 0, delta = 0;
        for (int64_t j = from; j < to; ++j) {
            double s = 0;
            const Value* key_row = &k[(kv * c.kv_seq + j) * c.head_dim];
            const Value* value_row = &v[(kv * c.kv_seq + j) * c.value_dim];
            for (int64_t d = 0; d < c.head_dim; ++d) s += double(widen(q[row * c.head_dim + d])) * widen(key_row[d]);
            for (int64_t d = 0; d < c.value_dim; ++d)
                dp[j - from] += double(widen(up[row * c.value_dim + d])) * widen(value_row[d]);
            sum += p[j - from] = std::exp(s * made.problem.scale + c.bias(bh % c.heads, row % c.seq, j));
        }
        for (int64_t j = 0; j < to - from; ++j) delta += (p[j] /= sum) * dp[j];
        for (int64_t j = from; j < to; ++j) {
            const double ds = p[j - from] * (dp[j - from] - delta) * made.problem.scale;
            for (int64_t d = 0; d < c.head_dim; ++d) {
                exact_q[row * c.head_dim + d] += ds * widen(k[(kv * c.kv_seq + j) * c.head_dim + d]);
                exact_k[(kv * c.kv_seq + j) * c.head_dim + d] += ds * widen(q[row * c.head_dim + d]);
            }
            for (int64_t d = 0; d < c.value_dim; ++d)
                exact_v[(kv * c.kv_seq + j) * c.value_dim + d] += p[j - from] * widen(up[row * c.value_dim + d]);
        }
    }
    // Beside 1e-3: with a single key the gradients of query and key are 0.
    const auto off = [](const std::vector<Value>& found, const std::vector<double>& exact) {
        double wrong = 0, all = 1e-3 * double(exact.size());
        for (size_t i = 0; i < exact.size(); ++i) {
            wrong += std::pow(widen(found[i]) - exact[i], 2);
            all += exact[i] * exact[i];
        }
        return std::sqrt(wrong / all);
    };
    return std::max({off(dq, exact_q), off(dk, exact_k), off(dv, exact_v)});
}

// A cache of the shape's keys and values in few bits, made by `append` and read by `decode`: relative L2 from attention over
// the values as they were. The cache ends where its memory does, but for room for whole tiles.
double packed_error(const Shape& c, int bits, int group, int (*append)(const Tokens*),
                    int (*decode)(const Problem*, const Scales*)) {
    std::mt19937 random(1);
    auto q = make(c.batch * c.heads * c.seq * c.head_dim, random);
    auto k = make(c.batch * c.kv_heads * c.kv_seq * c.head_dim, random);
    auto v = make(c.batch * c.kv_heads * c.kv_seq * c.value_dim, random);
    std::vector<Value> out(c.batch * c.heads * c.seq * c.value_dim);
    const int64_t heads = c.batch * c.kv_heads, tiles = round_up(c.kv_seq, TILE) / TILE;
    const int64_t key_row = round_up(c.head_dim, 8) * bits / 8 * TILE;
    const int64_t value_row = round_up(c.value_dim, 32) * bits / 8 * 4;
    const auto groups = [&](int64_t dim) { return group ? (dim + group - 1) / group : 1; };
    std::vector<char> keys(heads * tiles * key_row), values(heads * tiles * 4 * value_row);
    std::vector<bf16> key_scales(heads * tiles * TILE * groups(c.head_dim));
    std::vector<bf16> value_scales(heads * tiles * TILE * groups(c.value_dim));
    std::vector<float> mean(heads * c.head_dim);
    const auto lies = [&](void* data, int64_t rows, int64_t row) {
        return Tensor{data, c.kv_heads * rows * row, rows * row, row};
    };
    const Tensor in_keys = lies(keys.data(), tiles, key_row), in_values = lies(values.data(), tiles * 4, value_row);
    const Scales scales{lies(key_scales.data(), tiles, TILE * groups(c.head_dim)),
                        lies(value_scales.data(), tiles, TILE * groups(c.value_dim))};
    const Tensor key = tensor(k, c.kv_heads, c.kv_seq, c.head_dim), value = tensor(v, c.kv_heads, c.kv_seq, c.value_dim);
    const Tokens tokens{key, value, in_keys, in_values, scales.key, scales.value, mean.data(), c.batch, c.kv_heads, c.kv_seq,
                        0, c.head_dim, c.value_dim, c.threads};
    const Tensor query = tensor(q, c.heads, c.seq, c.head_dim), to = tensor(out, c.heads, c.seq, c.value_dim);
    const Case made(c, query, in_keys, in_values, to);
    if (append(&tokens) || decode(&made.problem, &scales)) return 1;
    auto exact = out;
    const Case plain(c, query, key, value, tensor(exact, c.heads, c.seq, c.value_dim));
    if (::decode(&plain.problem)) return 1;
    double off = 0, all = 0;
    for (size_t i = 0; i < out.size(); ++i) {
        off += std::pow(double(widen(out[i])) - widen(exact[i]), 2);
        all += std::pow(widen(exact[i]), 2);
    }
    return std::sqrt(off / all);
}

}  // namespace

int main() {
#ifdef __AMX_TILE__  // asked for as compiler.py does
    if (syscall(SYS_arch_prctl, 0x1023, 18) && tiles_emulate) tiles_emulate();
#endif
    const Shape shapes[] = {
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 64, 0, false},        {1, 2, 1, 5, 67, 33, 17, 2, 4, 64, 0, true, 0.3},
        {2, 3, 3, 70, 130, 64, 64, 2, 13, 128, 0, true},  {1, 4, 2, 97, 97, 16, 80, 3, 96, 64, 0, false, 0.1},
        {1, 1, 1, 130, 200, 256, 256, 2, 48, 192, 0, false}, {1, 2, 2, 150, 211, 40, 24, 2, 7, 128, 9, true},
        {1, 2, 2, 150, 211, 40, 24, 2, 50, 128, 70, false, 0.1},  {1, 3, 1, 65, 65, 2, 128, 2, 64, 64, 1, true},
    };
    const Shape few[] = {
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 64, 0, false},     {2, 6, 2, 1, 301, 33, 17, 2, 1, 64, 0, true, 0.3},
        {1, 2, 1, 5, 999, 64, 80, 3, 5, 64, 0, true, 0.1},  {1, 1, 1, 3, 2049, 256, 256, 2, 3, 64, 0, true},
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
        for (const auto& shape : shapes)
            check(kernel.name, kernel.kernel, kernel.limit, kernel.kernel == tiled ? shape : shape.level());
    for (const auto& shape : shapes) {
        const double off = gradient_error(shape);
        std::printf("backward, %ld x %ld, dims %ld, %ld: %.1e\n", shape.seq, shape.kv_seq, shape.head_dim,
                    shape.value_dim, off);
        bad |= !(off < 6e-3);
    }
    for (const auto& shape : few) check("decode", decode, 6e-3, shape);
    const struct {
        const char* name;
        int bits, group;
        int (*append)(const Tokens*);
        int (*decode)(const Problem*, const Scales*);
        double limit;
    } caches[] = {{"int8", 8, 0, append_int8, decode_int8, 3e-2},
                  {"int4", 4, 64, append_int4, decode_int4, 4e-1},
                  {"e4m3", 8, 0, append_e4m3, decode_e4m3, 1e-1},
                  {"e5m2", 8, 0, append_e5m2, decode_e5m2, 2e-1}};
    for (const auto& cache : caches)
        for (const auto& shape : few) {
            const double off = packed_error(shape.level(), cache.bits, cache.group, cache.append, cache.decode);
            std::printf("%s, %ld x %ld, dims %ld, %ld: %.1e\n", cache.name, shape.seq, shape.kv_seq, shape.head_dim,
                        shape.value_dim, off);
            bad |= !(off < cache.limit);
        }
    for (const auto& shape : shapes)
        if (!shape.window) check("linear", linear, 6e-3, shape.level(), true);
    return bad;
}
