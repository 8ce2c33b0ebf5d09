// Exact attention in bf16: softmax(Q K^T * scale) V with products of bf16 pairs and float32 sums.
#include "bf16_values.h"

namespace attnbench {

class Bf16Keys {
  public:
    // A strip's queries, each padded to whole pairs.
    class Queries {
      public:
        explicit Queries(const Problem& p)
            : row_(round_up(p.head_dim, 2)), scale_(p.scale * float(M_LOG2E)), data_(p.strip_rows * row_) {}

        void pack(const Problem& p, int64_t batch, int64_t head, const Strip& strip) {
            for (int64_t i = strip.start; i < strip.end; ++i) {
                bf16* to = data_ + (i - strip.start) * row_;
                to[row_ - 1] = 0;
                std::memcpy(to, p.query.at<bf16>(batch, head, i), p.head_dim * sizeof(bf16));
            }
        }

        float scale(int64_t) const { return scale_; }
        const bf16* at(int64_t row) const { return data_ + row * row_; }
        int64_t row() const { return row_; }

      private:
        int64_t row_;
        float scale_;  // log2 e is in it, as powers are of 2
        Buffer<bf16> data_;
    };

    explicit Bf16Keys(const Problem& p)
        : pairs_(round_up(p.head_dim, 2) / 2), data_(p.packed_keys() * 2 * pairs_) {}

    void measure(const Problem&, int64_t, int64_t) {}

    // K to [block of keys][pair of dims][KEYS][2].
    void pack(const Problem& p, int64_t batch, int64_t head, int64_t key, int64_t rows) {
        pack_groups(p.key.at<bf16>(batch, head, key), p.key.row * sizeof(bf16), rows, p.head_dim * sizeof(bf16),
                    data_ + key * 2 * pairs_);
    }

    template <int R>
    void scores(const Queries& queries, int64_t row, int64_t key, float* s, int64_t s_row) const {
        product<R, VECTORS, false>(queries.at(row), queries.row(), data_ + key * 2 * pairs_, pairs_, s, s_row);
    }

  private:
    int64_t pairs_;
    Buffer<bf16> data_;
};

}  // namespace attnbench

extern "C" int tiled(const attnbench::Problem* problem) {
    using namespace attnbench;
    return run<Bf16Keys, Bf16Values>(*problem);
}
