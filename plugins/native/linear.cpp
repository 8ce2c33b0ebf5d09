// Linear attention with phi(x) = elu(x) + 1 (Katharopoulos 2020, equations 4 to 7) in float32, for float32 and bf16.
//
// A key/value head's running sums S = sum of phi(k) v^T and z = sum of phi(k) are small enough for a first-level cache.
// Causal: CHUNK tokens at a time read the sums of all earlier chunks and meet each other in a CHUNK x CHUNK triangle
// (Hua 2022, "Transformer Quality in Linear Time", section 3.2); then they join the sums. Every product of this is the
// same small matrix product, whose tile of 6 rows x 64 columns stays in registers.
#include "attention.h"

namespace attnbench {

constexpr int CHUNK = 64;  // tokens

// c (rows x columns) = a b, or += with `add`, over n terms. a is read at row * a_row + term * a_step, so that it may be
// taken as transposed; b and c are rows of floats; columns: a multiple of LANES.
template <int R, int V>
void product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t n, float* c,
             int64_t c_row, bool add) {
    __m512 sum[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < V; ++t) sum[r][t] = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; ++i) {
        __m512 row[V];
#pragma GCC unroll 4
        for (int t = 0; t < V; ++t) row[t] = _mm512_load_ps(b + i * b_row + LANES * t);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m512 factor = _mm512_set1_ps(a[r * a_row + i * a_step]);
#pragma GCC unroll 4
            for (int t = 0; t < V; ++t) sum[r][t] = _mm512_fmadd_ps(factor, row[t], sum[r][t]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < V; ++t) {
            float* to = c + r * c_row + LANES * t;
            _mm512_store_ps(to, add ? _mm512_add_ps(_mm512_load_ps(to), sum[r][t]) : sum[r][t]);
        }
}

template <int R>
void product(int64_t columns, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t n,
             float* c, int64_t c_row, bool add) {
    for (int64_t at = 0; at < columns; at += KEYS) switch (std::min<int64_t>(KEYS, columns - at) / LANES) {
            case 1: product<R, 1>(a, a_row, a_step, b + at, b_row, n, c + at, c_row, add); break;
            case 2: product<R, 2>(a, a_row, a_step, b + at, b_row, n, c + at, c_row, add); break;
            case 3: product<R, 3>(a, a_row, a_step, b + at, b_row, n, c + at, c_row, add); break;
            default: product<R, 4>(a, a_row, a_step, b + at, b_row, n, c + at, c_row, add);
        }
}

inline void product(int64_t rows, int64_t columns, const float* a, int64_t a_row, int64_t a_step, const float* b,
                    int64_t b_row, int64_t n, float* c, int64_t c_row, bool add) {
    for (int64_t r = 0; r < rows; r += ROWS, a += ROWS * a_row, c += ROWS * c_row) switch (rows - r) {
            case 1: product<1>(columns, a, a_row, a_step, b, b_row, n, c, c_row, add); break;
            case 2: product<2>(columns, a, a_row, a_step, b, b_row, n, c, c_row, add); break;
            case 3: product<3>(columns, a, a_row, a_step, b, b_row, n, c, c_row, add); break;
            case 4: product<4>(columns, a, a_row, a_step, b, b_row, n, c, c_row, add); break;
            case 5: product<5>(columns, a, a_row, a_step, b, b_row, n, c, c_row, add); break;
            default: product<ROWS>(columns, a, a_row, a_step, b, b_row, n, c, c_row, add);
        }
}

inline __m512 load_float(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }

inline void store(float* to, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }

inline void store(bf16* to, __mmask16 mask, __m512 x) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// e^x for x <= 0 to float32's last digits: 2^n 2^f as in tile.h, with the series of 2^f up to f^7.
inline __m512 exp_fine(__m512 x) {
    const __m512 y = _mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(float(M_LOG2E))), _mm512_set1_ps(-126.f));
    const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_mul_ps(_mm512_sub_ps(y, n), _mm512_set1_ps(float(M_LN2)));
    __m512 sum = _mm512_set1_ps(1.f);
    for (int k = 7; k > 0; --k)  // 1 + f (1 + f/2 (1 + f/3 (..)))
        sum = _mm512_fmadd_ps(_mm512_mul_ps(f, _mm512_set1_ps(1.f / k)), sum, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(sum, n);
}

// elu(x) + 1 = e^min(x, 0) + max(x, 0) (equation 7).
inline __m512 phi(__m512 x) {
    const __m512 zero = _mm512_setzero_ps();
    return _mm512_add_ps(exp_fine(_mm512_min_ps(x, zero)), _mm512_max_ps(x, zero));
}

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
        for (int64_t d = 0; d < width; d += LANES) {
            const __mmask16 mask = i < rows ? first(dim - d) : 0;
            const __m512 y = mask ? _mm512_maskz_mov_ps(mask, map(load_float(x + i * x_row + d, mask))) : _mm512_setzero_ps();
            _mm512_store_ps(to + i * width + d, y);
        }
}

// phi(k) (CHUNK, dims) to (dims, CHUNK).
inline void turn(const Sums& w) {
    for (int64_t d = 0; d < w.dims; d += LANES)
        for (int64_t i = 0; i < CHUNK; i += LANES) {
            __m512i r[LANES];
            for (int j = 0; j < LANES; ++j) r[j] = _mm512_load_si512(w.keys + (i + j) * w.dims + d);
            transpose(r);
            for (int j = 0; j < LANES; ++j) _mm512_store_si512(w.turned + (d + j) * CHUNK + i, r[j]);
        }
}

// Keys [start, start + rows) join the sums; `fill`ed already.
inline void join(const Sums& w, int64_t rows) {
    product(w.dims, w.columns, w.keys, 1, w.dims, w.values, w.columns, rows, w.total, w.columns, true);
    for (int64_t d = 0; d < w.dims; d += LANES) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < rows; ++i) sum = _mm512_add_ps(sum, _mm512_load_ps(w.keys + i * w.dims + d));
        _mm512_store_ps(w.normal + d, _mm512_add_ps(_mm512_load_ps(w.normal + d), sum));
    }
}

// `rows` queries read the sums, and with `diagonal` the keys of their own chunk up to their own place.
template <class T>
void read(const Problem& p, const Sums& w, int64_t batch, int64_t head, int64_t start, int64_t rows, bool diagonal) {
    const auto features = [](__m512 x) { return phi(x); };
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
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < w.dims; d += LANES)
            sum = _mm512_fmadd_ps(_mm512_load_ps(w.queries + i * w.dims + d), _mm512_load_ps(w.normal + d), sum);
        for (int64_t j = 0; diagonal && j <= i; j += LANES)
            sum = _mm512_add_ps(sum, _mm512_load_ps(w.scores + i * CHUNK + j));
        const __m512 by = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
        T* to = p.out.at<T>(batch, head, start + i);
        for (int64_t c = 0; c < p.value_dim; c += LANES)
            store(to + c, first(p.value_dim - c), _mm512_div_ps(_mm512_load_ps(w.out + i * w.columns + c), by));
    }
}

// One key/value head with the query heads of its group. Row i sees the keys up to i + high.
template <class T>
void head(const Problem& p, const Sums& w, int64_t batch, int64_t kv_head) {
    const int64_t group = p.heads / p.kv_heads;
    const bool causal = p.high < p.kv_seq;
    const int64_t past = causal ? p.high : p.kv_seq;  // keys that all queries see
    const auto same = [](__m512 x) { return x; };
    const auto features = [](__m512 x) { return phi(x); };
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

extern "C" int linear_bfloat16(const attnbench::Problem* problem) {
    return attnbench::linear<attnbench::bf16>(*problem);
}

extern "C" int linear_float32(const attnbench::Problem* problem) { return attnbench::linear<float>(*problem); }
