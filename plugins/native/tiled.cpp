// Exact attention: softmax(Q K^T * scale) V with products of float32, or of bf16 pairs, and float32 sums.
#include "ragged.h"
#include "values.h"

namespace attnbench {

template <class T>
class FloatKeys {
    using Product = typename Multiplied<T>::Product;
    using Element = typename Product::Element;

  public:
    static constexpr int ROWS = Product::ROWS;

    // A strip's queries, each padded to whole groups.
    class Queries {
      public:
        explicit Queries(const Problem& p)
            : row_(round_up(p.head_dim, LANES * Product::GROUP)),
              scale_(p.scale * float(M_LOG2E)),
              data_(p.strip_rows * row_) {}

        void pack(const Problem& p, int64_t batch, int64_t head, const Strip& strip) {
            for (int64_t i = strip.start; i < strip.end; ++i)
                copy_row<Product>(p.query.at<T>(batch, head, i), p.head_dim, data_ + (i - strip.start) * row_);
        }

        float scale(int64_t) const { return scale_; }
        const Element* at(int64_t row) const { return data_ + row * row_; }
        int64_t row() const { return row_; }

      private:
        int64_t row_;
        float scale_;  // log2 e is in it, as powers are of 2
        Buffer<Element> data_;
    };

    explicit FloatKeys(const Problem& p)
        : groups_(round_up(p.head_dim, Product::GROUP) / Product::GROUP),
          data_(p.packed_keys() * groups_ * Product::GROUP) {}

    void measure(const Problem&, int64_t, int64_t) {}

    void pack(const Problem& p, int64_t batch, int64_t head, int64_t key, int64_t rows) {
        pack_rows<Product>(p.rows<T>(p.key, batch, head, key), rows, p.head_dim, at(key));
    }

    // The products of R rows with PANEL keys.
    template <int R>
    void scores(const Queries& queries, int64_t row, int64_t key, float* s, int64_t s_row) const {
        product<Product, R, VECTORS, false>(queries.at(row), queries.row(), at(key), groups_, s, s_row);
    }

  private:
    Element* at(int64_t key) const { return data_ + key * groups_ * Product::GROUP; }

    int64_t groups_;
    Buffer<Element> data_;
};

}  // namespace attnbench

extern "C" int tiled(const attnbench::Problem* problem) {
    using namespace attnbench;
    return run<FloatKeys<Value>, FloatValues<Value>>(*problem);
}

// As `tiled`, of a batch whose entries have lengths of their own: ragged.h.
extern "C" int tiled_ragged(const attnbench::Problem* problems, int64_t count) {
    using namespace attnbench;
    return run_ragged<FloatKeys<Value>, FloatValues<Value>>(problems, count);
}
