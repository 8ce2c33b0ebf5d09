// Values in bf16, and weights in bf16 by the online softmax.
#pragma once

#include "attention.h"

namespace attnbench {

class Bf16Values {
  public:
    using Weight = bf16;

    explicit Bf16Values(const Problem& p)
        : length_(p.packed_keys()), columns_(p.columns()), data_(length_ * columns_) {}

    void measure(const Problem&, int64_t, int64_t) {}

    // V to [group of columns][pair of keys][columns of the group][2].
    void pack(const Problem& p, int64_t batch, int64_t head, int64_t key, int64_t rows) {
        for (int64_t c = 0; c < columns_; c += KEYS)
            pack_pairs(p.value.at<bf16>(batch, head, key) + c, p.value.row, rows, p.value_dim - c, width(c),
                       data_ + c * length_ + key * width(c));
    }

    // P of n more keys for one row; returns what accumulate() multiplies it with, which is nothing here.
    float weigh(const float* s, int64_t n, float scale, float& top, float& sum, float* o, int64_t columns,
                bf16* p) const {
        raise(maximum(s, n) * scale, top, sum, o, columns);
        sum += powers(s, n, scale, top, p);
        return 1;
    }

    template <int R>
    void accumulate(const bf16* p, int64_t p_row, const float*, int64_t key, int64_t n, float* o, int64_t o_row) const {
        for (int64_t c = 0; c < columns_; c += KEYS) {
            const bf16* v = data_ + c * length_ + key * width(c);
            switch (width(c) / LANES) {
                case 1: product<R, 1, true>(p, p_row, v, n / 2, o + c, o_row); break;
                case 2: product<R, 2, true>(p, p_row, v, n / 2, o + c, o_row); break;
                case 3: product<R, 3, true>(p, p_row, v, n / 2, o + c, o_row); break;
                default: product<R, 4, true>(p, p_row, v, n / 2, o + c, o_row);
            }
        }
    }

  private:
    int64_t width(int64_t c) const { return std::min<int64_t>(KEYS, columns_ - c); }

    int64_t length_, columns_;
    Buffer<bf16> data_;
};

}  // namespace attnbench
