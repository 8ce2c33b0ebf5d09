// Few queries on many keys, as when a decoder adds a token to its cache: K and V are read once, from where they lie, so
// the time is that of reading them. The rows of a group of heads pass over a block of keys together. Keys are split among
// threads and the parts merged by their maxima and sums (Dao, Haziza, Massa, Sizov 2023, "Flash-Decoding"). What the cache
// holds is left to `Cache`.
#pragma once

#include "attention.h"

namespace attnbench {

constexpr int TOGETHER = 4;  // rows at a time: their sums, of LANES / TOGETHER keys, take LANES registers
constexpr int WIDE_DIM = 1024;  // of heads and values that are held as they are

// The rows of queries that share a key/value head: row r is query r % seq of the group's head r / seq.
struct Group {
    explicit Group(const Problem& p) : heads(p.heads / p.kv_heads), seq(p.seq), rows(heads * seq) {}

    template <class T>
    T* at(const Problem& p, const Tensor& x, int64_t head, int64_t row) const {
        return x.at<T>(head / p.kv_heads, head % p.kv_heads * heads + row / seq, row % seq);
    }

    int64_t heads, seq, rows;
};

// Asks for rows that are needed next, a cache line at a time in the order in which they lie, among the arithmetic on those
// that are there: at the pace of memory. The hardware's own prefetcher loses the thread from K to V and back; asked for at
// once, or out of order, lines would wait for each other and all else for them.
class Ahead {
  public:
    Ahead(const void* first, int64_t row, int64_t rows, int64_t width)  // in bytes
        : at_(static_cast<const char*>(first)), row_(row), width_(width), lines_(rows * ((width + LINE - 1) / LINE)) {
        if (row == width) width_ = rows * row;  // rows that lie next to each other are one
        each_ = lines_;
    }

    // As many rows from here on next.
    void then(const void* first) { starts_[runs_++] = static_cast<const char*>(first); }

    template <int LINES>
    INLINE void ask() {
        if (lines_ <= 0 && !next_run()) return;
        lines_ -= LINES;
        if (width_ - done_ >= LINES * LINE) {
#pragma GCC unroll 16
            for (int i = 0; i < LINES; ++i) __builtin_prefetch(at_ + done_ + LINE * i);
            done_ += LINES * LINE;
        } else {
            for (int i = 0; i < LINES; ++i) {
                if (done_ >= width_) done_ = 0, at_ += row_;
                __builtin_prefetch(at_ + done_);
                done_ += LINE;
            }
        }
    }

  private:
    bool next_run() {
        if (run_ == runs_) return false;
        at_ = starts_[run_++];
        lines_ = each_, done_ = 0;
        return true;
    }

    static constexpr int64_t LINE = 64;
    const char *at_, *starts_[KEYS / SHORTEST_PAGE];
    int64_t row_, width_, lines_, each_, done_ = 0;
    int run_ = 0, runs_ = 0;
};

// One row over one part of the keys: its output before division, the maximum and the sum that it is relative to.
struct Share {
    float top = LOWEST, sum = 0;
};

// All of them: for each key/value head and each part of its keys, all rows of its group.
class Shares {
  public:
    Shares(const Problem& p, int64_t rows, int64_t splits, int64_t columns)
        : rows_(rows),
          splits_(splits),
          columns_(columns),
          shares_(p.batch * p.kv_heads * rows * splits),
          out_(shares_.size() * columns) {
        std::fill(out_ + 0, out_ + shares_.size() * columns, 0.f);
    }

    Share& at(int64_t head, int64_t split, int64_t row) { return shares_[index(head, split, row)]; }
    float* out(int64_t head, int64_t split, int64_t row) { return out_ + index(head, split, row) * columns_; }
    int64_t splits() const { return splits_; }
    int64_t columns() const { return columns_; }

  private:
    int64_t index(int64_t head, int64_t split, int64_t row) const { return (head * splits_ + split) * rows_ + row; }

    int64_t rows_, splits_, columns_;
    std::vector<Share> shares_;
    Buffer<float> out_;
};

// R rows from the `row`-th on over a block of keys, of which `rows` exist. first: query head of the group.
template <int R, class Cache>
void block(const Problem& p, const Cache& cache, const typename Cache::Head& head, int64_t first, Share* shares, float* out,
           int64_t columns, int64_t row, int64_t key, int64_t rows, Ahead& values, Ahead& keys) {
    constexpr int BLOCK = Cache::BLOCK;
    alignas(64) float s[R * BLOCK];
    typename Cache::Weights weights;
    float scale[R], top[R], sum[R];
    cache.template scores<R>(head, row, key, rows, s, values);
    for (int r = 0; p.bias && r < R; ++r)
        add(s + r * BLOCK, p.added(first + (row + r) / p.seq, (row + r) % p.seq, key), BLOCK);
    for (int r = 0; r < R; ++r) hide(s + r * BLOCK, BLOCK, 0, std::min(rows, (row + r) % p.seq + p.high + 1 - key));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        scale[r] = cache.scale(head, row + r);
        top[r] = maximum(s + r * BLOCK, BLOCK) * scale[r];
    }
    for (int r = 0; r < R; ++r) {
        raise(top[r], shares[r].top, shares[r].sum, out + r * columns, columns);
        top[r] = shares[r].top;
    }
    cache.template weigh<R>(head, key, rows, s, scale, top, sum, weights);
    for (int r = 0; r < R; ++r) shares[r].sum += sum[r];
    cache.template accumulate<R>(head, key, rows, weights, out, columns, keys);
}

// Keys [start, end) of one key/value head, for the queries of its group.
template <class Cache>
void attend(const Problem& p, const Cache& cache, Shares& shares, int64_t index, int64_t split, int64_t start,
            int64_t end) {
    const typename Cache::Head head = cache.head(index);
    const Group group(p);
    const int64_t all = group.rows, columns = shares.columns(), first = index % p.kv_heads * group.heads;
    for (int64_t key = start; key < end; key += Cache::BLOCK) {
        const int64_t rows = std::min<int64_t>(Cache::BLOCK, end - key);
        // While scores are computed, V of these keys is asked for, and while V is read, K of the next ones.
        Ahead values = cache.values_ahead(head, key, rows);
        const int64_t next = std::clamp<int64_t>(end - key - Cache::BLOCK, 0, Cache::BLOCK);
        Ahead keys = cache.keys_ahead(head, key + Cache::BLOCK, next);
        for (int64_t row = 0; row < all; row += TOGETHER)
            with_constant<TOGETHER>(all - row, [&](auto r) {
                block<r>(p, cache, head, first, &shares.at(index, split, row), shares.out(index, split, row), columns, row,
                         key, rows, values, keys);
            });
    }
}

// A row's parts into its output.
template <class Cache>
void merge(const Problem& p, const Cache& cache, Shares& shares, int64_t head, int64_t row) {
    Share& whole = shares.at(head, 0, row);
    float* sum = shares.out(head, 0, row);
    for (int64_t split = 1; split < shares.splits(); ++split) {
        const Share& share = shares.at(head, split, row);
        const float top = std::max(whole.top, share.top), *out = shares.out(head, split, row);
        const float keep = std::exp2(whole.top - top), add = std::exp2(share.top - top);
        for (int64_t c = 0; c < shares.columns(); c += LANES)
            store(sum + c, splat(keep) * load(sum + c) + splat(add) * load(out + c));
        whole.sum = keep * whole.sum + add * share.sum;
        whole.top = top;
    }
    alignas(64) float ordered[WIDE_DIM + 2 * LANES];
    for (int64_t c = 0; c < p.value_dim; ++c) ordered[c] = sum[cache.place(c)];
    const Group group(p);
    finish(ordered, p.value_dim, cache.factor() / whole.sum, group.at<Value>(p, p.out, head, row));
    if (p.lse) p.lse[head * group.rows + row] = log_sum_exp(whole.top, whole.sum);
}

template <class Cache>
void decode(const Problem& p, const Cache& cache) {
    const int64_t heads = p.batch * p.kv_heads, rows = Group(p).rows;
    // Some parts for each thread, so that none waits long for the last; but not of less than a few blocks.
    const int64_t wanted = std::max<int64_t>(1, 4 * p.threads / heads);
    const int64_t keys = round_up(std::max<int64_t>((p.kv_seq + wanted - 1) / wanted, 4 * KEYS), KEYS);
    const int64_t splits = (p.kv_seq + keys - 1) / keys;
    Shares shares(p, rows, splits, cache.columns());
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < heads * splits; ++task) {
            const int64_t start = task % splits * keys;
            attend(p, cache, shares, task / splits, task % splits, start, std::min(start + keys, p.kv_seq));
        }
#pragma omp for
        for (int64_t task = 0; task < heads * rows; ++task) merge(p, cache, shares, task / rows, task % rows);
    }
}

// Runs it for C: 0, or 1 where memory did not suffice. `high` of the problem is the causal mask's: row i sees the keys up
// to i + high. Strips and ranges are not read.
template <class Cache, class... More>
int run_decode(const Problem& p, const More&... more) {
    try {
        decode(p, Cache(p, more...));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace attnbench
