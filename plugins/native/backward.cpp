// The gradients of exact attention: FlashAttention-2 (Dao 2023), algorithm 2, with the loops as in the forward, strips of
// query rows outside and blocks of keys inside. The forward left each row's log-sum-exp L, so no maximum has to be found
// again. With dO given, and delta = rowsum(dO * O):
//
//     P = exp(S - L)    dP = dO V^T    dS = P * (dP - delta)
//     dV += P^T dO    dK += dS^T Q * scale    dQ += dS K * scale
//
// A tile is computed as its transpose, keys x query rows: P^T and dS^T then come out as the left operands that dV and
// dK need, L and delta are whole registers, and for dQ^T += K^T dS^T alone rows of keys are packed to groups.
#include "backward.h"

namespace attnbench::gradient {

// dO, and where the gradients of query, key and value go. Mirrored in attention.py.
struct Gradients {
    Tensor out, query, key, value;
};

// R rows of groups with KEYS columns, packed by pack_rows.
template <int R>
INLINE void products(const Element* a, int64_t a_row, const Element* b, int64_t groups, float* c) {
    for (int t = 0; t < KEYS; t += PANEL, b += groups * PANEL * GROUP)
        product<Product, R, VECTORS, false>(a, a_row, b, groups, c + t, KEYS);
}

// ---- operands ---------------------------------------------------------------------------------------------------

inline int64_t whole(int64_t n) { return round_up(n, GROUP); }

// One key/value head: rows of K and V padded to whole registers, and K^T.
struct Head {
    explicit Head(const Problem& p)
        : turned_row(p.packed_keys() + 2 * LANES),  // no power of 2: those rows would share one set of a cache
          key_row(round_up(p.head_dim, GROUP * LANES)),
          value_row(round_up(p.value_dim, GROUP * LANES)),
          keys(p.packed_keys() * key_row),
          values(p.packed_keys() * value_row),
          turned(p.head_dim * turned_row) {}

    void pack(const Problem& p, int64_t batch, int64_t head, int64_t block) {
        const int64_t start = block * KEYS, rows = std::min<int64_t>(KEYS, p.kv_seq - start);
        for (int64_t i = start; i < start + rows; ++i) {
            copy_row<Product>(p.key.at<Value>(batch, head, i), p.head_dim, keys + i * key_row);
            copy_row<Product>(p.value.at<Value>(batch, head, i), p.value_dim, values + i * value_row);
        }
        pack_turned(p.key.at<Value>(batch, head, start), p.key.row, rows, p.head_dim, turned + start, turned_row);
    }

    int64_t turned_row, key_row, value_row;
    Buffer<Element> keys, values, turned;
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

// KEYS query rows. Q and dO by groups of dims are the right operands of S^T and dP^T, by groups of rows those of dK, dV.
struct Queries {
    explicit Queries(const Problem& p)
        : queries(whole(p.head_dim) * KEYS),
          ups(whole(p.value_dim) * KEYS),
          query_rows(round_up(p.head_dim, LANES) * KEYS),
          up_rows(p.columns() * KEYS),
          sums(p.head_dim * KEYS) {}

    void pack(const Problem& p, const Gradients& g, int64_t batch, int64_t of, int64_t start, int64_t rows) {
        head = of;
        const Value *q = p.query.at<Value>(batch, head, start), *up = g.out.at<Value>(batch, head, start);
        const Dense<Value> from_q{q, p.query.row}, from_up{up, g.out.row};
        pack_rows<Product>(from_q, rows, p.head_dim, queries + 0);
        pack_rows<Product>(from_up, rows, p.value_dim, ups + 0);
        const int64_t columns = round_up(p.head_dim, LANES);
        pack_panels<Product>(from_q, rows, p.head_dim, columns, KEYS, 0, query_rows + 0);
        pack_panels<Product>(from_up, rows, p.value_dim, p.columns(), KEYS, 0, up_rows + 0);
        std::fill(lse, lse + KEYS, 0.f);  // rows that are missing have Q = 0 and dO = 0, and add nothing
        std::fill(delta, delta + KEYS, 0.f);
        for (int64_t i = 0; i < rows; ++i) {
            lse[i] = p.lse[(batch * p.heads + head) * p.seq + start + i] * float(M_LOG2E);
            delta[i] = row_sum(up + i * g.out.row, p.out.at<Value>(batch, head, start + i), p.value_dim);
        }
        std::fill(sums + 0, sums + p.head_dim * KEYS, 0.f);
    }

    Buffer<Element> queries, ups, query_rows, up_rows;
    Buffer<float> sums;  // dQ^T
    alignas(64) float lse[KEYS], delta[KEYS];
    int64_t head;
};

// What one thread works in: a strip's queries; S^T, dP^T, P^T and dS^T of a tile; dS^T of a block by groups of keys.
struct Room {
    explicit Room(const Problem& p) : groups(p.keys * KEYS) {
        for (int64_t i = 0; i < p.strip_rows; i += KEYS) queries.push_back(std::make_unique<Queries>(p));
    }

    std::vector<std::unique_ptr<Queries>> queries;
    Buffer<Element> groups;
    alignas(64) float scores[ROWS * KEYS], products[ROWS * KEYS];
    alignas(64) Element weights[ROWS * KEYS], differences[ROWS * KEYS];
};

// ---- loops ------------------------------------------------------------------------------------------------------

// R keys from `key` on, of a block from `start` on, with KEYS queries from `row` on: what they add to dV and dK, and dS^T
// by groups of keys.
template <int R>
void tile(const Problem& p, const Head& head, const Sums& sums, const Queries& q, Room& w, const Range& range,
          int64_t row, int64_t start, int64_t key) {
    products<R>(head.keys + key * head.key_row, head.key_row, q.queries + 0, whole(p.head_dim) / GROUP, w.scores);
    products<R>(head.values + key * head.value_row, head.value_row, q.ups + 0, whole(p.value_dim) / GROUP, w.products);
    for (int r = 0; r < R; ++r) {
        float* s = w.scores + r * KEYS;
        const int64_t j = key + r;
        if (p.bias) add(s, p.added_to_key(q.head, j, row), KEYS);
        if (j < range.start)
            hide(s, KEYS, KEYS, KEYS);
        else if (!range.whole)  // the queries i that see it have i + low <= j <= i + high
            hide(s, KEYS, j - p.high - row, j - p.low + 1 - row);
        weights(s, p.scale * float(M_LOG2E), q.lse, w.weights + r * KEYS);
        differences(s, w.products + r * KEYS, q.delta, w.differences + r * KEYS);
    }
    const int64_t columns = p.columns();
    accumulate<Product, R>(w.weights + 0, KEYS, q.up_rows + 0, KEYS, 0, KEYS, columns, sums.values + key * columns, columns);
    accumulate<Product, R>(w.differences + 0, KEYS, q.query_rows + 0, KEYS, 0, KEYS, sums.columns,
                           sums.keys + key * sums.columns, sums.columns);
    pack_panels<Product>(Dense<Element>{w.differences, KEYS}, R, KEYS, KEYS, p.keys, key - start, w.groups + 0, R);
}

// KEYS queries from `row` on with keys [start, end) of one block; start is a multiple of GROUP.
inline void block(const Problem& p, const Head& head, const Sums& sums, const Queries& q, Room& w, const Range& range,
                  int64_t row, int64_t start, int64_t end) {
    for (int64_t key = start; key < end; key += ROWS)
        with_constant<ROWS>(end - key, [&](auto rows) {
            tile<rows>(p, head, sums, q, w, range, row, start, key);
        });
    for (int64_t d = 0; d < p.head_dim; d += ROWS)  // dQ^T += K^T dS^T
        with_constant<ROWS>(p.head_dim - d, [&](auto rows) {
            accumulate<Product, rows>(head.turned + d * head.turned_row + start, head.turned_row, w.groups + 0, p.keys, 0,
                                      end - start, KEYS, q.sums + d * KEYS, KEYS);
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
        for (int64_t start = range.start / GROUP * GROUP; start < range.end; start += p.keys)
            each([&](Queries& q, int64_t row, int64_t rows) {
                int64_t from = start, to = std::min<int64_t>(start + p.keys, range.end);
                if (!range.whole) {  // skip what the band leaves out for all of these rows
                    from = std::max(from, std::max<int64_t>(row + p.low, 0) / GROUP * GROUP);
                    to = std::min(to, row + rows + p.high);
                }
                if (from < to) block(p, head, sums, q, w, range, row, from, to);
            });
    }
    each([&](Queries& q, int64_t row, int64_t rows) {
        finish_turned(q.sums, p.head_dim, p.scale, rows, g.query.at<Value>(batch, query_head, row), g.query.row);
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
    finish(sums.keys + key * sums.columns, p.head_dim, p.scale, g.key.at<Value>(batch, head, key));
    finish(sums.values + key * p.columns(), p.value_dim, 1, g.value.at<Value>(batch, head, key));
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
        const Tiles tiles;
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
