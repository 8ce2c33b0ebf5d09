// Few queries over a cache of int8 keys and values with a scale for each token: see decode.h. It reads half of what bf16
// would take.
#include "decode.h"

namespace attnbench {

// Mirrored in attention.py: scales (batch, head, token) of query, key and value.
struct Scales {
    Tensor query, key, value;
};

// Products of one query with up to KEYS keys, `rows` of which exist, times the keys' scales. q: dim integers as floats, whose
// sums float32 holds exactly.
inline void scores(const float* q, const int8_t* k, int64_t k_row, const float* k_scale, int64_t scale_row,
                   int64_t rows, int64_t dim, float* s) {
    for (int64_t key = 0; key < KEYS; key += LANES) {
        Ints sums[LANES];
        alignas(64) float scale[LANES] = {};
        for (int i = 0; i < LANES; ++i) {
            const int64_t there = key + i < rows ? dim : 0;
            Floats sum = zero();
            for (int64_t d = 0; d < there; d += LANES)
                sum = fma(load_first(q + d, there - d), load_first(k + (key + i) * k_row + d, there - d), sum);
            sums[i] = (Ints)sum;
            if (there) scale[i] = k_scale[(key + i) * scale_row];
        }
        transpose(sums);  // so that the lanes of a key's sum stand in a column
        Floats total = zero();
        for (const Ints& sum : sums) total = total + (Floats)sum;
        store(s + key, total * load(scale));
    }
}

// O += P V for one row of P over `rows` keys, whose scales P takes in.
inline void accumulate(const float* p, const int8_t* v, int64_t v_row, const float* v_scale, int64_t scale_row,
                       int64_t rows, int64_t dim, float* o) {
    for (int64_t c = 0; c < dim; c += 4 * LANES) {
        Floats sum[4];
        for (int t = 0; t < 4; ++t) sum[t] = load_first(o + c + LANES * t, dim - c - LANES * t);
        for (int64_t j = 0; j < rows; ++j) {
            const Floats weight = splat(p[j] * v_scale[j * scale_row]);
            for (int t = 0; t < 4; ++t)
                sum[t] = fma(weight, load_first(v + j * v_row + c + LANES * t, dim - c - LANES * t), sum[t]);
        }
        for (int t = 0; t < 4; ++t) store_first(o + c + LANES * t, sum[t], dim - c - LANES * t);
    }
}

class Int8Cache {
  public:
    Int8Cache(const Problem& p, const Scales& scales) : p_(p), scales_(scales) {}

    // V of these keys, and K of the next ones.
    void fetch(int64_t batch, int64_t head, int64_t key, int64_t rows, int64_t next) const {
        fetch_rows<int8_t>(p_.value, batch, head, key, rows, p_.value_dim);
        fetch_rows<int8_t>(p_.key, batch, head, key + KEYS, next, p_.head_dim);
    }

    // The products of one query with `rows` keys into s, and what they are still to be multiplied by, log2 e included.
    float scores(int64_t, int64_t row, int64_t batch, int64_t head, int64_t key, int64_t rows, float* s) const {
        const int64_t query_head = head * (p_.heads / p_.kv_heads) + row / p_.seq;
        alignas(64) float q[MAX_DIM];
        const int8_t* query = p_.query.at<int8_t>(batch, query_head, row % p_.seq);
        std::copy(query, query + p_.head_dim, q);
        attnbench::scores(q, p_.key.at<int8_t>(batch, head, key), p_.key.row, scales_.key.at<float>(batch, head, key),
                          scales_.key.row, rows, p_.head_dim, s);
        return *scales_.query.at<float>(batch, query_head, row % p_.seq) * p_.scale * float(M_LOG2E);
    }

    void accumulate(int64_t batch, int64_t head, int64_t key, int64_t rows, const float* weights, float* o) const {
        attnbench::accumulate(weights, p_.value.at<int8_t>(batch, head, key), p_.value.row,
                              scales_.value.at<float>(batch, head, key), scales_.value.row, rows, p_.value_dim, o);
    }

  private:
    const Problem& p_;
    const Scales& scales_;
};

}  // namespace attnbench

// query, key and value are int8, out is bf16; the rest as for `decode`.
extern "C" int decode_int8(const attnbench::Problem* problem, const attnbench::Scales* scales) {
    try {
        attnbench::decode(*problem, attnbench::Int8Cache(*problem, *scales));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
