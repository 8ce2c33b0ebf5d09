// Few queries on many keys, as when a decoder adds a token to its cache: K and V are read once, from where they lie, so
// the time is that of reading them. Keys are split among threads and the parts merged by their maxima and sums
// (Dao, Haziza, Massa, Sizov 2023, "Flash-Decoding"). What the cache holds is left to `Cache`.
#pragma once

#include "attention.h"

namespace attnbench {

// Asks for rows of a tensor that are needed soon; the hardware's own prefetcher loses the thread from K to V and back.
template <class T>
void fetch_rows(const Tensor& x, int64_t batch, int64_t head, int64_t start, int64_t rows, int64_t dim) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T)))
            __builtin_prefetch(x.at<T>(batch, head, start + i) + d);
}

// One row over one part of the keys: its output before division, the maximum and the sum that it is relative to.
struct Part {
    float* out;
    float top = LOWEST, sum = 0;
};

// All parts of the problem: for each key/value head, `splits` parts of its keys, each with all rows of its group.
class Parts {
  public:
    Parts(const Problem& p, int64_t splits)
        : rows_(p.heads / p.kv_heads * p.seq),
          splits_(splits),
          out_(p.batch * p.heads * p.seq * splits * p.columns()),
          parts_(p.batch * p.heads * p.seq * splits) {
        std::fill(out_ + 0, out_ + parts_.size() * p.columns(), 0.f);
        for (size_t i = 0; i < parts_.size(); ++i) parts_[i].out = out_ + i * p.columns();
    }

    Part& at(int64_t head, int64_t row, int64_t split) { return parts_[(head * rows_ + row) * splits_ + split]; }
    int64_t rows() const { return rows_; }
    int64_t splits() const { return splits_; }

  private:
    int64_t rows_, splits_;
    Buffer<float> out_;
    std::vector<Part> parts_;
};

// Keys [start, end) of one key/value head, for the queries of its group.
template <class Cache>
void attend(const Problem& p, const Cache& cache, Parts& parts, int64_t head, int64_t split, int64_t start,
            int64_t end) {
    const int64_t batch = head / p.kv_heads, kv_head = head % p.kv_heads;
    alignas(64) float s[KEYS];
    for (int64_t key = start; key < end; key += KEYS) {
        const int64_t rows = std::min<int64_t>(KEYS, end - key);
        cache.fetch(batch, kv_head, key, rows, std::clamp<int64_t>(end - key - KEYS, 0, KEYS));
        for (int64_t row = 0; row < parts.rows(); ++row) {
            const int64_t seen = std::min(rows, row % p.seq + p.high + 1 - key);
            if (seen <= 0) continue;
            Part& part = parts.at(head, row, split);
            const float scale = cache.scores(head, row, batch, kv_head, key, rows, s);
            hide(s, KEYS, 0, seen);
            raise(maximum(s, KEYS) * scale, part.top, part.sum, part.out, p.columns());
            part.sum += powers<Singles, !std::is_same_v<Value, bf16>>(s, KEYS, scale, part.top, s);
            cache.accumulate(batch, kv_head, key, seen, s, part.out);
        }
    }
}

// A row's parts into its output.
void merge(const Problem& p, Parts& parts, int64_t head, int64_t row) {
    Part& whole = parts.at(head, row, 0);
    for (int64_t split = 1; split < parts.splits(); ++split) {
        const Part& part = parts.at(head, row, split);
        const float top = std::max(whole.top, part.top);
        const float keep = std::exp2(whole.top - top), add = std::exp2(part.top - top);
        for (int64_t c = 0; c < p.value_dim; ++c) whole.out[c] = keep * whole.out[c] + add * part.out[c];
        whole.sum = keep * whole.sum + add * part.sum;
        whole.top = top;
    }
    const int64_t query_head = head % p.kv_heads * (p.heads / p.kv_heads) + row / p.seq;
    finish(whole.out, p.value_dim, 1 / whole.sum, p.out.at<Value>(head / p.kv_heads, query_head, row % p.seq));
}

template <class Cache>
void decode(const Problem& p, const Cache& cache) {
    const int64_t heads = p.batch * p.kv_heads, rows = p.heads / p.kv_heads * p.seq;
    // Some parts for each thread, so that none waits long for the last; but not of less than a few blocks.
    const int64_t wanted = std::max<int64_t>(1, 4 * p.threads / heads);
    const int64_t keys = round_up(std::max<int64_t>((p.kv_seq + wanted - 1) / wanted, 4 * KEYS), KEYS);
    const int64_t splits = (p.kv_seq + keys - 1) / keys;
    Parts parts(p, splits);
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < heads * splits; ++task) {
            const int64_t start = task % splits * keys;
            attend(p, cache, parts, task / splits, task % splits, start, std::min(start + keys, p.kv_seq));
        }
#pragma omp for
        for (int64_t task = 0; task < heads * rows; ++task) merge(p, parts, task / rows, task % rows);
    }
}

}  // namespace attnbench
