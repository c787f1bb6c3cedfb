// One or two rows of bfloat16 by NF4 where pairs of integers are multiplied faster than pairs of bfloat16: x as 15 bits,
// the codebook in steps of 1 / 8,192.
struct Words {
    static constexpr int64_t MAX_CHUNK = 64, BYTES = BF16<Kind::nf4>::BYTES;
    static constexpr float LIMIT = 16383, FACTOR = 8192;
    static constexpr int OFFSET = 0, PANELS = 2;

    struct Table {
        alignas(64) int16_t values[32] = {};
        constexpr Table() {
            for (int code = 0; code < 32; ++code) {
                const float exact = NF4_CODEBOOK[code % 16] * FACTOR;
                values[code] = static_cast<int16_t>(exact + (exact < 0 ? -0.5f : 0.5f));
            }
        }
    };
    static const Table TABLE;

    static inline void split(const int16_t* values, int64_t blocks, uint32_t* words, int64_t stride, int (&)[2]) {
        for (int64_t block = 0; block < blocks; ++block, values += BLOCK, words += stride)
            std::memcpy(words, values, BLOCK * sizeof(int16_t));
    }

    // A sum has every fourth pair of at most 64 columns: 16 products of at most 2**13 (2**14 - 1).
    template <int M, int N>
    static QUANTKIT_INLINE void dot(const uint8_t* codes, int64_t panel_bytes, int64_t next, int64_t blocks,
                                    const uint32_t* x, const int32_t*, vf (&out)[M][N][PARTS]) {
        const __m512i table = _mm512_load_si512(TABLE.values);
        __m512i total[WORDS][M][N];
        unroll<WORDS>(EACH(unit) {
            unroll<M>(EACH(row) { unroll<N>(EACH(n) { total[unit][row][n] = _mm512_setzero_si512(); }); });
        });
        for (int64_t block = 0; block < blocks; ++block, codes += BYTES, x += M * WORDS)
            unroll<N>(EACH(n) {
                const uint8_t* at = codes + n * panel_bytes;
                prefetch_once(at + next);
                const __m512i words = load_once(at);
                unroll<WORDS>(EACH(unit) {
                    const __m512i weights = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * unit), table);
                    unroll<M>(EACH(row) {
                        const __m512i pair = _mm512_set1_epi32(static_cast<int>(x[row * WORDS + unit]));
                        total[unit][row][n] = _mm512_dpwssd_epi32(total[unit][row][n], weights, pair);
                    });
                });
            });
        unroll<M>(EACH(row) {
            unroll<N>(EACH(n) {
                vf sum[WORDS];
                unroll<WORDS>(EACH(unit) { sum[unit] = _mm512_cvtepi32_ps(total[unit][row][n]); });
                out[row][n][0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            });
        });
    }
};

constexpr Words::Table Words::TABLE;
