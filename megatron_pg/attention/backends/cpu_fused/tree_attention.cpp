// Attention of every query over its own path in the tree, forward and backward, on one CPU.
//
// A tile is a few queries of one segment. Its ranges are the keys that it sees: the segments of
// its ancestors in full, and its own segment up to the diagonal; under a window only what follows
// a second diagonal, which may run through several of them. One online softmax runs over all of
// them, so nothing is merged afterwards. A key or value is read where it lies by every tile that
// sees it; only the products with transposed keys or values read copies, in panels.
//
// interface.py and layout.py check what is given, __init__.py brings it into order; tiles.py makes
// the tables.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using Index = std::int64_t;

constexpr Index VECTOR_BYTES = 64;
// 6 x 4 sums, 4 operands and a factor fit the 32 registers of AVX-512.
constexpr int PRODUCT_ROWS = 6, PRODUCT_VECTORS = 4;
// Weights and their gradients of 132 x 256 pairs, and 256 keys and values, stay in 1 MiB of L2:
// at three shapes on Zen 4 as fast as 512 keys within 5 %, and 2 to 16 % faster than 66 or 198
// rows or 128 keys.
constexpr Index TILE_ROWS = 132, BLOCK_KEYS = 256;

// As many as have some 20 us of work each: a thread that waits for its turn delays all others.
int num_threads(Index multiplications) {
    return int(std::clamp<Index>(multiplications >> 20, 1, at::get_num_threads()));
}

// Rows of the int64 tables. Trees ascend.
struct Tile {
    Index q_start, q_len, first_range, end_range, tree;
};
// q_offset: place of the tile's first query in its own segment; -1 where all keys are visible.
// first_key: that the tile's first query sees under a window, the next query one later; below 0
// where that key stands before the range.
struct Range {
    Index source, kv_start, len, panel_start, panel_len, q_offset, first_key;
};
struct PanelSpan {
    Index source, kv_start, len, panel_start;
};

// What all tiles share. A head of values and outputs has value_dim numbers, one of queries and keys
// head_dim.
template <class T>
struct Shape {
    Index num_heads, grouping, head_dim, value_dim, tokens;
    T scale, softcap;  // softcap 0: scores are not bounded
    Shape(const at::Tensor& q, const at::Tensor& v, const at::Tensor& lse, double scale,
          double softcap)
        : num_heads(q.size(1)),
          grouping(q.size(1) / v.size(1)),
          head_dim(q.size(2)),
          value_dim(v.size(2)),
          tokens(lse.size(1)),
          scale(T(scale)),
          softcap(T(softcap)) {}
};

// [tokens, heads, head_dim], the last dim contiguous.
template <class T>
struct Rows {
    T* data;
    Index row, head;
    explicit Rows(const at::Tensor& x)
        : data(x.data_ptr<std::remove_const_t<T>>()), row(x.stride(0)), head(x.stride(1)) {
        TORCH_CHECK(x.stride(2) == 1, "head_dim must be contiguous");
    }
    T* at(Index r, Index h) const { return data + r * row + h * head; }
};

template <class Row>
struct Table {
    const Row* rows;
    Index size;
    explicit Table(const at::Tensor& x)
        : rows(reinterpret_cast<const Row*>(x.data_ptr<Index>())), size(x.size(0)) {
        TORCH_CHECK(x.is_contiguous() && x.size(1) * sizeof(Index) == sizeof(Row));
    }
    const Row& operator[](Index i) const { return rows[i]; }
};

struct Plan {
    Table<Tile> tiles;
    Table<Range> ranges;
    Table<PanelSpan> panel_spans;
    Index num_pairs = 0;  // computed, not only visible
    Index max_rows = 0;   // of a tile
    explicit Plan(const std::vector<at::Tensor>& tables)
        : tiles(tables.at(0)), ranges(tables.at(1)), panel_spans(tables.at(2)) {
        for (Index i = 0; i < tiles.size; ++i) {
            TORCH_CHECK(tiles[i].q_len <= TILE_ROWS, "a tile holds up to ", TILE_ROWS, " rows");
            max_rows = std::max(max_rows, tiles[i].q_len);
            for (Index r = tiles[i].first_range; r < tiles[i].end_range; ++r)
                num_pairs += tiles[i].q_len * ranges[r].len;
        }
    }
};

// Keys and values of the row itself (source 0), or of a resident prefix row.
template <class T>
struct Source {
    Rows<const T> k, v;
    at::Tensor k_panels, v_panels;
    Source(const at::Tensor& k, const at::Tensor& v) : k(k), v(v) {}
    static const T* panels(const at::Tensor& panels, Index kv_head) {
        return panels.const_data_ptr<T>() + kv_head * panels.stride(0);
    }
};

template <class T>
struct Simd {
    static constexpr Index lanes = VECTOR_BYTES / sizeof(T);
    static constexpr Index panel = PRODUCT_VECTORS * lanes;
    static constexpr Index pitch = BLOCK_KEYS + lanes;  // no power of 2: rows in other cache sets
    typedef T V __attribute__((vector_size(VECTOR_BYTES)));
    typedef T Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T))));
    typedef std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t> Int
        __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr bool is_float = sizeof(T) == 4;

    static V load(const T* x) { return *reinterpret_cast<const Unaligned*>(x); }
    static void store(T* x, V v) { *reinterpret_cast<Unaligned*>(x) = v; }
    static V all(T x) { return x - V{}; }

    // 2 ** x for x up to the largest exponent.
    static V exp2(V x) {
        // 2 ** lowest is 0, the weight of -inf. NaN stays: the second operand wins.
        x = larger(all(is_float ? -160 : -1100), x);
        const V whole = nearest(x);
        return scaled(expm1_near_0((x - whole) * LN2) + T(1), whole);
    }

    // tanh and its slope, 1 - tanh ** 2: accurate near 0 and 1, where differences would cancel.
    struct Tanh {
        V value, slope;
    };
    static Tanh tanh(V x) {
        // 1 from limit on. NaN stays: the second operand wins.
        const V limit = all(is_float ? 10 : 20);
        const V twice = -2 * larger(-limit, -larger(-x, x));
        const V whole = nearest(twice * T(1.44269504088896340736));
        // LN2 in two steps, so that what is left of large numbers is exact.
        constexpr T high = is_float ? 0.693145751953125 : 6.93147180369123816490e-01;
        constexpr T low = is_float ? 1.42860682030941723e-6 : 1.90821492927058770002e-10;
        const V power = scaled(all(1), whole);
        const V rest = expm1_near_0((twice - whole * high) - whole * low);
        const V expm1 = power * rest + (power - T(1)), sum = expm1 + T(2), size = expm1 / sum;
        return {x < 0 ? -size : size, 4 * (expm1 + T(1)) / (sum * sum)};
    }

    static constexpr T LN2 = T(0.693147180559945309417);

    // e ** x - 1 for x within half of LN2.
    static V expm1_near_0(V x) {
        constexpr int degree = is_float ? 7 : 13;
        V power = all(reciprocal_factorial(degree));
#pragma GCC unroll 16
        for (int n = degree - 1; n >= 1; --n) power = power * x + reciprocal_factorial(n);
        return power * x;
    }

    // The larger ones; b where either is NaN.
    static V larger(V a, V b) {
        if constexpr (is_float)
            return _mm512_max_ps(a, b);
        else
            return _mm512_max_pd(a, b);
    }

    static V nearest(V x) {
        if constexpr (is_float)
            return _mm512_roundscale_ps(x, 0);
        else
            return _mm512_roundscale_pd(x, 0);
    }

    // x * 2 ** exponent
    static V scaled(V x, V exponent) {
        if constexpr (is_float)
            return _mm512_scalef_ps(x, exponent);
        else
            return _mm512_scalef_pd(x, exponent);
    }

    static constexpr T reciprocal_factorial(int n) {
        double product = 1;
        for (int i = 2; i <= n; ++i) product *= i;
        return T(1 / product);
    }

    // Lanes begin to end of x, -inf in the others.
    static V only(Index begin, Index end, V x) {
        V lane;
        for (Index i = 0; i < lanes; ++i) lane[i] = T(i);
        x = lane < all(T(begin)) ? all(-std::numeric_limits<T>::infinity()) : x;
        return lane < all(T(end)) ? x : all(-std::numeric_limits<T>::infinity());
    }

    // In steps of 1, 2, 4, ... lanes: of every four blocks, the two off the diagonal change places.
    static void transpose(V (&rows)[lanes]) {
#pragma GCC unroll 4
        for (Index step = 1; step < lanes; step *= 2) {
            Int upper, lower;
            for (Index i = 0; i < lanes; ++i) {
                upper[i] = i & step ? lanes + i - step : i;
                lower[i] = i & step ? lanes + i : i + step;
            }
#pragma GCC unroll 16
            for (Index i = 0; i < lanes; ++i) {
                if (i & step) continue;
                const V a = rows[i], b = rows[i + step];
                rows[i] = __builtin_shuffle(a, b, upper);
                rows[i + step] = __builtin_shuffle(a, b, lower);
            }
        }
    }

    static T sum(V v) {
        if constexpr (is_float)
            return _mm512_reduce_add_ps(v);
        else
            return _mm512_reduce_add_pd(v);
    }

    static T max(V v) {
        if constexpr (is_float)
            return _mm512_reduce_max_ps(v);
        else
            return _mm512_reduce_max_pd(v);
    }
};

// c[rows, columns] (+)= a[rows, depth] b[depth, columns]; a is read by single elements, so it may
// be transposed; rows of b and c are contiguous.
template <class T>
struct Product {
    Index depth;
    const T* a;
    Index a_row, a_depth;
    const T* b;
    Index b_depth;
    T* c;
    Index c_row;
    bool add;
};

template <class T, int ROWS, int VECTORS>
void multiply_block(const Product<T>& p, Index column) {
    using S = Simd<T>;
    const T* __restrict a = p.a;
    const T* __restrict b = p.b + column;
    typename S::V sums[ROWS][VECTORS] = {};
    for (Index n = 0; n < p.depth; ++n, a += p.a_depth, b += p.b_depth) {
        typename S::V operands[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) operands[j] = S::load(b + j * S::lanes);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) {
            const typename S::V factor = S::all(a[i * p.a_row]);
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) sums[i][j] += factor * operands[j];
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) {
            T* place = p.c + column + i * p.c_row + j * S::lanes;
            S::store(place, p.add ? sums[i][j] + S::load(place) : sums[i][j]);
        }
}

template <class T, int ROWS>
void multiply_rows(Index vectors, const Product<T>& p) {
    constexpr Index lanes = Simd<T>::lanes;
    Index done = 0;
    for (; done + PRODUCT_VECTORS <= vectors; done += PRODUCT_VECTORS)
        multiply_block<T, ROWS, PRODUCT_VECTORS>(p, done * lanes);
    switch (vectors - done) {
        case 3: return multiply_block<T, ROWS, 3>(p, done * lanes);
        case 2: return multiply_block<T, ROWS, 2>(p, done * lanes);
        case 1: return multiply_block<T, ROWS, 1>(p, done * lanes);
    }
}

// The product of 1 to PRODUCT_ROWS rows and any number of vectors.
template <class T>
void multiply(Index rows, Index vectors, const Product<T>& p) {
    switch (rows) {
        case 6: return multiply_rows<T, 6>(vectors, p);
        case 5: return multiply_rows<T, 5>(vectors, p);
        case 4: return multiply_rows<T, 4>(vectors, p);
        case 3: return multiply_rows<T, 3>(vectors, p);
        case 2: return multiply_rows<T, 2>(vectors, p);
        case 1: return multiply_rows<T, 1>(vectors, p);
    }
}

// Rows in as few products as possible, even: one of 2 rows takes as long as one of 4.
template <class Visit>
void for_products(Index num_rows, Visit visit) {
    const Index count = (num_rows + PRODUCT_ROWS - 1) / PRODUCT_ROWS;
    for (Index i = 0; i < count; ++i) {
        const Index first = i * num_rows / count;
        visit(first, (i + 1) * num_rows / count - first);
    }
}

Index round_up(Index n, Index step) { return (n + step - 1) / step * step; }
Index round_down(Index n, Index step) { return n / step * step; }

// One block of keys of a range, as a tile sees it.
struct Block {
    Index kv_start, panel_start, panel_len, keys, rows;
    Index num_hidden;  // row r sees none after the first r + 1 - num_hidden keys
    bool is_causal;
    Index window_start;  // row r sees keys from r + window_start on
    // A row sees the keys from begin(row) to end(row); none where the end is not above.
    Index begin(Index row) const { return std::clamp<Index>(row + window_start, 0, keys); }
    Index end(Index row) const {
        return is_causal ? std::clamp<Index>(row + 1 - num_hidden, 0, keys) : keys;
    }
    // The rows that see a key.
    Index first_row(Index key) const {
        return is_causal ? std::clamp<Index>(key + num_hidden, 0, rows) : 0;
    }
    Index end_row(Index key) const { return std::clamp<Index>(key + 1 - window_start, 0, rows); }
};

template <class Visit>
void for_blocks(const Tile& tile, const Range& range, Visit visit) {
    for (Index begin = 0; begin < range.len; begin += BLOCK_KEYS)
        visit(Block{range.kv_start + begin, range.panel_start + begin, range.panel_len - begin,
                    std::min(BLOCK_KEYS, range.len - begin), tile.q_len, begin - range.q_offset,
                    range.q_offset >= 0, range.first_key - begin});
}

// scores[rows, keys] = a[rows, depth] panels, where visible, in whole vectors.
template <class T>
void multiply_panels(const Block& block, Index depth, const T* a, Index a_row, const T* panels,
                     T* scores) {
    using S = Simd<T>;
    for (Index key = 0; key < block.keys; key += S::panel) {
        const T* panel = panels + (block.panel_start + key) * depth;
        const Index width = std::min(S::panel, round_up(block.panel_len - key, S::lanes));
        for_products(block.rows, [&](Index row, Index rows) {
            const Index end = std::min(block.end(row + rows - 1) - key, S::panel);
            const Index begin = round_down(std::max<Index>(block.begin(row) - key, 0), S::lanes);
            if (end <= begin) return;
            multiply<T>(rows, round_up(end - begin, S::lanes) / S::lanes,
                        {depth, a + row * a_row, a_row, 1, panel + begin, width,
                         scores + row * S::pitch + key + begin, S::pitch, false});
        });
    }
}

// Room for every thread; memory of tensors is aligned to vectors.
template <class T>
struct Scratch {
    at::Tensor memory;
    Scratch(Index threads, Index count, const at::Tensor& like)
        : memory(at::empty({threads, round_up(count, Simd<T>::lanes)}, like.options())) {}
    T* mine() const { return memory.data_ptr<T>() + omp_get_thread_num() * memory.stride(0); }
};

// Transposed copies: for every key head and span, [head_dim, S::panel] blocks side by side; the
// last is as wide as the keys left, in whole vectors.
template <class T>
at::Tensor make_panels(const Rows<const T>& rows, Index source, const at::Tensor& like,
                       const Plan& plan) {
    using S = Simd<T>;
    const Index num_heads = like.size(1), head_dim = like.size(2);
    std::vector<PanelSpan> spans;
    Index panel_rows = 0;
    for (Index i = 0; i < plan.panel_spans.size; ++i)
        if (plan.panel_spans[i].source == source) {
            spans.push_back(plan.panel_spans[i]);
            panel_rows = spans.back().panel_start + round_up(spans.back().len, S::lanes);
        }
    at::Tensor panels = at::empty({num_heads, panel_rows, head_dim}, like.options());
    T* const data = panels.data_ptr<T>();
    const Index num_items = num_heads * Index(spans.size());
    // Moving a number takes as long as some 16 multiplications.
    const int threads = num_threads(16 * panels.numel());
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (Index item = 0; item < num_items; ++item) {
        const PanelSpan& span = spans[item % spans.size()];
        const Index head = item / spans.size();
        T* place = data + (head * panel_rows + span.panel_start) * head_dim;
        for (Index begin = 0; begin < span.len; begin += S::panel, place += S::panel * head_dim) {
            const Index keys = std::min(S::panel, span.len - begin);
            const Index width = round_up(keys, S::lanes);
            for (Index key = 0; key < width; key += S::lanes)
                for (Index d = 0; d < head_dim; d += S::lanes) {
                    typename S::V square[S::lanes];
                    const T* corner = rows.at(span.kv_start + begin + key, head) + d;
#pragma GCC unroll 16
                    for (Index i = 0; i < S::lanes; ++i)
                        square[i] = key + i < keys ? S::load(corner + i * rows.row) : S::all(0);
                    S::transpose(square);
#pragma GCC unroll 16
                    for (Index i = 0; i < S::lanes; ++i)
                        S::store(place + (d + i) * width + key, square[i]);
                }
        }
    }
    return panels;
}

constexpr double LOG2E = 1.44269504088896340736;

template <class T>
struct Forward : Shape<T> {
    using Shape<T>::num_heads, Shape<T>::head_dim, Shape<T>::value_dim, Shape<T>::grouping;
    using Shape<T>::tokens, Shape<T>::scale, Shape<T>::softcap;
    const Plan& plan;
    const std::vector<Source<T>>& sources;
    Rows<const T> q;
    Rows<T> out;
    T* lse;  // [num_heads, tokens], natural

    void tile(const Tile& tile, Index head, T* scores) const;
    void block(const Block& block, const Source<T>& source, Index kv_head, T* tile_out, T* scores,
               T* top, T* total, bool is_first) const;
    void run(const at::Tensor& like) const;
};

template <class T>
void Forward<T>::tile(const Tile& tile, Index head, T* scores) const {
    using S = Simd<T>;
    T top[TILE_ROWS], total[TILE_ROWS];
    std::fill_n(top, tile.q_len, -std::numeric_limits<T>::infinity());
    std::fill_n(total, tile.q_len, T(0));
    const T* tile_q = q.at(tile.q_start, head);
    T* tile_out = out.at(tile.q_start, head);
    bool is_first = true;
    for (Index i = tile.first_range; i < tile.end_range; ++i) {
        const Source<T>& source = sources[plan.ranges[i].source];
        const T* panels = source.panels(source.k_panels, head / grouping);
        for_blocks(tile, plan.ranges[i], [&](const Block& b) {
            multiply_panels(b, head_dim, tile_q, q.row, panels, scores);
            block(b, source, head / grouping, tile_out, scores, top, total, is_first);
            is_first = false;
        });
    }
    for (Index row = 0; row < tile.q_len; ++row) {
        T* place = tile_out + row * out.row;
        const T factor = T(1) / total[row];
        for (Index d = 0; d < value_dim; d += S::lanes)
            S::store(place + d, S::load(place + d) * factor);
        lse[head * tokens + tile.q_start + row] = (top[row] + std::log2(total[row])) / T(LOG2E);
    }
}

// One step of the online softmax: scores become weights, top and total the running maximum and
// sum of every row, tile_out the running sum of weighted values. Rows of a product meet the values
// that only the last of them sees with weight 0: one that is not finite makes them NaN.
template <class T>
void Forward<T>::block(const Block& block, const Source<T>& source, Index kv_head, T* tile_out,
                       T* scores, T* top, T* total, bool is_first) const {
    using S = Simd<T>;
    using V = typename S::V;
    for_products(block.rows, [&](Index first, Index rows) {
        const Index seen_begin = block.begin(first);
        const Index seen_end = std::max(seen_begin, block.end(first + rows - 1));
        if (seen_begin == seen_end && !is_first) return;
        for (Index row = first; row < first + rows; ++row) {
            T* line = scores + row * S::pitch;
            const Index own_begin = block.begin(row), own_end = block.end(row);
            if (own_begin >= own_end) {
                std::fill(line + seen_begin, line + seen_end, T(0));
                continue;
            }
            const Index begin = round_down(own_begin, S::lanes), end = round_up(own_end, S::lanes);
            std::fill(line + seen_begin, line + std::max(seen_begin, begin), T(0));
            std::fill(line + end, line + std::max(end, seen_end), T(0));
            V most = S::all(top[row]);
            for (Index i = begin; i < end; i += S::lanes) {
                V x = S::load(line + i) * (scale * T(LOG2E));
                if (softcap > 0) x = softcap * T(LOG2E) * S::tanh(x / (softcap * T(LOG2E))).value;
                if (i < own_begin || i + S::lanes > own_end)
                    x = S::only(own_begin - i, own_end - i, x);
                S::store(line + i, x);
                most = x > most ? x : most;
            }
            const T new_top = S::max(most);
            V sums{};
            for (Index i = begin; i < end; i += S::lanes) {
                const V weight = S::exp2(S::load(line + i) - new_top);
                S::store(line + i, weight);
                sums += weight;
            }
            if (!is_first && new_top > top[row]) {
                const T factor = std::exp2(top[row] - new_top);
                T* place = tile_out + row * out.row;
                for (Index d = 0; d < value_dim; d += S::lanes)
                    S::store(place + d, S::load(place + d) * factor);
                total[row] *= factor;
            }
            total[row] += S::sum(sums);
            top[row] = new_top;
        }
        multiply<T>(
            rows, value_dim / S::lanes,
            {seen_end - seen_begin, scores + first * S::pitch + seen_begin, S::pitch, 1,
             source.v.at(block.kv_start + seen_begin, kv_head), source.v.row,
             tile_out + first * out.row, out.row, !is_first});
    });
}

template <class T>
void Forward<T>::run(const at::Tensor& like) const {
    const Index num_items = num_heads * plan.tiles.size;
    const int threads = num_threads(plan.num_pairs * num_heads * (head_dim + value_dim));
    const Scratch<T> scores(threads, plan.max_rows * Simd<T>::pitch, like);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (Index item = 0; item < num_items; ++item)
        tile(plan.tiles[item % plan.tiles.size], item / plan.tiles.size, scores.mine());
}

template <class T>
struct Backward : Shape<T> {
    using Shape<T>::num_heads, Shape<T>::head_dim, Shape<T>::value_dim, Shape<T>::grouping;
    using Shape<T>::tokens, Shape<T>::scale, Shape<T>::softcap;
    const Plan& plan;
    const std::vector<Source<T>>& sources;
    Rows<const T> q, dout, out;
    const T* lse;
    Rows<T> dq;
    std::vector<Rows<T>> dk, dv;  // of every source

    void tile(const Tile& tile, Index head, T* weights, T* dscores) const;
    void run(const at::Tensor& like) const;
};

template <class T>
void Backward<T>::tile(const Tile& tile, Index head, T* weights, T* dscores) const {
    using S = Simd<T>;
    using V = typename S::V;
    const Index kv_head = head / grouping;
    const Index vectors = head_dim / S::lanes, value_vectors = value_dim / S::lanes;
    const T *tile_q = q.at(tile.q_start, head), *tile_dout = dout.at(tile.q_start, head);
    T* tile_dq = dq.at(tile.q_start, head);
    T tile_lse[TILE_ROWS], delta[TILE_ROWS];  // lse base 2; sum of dout * out
    for (Index row = 0; row < tile.q_len; ++row) {
        V sums{};
        const T* place = out.at(tile.q_start + row, head);
        for (Index d = 0; d < value_dim; d += S::lanes)
            sums += S::load(place + d) * S::load(tile_dout + row * dout.row + d);
        delta[row] = S::sum(sums);
        tile_lse[row] = lse[head * tokens + tile.q_start + row] * T(LOG2E);
    }
    bool is_first = true;
    for (Index r = tile.first_range; r < tile.end_range; ++r) {
        const Range& range = plan.ranges[r];
        const Source<T>& source = sources[range.source];
        const Rows<T>&source_dk = dk[range.source], &source_dv = dv[range.source];
        const T *k_panels = source.panels(source.k_panels, kv_head),
                *v_panels = source.panels(source.v_panels, kv_head);
        for_blocks(tile, range, [&](const Block& block) {
            multiply_panels(block, head_dim, tile_q, q.row, k_panels, weights);
            multiply_panels(block, value_dim, tile_dout, dout.row, v_panels, dscores);
            for_products(tile.q_len, [&](Index first, Index rows) {
                const Index seen_begin = block.begin(first);
                const Index seen_end = std::max(seen_begin, block.end(first + rows - 1));
                // A product of keys reads up to PRODUCT_ROWS - 1 beyond those that a row sees.
                const Index low = std::max<Index>(seen_begin - PRODUCT_ROWS, 0);
                const Index high = std::min(round_up(seen_end + PRODUCT_ROWS, S::lanes), S::pitch);
                for (Index row = first; row < first + rows; ++row) {
                    T *p = weights + row * S::pitch, *ds = dscores + row * S::pitch;
                    const Index own_begin = block.begin(row);
                    const Index own_end = std::max(own_begin, block.end(row));
                    for (Index i = round_down(own_begin, S::lanes); i < own_end; i += S::lanes) {
                        V x = S::load(p + i) * (scale * T(LOG2E)), slope = S::all(scale);
                        if (softcap > 0) {
                            const auto bounded = S::tanh(x / (softcap * T(LOG2E)));
                            x = softcap * T(LOG2E) * bounded.value;
                            slope *= bounded.slope;
                        }
                        const V weight = S::exp2(x - tile_lse[row]);
                        S::store(p + i, weight);
                        S::store(ds + i, weight * (S::load(ds + i) - delta[row]) * slope);
                    }
                    for (T* line : {p, ds}) {
                        std::fill(line + low, line + own_begin, T(0));
                        std::fill(line + own_end, line + high, T(0));
                    }
                }
                if (seen_begin < seen_end || is_first)
                    multiply<T>(rows, vectors,
                                {seen_end - seen_begin, dscores + first * S::pitch + seen_begin,
                                 S::pitch, 1, source.k.at(block.kv_start + seen_begin, kv_head),
                                 source.k.row, tile_dq + first * dq.row, dq.row, !is_first});
            });
            for_products(block.keys, [&](Index key, Index keys) {
                const Index row = block.first_row(key);
                const Index depth = block.end_row(key + keys - 1) - row;
                if (depth <= 0) return;
                const Index place = row * S::pitch + key, kv = block.kv_start + key;
                multiply<T>(keys, value_vectors,
                            {depth, weights + place, 1, S::pitch, tile_dout + row * dout.row,
                             dout.row, source_dv.at(kv, kv_head), source_dv.row, true});
                multiply<T>(keys, vectors,
                            {depth, dscores + place, 1, S::pitch, tile_q + row * q.row, q.row,
                             source_dk.at(kv, kv_head), source_dk.row, true});
            });
            is_first = false;
        });
    }
}

// An item is a key head in a tree: the tiles of different ones write to different rows.
template <class T>
void Backward<T>::run(const at::Tensor& like) const {
    std::vector<Index> tree_starts{0};
    for (Index i = 1; i < plan.tiles.size; ++i)
        if (plan.tiles[i].tree != plan.tiles[i - 1].tree) tree_starts.push_back(i);
    tree_starts.push_back(plan.tiles.size);
    const Index num_trees = tree_starts.size() - 1, num_items = num_heads / grouping * num_trees;
    const int threads = num_threads(plan.num_pairs * num_heads * (3 * head_dim + 2 * value_dim));
    const Index size = plan.max_rows * Simd<T>::pitch;
    const Scratch<T> weights(threads, size, like), dscores(threads, size, like);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (Index item = 0; item < num_items; ++item) {
        const Index kv_head = item / num_trees, tree = item % num_trees;
        for (Index head = kv_head * grouping; head < (kv_head + 1) * grouping; ++head)
            for (Index i = tree_starts[tree]; i < tree_starts[tree + 1]; ++i)
                tile(plan.tiles[i], head, weights.mine(), dscores.mine());
    }
}

template <class T>
std::vector<Source<T>> make_sources(at::TensorList k, at::TensorList v, const Plan& plan,
                                    bool with_value_panels) {
    std::vector<Source<T>> sources;
    for (std::size_t i = 0; i < k.size(); ++i) {
        Source<T>& source = sources.emplace_back(k[i], v[i]);
        source.k_panels = make_panels<T>(source.k, i, k[i], plan);
        if (with_value_panels) source.v_panels = make_panels<T>(source.v, i, v[i], plan);
    }
    return sources;
}

template <class T>
void forward(const at::Tensor& q, at::TensorList k, at::TensorList v, const Plan& plan,
             double scale, double softcap, at::Tensor& out, at::Tensor& lse) {
    const auto sources = make_sources<T>(k, v, plan, false);
    Forward<T>{{q, v[0], lse, scale, softcap}, plan,         sources,
               Rows<const T>(q),               Rows<T>(out), lse.data_ptr<T>()}
        .run(q);
}

template <class T>
void backward(const at::Tensor& dout, const at::Tensor& q, at::TensorList k, at::TensorList v,
              const at::Tensor& out, const at::Tensor& lse, const Plan& plan, double scale,
              double softcap, at::Tensor& dq, at::TensorList dk, at::TensorList dv) {
    const auto sources = make_sources<T>(k, v, plan, true);
    std::vector<Rows<T>> dk_rows(dk.begin(), dk.end()), dv_rows(dv.begin(), dv.end());
    Backward<T>{{q, v[0], lse, scale, softcap},
                plan,
                sources,
                Rows<const T>(q),
                Rows<const T>(dout),
                Rows<const T>(out),
                lse.data_ptr<T>(),
                Rows<T>(dq),
                dk_rows,
                dv_rows}
        .run(q);
}

void tree_forward(const at::Tensor& q, at::TensorList k, at::TensorList v,
                  const std::vector<at::Tensor>& plan, double scale, double softcap,
                  at::Tensor& out, at::Tensor& lse) {
    const auto run = q.scalar_type() == at::kFloat ? forward<float> : forward<double>;
    run(q, k, v, Plan(plan), scale, softcap, out, lse);
}

void tree_backward(const at::Tensor& dout, const at::Tensor& q, at::TensorList k, at::TensorList v,
                   const at::Tensor& out, const at::Tensor& lse,
                   const std::vector<at::Tensor>& plan, double scale, double softcap,
                   at::Tensor& dq, at::TensorList dk, at::TensorList dv) {
    const auto run = q.scalar_type() == at::kFloat ? backward<float> : backward<double>;
    run(dout, q, k, v, out, lse, Plan(plan), scale, softcap, dq, dk, dv);
}

}  // namespace

TORCH_LIBRARY(megatron_pg_cpu, library) {
    library.def(
        "tree_forward(Tensor q, Tensor[] k, Tensor[] v, Tensor[] plan, float scale, "
        "float softcap, Tensor(a!) out, Tensor(b!) lse) -> ()",
        &tree_forward);
    library.def(
        "tree_backward(Tensor dout, Tensor q, Tensor[] k, Tensor[] v, Tensor out, Tensor lse, "
        "Tensor[] plan, float scale, float softcap, Tensor(a!) dq, Tensor(b!)[] dk, "
        "Tensor(c!)[] dv) -> ()",
        &tree_backward);
}
