// A few rows of bfloat16 as blocked integers: products and sums are then exact, and cost the fewest instructions.
//
// Columns are cut into chunks of at most MAX_CHUNK inside a window. A chunk of x becomes integers of a common scale,
// absmax / LIMIT: an element is off by at most absmax / (2 * LIMIT). An engine has:
//     MAX_CHUNK, LIMIT    as above
//     OFFSET              the code that stands for 0, which sums of x take off
//     PANELS              how many it reads at a time
//     split(int16_t[8 * blocks], blocks, uint32_t*, stride, int (&sums)[2]): a chunk of x as `dot` reads it, a block's
//         words `stride` after those of the block before, and what its sums add up to
//     dot<M, N>(codes, panel_bytes, next, blocks, x, sums, vf[M][N][PARTS]): of N panels, in units of the chunk's scale;
//         prefetches `next` bytes after what it reads

constexpr int WORDS = 4;  // of x in a block

// A chunk of x in two planes of bytes, x = 256 * high + low; a plane's bytes are those of columns 0 to 7 of a block, or
// 0 4 1 5 2 6 3 7: of the low nibbles of int4's words, then of the high ones.
template <bool NIBBLES, int64_t MOST>
void split_planes(const int16_t* values, int64_t blocks, uint32_t* words, int64_t stride, int (&sums)[2]) {
    static_assert(MOST / BLOCK * 128 < 1 << 15, "sums of a lane fit 16 bits");
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    __m128i high_sum = _mm_setzero_si128(), low_sum = high_sum;
    for (int64_t block = 0; block < blocks; ++block, words += stride) {
        const __m128i value = _mm_load_si128(reinterpret_cast<const __m128i*>(values) + block);
        const __m128i high = _mm_srai_epi16(_mm_add_epi16(value, _mm_set1_epi16(128)), 8);
        const __m128i low = _mm_sub_epi16(value, _mm_slli_epi16(high, 8));
        high_sum = _mm_add_epi16(high_sum, high), low_sum = _mm_add_epi16(low_sum, low);
        const __m128i planes = _mm_packs_epi16(high, low);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(words), NIBBLES ? _mm_shuffle_epi8(planes, order) : planes);
    }
    const __m128i ones = _mm_set1_epi16(1);
    const __m128i pairs = _mm_hadd_epi32(_mm_madd_epi16(high_sum, ones), _mm_madd_epi16(low_sum, ones));
    const __m128i totals = _mm_hadd_epi32(pairs, pairs);
    sums[0] += _mm_cvtsi128_si32(totals);
    sums[1] += _mm_extract_epi32(totals, 1);
}

// Some elements of x as integers of a common scale, which is returned: NaN where an element is not finite. Zeros follow,
// up to `padded` integers.
QUANTKIT_INLINE float to_integers(const uint16_t* x, int64_t count, int64_t padded, float limit, int16_t* values) {
    uint16_t most = 0;  // magnitudes of bfloat16 compare as integers
    for (int64_t index = 0; index < count; ++index) {
        const uint16_t magnitude = x[index] & 0x7fff;
        most = magnitude > most ? magnitude : most;
    }
    if (most == 0 || most >= 0x7f80) count = 0;  // where one is not finite, neither is any result
    const float absmax = from_bf16(most), inverse = limit / absmax;
    for (int64_t index = 0; index < count; ++index) {
        const float shifted = from_bf16(x[index]) * inverse + SHIFTER;
        values[index] = static_cast<int16_t>(__builtin_bit_cast(uint32_t, shifted));
    }
    if (count < padded) std::memset(values + count, 0, (padded - count) * sizeof *values);
    return most < 0x7f80 ? absmax / limit : __builtin_nanf("");
}

template <class I>
QUANTKIT_INLINE int64_t chunks_of(int64_t width) {
    return (width + I::MAX_CHUNK - 1) / I::MAX_CHUNK;
}

// x as integers: words (blocks, rows, WORDS), scales (chunks, rows), sums (chunks, rows, 2) times -OFFSET.
template <class I>
void pack_integers(const Product& p, uint32_t* words, float* scales, int32_t* sums) {
    const Layout& l = *p.layout;
    const int64_t per_window = chunks_of<I>(l.width(0));
    for (int64_t row = 0; row < p.m; ++row) {
        const auto* x = static_cast<const uint16_t*>(p.x) + row * l.cols;
        for (int64_t window = 0; window < l.windows; ++window) {
            const int64_t width = l.width(window), begin = window * l.window;
            for (int64_t chunk = 0; chunk < chunks_of<I>(width); ++chunk) {
                const int64_t start = begin + chunk * I::MAX_CHUNK;
                const int64_t end = begin + width < start + I::MAX_CHUNK ? begin + width : start + I::MAX_CHUNK;
                const int64_t count = (end < l.cols ? end : l.cols) - start, at = (window * per_window + chunk) * p.m + row;
                alignas(64) int16_t values[I::MAX_CHUNK];
                scales[at] = to_integers(x + start, count, end - start, I::LIMIT, values);
                int totals[2] = {0, 0};
                I::split(values, (end - start) / BLOCK, words + (start / BLOCK * p.m + row) * WORDS, p.m * WORDS, totals);
                sums[2 * at] = -I::OFFSET * totals[0];
                sums[2 * at + 1] = -I::OFFSET * totals[1];
            }
        }
    }
}

template <class I, int M, int N>
void direct_integer(const Product& p, int64_t first, const uint32_t* x, const float* x_scales, const int32_t* x_sums,
                    const float* sums) {
    const Layout& l = *p.layout;
    const int64_t groups = l.groups, repeat_bits = l.repeat_bits, panel_bytes = l.panel_bytes;
    const int64_t per_window = chunks_of<I>(l.width(0));
    const uint8_t* panel = p.weight + first * panel_bytes;
    const uint8_t* codes = panel;
    vf totals[M][N][PARTS] = {};
    Scales<I> readers[N];
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t window = group >> repeat_bits, width = l.width(window);
        const uint32_t* at = x + window * l.window / BLOCK * M * WORDS;
        int64_t chunk = window * per_window;
        vf sum[M][N][PARTS] = {};
        for (int64_t start = 0; start < width; start += I::MAX_CHUNK, ++chunk) {
            const int64_t blocks = (width - start < I::MAX_CHUNK ? width - start : I::MAX_CHUNK) / BLOCK;
            vf dots[M][N][PARTS];
            const int64_t next = ahead(l, codes - panel, N, AHEAD / N);
            I::template dot<M, N>(codes, panel_bytes, next, blocks, at, x_sums + 2 * M * chunk, dots);
            unroll<M>(EACH(row) {
                unroll<N>(EACH(n) {
                    unroll<PARTS>(EACH(part) {
                        vf& into = sum[row][n][part];
                        into = fused(into, dots[row][n][part], x_scales[M * chunk + row]);
                    });
                });
            });
            codes += blocks * I::BYTES;
            at += blocks * M * WORDS;
        }
        unroll<N>(EACH(n) {
            vf dots[M][PARTS];
            unroll<M>(EACH(row) { unroll<PARTS>(EACH(part) { dots[row][part] = sum[row][n][part]; }); });
            prefetch_scales<N>(l, panel + n * panel_bytes, group);
            vf scales[PARTS];
            readers[n].next(p, panel + n * panel_bytes, group, scales);
            scale_group<M>(p, panel + n * panel_bytes, group, window, sums, scales, dots);
            unroll<M>(EACH(row) { unroll<PARTS>(EACH(part) { totals[row][n][part] += dots[row][part]; }); });
        });
    }
    store_totals(p, first, totals);
}

// M rows, by all threads of a parallel region; each packs x for itself, so that none waits.
template <class I, int M>
void integer_rows(const Product& p) {
    const Layout& l = *p.layout;
    const int64_t chunks = l.windows * chunks_of<I>(l.width(0));
    auto* x = static_cast<uint32_t*>(scratch<7>(l.padded_cols / BLOCK * M * WORDS * sizeof(uint32_t)));
    auto* scales = static_cast<float*>(scratch<8>(chunks * M * sizeof(float)));
    auto* x_sums = static_cast<int32_t*>(scratch<9>(2 * chunks * M * sizeof(int32_t)));
    float* sums = l.zeros ? static_cast<float*>(scratch<4>(M * l.windows * sizeof(float))) : nullptr;
    pack_integers<I>(p, x, scales, x_sums);
    if (l.zeros) window_sums(p, 0, M, sums);
    each_panel<I::PANELS>(l.panels, [&](auto count, int64_t panel) {
        direct_integer<I, M, decltype(count)::value>(p, panel, x, scales, x_sums, sums);
    });
}
