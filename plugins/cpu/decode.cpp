// Few queries on many keys, as when a decoder adds a token to its cache: K and V are read once, from where they lie, so
// the time is that of reading them. Keys are split among threads and the parts merged by their maxima and sums
// (Dao, Haziza, Massa, Sizov 2023, "Flash-Decoding").
#include "attention.h"

namespace attnbench {

constexpr int PAIRS = 2 * LANES;  // bf16 values in a register

inline __mmask32 first_pairs(int64_t n) { return first(n) | __mmask32(first(n - LANES)) << LANES; }

// The scores of one query with up to KEYS keys, `rows` of which exist. q: padded with zeros to a multiple of PAIRS.
inline void scores(const bf16* q, const bf16* k, int64_t k_row, int64_t rows, int64_t dim, float* s) {
    for (int64_t key = 0; key < KEYS; key += LANES) {
        __m512i sums[LANES];
        for (int i = 0; i < LANES; ++i) {
            const int64_t there = key + i < rows ? dim : 0;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; d < there; d += PAIRS) {
                const __m512i part = _mm512_maskz_loadu_epi16(first_pairs(there - d), k + (key + i) * k_row + d);
                sum = dot(sum, _mm512_castsi512_ps(part), _mm512_load_ps(q + d));
            }
            sums[i] = _mm512_castps_si512(sum);
        }
        transpose(sums);  // so that the lanes of a key's sum stand in a column
        __m512 total = _mm512_setzero_ps();
        for (int i = 0; i < LANES; ++i) total = _mm512_add_ps(total, _mm512_castsi512_ps(sums[i]));
        _mm512_store_ps(s + key, total);
    }
}

// P = 2^(scale S - top) in place, and its sum.
inline float powers(float* s, float scale, float top) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < KEYS; j += LANES) {
        const __m512 p = exp2(_mm512_fmadd_ps(_mm512_load_ps(s + j), _mm512_set1_ps(scale), _mm512_set1_ps(-top)));
        sum = _mm512_add_ps(sum, p);
        _mm512_store_ps(s + j, p);
    }
    return _mm512_reduce_add_ps(sum);
}

// O += P V for one row of P over `rows` keys. A register of 32 bf16 values is widened by halves, those of even columns and
// those of odd ones; the sums are kept that way meanwhile.
inline void accumulate(const float* p, const bf16* v, int64_t v_row, int64_t rows, int64_t dim, float* o) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512i upper = _mm512_set1_epi32(0xffff0000);
    for (int64_t c = 0; c < dim; c += 2 * PAIRS) {
        __m512 even[2], odd[2];
        __mmask32 mask[2];
        for (int t = 0; t < 2; ++t) {
            const int64_t at = c + PAIRS * t;
            mask[t] = first_pairs(dim - at);
            const __m512 left = _mm512_maskz_loadu_ps(mask[t], o + at);
            const __m512 right = _mm512_maskz_loadu_ps(mask[t] >> LANES, o + at + LANES);
            even[t] = _mm512_permutex2var_ps(left, evens, right);
            odd[t] = _mm512_permutex2var_ps(left, odds, right);
        }
        for (int64_t j = 0; j < rows; ++j) {
            const __m512 weight = _mm512_set1_ps(p[j]);
            for (int t = 0; t < 2; ++t) {
                const __m512i both = _mm512_maskz_loadu_epi16(mask[t], v + j * v_row + c + PAIRS * t);
                even[t] = _mm512_fmadd_ps(weight, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), even[t]);
                odd[t] = _mm512_fmadd_ps(weight, _mm512_castsi512_ps(_mm512_and_si512(both, upper)), odd[t]);
            }
        }
        for (int t = 0; t < 2; ++t) {
            const int64_t at = c + PAIRS * t;
            _mm512_mask_storeu_ps(o + at, mask[t], _mm512_permutex2var_ps(even[t], low, odd[t]));
            _mm512_mask_storeu_ps(o + at + LANES, mask[t] >> LANES, _mm512_permutex2var_ps(even[t], high, odd[t]));
        }
    }
}

// Asks for rows of a tensor that are needed soon; the hardware's own prefetcher loses the thread from K to V and back.
inline void fetch(const bf16* x, int64_t row, int64_t rows, int64_t dim) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t d = 0; d < dim; d += PAIRS) _mm_prefetch(x + i * row + d, _MM_HINT_T0);
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

// Keys [start, end) of one key/value head, for the queries of its group. q: rows of `width` values.
void attend(const Problem& p, Parts& parts, const bf16* q, int64_t width, int64_t head, int64_t split, int64_t start,
            int64_t end) {
    const int64_t batch = head / p.kv_heads, kv_head = head % p.kv_heads;
    const float scale = p.scale * float(M_LOG2E);
    alignas(64) float s[KEYS];
    for (int64_t key = start; key < end; key += KEYS) {
        const int64_t rows = std::min<int64_t>(KEYS, end - key);
        const bf16* k = p.key.at<bf16>(batch, kv_head, key);
        const bf16* v = p.value.at<bf16>(batch, kv_head, key);
        fetch(v, p.value.row, rows, p.value_dim);
        fetch(k + KEYS * p.key.row, p.key.row, std::clamp<int64_t>(end - key - KEYS, 0, KEYS), p.head_dim);
        for (int64_t row = 0; row < parts.rows(); ++row) {
            const int64_t seen = std::min(rows, row % p.seq + p.high + 1 - key);
            if (seen <= 0) continue;
            Part& part = parts.at(head, row, split);
            scores(q + row * width, k, p.key.row, rows, p.head_dim, s);
            hide(s, KEYS, 0, seen);
            raise(maximum(s, KEYS) * scale, part.top, part.sum, part.out, p.columns());
            part.sum += powers(s, scale, part.top);
            accumulate(s, v, p.value.row, seen, p.value_dim, part.out);
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
    finish(whole.out, p.value_dim, whole.sum, p.out.at<bf16>(head / p.kv_heads, query_head, row % p.seq));
}

void decode(const Problem& p) {
    const int64_t heads = p.batch * p.kv_heads, group = p.heads / p.kv_heads;
    const int64_t width = round_up(p.head_dim, PAIRS), rows = group * p.seq;
    // Some parts for each thread, so that none waits long for the last; but not of less than a few blocks.
    const int64_t wanted = std::max<int64_t>(1, 4 * p.threads / heads);
    const int64_t keys = round_up(std::max<int64_t>((p.kv_seq + wanted - 1) / wanted, 4 * KEYS), KEYS);
    const int64_t splits = (p.kv_seq + keys - 1) / keys;
    Parts parts(p, splits);
    Buffer<bf16> queries(heads * rows * width);
    std::fill(queries + 0, queries + heads * rows * width, bf16(0));
    for (int64_t head = 0; head < heads; ++head)
        for (int64_t row = 0; row < rows; ++row)
            std::memcpy(queries + (head * rows + row) * width,
                        p.query.at<bf16>(head / p.kv_heads, head % p.kv_heads * group + row / p.seq, row % p.seq),
                        p.head_dim * sizeof(bf16));
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < heads * splits; ++task) {
            const int64_t head = task / splits, start = task % splits * keys;
            attend(p, parts, queries + head * rows * width, width, head, task % splits, start,
                   std::min(start + keys, p.kv_seq));
        }
#pragma omp for
        for (int64_t task = 0; task < heads * rows; ++task) merge(p, parts, task / rows, task % rows);
    }
}

}  // namespace attnbench

// `high` of the problem is the causal mask's: row i sees the keys up to i + high. Strips and ranges are not read.
extern "C" int decode(const attnbench::Problem* problem) {
    try {
        attnbench::decode(*problem);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
