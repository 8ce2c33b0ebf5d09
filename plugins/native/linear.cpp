// Linear attention with phi(x) = elu(x) + 1 (Katharopoulos 2020, equations 4 to 7), in float32 inside.
//
// A key/value head's running sums S = sum of phi(k) v^T and z = sum of phi(k) are small enough for a first-level cache.
// Causal: CHUNK tokens at a time read the sums of all earlier chunks and meet each other in a CHUNK x CHUNK triangle
// (Hua 2022, "Transformer Quality in Linear Time", section 3.2); then they join the sums. Every product of this is the
// same small matrix product, of a tile that stays in registers.
#include "attention.h"

namespace attnbench {

constexpr int CHUNK = 64;  // tokens

// c (rows x columns) = a b, or += with `add`, over n terms. a is read at row * a_row + term * a_step, so that it may be
// taken as transposed; b and c are rows of floats; columns: a multiple of LANES.
inline void product(int64_t rows, int64_t columns, const float* a, int64_t a_row, int64_t a_step, const float* b,
                    int64_t b_row, int64_t n, float* c, int64_t c_row, bool add) {
    constexpr int64_t SIZE = sizeof(float);
    for (int64_t row = 0; row < rows; row += ROWS, a += ROWS * a_row, c += ROWS * c_row)
        with_constant<ROWS>(rows - row, [&](auto height) {
            constexpr int R = height;
            for (int64_t at = 0; at < columns; at += PANEL)
                with_constant<VECTORS>((columns - at) / LANES, [&](auto vectors) {
                    constexpr int V = vectors;
                    Floats sum[R][V] = {};
                    multiply<Singles>(a, a_row * SIZE, a_step * SIZE, b + at, b_row * SIZE, n, sum);
#pragma GCC unroll 6
                    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                        for (int t = 0; t < V; ++t) {
                            float* to = c + r * c_row + at + LANES * t;
                            store(to, add ? load(to) + sum[r][t] : sum[r][t]);
                        }
                });
        });
}

// e^x for x <= 0 to float32's last digits: 2^n 2^f as in vectors.h, with the series of 2^f up to f^7.
INLINE Floats exp_fine(Floats x) {
    const Floats y = max(x * splat(float(M_LOG2E)), splat(-126.f));
    const Floats n = nearest(y), f = (y - n) * splat(float(M_LN2));
    Floats sum = splat(1.f);
    for (int k = 7; k > 0; --k) sum = fma(f * splat(1.f / k), sum, splat(1.f));  // 1 + f (1 + f/2 (1 + f/3 (..)))
    return times_power(sum, n);
}

// elu(x) + 1 = e^min(x, 0) + max(x, 0) (equation 7).
INLINE Floats phi(Floats x) { return exp_fine(min(x, zero())) + max(x, zero()); }

// What one thread works in. `dims` and `columns` are rounded up to whole registers, with zeros.
struct Sums {
    explicit Sums(const Problem& p)
        : dims(round_up(p.head_dim, LANES)),
          columns(p.columns()),
          total(dims * columns),
          normal(dims),
          keys(CHUNK * dims),
          turned(dims * CHUNK),
          values(CHUNK * columns),
          queries(CHUNK * dims),
          scores(CHUNK * CHUNK),
          out(CHUNK * columns) {}

    int64_t dims, columns;
    Buffer<float> total, normal;          // S (dims, columns) and z (dims)
    Buffer<float> keys, turned, values;   // phi(k) (CHUNK, dims), its transpose, v (CHUNK, columns)
    Buffer<float> queries, scores, out;   // phi(q) (CHUNK, dims), (CHUNK, CHUNK), (CHUNK, columns)
};

// `rows` rows of x, mapped, to (CHUNK, width); what is missing becomes 0.
template <class T, class Map>
void fill(const T* x, int64_t x_row, int64_t rows, int64_t dim, int64_t width, float* to, Map map) {
    for (int64_t i = 0; i < CHUNK; ++i)
        for (int64_t d = 0; d < width; d += LANES)
            store(to + i * width + d, i < rows ? kept(map(load_first(x + i * x_row + d, dim - d)), dim - d) : zero());
}

// phi(k) (CHUNK, dims) to (dims, CHUNK).
inline void turn(const Sums& w) {
    for (int64_t d = 0; d < w.dims; d += LANES)
        for (int64_t i = 0; i < CHUNK; i += LANES) {
            Ints r[LANES];
            for (int j = 0; j < LANES; ++j) r[j] = load_ints(w.keys + (i + j) * w.dims + d);
            transpose(r);
            for (int j = 0; j < LANES; ++j) store_ints(w.turned + (d + j) * CHUNK + i, r[j]);
        }
}

// Keys [start, start + rows) join the sums; `fill`ed already.
inline void join(const Sums& w, int64_t rows) {
    product(w.dims, w.columns, w.keys, 1, w.dims, w.values, w.columns, rows, w.total, w.columns, true);
    for (int64_t d = 0; d < w.dims; d += LANES) {
        Floats sum = load(w.normal + d);
        for (int64_t i = 0; i < rows; ++i) sum = sum + load(w.keys + i * w.dims + d);
        store(w.normal + d, sum);
    }
}

// `rows` queries read the sums, and with `diagonal` the keys of their own chunk up to their own place.
template <class T>
void read(const Problem& p, const Sums& w, int64_t batch, int64_t head, int64_t start, int64_t rows, bool diagonal) {
    const auto features = [](Floats x) { return phi(x); };
    fill(p.query.at<T>(batch, head, start), p.query.row, rows, p.head_dim, w.dims, w.queries, features);
    product(rows, w.columns, w.queries, w.dims, 1, w.total, w.columns, w.dims, w.out, w.columns, false);
    for (int64_t r = 0; diagonal && r < rows; r += ROWS) {
        const int64_t together = std::min<int64_t>(ROWS, rows - r), seen = r + together;
        float* scores = w.scores + r * CHUNK;
        product(together, round_up(seen, LANES), w.queries + r * w.dims, w.dims, 1, w.turned, CHUNK, w.dims, scores,
                CHUNK, false);
        for (int64_t i = 0; i < together; ++i) std::fill(scores + i * CHUNK + r + i + 1, scores + (i + 1) * CHUNK, 0.f);
        product(together, w.columns, scores, CHUNK, 1, w.values, w.columns, seen, w.out + r * w.columns, w.columns,
                true);
    }
    for (int64_t i = 0; i < rows; ++i) {
        Floats sum = zero();
        for (int64_t d = 0; d < w.dims; d += LANES) sum = fma(load(w.queries + i * w.dims + d), load(w.normal + d), sum);
        for (int64_t j = 0; diagonal && j <= i; j += LANES) sum = sum + load(w.scores + i * CHUNK + j);
        const Floats by = splat(total(sum));
        T* to = p.out.at<T>(batch, head, start + i);
        for (int64_t c = 0; c < p.value_dim; c += LANES)
            store_first(to + c, load(w.out + i * w.columns + c) / by, p.value_dim - c);
    }
}

// One key/value head with the query heads of its group. Row i sees the keys up to i + high.
template <class T>
void head(const Problem& p, const Sums& w, int64_t batch, int64_t kv_head) {
    const int64_t group = p.heads / p.kv_heads;
    const bool causal = p.high < p.kv_seq;
    const int64_t past = causal ? p.high : p.kv_seq;  // keys that all queries see
    const auto same = [](Floats x) { return x; };
    const auto features = [](Floats x) { return phi(x); };
    const auto load_keys = [&](int64_t start, int64_t rows) {
        fill(p.key.at<T>(batch, kv_head, start), p.key.row, rows, p.head_dim, w.dims, w.keys, features);
        fill(p.value.at<T>(batch, kv_head, start), p.value.row, rows, p.value_dim, w.columns, w.values, same);
    };
    std::fill(w.total + 0, w.total + w.dims * w.columns, 0.f);
    std::fill(w.normal + 0, w.normal + w.dims, 0.f);
    for (int64_t key = 0; key < past; key += CHUNK) {
        const int64_t rows = std::min<int64_t>(CHUNK, past - key);
        load_keys(key, rows);
        join(w, rows);
    }
    for (int64_t row = 0; row < p.seq; row += CHUNK) {
        const int64_t rows = std::min<int64_t>(CHUNK, p.seq - row);
        if (causal) {
            load_keys(past + row, rows);
            turn(w);
        }
        for (int64_t g = 0; g < group; ++g) read<T>(p, w, batch, kv_head * group + g, row, rows, causal);
        if (causal) join(w, rows);
    }
}

template <class T>
int linear(const Problem& p) {
    try {
        std::vector<std::unique_ptr<Sums>> works;
        for (int64_t t = 0; t < p.threads; ++t) works.push_back(std::make_unique<Sums>(p));
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
        for (int64_t n = 0; n < p.batch * p.kv_heads; ++n)
            head<T>(p, *works[omp_get_thread_num()], n / p.kv_heads, n % p.kv_heads);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace attnbench

extern "C" int linear(const attnbench::Problem* problem) { return attnbench::linear<attnbench::Value>(*problem); }
