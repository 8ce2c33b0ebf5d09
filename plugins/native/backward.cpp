// The gradients of exact attention in bf16: FlashAttention-2 (Dao 2023), algorithm 2, with the loops as in the forward,
// strips of query rows outside and blocks of keys inside. The forward left each row's log-sum-exp L, so no maximum has
// to be found again. With dO given, and delta = rowsum(dO * O):
//
//     P = exp(S - L)    dP = dO V^T    dS = P * (dP - delta)
//     dV += P^T dO    dK += dS^T Q * scale    dQ += dS K * scale
//
// A tile is computed as its transpose, keys x query rows: P^T and dS^T then come out as the left operands that dV and
// dK need, L and delta are whole registers, and for dQ^T += K^T dS^T alone pairs of keys have to be interleaved.
#include <type_traits>

#include "attention.h"

namespace attnbench::gradient {

// dO, and where the gradients of query, key and value go. Mirrored in attention.py.
struct Gradients {
    Tensor out, query, key, value;
};

// ---- stages: of one key with KEYS queries, where nothing else is said ----------------------------------------------

// P^T = 2^(scale S^T - L), in place and in bf16; scale and L have log2 e in them.
inline void weights(float* s, float scale, const float* lse, bf16* p) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int t = 0; t < KEYS; t += 2 * LANES) {
        __m512 half[2];
        for (int i = 0; i < 2; ++i) {
            const int at = t + i * LANES;
            half[i] = exp2(_mm512_fmsub_ps(_mm512_load_ps(s + at), factor, _mm512_load_ps(lse + at)));
            _mm512_store_ps(s + at, half[i]);
        }
        _mm512_store_si512(p + t, (__m512i)_mm512_cvtne2ps_pbh(half[1], half[0]));
    }
}

// dS^T = P^T * (dP^T - delta), in bf16.
inline void differences(const float* p, const float* dp, const float* delta, bf16* ds) {
    for (int t = 0; t < KEYS; t += 2 * LANES) {
        __m512 half[2];
        for (int i = 0; i < 2; ++i) {
            const int at = t + i * LANES;
            half[i] = _mm512_sub_ps(_mm512_load_ps(dp + at), _mm512_load_ps(delta + at));
            half[i] = _mm512_mul_ps(_mm512_load_ps(p + at), half[i]);
        }
        _mm512_store_si512(ds + t, (__m512i)_mm512_cvtne2ps_pbh(half[1], half[0]));
    }
}

// Two keys' dS^T to [query][2].
inline void interleave(const bf16* even, const bf16* odd, bf16* to) {
    for (int t = 0; t < KEYS; t += LANES) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)(even + t)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)(odd + t)));
        _mm512_store_si512(to + 2 * t, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// delta = the sum of dO * O over one row.
inline float row_sum(const bf16* a, const bf16* b, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES)
        sum = _mm512_fmadd_ps(load_float(a + i, first(n - i)), load_float(b + i, first(n - i)), sum);
    return _mm512_reduce_add_ps(sum);
}

// KEYS rows of K to K^T: `width` rows, `to_row` apart; keys that are missing become 0.
inline void pack_turned(const bf16* from, int64_t row, int64_t rows, int64_t width, bf16* to, int64_t to_row) {
    for (int64_t key = 0; key < KEYS; key += 2 * LANES)
        for (int64_t c = 0; c < width; c += LANES) {
            const auto load = [&](int64_t k) {
                const __mmask16 there = k < rows ? first(width - c) : 0;
                return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from + k * row + c));
            };
            __m512i r[LANES];  // pairs of keys, of 16 columns
            for (int i = 0; i < LANES; ++i)
                r[i] = _mm512_or_si512(load(key + 2 * i), _mm512_slli_epi32(load(key + 2 * i + 1), 16));
            transpose(r);
            for (int i = 0; i < LANES && c + i < width; ++i) _mm512_storeu_si512(to + (c + i) * to_row + key, r[i]);
        }
}

// KEYS rows to [group of KEYS columns][pair of rows][column][2]; the last group may be narrower.
inline void pack_columns(const bf16* from, int64_t row, int64_t rows, int64_t width, bf16* to) {
    for (int64_t c = 0; c < width; c += KEYS, to += KEYS * KEYS)
        pack_pairs(from + c, row, rows, width - c, std::min<int64_t>(KEYS, round_up(width - c, LANES)), to);
}

// dQ^T (n rows of KEYS queries) * factor to `rows` rows of n values in bf16.
inline void finish_turned(const float* x, int64_t n, float factor, int64_t rows, bf16* out, int64_t out_row) {
    for (int64_t query = 0; query < rows; query += LANES)
        for (int64_t c = 0; c < n; c += LANES) {
            __m512i r[LANES];
            for (int i = 0; i < LANES; ++i)
                r[i] = c + i < n ? _mm512_load_si512(x + (c + i) * KEYS + query) : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < LANES && query + i < rows; ++i) {
                const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(r[i]), _mm512_set1_ps(factor));
                _mm256_mask_storeu_epi16(out + (query + i) * out_row + c, first(n - c),
                                         (__m256i)_mm512_cvtneps_pbh(value));
            }
        }
}

// f with min(n, ROWS) as a constant.
template <class F>
void with_rows(int64_t n, F f) {
    switch (n) {
        case 1: f(std::integral_constant<int, 1>()); break;
        case 2: f(std::integral_constant<int, 2>()); break;
        case 3: f(std::integral_constant<int, 3>()); break;
        case 4: f(std::integral_constant<int, 4>()); break;
        case 5: f(std::integral_constant<int, 5>()); break;
        default: f(std::integral_constant<int, ROWS>());
    }
}

// C += A B for R rows and `columns` columns, a multiple of LANES. B: as pack_columns lays it out.
template <int R>
void accumulate(const bf16* a, int64_t a_row, const bf16* b, int64_t pairs, int64_t columns, float* c) {
    for (int64_t at = 0; at < columns; at += KEYS, b += 2 * pairs * KEYS)
        switch (std::min<int64_t>(KEYS, columns - at) / LANES) {
            case 1: product<R, 1, true>(a, a_row, b, pairs, c + at, columns); break;
            case 2: product<R, 2, true>(a, a_row, b, pairs, c + at, columns); break;
            case 3: product<R, 3, true>(a, a_row, b, pairs, c + at, columns); break;
            default: product<R, 4, true>(a, a_row, b, pairs, c + at, columns);
        }
}

// ---- operands ---------------------------------------------------------------------------------------------------

inline int64_t even(int64_t n) { return round_up(n, 2); }

// One key/value head: rows of K and V padded to whole pairs, and K^T.
struct Head {
    explicit Head(const Problem& p)
        : turned_row(p.packed_keys() + 2 * LANES),  // no power of 2: those rows would share one set of a cache
          keys(p.packed_keys() * even(p.head_dim)),
          values(p.packed_keys() * even(p.value_dim)),
          turned(p.head_dim * turned_row) {}

    void pack(const Problem& p, int64_t batch, int64_t head, int64_t block) {
        const int64_t start = block * KEYS, rows = std::min<int64_t>(KEYS, p.kv_seq - start);
        copy(p.key, batch, head, start, rows, p.head_dim, keys);
        copy(p.value, batch, head, start, rows, p.value_dim, values);
        pack_turned(p.key.at<bf16>(batch, head, start), p.key.row, rows, p.head_dim, turned + start, turned_row);
    }

    int64_t turned_row;
    Buffer<bf16> keys, values, turned;

  private:
    static void copy(const Tensor& x, int64_t batch, int64_t head, int64_t start, int64_t rows, int64_t dim, bf16* to) {
        to += start * even(dim);
        for (int64_t i = start; i < start + rows; ++i, to += even(dim)) {
            to[even(dim) - 1] = 0;
            std::memcpy(to, x.at<bf16>(batch, head, i), dim * sizeof(bf16));
        }
    }
};

// Running sums for dK and dV of one key/value head, a row for each key.
struct Sums {
    explicit Sums(const Problem& p)
        : columns(round_up(p.head_dim, LANES)), keys(p.kv_seq * columns), values(p.kv_seq * p.columns()) {}

    void clear(const Problem& p) {
        std::fill(keys + 0, keys + p.kv_seq * columns, 0.f);
        std::fill(values + 0, values + p.kv_seq * p.columns(), 0.f);
    }

    int64_t columns;
    Buffer<float> keys, values;
};

// KEYS query rows. Q and dO by pairs of dims are the right operands of S^T and dP^T, by pairs of rows those of dK, dV.
struct Queries {
    explicit Queries(const Problem& p)
        : queries(even(p.head_dim) * KEYS),
          ups(even(p.value_dim) * KEYS),
          query_rows(round_up(p.head_dim, LANES) * KEYS),
          up_rows(p.columns() * KEYS),
          sums(p.head_dim * KEYS) {}

    void pack(const Problem& p, const Gradients& g, int64_t batch, int64_t head, int64_t start, int64_t rows) {
        const bf16 *q = p.query.at<bf16>(batch, head, start), *up = g.out.at<bf16>(batch, head, start);
        pack_groups(q, p.query.row * sizeof(bf16), rows, p.head_dim * sizeof(bf16), queries);
        pack_groups(up, g.out.row * sizeof(bf16), rows, p.value_dim * sizeof(bf16), ups);
        pack_columns(q, p.query.row, rows, p.head_dim, query_rows);
        pack_columns(up, g.out.row, rows, p.value_dim, up_rows);
        std::fill(lse, lse + KEYS, 0.f);  // rows that are missing have Q = 0 and dO = 0, and add nothing
        std::fill(delta, delta + KEYS, 0.f);
        for (int64_t i = 0; i < rows; ++i) {
            lse[i] = p.lse[(batch * p.heads + head) * p.seq + start + i] * float(M_LOG2E);
            delta[i] = row_sum(up + i * g.out.row, p.out.at<bf16>(batch, head, start + i), p.value_dim);
        }
        std::fill(sums + 0, sums + p.head_dim * KEYS, 0.f);
    }

    Buffer<bf16> queries, ups, query_rows, up_rows;
    Buffer<float> sums;  // dQ^T
    alignas(64) float lse[KEYS], delta[KEYS];
};

// What one thread works in: a strip's queries; S^T, dP^T, P^T and dS^T of a tile; dS^T of a block by pairs of keys.
struct Room {
    explicit Room(const Problem& p) : pairs(p.keys * KEYS) {
        for (int64_t i = 0; i < p.strip_rows; i += KEYS) queries.push_back(std::make_unique<Queries>(p));
    }

    std::vector<std::unique_ptr<Queries>> queries;
    Buffer<bf16> pairs;
    alignas(64) float scores[ROWS * KEYS], products[ROWS * KEYS];
    alignas(64) bf16 weights[ROWS * KEYS], differences[(ROWS + 1) * KEYS];
};

// ---- loops ------------------------------------------------------------------------------------------------------

// R keys from `key` on with KEYS queries from `row` on: what they add to dV and dK, and dS^T by pairs of keys.
template <int R>
void tile(const Problem& p, const Head& head, const Sums& sums, const Queries& q, Room& w, const Range& range,
          int64_t row, int64_t key, bf16* pairs) {
    const int64_t dims = even(p.head_dim), value_dims = even(p.value_dim);
    product<R, VECTORS, false>(head.keys + key * dims, dims, q.queries, dims / 2, w.scores, KEYS);
    product<R, VECTORS, false>(head.values + key * value_dims, value_dims, q.ups, value_dims / 2, w.products, KEYS);
    for (int r = 0; r < R; ++r) {
        float* s = w.scores + r * KEYS;
        const int64_t j = key + r;
        if (j < range.start)
            hide(s, KEYS, KEYS, KEYS);
        else if (!range.whole)  // the queries i that see it have i + low <= j <= i + high
            hide(s, KEYS, j - p.high - row, j - p.low + 1 - row);
        weights(s, p.scale * float(M_LOG2E), q.lse, w.weights + r * KEYS);
        differences(s, w.products + r * KEYS, q.delta, w.differences + r * KEYS);
    }
    accumulate<R>(w.weights, KEYS, q.up_rows, KEYS / 2, p.columns(), sums.values + key * p.columns());
    accumulate<R>(w.differences, KEYS, q.query_rows, KEYS / 2, sums.columns, sums.keys + key * sums.columns);
    if (R % 2) std::fill(w.differences + R * KEYS, w.differences + (R + 1) * KEYS, bf16(0));
    for (int r = 0; r < R; r += 2)
        interleave(w.differences + r * KEYS, w.differences + (r + 1) * KEYS, pairs + r * KEYS);
}

// KEYS queries from `row` on with keys [start, end) of one block; start is even.
inline void block(const Problem& p, const Head& head, const Sums& sums, const Queries& q, Room& w, const Range& range,
                  int64_t row, int64_t start, int64_t end) {
    for (int64_t key = start; key < end; key += ROWS)
        with_rows(end - key, [&](auto rows) {
            tile<rows>(p, head, sums, q, w, range, row, key, w.pairs + (key - start) * KEYS);
        });
    for (int64_t d = 0; d < p.head_dim; d += ROWS)  // dQ^T += K^T dS^T
        with_rows(p.head_dim - d, [&](auto rows) {
            accumulate<rows>(head.turned + d * head.turned_row + start, head.turned_row, w.pairs, even(end - start) / 2,
                             KEYS, q.sums + d * KEYS);
        });
}

// A strip's dQ, and what it adds to dK and dV.
inline void strip_gradients(const Problem& p, const Gradients& g, const Head& head, const Sums& sums, Room& w,
                            int64_t batch, int64_t query_head, const Strip& strip) {
    const auto each = [&](auto f) {  // KEYS rows of the strip
        for (int64_t row = strip.start, i = 0; row < strip.end; row += KEYS, ++i)
            f(*w.queries[i], row, std::min<int64_t>(KEYS, strip.end - row));
    };
    each([&](Queries& q, int64_t row, int64_t rows) { q.pack(p, g, batch, query_head, row, rows); });
    for (int64_t at = strip.first_range; at < strip.end_range; ++at) {
        const Range& range = p.ranges[at];
        for (int64_t start = range.start / 2 * 2; start < range.end; start += p.keys)
            each([&](Queries& q, int64_t row, int64_t rows) {
                int64_t from = start, to = std::min<int64_t>(start + p.keys, range.end);
                if (!range.whole) {  // skip what the band leaves out for all of these rows
                    from = std::max(from, std::max<int64_t>(row + p.low, 0) / 2 * 2);
                    to = std::min(to, row + rows + p.high);
                }
                if (from < to) block(p, head, sums, q, w, range, row, from, to);
            });
    }
    each([&](Queries& q, int64_t row, int64_t rows) {
        finish_turned(q.sums, p.head_dim, p.scale, rows, g.query.at<bf16>(batch, query_head, row), g.query.row);
    });
}

// One thread's sums of a key join another's.
inline void join(const Problem& p, const Sums& from, int64_t key, const Sums& to) {
    const auto add = [&](const float* x, int64_t columns, float* y) {
        for (int64_t i = key * columns; i < (key + 1) * columns; ++i) y[i] += x[i];
    };
    add(from.keys, from.columns, to.keys);
    add(from.values, p.columns(), to.values);
}

inline void finish_key(const Problem& p, const Gradients& g, const Sums& sums, int64_t batch, int64_t head,
                       int64_t key) {
    finish(sums.keys + key * sums.columns, p.head_dim, p.scale, g.key.at<bf16>(batch, head, key));
    finish(sums.values + key * p.columns(), p.value_dim, 1, g.value.at<bf16>(batch, head, key));
}

// All of it, shared among threads as in the forward. Where they share a key/value head each thread has sums of its own,
// and takes every so many strips, so that as many threads always give the same result.
inline void all_gradients(const Problem& p, const Gradients& g) {
    const int64_t heads = p.batch * p.kv_heads, alone = heads - heads % p.threads, group = p.heads / p.kv_heads;
    const int64_t blocks = p.packed_keys() / KEYS;
    std::vector<std::unique_ptr<Room>> rooms;
    std::vector<std::unique_ptr<Sums>> sums;
    std::vector<std::unique_ptr<Head>> packs;  // made here: no exception may leave a parallel region
    for (int64_t t = 0; t < p.threads; ++t) {
        rooms.push_back(std::make_unique<Room>(p));
        sums.push_back(std::make_unique<Sums>(p));
        if (alone || t == 0) packs.push_back(std::make_unique<Head>(p));
    }
#pragma omp parallel num_threads(p.threads)
    {
        const int thread = omp_get_thread_num();
        auto& room = *rooms[thread];
        auto& own = *sums[thread];
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < alone; ++n) {
            const int64_t batch = n / p.kv_heads, head = n % p.kv_heads;
            auto& pack = *packs[thread];
            for (int64_t block = 0; block < blocks; ++block) pack.pack(p, batch, head, block);
            own.clear(p);
            for (int64_t task = 0; task < group * p.strip_count; ++task)
                strip_gradients(p, g, pack, own, room, batch, head * group + task / p.strip_count,
                                p.strips[task % p.strip_count]);
            for (int64_t key = 0; key < p.kv_seq; ++key) finish_key(p, g, own, batch, head, key);
        }
        auto& shared = *packs[0];
        for (int64_t n = alone; n < heads; ++n) {
            const int64_t batch = n / p.kv_heads, head = n % p.kv_heads;
#pragma omp for
            for (int64_t t = 0; t < p.threads; ++t) sums[t]->clear(p);
#pragma omp for
            for (int64_t block = 0; block < blocks; ++block) shared.pack(p, batch, head, block);
#pragma omp for schedule(static, 1)
            for (int64_t task = group * p.strip_count - 1; task >= 0; --task)
                strip_gradients(p, g, shared, own, room, batch, head * group + task % group, p.strips[task / group]);
#pragma omp for
            for (int64_t key = 0; key < p.kv_seq; ++key) {
                for (int64_t t = 1; t < p.threads; ++t) join(p, *sums[t], key, *sums[0]);
                finish_key(p, g, *sums[0], batch, head, key);
            }
        }
    }
}

}  // namespace attnbench::gradient

// `out` and `lse` of the problem are the forward's.
extern "C" int backward(const attnbench::Problem* problem, const attnbench::gradient::Gradients* gradients) {
    try {
        attnbench::gradient::all_gradients(*problem, *gradients);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
