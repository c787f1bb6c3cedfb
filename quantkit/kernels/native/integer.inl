// A few rows of bfloat16 as blocked integers: products and sums are then exact, and cost the fewest instructions.
//
// Columns are cut into chunks of at most MAX_CHUNK inside a window. A chunk of x becomes integers of a common scale,
// absmax / LIMIT: an element is off by at most absmax / (2 * LIMIT). An engine has:
//     MAX_CHUNK, LIMIT    as above
//     OFFSET              the code that stands for 0, which sums of x take off
//     split(int[BLOCK], uint32_t[WORDS], int (&sums)[2]): a block of x as `dot` reads it, and what its sums add up to
//     dot<M>(codes, blocks, x, sums, vf[M][PARTS]): in units of the chunk's scale

constexpr int WORDS = 4;  // of x in a block

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
                const int64_t stop = end < l.cols ? end : l.cols;
                uint16_t most = 0;  // magnitudes of bfloat16 compare as integers
                for (int64_t column = start; column < stop; ++column) {
                    const uint16_t magnitude = x[column] & 0x7fff;
                    most = magnitude > most ? magnitude : most;
                }
                const float absmax = from_bf16(most);  // where it is not finite, neither is any result
                const float inverse = absmax > 0 && most < 0x7f80 ? I::LIMIT / absmax : 0;
                const int64_t at = (window * per_window + chunk) * p.m + row;
                int totals[2] = {0, 0};
                for (int64_t column = start; column < end; column += BLOCK) {
                    alignas(32) float scaled[BLOCK] = {};
                    if (inverse > 0) {
                        const int64_t left = stop - column;
                        for (int index = 0; index < BLOCK; ++index)
                            if (left >= BLOCK || index < left) scaled[index] = from_bf16(x[column + index]) * inverse;
                    }
                    int values[BLOCK];
                    for (int index = 0; index < BLOCK; ++index)
                        values[index] = static_cast<int>(__builtin_rintf(scaled[index]));
                    I::split(values, words + (column / BLOCK * p.m + row) * WORDS, totals);
                }
                scales[at] = most < 0x7f80 ? absmax / I::LIMIT : __builtin_nanf("");
                sums[2 * at] = -I::OFFSET * totals[0];
                sums[2 * at + 1] = -I::OFFSET * totals[1];
            }
        }
    }
}

template <class I, int M>
void direct_integer(const Product& p, int64_t index, const uint32_t* x, const float* x_scales, const int32_t* x_sums,
                    const float* sums) {
    const Layout& l = *p.layout;
    const int64_t groups = l.groups, repeat_bits = l.repeat_bits;
    const int64_t per_window = chunks_of<I>(l.width(0));
    const uint8_t* panel = p.weight + index * l.panel_bytes;
    const uint8_t* codes = panel;
    vf totals[M][1][PARTS] = {};
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t window = group >> repeat_bits, width = l.width(window);
        const uint32_t* at = x + window * l.window / BLOCK * M * WORDS;
        int64_t chunk = window * per_window;
        vf sum[M][PARTS] = {};
        for (int64_t start = 0; start < width; start += I::MAX_CHUNK, ++chunk) {
            const int64_t blocks = (width - start < I::MAX_CHUNK ? width - start : I::MAX_CHUNK) / BLOCK;
            vf dots[M][PARTS];
            I::template dot<M>(codes, blocks, at, x_sums + 2 * M * chunk, dots);
            unroll<M>(EACH(row) {
                unroll<PARTS>(EACH(part) { sum[row][part] += dots[row][part] * x_scales[M * chunk + row]; });
            });
            codes += blocks * I::BYTES;
            at += blocks * M * WORDS;
        }
        scale_group<I, M>(p, panel, group, window, sums, sum);
        unroll<M>(EACH(row) { unroll<PARTS>(EACH(part) { totals[row][0][part] += sum[row][part]; }); });
    }
    store_totals(p, index, totals);
}

// The result of M rows, M at most 4.
template <class I, int M>
void run_integer(const Product& p) {
    const Layout& l = *p.layout;
    const int64_t chunks = l.windows * chunks_of<I>(l.width(0));
    auto* x = static_cast<uint32_t*>(scratch<5>(l.padded_cols / BLOCK * M * WORDS * sizeof(uint32_t)));
    auto* scales = static_cast<float*>(scratch<6>(chunks * M * sizeof(float)));
    auto* x_sums = static_cast<int32_t*>(scratch<7>(2 * chunks * M * sizeof(int32_t)));
    float* sums = l.zeros ? static_cast<float*>(scratch<4>(M * l.windows * sizeof(float))) : nullptr;
    pack_integers<I>(p, x, scales, x_sums);
    if (l.zeros) window_sums(p, 0, M, sums);
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t panel = 0; panel < l.panels; ++panel) direct_integer<I, M>(p, panel, x, scales, x_sums, sums);
}
