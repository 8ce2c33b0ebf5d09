// Attention over strips of query rows and blocks of keys, whatever the operands are held in: that is left to `Keys`, which
// pack queries and keys and multiply them, and to `Values`, which turn scores into weights and multiply those.
//
// Dao 2022 (FlashAttention), algorithm 1, with the loops as in FlashAttention-2: strips of rows outside, blocks of keys
// inside. K and V are packed once per key/value head; a block of both is to stay in a core's L2 cache while the strip's
// rows pass over it, a tile at a time.
#pragma once

#include <omp.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "tile.h"

#ifndef VALUE
#define VALUE bf16  // of query, key, value and output: float, bf16 or f16
#endif

namespace attnbench {

using Value = VALUE;
constexpr int MAX_DIM = 256;  // of heads and values
constexpr int SHORTEST_PAGE = 16;  // tokens

// (batch, heads, length, dim) with strides in elements; the last dimension is dense.
struct Tensor {
    void* data;
    int64_t batch, head, row;

    template <class T>
    T* at(int64_t b, int64_t h, int64_t i) const {
        return static_cast<T*>(data) + b * batch + h * head + i * row;
    }
};

// Rows of one head of keys or values from `start` on, wherever they lie: one after the other, or in pages of `page` tokens,
// which a table names. A page is what a batch entry is of the tensor then.
template <class T>
struct Rows {
    const T* operator()(int64_t i) const {
        if (!table) return x.at<T>(batch, head, start + i);
        return x.at<T>(table[(start + i) >> page_bits], head, (start + i) & ((int64_t(1) << page_bits) - 1));
    }

    const Tensor& x;
    int64_t batch, head, start;
    const int32_t* table;
    int64_t page_bits;
};

// Keys [start, end) that a strip computes. In a whole range each of its rows sees all of them; in another, row i sees
// the keys from i + low to i + high.
struct Range {
    int32_t start, end, whole;
};

// Query rows [start, end) and their ranges, in ascending order and apart.
struct Strip {
    int32_t start, end, first_range, end_range;
};

// Mirrored in attention.py.
struct Problem {
    Tensor query, key, value, out;
    int64_t batch, heads, kv_heads, seq, kv_seq, head_dim, value_dim;
    int64_t low, high;  // the band that a row sees in ranges that are not whole
    int64_t keys;       // of a block, a multiple of KEYS
    int64_t strip_rows; // of the largest strip
    int64_t threads;
    float scale;
    const Strip* strips;
    int64_t strip_count;
    const Range* ranges;
    float* lse;         // (batch, heads, seq), dense: the log-sum-exp of each row's scores; null where not wanted
    const int32_t* pages;  // (batch, pages of an entry), dense: where keys and values lie; null where they do so in order
    int64_t pages_row, page_bits;  // pages of an entry; the logarithm of the tokens in one, to base 2
    // (heads, bias_row): over the scale what a head adds to a score, by how far the key lies from the query, from the last
    // query's first key on; of the backward pass by how far the query lies from the key. Null where nothing is added.
    const float* bias;
    int64_t bias_row;

    // Of key or value.
    template <class T>
    Rows<T> rows(const Tensor& x, int64_t entry, int64_t head, int64_t start) const {
        return {x, entry, head, start, pages ? pages + entry * pages_row : nullptr, page_bits};
    }
    // What is added to the scores of a query with the keys from `key` on; as it is said of `bias`, or the other way round.
    const float* added(int64_t head, int64_t row, int64_t key) const {
        return bias + head * bias_row + key - row + seq - 1;
    }
    const float* added_to_key(int64_t head, int64_t key, int64_t row) const {
        return bias + head * bias_row + row - key + kv_seq - 1;
    }
    // Keys that lie one after the other, from a multiple of it on.
    int64_t run() const { return pages ? int64_t(1) << page_bits : kv_seq; }
    int64_t packed_keys() const { return round_up(kv_seq, KEYS); }
    int64_t columns() const { return round_up(value_dim, LANES); }
};

// Memory that is aligned to a cache's lines and goes with its owner.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t count)
        : data_(static_cast<T*>(std::aligned_alloc(64, round_up(count * sizeof(T) + 1, 64)))) {
        if (!data_) throw std::bad_alloc();
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator T*() const { return data_; }

  private:
    T* data_;
};

// One key/value head, packed.
template <class Keys, class Values>
struct Packed {
    explicit Packed(const Problem& p) : keys(p), values(p) {}

    void measure(const Problem& p, int64_t batch, int64_t head) {
        keys.measure(p, batch, head);
        values.measure(p, batch, head);
    }

    void pack(const Problem& p, int64_t batch, int64_t head, int64_t block) {
        const int64_t start = block * KEYS, rows = std::min<int64_t>(KEYS, p.kv_seq - start);
        keys.pack(p, batch, head, start, rows);
        values.pack(p, batch, head, start, rows);
    }

    Keys keys;
    Values values;
};

// That are computed together.
template <class Keys, class Values>
constexpr int SCORE_ROWS = std::max(Keys::ROWS, Values::ROWS);

// What one thread works in: a strip's queries, running output, maximum and sum; a tile's scores and weights.
template <class Keys, class Values>
struct Workspace {
    explicit Workspace(const Problem& p)
        : queries(p),
          scores(SCORE_ROWS<Keys, Values> * p.keys),
          weights(SCORE_ROWS<Keys, Values> * p.keys),
          out(p.strip_rows * p.columns()),
          top(p.strip_rows),
          sum(p.strip_rows) {}

    typename Keys::Queries queries;
    Buffer<float> scores;
    Buffer<typename Values::Weight> weights;
    Buffer<float> out, top, sum;
    int64_t head = 0;  // of the queries
};

// R rows of a strip, from the `row`-th on, over the keys [start, end) of one block, both multiples of PANEL: what lies
// outside the range or the band is hidden.
template <int R, class Keys, class Values>
void tile(const Problem& p, const Packed<Keys, Values>& packed, Workspace<Keys, Values>& w, const Strip& strip,
          const Range& range, int64_t row, int64_t start, int64_t end) {
    const int64_t n = end - start, columns = p.columns();
    for (int64_t j = 0; j < n; j += PANEL)
        packed.keys.template scores<R>(w.queries, row, start + j, w.scores + j, p.keys);
    float* out = w.out + row * columns;
    float factors[R];
    for (int r = 0; r < R; ++r) {
        const int64_t i = strip.start + row + r;
        const int64_t from = range.whole ? range.start : std::max<int64_t>(range.start, i + p.low);
        const int64_t to = range.whole ? range.end : std::min<int64_t>(range.end, i + p.high + 1);
        float* s = w.scores + r * p.keys;
        if (p.bias) add(s, p.added(w.head, i, start), n);
        if (from > start || to < end) hide(s, n, from - start, to - start);
        factors[r] = packed.values.weigh(s, n, w.queries.scale(row + r), w.top[row + r], w.sum[row + r],
                                         out + r * columns, columns, w.weights + r * p.keys);
    }
    packed.values.template accumulate<R>(w.weights, p.keys, factors, start, n, out, columns);
}

template <class Keys, class Values>
void attend(const Problem& p, const Packed<Keys, Values>& packed, Workspace<Keys, Values>& w, int64_t batch,
            int64_t head, const Strip& strip) {
    constexpr int ROWS = SCORE_ROWS<Keys, Values>;
    const int64_t rows = strip.end - strip.start, columns = p.columns();
    w.queries.pack(p, batch, head, strip);
    w.head = head;
    std::fill(w.top + 0, w.top + rows, LOWEST);
    std::fill(w.sum + 0, w.sum + rows, 0.f);
    std::fill(w.out + 0, w.out + rows * columns, 0.f);
    for (int64_t at = strip.first_range; at < strip.end_range; ++at) {
        const Range& range = p.ranges[at];
        const int64_t last = round_up(range.end, PANEL);
        for (int64_t start = range.start / PANEL * PANEL, stop; start < last; start = stop) {
            // Of all keys the first APART are a block of their own.
            stop = std::min(start < Values::APART ? Values::APART : start + p.keys, last);
            for (int64_t row = 0; row < rows; row += ROWS) {
                const int64_t together = std::min<int64_t>(ROWS, rows - row), first = strip.start + row;
                int64_t from = start, to = stop;
                if (!range.whole) {  // skip what the band leaves out for all of these rows
                    from = std::max(from, std::max<int64_t>(first + p.low, 0) / PANEL * PANEL);
                    to = std::min(to, round_up(std::max<int64_t>(first + together + p.high, 0), PANEL));
                }
                if (from >= to) continue;
                with_constant<ROWS>(together, [&](auto r) { tile<r>(p, packed, w, strip, range, row, from, to); });
            }
        }
    }
    for (int64_t i = 0; i < rows; ++i)
        finish(w.out + i * columns, p.value_dim, 1 / w.sum[i], 
               p.out.at<typename Values::Value>(batch, head, strip.start + i));
    for (int64_t i = 0; p.lse && i < rows; ++i)
        p.lse[(batch * p.heads + head) * p.seq + strip.start + i] = log_sum_exp(w.top[i], w.sum[i]);
}

// All of it. As long as every thread has a key/value head of its own, it packs that head and computes its query heads
// alone; the heads left over are shared by all threads, first by blocks of keys and then by strips.
template <class Keys, class Values>
void attention(const Problem& p) {
    const int64_t heads = p.batch * p.kv_heads, alone = heads - heads % p.threads, group = p.heads / p.kv_heads;
    const int64_t blocks = p.packed_keys() / KEYS;
    std::vector<std::unique_ptr<Workspace<Keys, Values>>> works;
    std::vector<std::unique_ptr<Packed<Keys, Values>>> packs;  // made here: no exception may leave a parallel region
    for (int64_t t = 0; t < p.threads; ++t) {
        works.push_back(std::make_unique<Workspace<Keys, Values>>(p));
        if (alone || t == 0) packs.push_back(std::make_unique<Packed<Keys, Values>>(p));
    }
#pragma omp parallel num_threads(p.threads)
    {
        const Tiles tiles;
        const int thread = omp_get_thread_num();
        auto& work = *works[thread];
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < alone; ++n) {
            const int64_t batch = n / p.kv_heads, head = n % p.kv_heads;
            auto& own = *packs[thread];
            own.measure(p, batch, head);
            for (int64_t block = 0; block < blocks; ++block) own.pack(p, batch, head, block);
            for (int64_t task = 0; task < group * p.strip_count; ++task)
                attend(p, own, work, batch, head * group + task / p.strip_count, p.strips[task % p.strip_count]);
        }
        auto& shared = *packs[0];
        for (int64_t n = alone; n < heads; ++n) {
            const int64_t batch = n / p.kv_heads, head = n % p.kv_heads;
#pragma omp single
            shared.measure(p, batch, head);
#pragma omp for
            for (int64_t block = 0; block < blocks; ++block) shared.pack(p, batch, head, block);
            // A causal head's last strips are the longest: they go first, so that no thread ends late.
#pragma omp for schedule(dynamic)
            for (int64_t task = group * p.strip_count - 1; task >= 0; --task)
                attend(p, shared, work, batch, head * group + task % group, p.strips[task / group]);
        }
    }
}

// Runs it for C: 0, or 1 where memory did not suffice.
template <class Keys, class Values>
int run(const Problem& p) {
    try {
        attention<Keys, Values>(p);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace attnbench
