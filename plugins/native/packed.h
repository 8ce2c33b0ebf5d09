// A cache of narrow values with scales, laid out for what reads it: four bytes a lane, so that scores come out a key a
// lane, and sums a column a lane, and no register has to be added up.
//
// K: [16 keys][four dims][key][4 bytes], dims padded to 8. V: [four keys][column][4 bytes], columns padded to 32. Of four
// bytes the even ones are the first two dims, or keys, and the odd ones the others: each two are widened to 16 bits by
// a shift. A scale for each key, or for each group of its dims: [16 keys][group][key], in bf16. Beyond the last key scales
// are 0, and bytes whatever they are.
#pragma once

#include "decode.h"

namespace attnbench {

constexpr int TILE = 16;  // keys that lie together, a multiple of LANES; mirrored in quantized_cache.py

// Mirrored in attention.py: of key and value, in elements; a row is that of 16 keys.
struct Scales {
    Tensor key, value;
};

// Where things lie. A row of the problem's key is that of 16 keys, and of its value that of four.
class PackedCache {
  public:
    static constexpr int BLOCK = 128;

    // One key/value head, and the first of its queries.
    class Head {
      public:
        Head(const Problem& p, const Scales& scales, int64_t i, int64_t rows)
            : query(i * rows), key_(at<char>(p, p.key, i)), value_(at<char>(p, p.value, i)),
              key_scale_(at<bf16>(p, scales.key, i)), value_scale_(at<bf16>(p, scales.value, i)) {}

        const char* keys(int64_t key) const { return key_.data + key / TILE * key_.row + key % TILE * 4; }
        const char* values(int64_t key) const { return value_.data + key / 4 * value_.row; }
        int64_t value_row() const { return value_.row; }
        Ahead keys_ahead(int64_t key, int64_t rows) const { return ahead(keys(key), key_.row, rows, TILE); }
        Ahead values_ahead(int64_t key, int64_t rows) const { return ahead(values(key), value_.row, rows, 4); }
        Floats key_scales(int64_t key, int64_t group) const { return load(scale(key_scale_, key, group)); }
        // Of the LANES keys from `key` on that are among n.
        Floats value_scales(int64_t key, int64_t group, int64_t n) const {
            return n > 0 ? load_first(scale(value_scale_, key, group), n) : zero();
        }

        const int64_t query;

      private:
        static Ahead ahead(const char* from, int64_t row, int64_t rows, int64_t tile) {
            return {from, row, round_up(rows, tile) / tile, row};
        }
        template <class T>
        struct Tiles {
            const T* data;
            int64_t row;
        };
        template <class T>
        static Tiles<T> at(const Problem& p, const Tensor& x, int64_t i) {
            return {x.at<T>(i / p.kv_heads, i % p.kv_heads, 0), x.row};
        }
        static const bf16* scale(const Tiles<bf16>& x, int64_t key, int64_t group) {
            return x.data + key / TILE * x.row + group * TILE + key % TILE;
        }

        Tiles<char> key_, value_;
        Tiles<bf16> key_scale_, value_scale_;
    };

    PackedCache(const Problem& p, const Scales& scales) : p_(p), group_(p), scales_(scales) {}

    Head head(int64_t i) const { return {p_, scales_, i, group_.rows}; }
    Ahead keys_ahead(const Head& head, int64_t key, int64_t rows) const { return head.keys_ahead(key, rows); }
    Ahead values_ahead(const Head& head, int64_t key, int64_t rows) const { return head.values_ahead(key, rows); }
    int64_t columns() const { return round_up(p_.value_dim, 32); }
    int64_t place(int64_t column) const { return column; }

  protected:
    const Problem& p_;
    Group group_;
    const Scales& scales_;
};

// So many registers, of keys or of columns, are multiplied together, that their sums for TOGETHER rows fill half of all
// registers or more: there are as many then as products begin before the first one is done.
constexpr int PANEL_LINES = std::max(4 * PANEL / 64, 1);  // cache lines of them

// Registers of keys, from the j-th of a block on; where there is no further one, the last stands for it.
template <int N>
struct Several {
    Several(const PackedCache::Head& head, int64_t start, int64_t j, int64_t rows) {
        for (int t = 0; t < N; ++t) {
            key[t] = start + std::min<int64_t>(j + LANES * t, (rows - 1) / LANES * LANES);
            bytes[t] = head.keys(key[t]);
        }
    }

    int64_t key[N];
    const char* bytes[N];
};

}  // namespace attnbench
