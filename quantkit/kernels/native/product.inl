// Fused dequantize and multiply, written once and compiled for each instruction set.
//
// The including file opens a namespace and defines, before it includes this:
//     vf, vu, vd       vectors of LANES floats and uint32_t, with + and *, and of half as many doubles
//     look_up(table, size, vu) -> vf: entries of a table of floats
//     load_bf16, load_f16, load_bytes, store_bytes: LANES numbers in memory; load_double: half as many floats
//     ROWS_DIRECT      up to so many rows of x, codes are decoded in registers; of 4 bits, up to ROWS_DIRECT_4_BITS;
//                      of bfloat16, up to ROWS_DIRECT_BF16
//     ROWS_TILE        beyond that, strips of STRIP_PANELS panels are decoded once and meet blocks of so many rows
//     TOGETHER         groups whose nested scales are unfolded together; `look_up_codes` may know how for so many
//     engines          how codes become factors: see `product` in the isa files
//
// An engine has:
//     X, W             an element of x as the engine takes it, a vector of weights
//     UNITS            X of a row in a block of 8 columns
//     KIND, FACTOR     what it decodes; what it multiplied the weights by
//     TAKES_BF16       an X is a pair of bfloat16, as they lie in x
//     decode(bytes, W[UNITS][PARTS]); fma(vf, W, X) -> vf; pack(float[BLOCK], X[UNITS])
//
// Each result is summed by one thread in a fixed order: results do not depend on the number of threads.

constexpr int PARTS = PANEL / LANES;
constexpr int64_t AHEAD = 4096;           // bytes of codes that are read before what is prefetched
constexpr int64_t STRIP_UNITS = 128;      // decoded at a time
constexpr int64_t TILE_STRIPS = 4;        // that meet a block of x together
constexpr int64_t TILES_OF_THREAD = 16;   // at least: with fewer, some threads would wait for others
constexpr int64_t MAX_ROWS = 512;         // of x that share a pass over the weights,
constexpr int64_t X_BYTES = 8 << 20;      // or as many as a cache still holds when the next tile comes,
constexpr int64_t MIN_ROWS = 64;          // but so many

// f(0), f(1), ... f(N - 1), unrolled before the compiler looks for arrays that can live in registers.
#define EACH(index) [&](auto index) __attribute__((always_inline))
template <class F, int... I>
QUANTKIT_INLINE void unroll(F&& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
QUANTKIT_INLINE void unroll(F&& f) {
    unroll(f, std::make_integer_sequence<int, N>{});
}

// Memory that a thread keeps for its next call.
template <int ID>
void* scratch(std::size_t bytes) {
    struct Kept {
        void* data = nullptr;
        std::size_t size = 0;
        ~Kept() { std::free(data); }
    };
    thread_local Kept kept;
    if (kept.size < bytes) {
        std::free(kept.data);
        const std::size_t page = bytes < HUGE_PAGE ? 4096 : HUGE_PAGE;
        kept.size = (bytes + page - 1) / page * page;
        kept.data = std::aligned_alloc(page, kept.size);
        if (kept.data == nullptr) {
            kept.size = 0;
            std::abort();
        }
        if (page == HUGE_PAGE) advise_huge_pages(kept.data, kept.size, true);
    }
    return kept.data;
}

constexpr float from_bf16(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

constexpr uint16_t to_bf16(float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value), upper = bits >> 16;
    const uint32_t rounded = (bits + 0x7fffu + (upper & 1)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;  // without a branch, so that loops become vectors
    return static_cast<uint16_t>(nan ? upper | 0x40 : rounded);
}

inline float from_f16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude < 0x0400u) {
        const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    const uint32_t bits = sign | (magnitude >= 0x7c00u ? 0x7f800000u | (magnitude & 0x3ffu) << 13
                                                       : (magnitude << 13) + 0x38000000u);
    return __builtin_bit_cast(float, bits);
}

inline vf splat(float value) { return vf{} + value; }

inline vf load(const float* at) {
    vf value;
    std::memcpy(&value, at, sizeof(vf));
    return value;
}

constexpr float SHIFTER = 12582912.0f;  // 1.5 * 2**23: what is added to it is rounded to an integer, in the low bits

// The largest of all lanes, each compared with the one STEP away.
template <int STEP = LANES / 2>
QUANTKIT_INLINE float largest(vf x) {
    if constexpr (STEP == 0) {
        return x[0];
    } else {
        vu other;
        unroll<LANES>(EACH(lane) { other[static_cast<int>(lane)] = lane ^ STEP; });
        const vf there = __builtin_shuffle(x, other);
        return largest<STEP / 2>(x > there ? x : there);
    }
}

inline float element(const Product& p, int64_t row, int64_t column) {
    const int64_t at = row * p.layout->cols + column;
    return p.type == Type::f32 ? static_cast<const float*>(p.x)[at] : from_bf16(static_cast<const uint16_t*>(p.x)[at]);
}

// The values of the codes of COUNT groups' nested scales.
template <int COUNT>
void look_up_codes(const Map& map, const uint8_t* codes, vf* out) {
    for (int part = 0; part < COUNT * PARTS; ++part)
        out[part] = look_up(map.values, 256, load_bytes(codes + part * LANES));
}

// From those values to the scales themselves: times the panel's own scales, plus its offset.
template <int COUNT>
QUANTKIT_INLINE void unfold(const Layout& l, const uint8_t* panel, int64_t group, vf* values) {
    constexpr uint32_t LANE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const uint8_t* nested = panel + l.nested_at;
    uint32_t start;
    float offset;
    std::memcpy(&start, nested, 4);
    std::memcpy(&offset, nested + 4, 4);
    const uint32_t first = start + static_cast<uint32_t>(group), groups = static_cast<uint32_t>(l.groups);
    for (int part = 0; part < PARTS; ++part) {
        vu blocks;  // scales before these
        std::memcpy(&blocks, LANE + part * LANES, sizeof blocks);
        blocks = blocks * groups + first;
        for (uint32_t next = 0; next < COUNT; ++next) {
            vf& value = values[next * PARTS + part];
            const auto* scales = reinterpret_cast<const float*>(nested + 8);
            value = value * look_up(scales, l.nested_scales, (blocks + next) / NESTED) + offset;
        }
    }
}

// Nested scales of COUNT groups: as many codes cost hardly more than a few.
template <int COUNT>
__attribute__((noinline)) void unfold_together(const Layout& l, const uint8_t* panel, int64_t group, vf* out) {
    look_up_codes<COUNT>(*l.map, panel + l.scales_at + group * PANEL, out);
    unfold<COUNT>(l, panel, group, out);
}

// Scales of a group, divided by the engine's factor.
template <class E>
QUANTKIT_INLINE void load_scales(const Product& p, const uint8_t* panel, int64_t group, vf* out) {
    const Layout& l = *p.layout;
    const uint8_t* at = panel + l.scales_at + group * PANEL * l.scale_bytes;
    if (l.scale == Type::bf16) {
        unroll<PARTS>(EACH(part) { out[part] = load_bf16(reinterpret_cast<const uint16_t*>(at) + part * LANES); });
    } else if (l.scale == Type::nested) {
        unfold_together<1>(l, panel, group, out);
    } else if (l.scale == Type::f32) {
        unroll<PARTS>(EACH(part) { out[part] = load(reinterpret_cast<const float*>(at) + part * LANES); });
    } else {
        unroll<PARTS>(EACH(part) { out[part] = load_f16(reinterpret_cast<const uint16_t*>(at) + part * LANES); });
    }
    if constexpr (E::FACTOR != 1) unroll<PARTS>(EACH(part) { out[part] = out[part] * (1 / E::FACTOR); });
}

// A panel's scales, group after group.
template <class E>
class Scales {
public:
    QUANTKIT_INLINE void next(const Product& p, const uint8_t* panel, int64_t group, vf* out) {
        const Layout& l = *p.layout;
        if (l.scale != Type::nested || (group | (TOGETHER - 1)) >= l.groups)
            return load_scales<E>(p, panel, group, out);
        if (group % TOGETHER == 0) unfold_together<TOGETHER>(l, panel, group, kept_);
        unroll<PARTS>(EACH(part) { out[part] = kept_[group % TOGETHER * PARTS + part] * (1 / E::FACTOR); });
    }

private:
    vf kept_[TOGETHER * PARTS];
};

#ifdef QUANTKIT_X86
const bool INTEL = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
#else
constexpr bool INTEL = false;
#endif

// Prefetches what is read once. Past the caches it leaves alone what they hold of all else, between two products the
// interpreter and its instructions; but Intel's cores have few such lines under way, and would read half as fast.
QUANTKIT_INLINE void prefetch_once(const void* at) {
    if (INTEL) __builtin_prefetch(at, 0, 2);
    else __builtin_prefetch(at, 0, 0);
}

// From codes at offset `at` of one of so many panels that are read together to what is to be prefetched, `far` ahead:
// codes of the same panel, or of the one that is read after it.
QUANTKIT_INLINE int64_t ahead(const Layout& l, int64_t at, int64_t panels, int64_t far) {
    return at + far < l.scales_at ? far : far - l.scales_at + panels * l.panel_bytes;
}

// Prefetches a group's scales of the panel that is read after N at a time: too sparse a stream for the hardware.
template <int N>
QUANTKIT_INLINE void prefetch_scales(const Layout& l, const uint8_t* panel, int64_t group) {
    __builtin_prefetch(panel + N * l.panel_bytes + l.scales_at + group * PANEL * l.scale_bytes, 0, 2);
}

// Zero points of a group, less the middle code.
inline void load_zeros(const Layout& l, const uint8_t* panel, int64_t group, vf* out) {
    const uint8_t* at = panel + l.zeros_at + group * PANEL / 2;
    alignas(64) float values[PANEL];
    for (int lane = 0; lane < PANEL; ++lane)
        values[lane] = static_cast<float>(((at[lane / 2] >> (lane % 2 * 4)) & 0xf) - 8);
    for (int part = 0; part < PARTS; ++part) out[part] = load(values + part * LANES);
}

inline void store(const Product& p, int64_t panel, int64_t row, const float* totals) {
    const Layout& l = *p.layout;
    const int64_t first = panel * PANEL;
    const int64_t lanes = l.rows - first < PANEL ? l.rows - first : PANEL;
    alignas(64) float values[PANEL];
    for (int64_t lane = 0; lane < PANEL; ++lane) values[lane] = totals[lane];
    if (p.bias != nullptr)
        for (int64_t lane = 0; lane < lanes; ++lane) values[lane] += p.bias[first + lane];
    const int64_t at = row * l.rows + first;
    if (p.type == Type::f32) {
        std::memcpy(static_cast<float*>(p.y) + at, values, lanes * sizeof(float));
    } else {
        uint16_t* y = static_cast<uint16_t*>(p.y) + at;
        if (lanes == PANEL)
            for (int64_t lane = 0; lane < PANEL; ++lane) y[lane] = to_bf16(values[lane]);
        else
            for (int64_t lane = 0; lane < lanes; ++lane) y[lane] = to_bf16(values[lane]);
    }
}

// Rows of x in blocks of nearly equal size.
struct Blocks {
    int64_t rows, count;
    Blocks(int64_t m, int64_t most) : rows(m), count((m + most - 1) / most) {}
    int64_t start(int64_t block) const { return rows * block / count; }
    int64_t size(int64_t block) const { return start(block + 1) - start(block); }
};

// Calls f(first, count) for chunks of at most STRIP_UNITS units, none of which crosses a window.
template <class E, class F>
QUANTKIT_INLINE void each_chunk(const Layout& l, F&& f) {
    for (int64_t window = 0; window < l.windows; ++window) {
        const int64_t units = l.width(window) / BLOCK * E::UNITS, first = window * (l.window / BLOCK) * E::UNITS;
        for (int64_t unit = 0; unit < units; unit += STRIP_UNITS)
            f(first + unit, units - unit < STRIP_UNITS ? units - unit : STRIP_UNITS);
    }
}

// x as kernels read it, in one stream: chunk by chunk, block by block, unit by unit, row by row. Packs rows `start` to
// `start + rows`, a block of `total` rows that begin at row `first` of x.
template <class E>
void pack_block(const Product& p, int64_t first, int64_t start, int64_t rows, int64_t total, typename E::X* out) {
    const Layout& l = *p.layout;
    each_chunk<E>(l, [&](int64_t unit, int64_t units) {
        typename E::X* chunk = out + unit * total + start * units;
        const int64_t blocks = units / E::UNITS, column = unit / E::UNITS * BLOCK;
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t block = 0; block < blocks; ++block) {
                typename E::X values[E::UNITS];
                const int64_t at = column + block * BLOCK, left = l.cols - at;
                if (E::TAKES_BF16 && left >= BLOCK) {
                    std::memcpy(values, static_cast<const uint16_t*>(p.x) + (first + start + row) * l.cols + at,
                                sizeof values);
                } else {
                    alignas(32) float wide[BLOCK];
                    for (int64_t index = 0; index < BLOCK; ++index)
                        wide[index] = index < left ? element(p, first + start + row, at + index) : 0.0f;
                    E::pack(wide, values);
                }
                for (int unit = 0; unit < E::UNITS; ++unit) chunk[(block * E::UNITS + unit) * rows + row] = values[unit];
            }
    });
}

// Sums of each row's windows (m, windows): what zero points multiply.
inline void window_sums(const Product& p, int64_t first, int64_t rows, float* out) {
    const Layout& l = *p.layout;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t window = 0; window < l.windows; ++window) {
            const int64_t start = window * l.window;
            const int64_t stop = start + l.window < l.cols ? start + l.window : l.cols;
            float sum = 0;
            for (int64_t column = start; column < stop; ++column) sum += element(p, first + row, column);
            out[row * l.windows + window] = sum;
        }
}

// Codes times x to weights times x: takes zero points off, then applies scales.
template <int M>
QUANTKIT_INLINE void scale_group(const Product& p, const uint8_t* panel, int64_t group, int64_t window,
                                 const float* sums, const vf* scales, vf (&dots)[M][PARTS]) {
    const Layout& l = *p.layout;
    if (l.zeros) {
        vf zeros[PARTS];
        load_zeros(l, panel, group, zeros);
        unroll<M>(EACH(row) {
            unroll<PARTS>(EACH(part) { dots[row][part] -= zeros[part] * sums[row * l.windows + window]; });
        });
    }
    unroll<M>(EACH(row) { unroll<PARTS>(EACH(part) { dots[row][part] = dots[row][part] * scales[part]; }); });
}

template <int M, int N>
QUANTKIT_INLINE void store_totals(const Product& p, int64_t first, const vf (&totals)[M][N][PARTS]) {
    for (int row = 0; row < M; ++row)
        for (int n = 0; n < N; ++n) {
            alignas(64) float values[PANEL];
            std::memcpy(values, totals[row][n], sizeof values);
            store(p, first + n, row, values);
        }
}

// N panels by M rows, codes decoded in registers.
template <class E, int M, int N>
void direct(const Product& p, int64_t first, const typename E::X* x, const float* sums) {
    const Layout& l = *p.layout;
    // sums in flight, as many as registers hold; the same for any N, and so is the result
    constexpr int CHAINS = M > 2 ? 1 : (LANES == 16 ? 4 : 2) / M;
    const int64_t panel_bytes = l.panel_bytes, groups = l.groups;
    const int64_t repeat_bits = l.repeat_bits, window_units = l.window / BLOCK * E::UNITS * M;
    const uint8_t* panel = p.weight + first * panel_bytes;
    const uint8_t* codes = panel;
    vf totals[M][N][PARTS] = {};
    Scales<E> scales[N];
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t window = group >> repeat_bits;
        const int64_t blocks = l.width(window) / BLOCK;
        const typename E::X* at = x + window * window_units;
        const int64_t next = ahead(l, codes - panel, N, AHEAD / N);
        vf sum[CHAINS][M][N][PARTS] = {};
        for (int64_t block = 0; block < blocks; ++block) {
            unroll<N>(EACH(n) {
                const uint8_t* bytes = codes + n * panel_bytes;
                unroll<E::BYTES / 64>(EACH(line) { prefetch_once(bytes + next + 64 * line); });
                typename E::W weights[E::UNITS][PARTS];
                E::decode(bytes, weights);
                unroll<E::UNITS>(EACH(unit) {
                    unroll<M>(EACH(row) {
                        unroll<PARTS>(EACH(part) {
                            vf& into = sum[unit % CHAINS][row][n][part];
                            into = E::fma(into, weights[unit][part], at[unit * M + row]);
                        });
                    });
                });
            });
            codes += E::BYTES;
            at += E::UNITS * M;
        }
        unroll<N>(EACH(n) {
            const uint8_t* bytes = panel + n * panel_bytes;
            prefetch_scales<N>(l, bytes, group);
            vf dots[M][PARTS];
            unroll<M>(EACH(row) {
                unroll<PARTS>(EACH(part) {
                    dots[row][part] = sum[0][row][n][part];
                    unroll<CHAINS - 1>(EACH(chain) { dots[row][part] += sum[chain + 1][row][n][part]; });
                });
            });
            vf now[PARTS];
            scales[n].next(p, bytes, group, now);
            scale_group<M>(p, bytes, group, window, sums, now, dots);
            unroll<M>(EACH(row) { unroll<PARTS>(EACH(part) { totals[row][n][part] += dots[row][part]; }); });
        });
    }
    store_totals(p, first, totals);
}

// M rows of x by a strip: sum += strip x. Rows of x are ROW apart, and so are a row's units UNIT.
template <class E, int M, int64_t ROW, int64_t UNIT>
QUANTKIT_INLINE void multiply_strip(const typename E::W* strip, const typename E::X* x, int64_t units,
                                    vf (&sum)[M][STRIP_PANELS * PARTS]) {
    constexpr int WIDTH = STRIP_PANELS * PARTS;
#pragma GCC unroll 4
    for (int64_t unit = 0; unit < units; ++unit) {
        unroll<M>(EACH(row) {
            unroll<WIDTH>(EACH(part) { sum[row][part] = E::fma(sum[row][part], strip[part], x[row * ROW]); });
        });
        strip += WIDTH;
        x += UNIT;
    }
}

// A decoded strip by M rows: totals (M, STRIP_PANELS * 16) += scales * (strip x).
template <class E, int M>
void micro(const typename E::W* strip, const typename E::X* x, int64_t units, const vf* scales, float* totals) {
    constexpr int WIDTH = STRIP_PANELS * PARTS;
    vf sum[M][WIDTH] = {};
    multiply_strip<E, M, 1, M>(strip, x, units, sum);
    unroll<M>(EACH(row) {
        unroll<WIDTH>(EACH(part) {
            float* at = totals + (row * WIDTH + part) * LANES;
            const vf whole = load(at) + sum[row][part] * scales[part];
            std::memcpy(at, &whole, sizeof whole);
        });
    });
}

template <class E>
using Micro = void (*)(const typename E::W*, const typename E::X*, int64_t, const vf*, float*);

template <class E, std::size_t... I>
Micro<E> micro_of(int64_t rows, std::index_sequence<I...>) {
    static constexpr Micro<E> kernels[] = {micro<E, static_cast<int>(I) + 1>...};
    return kernels[rows - 1];
}

// A tile of up to TILE_STRIPS strips by up to MAX_ROWS rows: each block of x is read once for all of them.
template <class E>
void tiled(const Product& p, int64_t first, int64_t panels, const Blocks& blocks, const typename E::X* x,
           const float* sums, int64_t first_row) {
    const Layout& l = *p.layout;
    constexpr int64_t WIDTH = STRIP_PANELS * PANEL, STEP = STRIP_PANELS * PARTS;
    constexpr int64_t STRIP_BYTES = STRIP_UNITS * STEP * sizeof(typename E::W);
    const int64_t count = l.panels - first < panels ? l.panels - first : panels;
    const int64_t strips = (count + STRIP_PANELS - 1) / STRIP_PANELS;
    auto* decoded = static_cast<typename E::W*>(scratch<1>(strips * STRIP_BYTES));
    float* totals = static_cast<float*>(scratch<2>(strips * blocks.rows * WIDTH * sizeof(float)));
    std::memset(totals, 0, strips * blocks.rows * WIDTH * sizeof(float));
    if (count % STRIP_PANELS != 0) std::memset(static_cast<void*>(decoded), 0, strips * STRIP_BYTES);

    int64_t codes_at = 0;
    Scales<E> readers[TILE_STRIPS * STRIP_PANELS];
    vf scales[TILE_STRIPS * STEP] = {}, zeros[TILE_STRIPS * STEP] = {};
    for (int64_t group = 0; group < l.groups; ++group) {
        const int64_t window = group >> l.repeat_bits;
        const int64_t window_blocks = l.width(window) / BLOCK;
        for (int64_t panel = 0; panel < count; ++panel) {
            const uint8_t* bytes = p.weight + (first + panel) * l.panel_bytes;
            readers[panel].next(p, bytes, group, scales + panel * PARTS);
            if (l.zeros) {
                load_zeros(l, bytes, group, zeros + panel * PARTS);
                for (int64_t part = panel * PARTS; part < (panel + 1) * PARTS; ++part)
                    zeros[part] = zeros[part] * scales[part];
            }
        }
        for (int64_t block = 0; block < window_blocks; block += STRIP_UNITS / E::UNITS) {
            const int64_t most = STRIP_UNITS / E::UNITS;
            const int64_t now = window_blocks - block < most ? window_blocks - block : most;
            for (int64_t panel = 0; panel < count; ++panel) {
                const uint8_t* codes = p.weight + (first + panel) * l.panel_bytes + codes_at;
                auto* to = decoded + panel / STRIP_PANELS * STRIP_UNITS * STEP + panel % STRIP_PANELS * PARTS;
                for (int64_t at = 0; at < now; ++at) {
                    typename E::W weights[E::UNITS][PARTS];
                    __builtin_prefetch(codes + at * E::BYTES + 1024);
                    E::decode(codes + at * E::BYTES, weights);
                    for (int unit = 0; unit < E::UNITS; ++unit)
                        for (int part = 0; part < PARTS; ++part)
                            to[(at * E::UNITS + unit) * STEP + part] = weights[unit][part];
                }
            }
            codes_at += now * E::BYTES;
            const int64_t unit = (window * (l.window / BLOCK) + block) * E::UNITS, units = now * E::UNITS;
            for (int64_t b = 0; b < blocks.count; ++b) {
                const int64_t start = blocks.start(b), rows = blocks.size(b);
                const auto run = micro_of<E>(rows, std::make_index_sequence<ROWS_TILE>());
                for (int64_t strip = 0; strip < strips; ++strip)
                    run(decoded + strip * STRIP_UNITS * STEP, x + unit * blocks.rows + start * units, units,
                        scales + strip * STEP, totals + (strip * blocks.rows + start) * WIDTH);
            }
        }
        if (l.zeros)
            for (int64_t strip = 0; strip < strips; ++strip)
                for (int64_t row = 0; row < blocks.rows; ++row)
                    for (int64_t part = 0; part < STEP; ++part) {
                        float* at = totals + (strip * blocks.rows + row) * WIDTH + part * LANES;
                        const vf rest = load(at) - zeros[strip * STEP + part] * sums[row * l.windows + window];
                        std::memcpy(at, &rest, sizeof rest);
                    }
    }
    for (int64_t panel = 0; panel < count; ++panel)
        for (int64_t row = 0; row < blocks.rows; ++row)
            store(p, first + panel, first_row + row,
                  totals + (panel / STRIP_PANELS * blocks.rows + row) * WIDTH + panel % STRIP_PANELS * PANEL);
}

template <class E, int N, std::size_t... I>
auto direct_of(int64_t rows, std::index_sequence<I...>) {
    using Direct = void (*)(const Product&, int64_t, const typename E::X*, const float*);
    static constexpr Direct kernels[] = {direct<E, static_cast<int>(I) + 1, N>...};
    return kernels[rows - 1];
}

// Calls f(N, first of N panels) for all panels, shared among the threads of a parallel region: long runs first, since
// memory serves threads unequally. Reading MOST panels at a time keeps more of memory's requests in flight.
template <int MOST, class F>
void each_panel(int64_t panels, F&& f) {
    const int64_t steps = (panels + MOST - 1) / MOST;
#pragma omp for schedule(guided)
    for (int64_t step = 0; step < steps; ++step) {
        int64_t panel = step * MOST;
        if (panel + MOST <= panels) f(std::integral_constant<int, MOST>{}, panel);
        else for (; panel < panels; ++panel) f(std::integral_constant<int, 1>{}, panel);
    }
}

// At most ROWS_DIRECT rows, by all threads of a parallel region; each packs x for itself, so that none waits.
template <class E>
void direct_rows(const Product& p) {
    const Layout& l = *p.layout;
    auto* x = static_cast<typename E::X*>(scratch<3>(p.m * l.padded_cols / BLOCK * E::UNITS * sizeof(typename E::X)));
    float* sums = l.zeros ? static_cast<float*>(scratch<4>(p.m * l.windows * sizeof(float))) : nullptr;
    pack_block<E>(p, 0, 0, p.m, p.m, x);
    if (l.zeros) window_sums(p, 0, p.m, sums);
    const auto run = [&](auto count, int64_t panel) {
        constexpr int N = decltype(count)::value;
        direct_of<E, N>(p.m, std::make_index_sequence<ROWS_DIRECT>())(p, panel, x, sums);
    };
    each_panel<2>(l.panels, run);
}

// Any number of rows.
template <class E>
void tiled_rows(const Product& p) {
    const Layout& l = *p.layout;
    const int64_t units = l.padded_cols / BLOCK * E::UNITS;
    int64_t panels = TILE_STRIPS * STRIP_PANELS;  // of a tile
    while (panels > STRIP_PANELS && l.panels < panels * TILES_OF_THREAD * p.threads) panels /= 2;
    const int64_t held = X_BYTES / (units * static_cast<int64_t>(sizeof(typename E::X)));
    const Blocks passes(p.m, held < MIN_ROWS ? MIN_ROWS : held < MAX_ROWS ? held : MAX_ROWS);
    for (int64_t pass = 0; pass < passes.count; ++pass) {
        const int64_t first = passes.start(pass), rows = passes.size(pass);
        const Blocks blocks(rows, ROWS_TILE);
        auto* x = static_cast<typename E::X*>(scratch<5>(rows * units * sizeof(typename E::X)));
        float* sums = l.zeros ? static_cast<float*>(scratch<6>(rows * l.windows * sizeof(float))) : nullptr;
#pragma omp parallel num_threads(p.threads)
        {
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks.count; ++block) {
                const int64_t start = blocks.start(block), size = blocks.size(block);
                pack_block<E>(p, first, start, size, rows, x);
                if (l.zeros) window_sums(p, first + start, size, sums + start * l.windows);
            }
#pragma omp for schedule(dynamic)
            for (int64_t panel = 0; panel < l.panels; panel += panels)
                tiled<E>(p, panel, panels, blocks, x, sums, first);
        }
    }
}
