// Many rows of bfloat16 in tiles of AMX, which multiply 16 rows by 16 rows over 32 columns at a time.
//
// x is laid out in tiles of 16 rows by 32 columns, every window padded to whole ones with zeros; codes are decoded to
// tiles of 32 columns by one panel, a chunk of columns at a time. Each group's products are summed by themselves and
// then scaled, as everywhere: weights are never rounded to bfloat16 with their scales.

constexpr int64_t TILE_ROWS = 16, TILE_COLS = 32, TILE_BYTES = 1024;
constexpr int64_t TILE_STEPS = 4;                         // tiles of a chunk
constexpr int64_t CHUNK_BYTES = TILE_STEPS * TILE_BYTES;  // of one panel
constexpr int MOST_PIECES = 4;                            // of columns whose sums are scaled and added together
constexpr int64_t ROWS = 256;                             // of x that share a pass over the weights
constexpr int64_t MOST_PANELS = 32;                       // that meet x together: the more, the less often x is read
constexpr int64_t NEAR_PANELS = 8;                        // of these, whose chunks the first-level cache holds
constexpr int64_t FEW_ROWS = 32, FEW_PANELS = 4;          // few rows: to read codes in few streams matters more

inline int64_t steps_of(int64_t width) { return (width + TILE_COLS - 1) / TILE_COLS; }

// All eight tiles: four of sums (0 to 3), two of x (4, 5), two of weights (6, 7).
struct TileConfig {
    alignas(64) uint8_t bytes[64] = {};
    constexpr TileConfig() {
        bytes[0] = 1;  // the palette
        for (int tile = 0; tile < 8; ++tile) {
            bytes[16 + 2 * tile] = 64;  // bytes of a row
            bytes[48 + tile] = TILE_ROWS;
        }
    }
};
constexpr TileConfig TILE_CONFIG;

// One tile of x: 16 rows from `row` on, 32 columns from `column` on, zeros beyond `rows` and `stop`.
inline void pack_tile(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t stop, uint16_t* out) {
    const auto* x = static_cast<const uint16_t*>(p.x) + row * p.layout->cols + column;
    const int64_t count = stop - column < TILE_COLS ? stop - column : TILE_COLS;
    if (rows < TILE_ROWS || count < TILE_COLS) std::memset(out, 0, TILE_BYTES);
    for (int64_t index = 0; index < TILE_ROWS && index < rows; ++index)
        std::memcpy(out + index * TILE_COLS, x + index * p.layout->cols, count * sizeof(uint16_t));
}

// R tiles of x by P panels of weights over `steps` tiles of columns; the sums go to out (R, P, 16, 16).
template <int R, int P>
inline void multiply_tiles(const uint8_t* x, int64_t x_step, const uint8_t* weights, int64_t steps, float* out) {
    _tile_zero(0);
    if constexpr (P > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && P > 1) _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step, x += x_step, weights += TILE_BYTES) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, weights, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (P > 1) _tile_loadd(7, weights + CHUNK_BYTES, 64);
        if constexpr (P > 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (R > 1) _tile_loadd(5, x + TILE_BYTES, 64);
        if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
        if constexpr (R > 1 && P > 1) _tile_dpbf16ps(3, 5, 7);
    }
    constexpr int SUMS = TILE_BYTES / sizeof(float);
    _tile_stored(0, out, 64);
    if constexpr (P > 1) _tile_stored(1, out + SUMS, 64);
    if constexpr (R > 1) _tile_stored(2, out + P * SUMS, 64);
    if constexpr (R > 1 && P > 1) _tile_stored(3, out + (P + 1) * SUMS, 64);
}

// Columns that share scales, or a chunk of them.
struct Piece {
    const uint8_t* x;
    const uint8_t* weights;
    int64_t steps;
    const float* sums;  // of x's rows, `windows` apart; with zero points only
    vf scales[MOST_PANELS], zeros[MOST_PANELS];
};

// R tiles of x by P panels, over C pieces: totals (R, panels, 16, 16) += each piece's sums, scaled.
template <int R, int P, int C, bool ZEROS>
void add_tiles(const Piece* pieces, int64_t tile, int64_t x_step, int64_t panel, int64_t rows, int64_t windows,
               float* totals, int64_t panels) {
    constexpr int SUMS = TILE_BYTES / sizeof(float);
    alignas(64) float products[C][R * P * SUMS];
    unroll<C>(EACH(piece) {
        const Piece& from = pieces[piece];
        multiply_tiles<R, P>(from.x + tile * TILE_BYTES, x_step, from.weights + panel * CHUNK_BYTES, from.steps,
                             products[piece]);
    });
    unroll<R>(EACH(r) {
        const int64_t first = (tile + r) * TILE_ROWS, stop = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
        unroll<P>(EACH(n) {
            float* to = totals + ((tile + r) * panels + panel + n) * SUMS;
            vf scales[C], zeros[C];
            unroll<C>(EACH(piece) {
                scales[piece] = pieces[piece].scales[panel + n];
                if constexpr (ZEROS) zeros[piece] = pieces[piece].zeros[panel + n];
            });
            for (int64_t row = 0; row < stop; ++row, to += PANEL) {
                vf total = load(to);
                unroll<C>(EACH(piece) {
                    vf product = load(products[piece] + (r * P + n) * SUMS + row * PANEL);
                    if constexpr (ZEROS) product -= zeros[piece] * pieces[piece].sums[(first + row) * windows];
                    total += product * scales[piece];
                });
                std::memcpy(to, &total, sizeof total);
            }
        });
    });
}

using Add = void (*)(const Piece*, int64_t, int64_t, int64_t, int64_t, int64_t, float*, int64_t);
template <int R, int P, bool ZEROS>
constexpr Add ADD[MOST_PIECES] = {add_tiles<R, P, 1, ZEROS>, add_tiles<R, P, 2, ZEROS>, add_tiles<R, P, 3, ZEROS>,
                                  add_tiles<R, P, 4, ZEROS>};

// All rows by all panels over some pieces.
template <bool ZEROS>
void add_pieces(const Piece* pieces, int count, int64_t rows, int64_t windows, float* totals, int64_t panels) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t near = 0; near < panels; near += NEAR_PANELS) {
        const int64_t end = near + NEAR_PANELS < panels ? near + NEAR_PANELS : panels;
        for (int64_t tile = 0; tile < tiles; tile += 2)
            for (int64_t panel = near; panel < end; panel += 2) {
                const bool two = tile + 1 < tiles, pair = panel + 1 < end;
                const Add* add = two ? pair ? ADD<2, 2, ZEROS> : ADD<2, 1, ZEROS>
                                     : pair ? ADD<1, 2, ZEROS> : ADD<1, 1, ZEROS>;
                add[count - 1](pieces, tile, tiles * TILE_BYTES, panel, rows, windows, totals, panels);
            }
    }
}

// Decodes `blocks` blocks of one panel, and zeros up to whole tiles.
template <class E>
void decode_tiles(const uint8_t* codes, int64_t blocks, uint8_t* out) {
    auto* to = reinterpret_cast<typename E::W*>(out);
    for (int64_t block = 0; block < blocks; ++block, codes += E::BYTES, to += E::UNITS) {
        typename E::W decoded[E::UNITS][PARTS];
        __builtin_prefetch(codes + 1024);
        E::decode(codes, decoded);
        unroll<E::UNITS>(EACH(unit) { to[unit] = decoded[unit][0]; });
    }
    uint8_t* end = out + steps_of(blocks * BLOCK) * TILE_BYTES;
    std::memset(static_cast<void*>(to), 0, end - reinterpret_cast<uint8_t*>(to));
}

// `panels` panels from `first` on by `rows` rows of x.
template <class E>
void multiply_panels(const Product& p, int64_t first, int64_t panels, int64_t rows, const uint8_t* x,
                     const float* sums, int64_t first_row) {
    const Layout& l = *p.layout;
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    auto* weights = static_cast<uint8_t*>(scratch<1>(MOST_PANELS * CHUNK_BYTES));
    auto* totals = static_cast<float*>(scratch<2>(tiles * panels * TILE_BYTES));
    std::memset(totals, 0, tiles * panels * TILE_BYTES);
    Piece pieces[MOST_PIECES];
    int count = 0;
    int64_t filled = 0, codes_at = 0;  // tiles of columns that the pieces have
    const auto flush = [&] {
        if (count == 0) return;
        l.zeros ? add_pieces<true>(pieces, count, rows, l.windows, totals, panels)
                : add_pieces<false>(pieces, count, rows, l.windows, totals, panels);
        count = 0, filled = 0;
    };
    for (int64_t group = 0; group < l.groups; ++group) {
        const int64_t window = group >> l.repeat_bits, width = l.width(window);
        for (int64_t start = 0; start < width; start += TILE_STEPS * TILE_COLS) {
            const int64_t left = width - start, most = TILE_STEPS * TILE_COLS;
            const int64_t blocks = (left < most ? left : most) / BLOCK, steps = steps_of(blocks * BLOCK);
            if (count == MOST_PIECES || filled + steps > TILE_STEPS) flush();
            Piece& piece = pieces[count++];
            piece.x = x + (window * steps_of(l.window) + start / TILE_COLS) * tiles * TILE_BYTES;
            piece.weights = weights + filled * TILE_BYTES;
            piece.steps = steps;
            piece.sums = sums + window;
            for (int64_t panel = 0; panel < panels; ++panel) {
                const uint8_t* bytes = p.weight + (first + panel) * l.panel_bytes;
                load_scales<E>(p, bytes, group, piece.scales + panel);
                __builtin_prefetch(bytes + l.scales_at + (group + 1) * PANEL * l.scale_bytes);
                if (l.zeros && start == 0) load_zeros(l, bytes, group, piece.zeros + panel);
                else piece.zeros[panel] = vf{};
                decode_tiles<E>(bytes + codes_at, blocks, weights + panel * CHUNK_BYTES + filled * TILE_BYTES);
            }
            filled += steps, codes_at += blocks * E::BYTES;
        }
    }
    flush();
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t panel = 0; panel < panels; ++panel)
            store(p, first + panel, first_row + row,
                  totals + (row / TILE_ROWS * panels + panel) * TILE_ROWS * PANEL + row % TILE_ROWS * PANEL);
}

// Any number of rows.
template <class E>
void tile_rows(const Product& p) {
    const Layout& l = *p.layout;
    const int64_t steps = (l.windows - 1) * steps_of(l.window) + steps_of(l.width(l.windows - 1));
    const int64_t most = p.m <= FEW_ROWS ? FEW_PANELS : MOST_PANELS;
    const int64_t fair = (l.panels + 2 * p.threads - 1) / (2 * p.threads);  // so that every thread has two turns
    const int64_t panels = fair < 2 ? 2 : fair < most ? fair : most;
    for (int64_t first = 0; first < p.m; first += ROWS) {
        const int64_t rows = p.m - first < ROWS ? p.m - first : ROWS;
        const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        auto* x = static_cast<uint8_t*>(scratch<5>(steps * tiles * TILE_BYTES));
        float* sums = l.zeros ? static_cast<float*>(scratch<6>(rows * l.windows * sizeof(float))) : nullptr;
#pragma omp parallel num_threads(p.threads)
        {
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t row = tile * TILE_ROWS, left = rows - row;
                uint8_t* to = x + tile * TILE_BYTES;
                for (int64_t window = 0; window < l.windows; ++window) {
                    const int64_t begin = window * l.window;
                    const int64_t stop = begin + l.window < l.cols ? begin + l.window : l.cols;
                    for (int64_t column = begin; column < stop; column += TILE_COLS, to += tiles * TILE_BYTES)
                        pack_tile(p, first + row, left, column, stop, reinterpret_cast<uint16_t*>(to));
                }
                if (l.zeros) window_sums(p, first + row, left < TILE_ROWS ? left : TILE_ROWS, sums + row * l.windows);
            }
            _tile_loadconfig(TILE_CONFIG.bytes);
#pragma omp for schedule(dynamic)
            for (int64_t panel = 0; panel < l.panels; panel += panels)
                multiply_panels<E>(p, panel, l.panels - panel < panels ? l.panels - panel : panels, rows, x, sums, first);
            _tile_release();
        }
    }
}
