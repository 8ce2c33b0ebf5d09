// Values as the product of their type takes them, and weights by the online softmax.
#pragma once

#include "attention.h"

namespace attnbench {

template <class T>
class FloatValues {
    using Product = typename Multiplied<T>::Product;

  public:
    using Value = T;
    using Weight = typename Product::Element;
    static constexpr int64_t APART = 0;
    static constexpr int ROWS = Product::ROWS;

    explicit FloatValues(const Problem& p)
        : length_(p.packed_keys()), columns_(p.columns()), data_(length_ * columns_) {}

    void measure(const Problem&, int64_t, int64_t) {}

    void pack(const Problem& p, int64_t batch, int64_t head, int64_t key, int64_t rows) {
        pack_panels<Product>(p.rows<T>(p.value, batch, head, key), rows, p.value_dim, columns_, length_, key, data_ + 0);
    }

    // P of n more keys for one row; returns what accumulate() multiplies it with, which is nothing here.
    float weigh(const float* s, int64_t n, float scale, float& top, float& sum, float* o, int64_t columns,
                Weight* p) const {
        raise(maximum(s, n) * scale, top, sum, o, columns);
        sum += powers<Product, !std::is_same_v<T, bf16>>(s, n, scale, top, p);
        return 1;
    }

    template <int R>
    void accumulate(const Weight* p, int64_t p_row, const float*, int64_t key, int64_t n, float* o, int64_t o_row) const {
        attnbench::accumulate<Product, R>(p, p_row, data_ + 0, length_, key, n, columns_, o, o_row);
    }

  private:
    int64_t length_, columns_;
    Buffer<Weight> data_;
};

}  // namespace attnbench
