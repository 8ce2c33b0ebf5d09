// Few queries over keys and values in float32 or 16 bits: see decode.h.
#include "decode.h"

namespace attnbench {

using Product = Multiplied<Value>::Product;
using Element = Product::Element;
constexpr int WIDTH = Product::GROUP * LANES;  // elements in a register

// The scores of one query with up to KEYS keys, `rows` of which exist. q: padded with zeros to a multiple of WIDTH.
inline void scores(const Element* q, const Value* k, int64_t k_row, int64_t rows, int64_t dim, float* s) {
    for (int64_t key = 0; key < KEYS; key += LANES) {
        Ints sums[LANES];
        for (int i = 0; i < LANES; ++i) {
            const int64_t there = key + i < rows ? dim : 0;
            Floats sum = zero();
            for (int64_t d = 0; d < there; d += WIDTH)
                sum = Product::dot(sum, Product::along(k + (key + i) * k_row + d, there - d), load_ints(q + d));
            sums[i] = (Ints)sum;
        }
        transpose(sums);  // so that the lanes of a key's sum stand in a column
        Floats total = zero();
        for (const Ints& sum : sums) total = total + (Floats)sum;
        store(s + key, total);
    }
}

// O += P V for one row of P over `rows` keys.
inline void accumulate(const float* p, const Value* v, int64_t v_row, int64_t rows, int64_t dim, float* o) {
    for (int64_t c = 0; c < dim; c += 4 * LANES) {
        Floats sum[4];
        for (int t = 0; t < 4; ++t) sum[t] = load_first(o + c + LANES * t, dim - c - LANES * t);
        for (int64_t j = 0; j < rows; ++j)
            for (int t = 0; t < 4; ++t)
                sum[t] = fma(splat(p[j]), load_first(v + j * v_row + c + LANES * t, dim - c - LANES * t), sum[t]);
        for (int t = 0; t < 4; ++t) store_first(o + c + LANES * t, sum[t], dim - c - LANES * t);
    }
}

class FloatCache {
  public:
    explicit FloatCache(const Problem& p)
        : p_(p),
          width_(round_up(p.head_dim, WIDTH)),
          rows_(p.heads / p.kv_heads * p.seq),
          queries_(p.batch * p.kv_heads * rows_ * width_) {
        const int64_t heads = p.batch * p.kv_heads, group = p.heads / p.kv_heads;
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t row = 0; row < rows_; ++row)
                copy_row<Product>(
                    p.query.at<Value>(head / p.kv_heads, head % p.kv_heads * group + row / p.seq, row % p.seq),
                    p.head_dim, queries_ + (head * rows_ + row) * width_);
    }

    // V of these keys, and K of the next ones.
    void fetch(int64_t batch, int64_t head, int64_t key, int64_t rows, int64_t next) const {
        fetch_rows<Value>(p_.value, batch, head, key, rows, p_.value_dim);
        fetch_rows<Value>(p_.key, batch, head, key + KEYS, next, p_.head_dim);
    }

    // The products of one query with `rows` keys into s, and what they are still to be multiplied by, log2 e included.
    float scores(int64_t of, int64_t row, int64_t batch, int64_t head, int64_t key, int64_t rows, float* s) const {
        attnbench::scores(queries_ + (of * rows_ + row) * width_, p_.key.at<Value>(batch, head, key), p_.key.row, rows,
                          p_.head_dim, s);
        return p_.scale * float(M_LOG2E);
    }

    void accumulate(int64_t batch, int64_t head, int64_t key, int64_t rows, const float* weights, float* o) const {
        attnbench::accumulate(weights, p_.value.at<Value>(batch, head, key), p_.value.row, rows, p_.value_dim, o);
    }

  private:
    const Problem& p_;
    int64_t width_, rows_;
    Buffer<Element> queries_;
};

}  // namespace attnbench

// `high` of the problem is the causal mask's: row i sees the keys up to i + high. Strips and ranges are not read.
extern "C" int decode(const attnbench::Problem* problem) {
    try {
        attnbench::decode(*problem, attnbench::FloatCache(*problem));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
