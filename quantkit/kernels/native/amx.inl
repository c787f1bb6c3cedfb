// Rows of bfloat16 in tiles of AMX. One instruction multiplies a tile of x by a tile of a panel, 64 bytes of each row.
//
// Two panels are taken together, columns in chunks. While a chunk meets all rows of x, two tiles of them at a time (a
// block), the codes of the next chunk are decoded, and the sums of blocks before are scaled: tiles are multiplied by a
// unit of their own, which so seldom waits. A chunk has pieces: columns that share scales. Each piece's products are
// summed by themselves and then scaled: weights are never rounded with their scales. Short pieces go in pairs, whose
// sums meet the totals together.
//
// Tiles lie in pairs, step by step (64 bytes of columns each), as they are multiplied: two of x by two of weights.
//
// What multiplies (PairTiles, ByteTiles) has:
//     PLANES, ROWS, COLS   of a tile of x: rows of each plane
//     PIECE_COLS           columns that a piece has at most
//     STEP_BYTES           from a step's weights to the next one's
//     FETCHES              whether x is prefetched: not where codes that are multiplied as they lie compete with it
//     multiply<R, P, FIRST>(x, weights, next panel, sums): tiles 0 to 3 += R tiles of x times P of weights
//     add_whole<COUNT>(pipeline, sums, index), add(pipeline, sums, piece, r, n): scale a tile of sums, of all pieces or
//                          of one, and add it to the totals
//     facts_of(layout, rows, piece, tile): where the facts of a tile's rows begin, for one piece
//     pack(product, first row, rows, tile): a tile of x, all its columns
// What goes ahead (Decoder, Loader) has:
//     Codes                an engine of product.inl, which knows the codes
//     start(product, first panel, panels together, chunk, buffer), run(count): makes `count` of a chunk's `units` ready

constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 1024, TILE_SUMS = TILE_BYTES / sizeof(float);
constexpr int64_t CHUNK_STEPS = 4;
constexpr int64_t CHUNK_BYTES = CHUNK_STEPS * TILE_BYTES;  // of a panel
constexpr int64_t CHUNK_PANELS = 2;  // the first-level cache holds two chunks, decoded, and two tiles of x
constexpr int64_t MOST_PANELS = 16;  // that meet x together: the more, the less often x is read
constexpr int64_t PASS_ROWS = 512;   // of x that share a pass over the weights
constexpr int64_t FAR = 2 << 20;     // bytes of x that the second-level cache does not hold
constexpr int64_t X_AHEAD = 512;     // columns of x, as it lies, that are prefetched before they are packed
constexpr int64_t Y_AHEAD = 4;       // rows of y that are prefetched before they are stored
constexpr int64_t FEW_ROWS = 32, FEW_PANELS = 2;  // few rows: to read codes in few streams matters more,
constexpr int64_t FEW_TURN = 32;                  // and many panels one after another

// All eight tiles: four of sums (0 to 3), two of x (4, 5), two of weights (6, 7).
struct TileConfig {
    alignas(64) uint8_t bytes[64] = {};
    explicit TileConfig(int64_t rows) {
        bytes[0] = 1;  // the palette
        for (int tile = 0; tile < 8; ++tile) {
            bytes[16 + 2 * tile] = 64;  // bytes of a row
            bytes[48 + tile] = static_cast<uint8_t>(tile < 6 ? rows : TILE_ROWS);
        }
    }
};

// x in tiles, and what belongs to its rows.
struct Rows {
    int64_t count, tiles, tile_rows;  // rows in all, and in a tile
    int64_t pair_bytes;               // from two tiles to the next two
    uint8_t* data;                    // (tiles / 2, steps, 2) tiles
    bool far;                         // beyond the second-level cache
    float* facts;                     // of rows: see `pack`

    QUANTKIT_INLINE uint8_t* at(int64_t step, int64_t tile) const {
        return data + tile / 2 * pair_bytes + (2 * step + tile % 2) * TILE_BYTES;
    }
    QUANTKIT_INLINE int64_t rows_of(int64_t tile) const {
        const int64_t left = count - tile * tile_rows;
        return left < tile_rows ? left : tile_rows;
    }
};

struct Piece {
    int64_t group, window, start, columns;
    int64_t step, steps;  // of x
    vf scales[CHUNK_PANELS], zeros[CHUNK_PANELS];
};

// Some columns of one or two panels.
struct Chunk {
    int count, steps;       // pieces, and steps of all
    int64_t codes_at;       // in a panel
    int64_t panel, panels;  // the first, of those that meet x together
    const uint8_t* weights;
    int64_t next_panel;  // from a tile to the other panel's
    int64_t paired;      // steps of each piece, where pieces go in pairs; else 0
    Piece pieces[CHUNK_STEPS];
};

// The sums of a block over a piece, or over two, each apart: of R tiles of x by P panels.
struct Sums {
    int tiles = 0, panels = 0;  // of the block; none
    bool whole = false;         // two by two full tiles, and no zero points
    int pieces = 1;
    const Piece* piece;  // the first
    int64_t tile;
    const float* facts[2];  // of its first row, by piece
    float* products[2];     // by piece: (2, 2, 16, 16), once they are stored
    float* held;            // the last piece's, until when tiles hold them
    float* totals;          // (2, 2, 16, 16)
};

// Sums on their way from tiles to the totals. Those of a piece are stored when the next one begins, and scaled and
// added while the one after it is multiplied: the later, the less is waited for. Those of a pair are added while the
// next is multiplied. (More of them on their way would put x out of the first-level cache, which costs a quarter of the
// speed.)
struct Pipeline {
    const Product* p;
    const Rows* x;
    int64_t panels;     // that meet x together
    float* totals;      // (tiles / 2, panels / 2, 2, 2, 16, 16)
    float* products;    // three of Sums::products: of pieces in turn, and of those that are second
    int64_t due, rate;  // of what goes ahead: 256ths of a unit, and how many each step adds
    const uint8_t* x_ahead;  // what is prefetched next, and how many bytes of it with each step
    int64_t fetches;
    int turn = 0;
    Sums ring[4];  // what is multiplied, what tiles hold, and what is stored

    QUANTKIT_INLINE float* totals_of(int64_t tile, int64_t panel) const {
        return totals + ((tile / 2 * ((panels + 1) / 2) + panel / 2) * 4 + tile % 2 * 2 + panel % 2) * TILE_SUMS;
    }
    QUANTKIT_INLINE Sums& before(int turns) { return ring[(turn - turns) & 3]; }
    void store(const Sums& held) const {
        float* to = held.held;
        if (held.tiles > 0) _tile_stored(0, to, 64);
        if (held.tiles > 0 && held.panels > 1) _tile_stored(1, to + TILE_SUMS, 64);
        if (held.tiles > 1) _tile_stored(2, to + 2 * TILE_SUMS, 64);
        if (held.tiles > 1 && held.panels > 1) _tile_stored(3, to + 3 * TILE_SUMS, 64);
    }
    template <class T>
    void add(const Sums& sums) const {
        for (int piece = 0; piece < sums.pieces; ++piece)
            for (int r = 0; r < sums.tiles; ++r)
                for (int n = 0; n < sums.panels; ++n) T::add(*this, sums, piece, r, n);
    }
    // Whether two tiles of x, from one on, are full, and there are no zero points.
    template <class T>
    QUANTKIT_INLINE bool whole(int64_t tile) const {
        return !p->layout->zeros && x->rows_of(tile + 1) == T::ROWS;
    }
    // The next turn: R tiles of x by P panels over COUNT pieces. What tiles hold is stored where that turn would not.
    template <class T, int R, int P, int COUNT>
    QUANTKIT_INLINE const Sums& begin(const Chunk& chunk, const Piece* piece, int64_t tile, bool all) {
        Sums& now = before(0);  // (never copied: fields are read as they were written)
        const Sums& held = before(1);
        now.tiles = R, now.panels = P, now.whole = all, now.pieces = COUNT, now.piece = piece, now.tile = tile;
        now.products[0] = products + turn % 2 * 4 * TILE_SUMS, now.products[1] = products + 8 * TILE_SUMS;
        now.held = now.products[COUNT - 1], now.totals = totals_of(tile, chunk.panel);
        unroll<COUNT>(EACH(index) { now.facts[index] = T::facts_of(*p->layout, *x, piece[index], tile); });
        ++turn;
        if (held.tiles != R || held.panels != P) store(held);
        return now;
    }
    static void forget(Sums& added) { added.tiles = 0, added.whole = false; }
    template <class T>
    void finish() {
        store(before(1));
        add<T>(before(2));
        add<T>(before(1));
        forget(before(1)), forget(before(2));
    }
    template <class A>
    QUANTKIT_INLINE void go_on(A& ahead) {
        due += rate;
        ahead.run(due >> 8);
        due &= 255;
    }
    QUANTKIT_INLINE void fetch() {
        if (fetches == 0) return;
        for (int64_t line = 0; line < fetches; line += 64) __builtin_prefetch(x_ahead + line, 0, 2);
        x_ahead += fetches;
    }
};

// FIRST: what tiles of sums hold is stored, and they begin at zero.
#define BEGIN_TILE(TILE)                                   \
    if constexpr (FIRST) {                                 \
        _tile_stored(TILE, sums + (TILE) * TILE_SUMS, 64); \
        _tile_zero(TILE);                                  \
    }
#define MULTIPLY_TILES(DOT)                       \
    _tile_loadd(4, x, 64);                        \
    _tile_loadd(6, weights, 64);                  \
    BEGIN_TILE(0)                                 \
    DOT(0, 4, 6);                                 \
    if constexpr (P > 1) {                        \
        _tile_loadd(7, weights + next_panel, 64); \
        BEGIN_TILE(1)                             \
        DOT(1, 4, 7);                             \
    }                                             \
    if constexpr (R > 1) {                        \
        _tile_loadd(5, x + TILE_BYTES, 64);       \
        BEGIN_TILE(2)                             \
        DOT(2, 5, 6);                             \
    }                                             \
    if constexpr (R > 1 && P > 1) {               \
        BEGIN_TILE(3)                             \
        DOT(3, 5, 7);                             \
    }

// 16 rows of bfloat16 by 32 columns. Facts: sums of a row's windows (count, windows), with zero points only.
struct PairTiles {
    static constexpr int64_t PLANES = 1, ROWS = 16, COLS = 32;
    static constexpr int64_t PIECE_COLS = CHUNK_STEPS * COLS, STEP_BYTES = 2 * TILE_BYTES;
    static constexpr bool FETCHES = true;

    template <int R, int P, bool FIRST>
    static QUANTKIT_INLINE void multiply(const uint8_t* x, const uint8_t* weights, [[maybe_unused]] int64_t next_panel,
                                         [[maybe_unused]] float* sums) {
        MULTIPLY_TILES(_tile_dpbf16ps)
    }

    template <int COUNT>
    static QUANTKIT_INLINE void add_whole(const Pipeline&, const Sums& sums, int index) {
        vf scales[COUNT];
        const float* products[COUNT];
        unroll<COUNT>(EACH(piece) {
            scales[piece] = sums.piece[piece].scales[index % 2];
            products[piece] = sums.products[piece] + index * TILE_SUMS;
        });
        float* to = sums.totals + index * TILE_SUMS;
        unroll<TILE_ROWS>(EACH(row) {
            constexpr int64_t AT = decltype(row)::value * PANEL;
            vf total = load(to + AT);
            unroll<COUNT>(EACH(piece) { total = fused(total, load(products[piece] + AT), scales[piece]); });
            std::memcpy(to + AT, &total, sizeof total);
        });
    }
    static void add(const Pipeline& pipe, const Sums& sums, int which, int r, int n) {
        const Piece& piece = sums.piece[which];
        const vf scales = piece.scales[n], zeros = piece.zeros[n];
        const float* products = sums.products[which] + (2 * r + n) * TILE_SUMS;
        float* to = sums.totals + (2 * r + n) * TILE_SUMS;
        const Layout& l = *pipe.p->layout;
        const float* of_windows = sums.facts[which] + r * ROWS * l.windows;
        const int64_t rows = pipe.x->rows_of(sums.tile + r);
        for (int64_t row = 0; row < rows; ++row, products += PANEL, to += PANEL) {
            vf total = load(to);
            if (l.zeros) total = fused(total, zeros * scales, splat(-of_windows[row * l.windows]));
            total = fused(total, load(products), scales);
            std::memcpy(to, &total, sizeof total);
        }
    }

    static const float* facts_of(const Layout& l, const Rows& x, const Piece& piece, int64_t tile) {
        return x.facts + tile * ROWS * l.windows + piece.window;
    }

    // As they lie in x; zeros beyond its rows and a window's end.
    static void pack(const Product& p, int64_t first, const Rows& x, int64_t tile) {
        const Layout& l = *p.layout;
        const int64_t rows = x.rows_of(tile), row = first + tile * x.tile_rows;
        const auto* from = static_cast<const uint16_t*>(p.x) + row * l.cols;
        for (int64_t window = 0, step = 0; window < l.windows; ++window) {
            const int64_t begin = window * l.window, stop = begin + l.window < l.cols ? begin + l.window : l.cols;
            for (int64_t column = begin; column < stop; column += COLS, ++step) {
                uint8_t* to = x.at(step, tile);
                const auto inside = static_cast<__mmask32>(stop - column < COLS ? (1u << (stop - column)) - 1 : ~0u);
                const uint16_t* here = from + column;
                for (int64_t index = 0; index < rows; ++index, here += l.cols) {
                    __builtin_prefetch(here + X_AHEAD, 0, 2);
                    _mm512_store_si512(to + index * 64, _mm512_maskz_loadu_epi16(inside, here));
                }
                std::memset(to + rows * 64, 0, (x.tile_rows - rows) * 64);
            }
        }
        if (l.zeros) window_sums(p, row, rows, x.facts + tile * TILE_ROWS * l.windows);
    }
};

// 8 rows of integers by 64 columns of codes that are bytes in offset binary, multiplied as they lie. The integers of a
// row's piece have a common scale, absmax / 32,512, and two planes of bytes, 256 * high + low: a tile has rows of high
// bytes, then of low ones. Facts (pieces, 2, count): what the offset takes off the sum, an integer, and the scale.
struct ByteTiles {
    static constexpr int64_t PLANES = 2, ROWS = 8, COLS = 64;
    static constexpr int64_t PIECE_COLS = 4 * COLS, STEP_BYTES = TILE_BYTES;
    static constexpr bool FETCHES = false;
    static constexpr float LIMIT = 32512;
    static constexpr int OFFSET = 128;

    static bool takes(const Layout& l) { return l.cols % COLS == 0 && l.window % COLS == 0; }

    template <int R, int P, bool FIRST>
    static QUANTKIT_INLINE void multiply(const uint8_t* x, const uint8_t* weights, [[maybe_unused]] int64_t next_panel,
                                         [[maybe_unused]] float* sums) {
        MULTIPLY_TILES(_tile_dpbsud)
    }

    // A total and the sums of its row: of high bytes, and `low_at` behind of low ones. Its facts are `count` apart.
    // What an integer holds in between may wrap around, the end does not: 256 columns of at most 128 by 32,512.
    static QUANTKIT_INLINE vf added(vf total, const float* products, int64_t low_at, const float* facts, int64_t count,
                                    vf scales) {
        const __m512i high = _mm512_load_si512(products), low = _mm512_load_si512(products + low_at);
        const __m512i offset = _mm512_set1_epi32(__builtin_bit_cast(int, facts[0]));
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high, 8), _mm512_add_epi32(low, offset));
        return fused(total, _mm512_cvtepi32_ps(sum) * splat(facts[count]), scales);
    }
    template <int COUNT>
    static QUANTKIT_INLINE void add_whole(const Pipeline& pipe, const Sums& sums, int index) {
        vf scales[COUNT];
        const float *products[COUNT], *facts[COUNT];
        unroll<COUNT>(EACH(piece) {
            scales[piece] = sums.piece[piece].scales[index % 2];
            products[piece] = sums.products[piece] + index * TILE_SUMS;
            facts[piece] = sums.facts[piece] + index / 2 * ROWS;
        });
        float* to = sums.totals + index * TILE_SUMS;
        const int64_t count = pipe.x->count;
        unroll<ROWS>(EACH(row) {
            constexpr int64_t AT = decltype(row)::value * PANEL;
            vf total = load(to + AT);
            unroll<COUNT>(EACH(piece) {
                total = added(total, products[piece] + AT, ROWS * PANEL, facts[piece] + row, count, scales[piece]);
            });
            std::memcpy(to + AT, &total, sizeof total);
        });
    }
    static void add(const Pipeline& pipe, const Sums& sums, int which, int r, int n) {
        const float* products = sums.products[which] + (2 * r + n) * TILE_SUMS;
        float* to = sums.totals + (2 * r + n) * TILE_SUMS;
        const int64_t rows = pipe.x->rows_of(sums.tile + r), tile_rows = pipe.x->tile_rows;
        const float* facts = sums.facts[which] + r * tile_rows;
        for (int64_t row = 0; row < rows; ++row, products += PANEL, to += PANEL) {
            const vf total = added(load(to), products, tile_rows * PANEL, facts + row, pipe.x->count,
                                   sums.piece[which].scales[n]);
            std::memcpy(to, &total, sizeof total);
        }
    }
    static const float* facts_of(const Layout& l, const Rows& x, const Piece& piece, int64_t tile) {
        const int64_t pieces = (l.width(0) + PIECE_COLS - 1) / PIECE_COLS;
        return x.facts + (piece.window * pieces + piece.start / PIECE_COLS) * 2 * x.count + tile * x.tile_rows;
    }

    static void pack(const Product& p, int64_t first, const Rows& x, int64_t tile) {
        const Layout& l = *p.layout;
        const int64_t rows = x.rows_of(tile);
        const auto* from = static_cast<const uint16_t*>(p.x) + (first + tile * x.tile_rows) * l.cols;
        float* facts = x.facts + tile * x.tile_rows;
        for (int64_t column = 0, left = 0; column < l.cols; facts += 2 * x.count) {
            if (left == 0) left = l.width(column / l.window);
            const int64_t count = left < PIECE_COLS ? left : PIECE_COLS;
            for (int64_t row = 0; row < rows; ++row)
                pack_row(from + row * l.cols + column, count, x, tile, row, column / COLS, facts + row);
            column += count, left -= count;
        }
    }
    static QUANTKIT_INLINE void pack_row(const uint16_t* from, int64_t count, const Rows& x, int64_t tile, int64_t row,
                                         int64_t step, float* facts) {
        alignas(64) int16_t values[PIECE_COLS];
        const float scale = to_integers(from, count, count, LIMIT, values);
        __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;  // a lane sums at most 8 bytes
        for (int64_t at = 0; at < count; at += 32) {
            const __m512i value = _mm512_load_si512(values + at);
            const __m512i high = _mm512_srai_epi16(_mm512_add_epi16(value, _mm512_set1_epi16(128)), 8);
            const __m512i low = _mm512_sub_epi16(value, _mm512_slli_epi16(high, 8));
            high_sum = _mm512_add_epi16(high_sum, high), low_sum = _mm512_add_epi16(low_sum, low);
            uint8_t* to = x.at(step + at / COLS, tile) + row * 64 + at % COLS;
            _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(high));
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + x.tile_rows * 64), _mm512_cvtepi16_epi8(low));
        }
        const __m512i both = _mm512_add_epi32(_mm512_madd_epi16(high_sum, _mm512_set1_epi16(256)),
                                              _mm512_madd_epi16(low_sum, _mm512_set1_epi16(1)));
        facts[0] = __builtin_bit_cast(float, -OFFSET * _mm512_reduce_add_epi32(both));
        facts[x.count] = scale;
    }
};

template <class T>
QUANTKIT_INLINE int64_t steps_of(int64_t width) {
    return (width + T::COLS - 1) / T::COLS;
}

// Walks through the columns of a panel.
struct Cursor {
    int64_t group = 0, start = 0, codes_at = 0;

    // The pieces of the next chunk, as many as fit.
    template <class T, class E>
    void next(const Layout& l, Chunk& chunk) {
        chunk.count = chunk.steps = 0;
        chunk.codes_at = codes_at;
        while (group < l.groups) {
            const int64_t window = group >> l.repeat_bits, left = l.width(window) - start;
            const int64_t columns = left < T::PIECE_COLS ? left : T::PIECE_COLS, steps = steps_of<T>(columns);
            if (chunk.steps + steps > CHUNK_STEPS) break;
            Piece& piece = chunk.pieces[chunk.count++];
            piece.group = group, piece.window = window, piece.start = start, piece.columns = columns;
            piece.step = window * steps_of<T>(l.window) + start / T::COLS, piece.steps = steps;
            chunk.steps += static_cast<int>(steps);
            codes_at += columns / BLOCK * E::BYTES, start += columns;
            if (start == l.width(window)) ++group, start = 0;
        }
        const int64_t step = chunk.pieces[0].step, each = chunk.pieces[0].steps;
        chunk.paired = chunk.count % 2 == 0 && each <= 2 ? each : 0;
        for (int index = 1; index < chunk.count; ++index)  // neighbours, all of as many steps
            if (chunk.pieces[index].steps != each || chunk.pieces[index].step != step + index * each) chunk.paired = 0;
    }
};

// Decodes a chunk, tile by tile; loads scales and zero points.
template <class E>
struct Decoder {
    using Codes = E;
    int64_t units;  // tiles that are left

    void start(const Product& product, int64_t first_panel, int64_t together, Chunk& to, uint8_t* buffer) {
        p_ = &product, chunk_ = &to, first_ = first_panel + to.panel, buffer_ = buffer;
        to.weights = buffer, to.next_panel = TILE_BYTES;
        units = to.steps * to.panels;
        panel_ = -1, piece_ = to.count - 1, left_ = 0;
        const Layout& l = *product.layout;
        int64_t bytes = 0;
        for (int piece = 0; piece < to.count; ++piece) bytes += to.pieces[piece].columns / BLOCK * E::BYTES;
        ahead_ = ahead(l, to.codes_at, together, AHEAD / together > bytes ? AHEAD / together : bytes);
    }
    QUANTKIT_INLINE void run(int64_t count) {
        for (; count > 0 && units > 0; --count, --units) {
            if (left_ == 0) begin();
            auto* to = reinterpret_cast<typename E::W*>(out_);
            if (left_ >= TILE_BLOCKS) {
                unroll<TILE_BLOCKS>(EACH(block) { decode(to + block * E::UNITS); });
                left_ -= TILE_BLOCKS;
            } else {
                std::memset(static_cast<void*>(to), 0, TILE_BYTES);
                for (; left_ > 0; --left_, to += E::UNITS) decode(to);
            }
            out_ += 2 * TILE_BYTES;
        }
    }

private:
    static constexpr int64_t TILE_BLOCKS = TILE_BYTES / 64 / E::UNITS;

    QUANTKIT_INLINE void decode(typename E::W* to) {
        typename E::W decoded[E::UNITS][PARTS];
        unroll<E::BYTES / 64>(EACH(line) { prefetch_once(codes_ + ahead_ + 64 * line); });
        E::decode(codes_, decoded);
        unroll<E::UNITS>(EACH(unit) { to[unit] = decoded[unit][0]; });
        codes_ += E::BYTES;
    }
    __attribute__((noinline)) void begin() {
        const Layout& l = *p_->layout;
        if (++piece_ == chunk_->count) piece_ = 0, ++panel_;
        const uint8_t* bytes = p_->weight + (first_ + panel_) * l.panel_bytes;
        if (piece_ == 0) {
            codes_ = bytes + chunk_->codes_at;
            out_ = buffer_ + panel_ * TILE_BYTES;
        }
        Piece& piece = chunk_->pieces[piece_];
        const int64_t index = chunk_->panel + panel_;
        if (piece.start == 0) readers_[index].next(*p_, bytes, piece.group, scales_ + index);
        piece.scales[panel_] = scales_[index];
        __builtin_prefetch(bytes + l.scales_at + (piece.group + 2) * PANEL * l.scale_bytes);
        if (l.zeros && piece.start == 0) load_zeros(l, bytes, piece.group, piece.zeros + panel_);
        else piece.zeros[panel_] = vf{};
        left_ = piece.columns / BLOCK;
    }

    const Product* p_;
    Chunk* chunk_;
    int64_t first_, ahead_;         // the first panel; from codes to what is prefetched
    int64_t panel_, piece_, left_;  // where it is, blocks left of the piece
    const uint8_t* codes_;
    uint8_t *buffer_, *out_;
    Scales<E> readers_[MOST_PANELS];
    vf scales_[MOST_PANELS];  // of the group
};

// Codes that are multiplied as they lie: loads scales, panel by panel, and prefetches the chunk after.
template <class E>
struct Loader {
    using Codes = E;
    int64_t units;  // panels that are left

    void start(const Product& product, int64_t first_panel, int64_t together, Chunk& to, uint8_t*) {
        const Layout& l = *product.layout;
        p_ = &product, chunk_ = &to, panel_ = 0, units = to.panels, bytes_ = to.steps * TILE_BYTES;
        to.weights = product.weight + (first_panel + to.panel) * l.panel_bytes + to.codes_at;
        to.next_panel = l.panel_bytes;
        ahead_ = ahead(l, to.codes_at, together, bytes_);
    }
    void run(int64_t count) {
        for (; count > 0 && units > 0; --count, --units, ++panel_) {
            const uint8_t* codes = chunk_->weights + panel_ * chunk_->next_panel;
            for (int piece = 0; piece < chunk_->count; ++piece)
                load_scales<E>(*p_, codes - chunk_->codes_at, chunk_->pieces[piece].group,
                               chunk_->pieces[piece].scales + panel_);
            for (int64_t line = 0; line < bytes_; line += 64) prefetch_once(codes + ahead_ + line);
        }
    }

private:
    const Product* p_;
    Chunk* chunk_;
    int64_t panel_, bytes_, ahead_;
};

// R tiles of x by P panels over COUNT pieces of STEPS steps, or one of `steps` where that is 0. What tiles hold goes to
// `held`, the first of two pieces' sums to `first`. What goes ahead goes on meanwhile. ADD: so does adding sums of
// before, over as many pieces, two by two whole tiles.
template <class T, class A, int R, int P, int COUNT, int STEPS, bool ADD>
QUANTKIT_INLINE void multiply_pieces(const uint8_t* x, const uint8_t* weights, int64_t next_panel, float* held,
                                     float* first, int64_t steps, Pipeline& pipe, const Sums& before, A& ahead) {
    const auto multiply = [&](auto begins, int64_t step, float* out) __attribute__((always_inline)) {
        T::template multiply<R, P, decltype(begins)::value>(x + step * 2 * TILE_BYTES, weights + step * T::STEP_BYTES,
                                                           next_panel, out);
    };
    const auto add = [&](auto tile) __attribute__((always_inline)) {
        if constexpr (ADD) T::template add_whole<COUNT>(pipe, before, tile);
    };
    const auto go_on = [&]() __attribute__((always_inline)) {
        pipe.go_on(ahead);
        if constexpr (T::FETCHES) pipe.fetch();
    };
    multiply(std::true_type{}, 0, held);
    if constexpr (STEPS == 0) {
        go_on();
        for (int64_t step = 1; step < steps; ++step) multiply(std::false_type{}, step, held), go_on();
    } else {
        unroll<COUNT * STEPS>(EACH(step) {
            constexpr int STEP = decltype(step)::value, OF_PIECE = STEP % STEPS;
            if constexpr (STEP > 0) multiply(std::bool_constant<OF_PIECE == 0>{}, STEP, first);
            if constexpr (COUNT == 1) unroll<4 / STEPS>(EACH(tile) { add(STEP * 4 / STEPS + tile); });
            else if constexpr (OF_PIECE == STEPS - 1) add(STEP / STEPS * 2), add(STEP / STEPS * 2 + 1);
            go_on();
        });
    }
}

// R tiles of x by P panels over all of a chunk, piece by piece.
template <class T, class A, int R, int P>
void multiply_block(const Chunk& chunk, const Rows& x, int64_t tile, Pipeline& pipe, A& ahead) {
    const uint8_t* weights = chunk.weights;
    const bool whole = R == 2 && P == 2 && pipe.template whole<T>(tile);
    for (const Piece* piece = chunk.pieces; piece != chunk.pieces + chunk.count; ++piece) {
        const Sums &held = pipe.before(1), &before = pipe.before(2);
        const Sums& now = pipe.template begin<T, R, P, 1>(chunk, piece, tile, whole);
        const auto run = [&](auto steps, auto add) __attribute__((always_inline)) {
            constexpr bool ADD = decltype(add)::value;
            multiply_pieces<T, A, R, P, 1, decltype(steps)::value, ADD>(x.at(piece->step, tile), weights,
                                                                        chunk.next_panel, held.held, now.products[0],
                                                                        piece->steps, pipe, before, ahead);
            if constexpr (!ADD) pipe.add<T>(before);
        };
        const auto by_steps = [&](auto add) __attribute__((always_inline)) {
            switch (piece->steps) {
                case 1: return run(std::integral_constant<int, 1>{}, add);
                case 2: return run(std::integral_constant<int, 2>{}, add);
                case 4: return run(std::integral_constant<int, 4>{}, add);
                default: return run(std::integral_constant<int, 0>{}, std::false_type{});
            }
        };
        if (R == 2 && P == 2 && before.whole && before.pieces == 1) by_steps(std::bool_constant<R == 2 && P == 2>{});
        else by_steps(std::false_type{});
        weights += piece->steps * T::STEP_BYTES;
    }
}

// Two whole tiles of x by two panels over all of a chunk, two pieces of STEPS steps at a time.
template <class T, class A, int STEPS>
void multiply_pairs(const Chunk& chunk, const Rows& x, int64_t tile, Pipeline& pipe, A& ahead) {
    const uint8_t* weights = chunk.weights;
    for (const Piece* piece = chunk.pieces; piece != chunk.pieces + chunk.count; piece += 2) {
        Sums &held = pipe.before(1), &older = pipe.before(2);
        pipe.add<T>(older), Pipeline::forget(older);
        const Sums& now = pipe.template begin<T, 2, 2, 2>(chunk, piece, tile, true);
        const auto run = [&](auto add) __attribute__((always_inline)) {
            multiply_pieces<T, A, 2, 2, 2, STEPS, decltype(add)::value>(x.at(piece->step, tile), weights,
                                                                       chunk.next_panel, held.held, now.products[0],
                                                                       STEPS, pipe, held, ahead);
        };
        if (held.whole && held.pieces == 2) run(std::true_type{});
        else run(std::false_type{}), pipe.add<T>(held);
        Pipeline::forget(held);
        weights += 2 * STEPS * T::STEP_BYTES;
    }
}

// All rows by a chunk.
template <class T, class A>
void multiply_chunk(const Chunk& chunk, const Rows& x, Pipeline& pipe, A& ahead) {
    using Block = void (*)(const Chunk&, const Rows&, int64_t, Pipeline&, A&);
    static constexpr Block BLOCKS[2][2] = {{multiply_block<T, A, 1, 1>, multiply_block<T, A, 1, 2>},
                                           {multiply_block<T, A, 2, 1>, multiply_block<T, A, 2, 2>}};
    const int64_t steps = (x.tiles + 1) / 2 * chunk.steps;
    pipe.due = 0, pipe.rate = (256 * ahead.units + steps - 1) / steps;
    // Each pair of panels prefetches a share of what the next chunk reads of x, a few lines at a time: many at once
    // would fill the buffers that misses of the first-level cache wait in.
    const int64_t shares = (pipe.panels + 1) / 2, share = chunk.panel / CHUNK_PANELS * chunk.steps;
    pipe.fetches = x.far ? (2 * TILE_BYTES / 64 + shares - 1) / shares * 64 : 0;
    const Block pairs = chunk.paired == 1 ? multiply_pairs<T, A, 1> : multiply_pairs<T, A, 2>;
    for (int64_t tile = 0; tile < x.tiles; tile += 2) {
        pipe.x_ahead = x.at(chunk.pieces[0].step + chunk.steps, tile) + share * pipe.fetches;
        const bool two = tile + 1 < x.tiles, panels = chunk.panels > 1;
        const bool paired = chunk.paired && x.tiles > 2 && two && panels && pipe.template whole<T>(tile);
        (paired ? pairs : BLOCKS[two][panels])(chunk, x, tile, pipe, ahead);
    }
    ahead.run(ahead.units);
    __asm__ volatile("" ::: "memory");  // loads of tiles are not known to read what was decoded
}

// 16 values rounded as to_bf16 does.
QUANTKIT_INLINE __m256i rounded_bf16(vf values) {
    const __m512i bits = _mm512_castps_si512(values), upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(_mm512_srli_epi32(sum, 16), nan, upper, _mm512_set1_epi32(0x40)));
}

inline void store_totals(const Product& p, int64_t first, const Rows& x, int64_t first_row, const Pipeline& pipe) {
    const int64_t cols = p.layout->rows, left = cols / PANEL - first, full = left < pipe.panels ? left : pipe.panels;
    auto* to = static_cast<uint16_t*>(p.y) + first_row * cols + first * PANEL;
    for (int64_t row = 0; row < x.count; ++row, to += cols) {
        const int64_t tile = row / x.tile_rows, at = row % x.tile_rows * PANEL;
        for (int64_t panel = 0; panel < full; ++panel) {
            __builtin_prefetch(to + Y_AHEAD * cols + panel * PANEL, 1);
            vf values = load(pipe.totals_of(tile, panel) + at);
            if (p.bias != nullptr) values += load(p.bias + (first + panel) * PANEL);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + panel * PANEL), rounded_bf16(values));
        }
        if (full < pipe.panels) store(p, first + full, first_row + row, pipe.totals_of(tile, full) + at);
    }
}

// Panels `first` to `stop`, `most` at a time, by all rows of x.
template <class T, class A>
void multiply_panels(const Product& p, int64_t first, int64_t stop, int64_t most, const Rows& x, int64_t first_row) {
    const Layout& l = *p.layout;
    auto* buffers = static_cast<uint8_t*>(scratch<1>(2 * CHUNK_PANELS * CHUNK_BYTES));
    Chunk chunks[4];  // what is made ready, what is multiplied, and two before, whose sums wait
    A ahead;
    Pipeline pipe;
    pipe.p = &p, pipe.x = &x;
    pipe.totals = static_cast<float*>(scratch<2>((x.tiles + 1) * (most + 1) * TILE_BYTES));
    pipe.products = static_cast<float*>(scratch<13>(12 * TILE_BYTES));
    pipe.before(1).held = pipe.products + 4 * TILE_SUMS;
    Cursor cursor;  // where the next chunk is
    int64_t panel = first, pair = 0;
    int turn = 0;
    const auto begin = [&] {
        if (panel >= stop) return;
        const int64_t together = stop - panel < most ? stop - panel : most;
        Chunk& chunk = chunks[turn % 4];
        Cursor after = cursor;
        after.next<T, typename A::Codes>(l, chunk);
        chunk.panel = pair, chunk.panels = together - pair < CHUNK_PANELS ? together - pair : CHUNK_PANELS;
        ahead.start(p, panel, together, chunk, buffers + turn % 2 * CHUNK_PANELS * CHUNK_BYTES);
        ++turn, pair += CHUNK_PANELS;
        if (pair >= together) pair = 0, cursor = after;
        if (pair == 0 && cursor.group == l.groups) cursor = Cursor{}, panel += most;
    };
    begin();
    ahead.run(ahead.units);
    __asm__ volatile("" ::: "memory");
    for (int64_t now = first; now < stop; now += most) {
        pipe.panels = stop - now < most ? stop - now : most;
        std::memset(pipe.totals, 0, (x.tiles + 1) / 2 * ((pipe.panels + 1) / 2) * 4 * TILE_BYTES);
        for (bool last = false; !last;) {
            const Chunk& chunk = chunks[(turn - 1) % 4];
            last = panel > now;
            begin();
            multiply_chunk<T>(chunk, x, pipe, ahead);
        }
        pipe.finish<T>();
        store_totals(p, now, x, first_row, pipe);
    }
}

// Any number of rows.
template <class T, class A>
void tile_rows(const Product& p) {
    const Layout& l = *p.layout;
    const int64_t steps = (l.windows - 1) * steps_of<T>(l.window) + steps_of<T>(l.width(l.windows - 1));
    const int64_t most = p.m <= FEW_ROWS ? FEW_PANELS : MOST_PANELS;
    const int64_t fair = (l.panels + 4 * p.threads - 1) / (4 * p.threads) * 2;  // so that every thread has two turns
    const int64_t panels = fair < most ? fair : most;
    for (int64_t first = 0; first < p.m; first += PASS_ROWS) {
        Rows x;
        x.count = p.m - first < PASS_ROWS ? p.m - first : PASS_ROWS;
        x.tile_rows = x.count < T::ROWS ? x.count : T::ROWS;
        x.tiles = (x.count + T::ROWS - 1) / T::ROWS;
        x.pair_bytes = 2 * (steps + CHUNK_STEPS) * TILE_BYTES;  // with a gap: pairs fall into other sets of a cache
        x.data = static_cast<uint8_t*>(scratch<5>((x.tiles + 1) / 2 * x.pair_bytes));
        x.far = x.tiles * x.pair_bytes / 2 > FAR;
        x.facts = static_cast<float*>(scratch<6>(x.count * (l.windows + steps) * 2 * sizeof(float)));
        const TileConfig config(T::PLANES * x.tile_rows);
#pragma omp parallel num_threads(p.threads)
        {
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < x.tiles; ++tile) T::pack(p, first, x, tile);
            __asm__ volatile("" ::: "memory");  // nor is this known to read all 64 bytes
            _tile_loadconfig(config.bytes);
            const int64_t turn = p.m <= FEW_ROWS ? FEW_TURN : panels;
#pragma omp for schedule(dynamic)
            for (int64_t panel = 0; panel < l.panels; panel += turn)
                multiply_panels<T, A>(p, panel, l.panels - panel < turn ? l.panels : panel + turn, panels, x, first);
            _tile_release();
        }
    }
}
