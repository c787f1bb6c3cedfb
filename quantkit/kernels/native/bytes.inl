// One or two rows of bfloat16 by NF4 where bytes are looked up and multiplied faster than pairs of bfloat16: x and the
// codebook both in two planes of bytes, 256 * high + low. A weight is c + 1 in steps of 1 / 16,384; what the 1 adds is
// taken off with the sums of x.
struct Bytes {
    static constexpr int64_t MAX_CHUNK = 64, BYTES = BF16<Kind::nf4>::BYTES;
    static constexpr float LIMIT = 32512, FACTOR = 16384;
    static constexpr int OFFSET = 64, PANELS = 2;  // of high bytes: 64 * 256 = FACTOR

    // High bytes, low bytes: 64 entries of 16, so that the two bits above a code do not matter.
    struct Table {
        alignas(64) uint8_t planes[2][64] = {};
        constexpr Table() {
            for (int code = 0; code < 64; ++code) {
                const auto value = static_cast<int>((NF4_CODEBOOK[code % 16] + 1) * FACTOR + 0.5f);
                planes[0][code] = static_cast<uint8_t>(value >> 8);
                planes[1][code] = static_cast<uint8_t>(value & 0xff);
            }
        }
    };
    static const Table TABLE;

    static inline void split(const int16_t* values, int64_t blocks, uint32_t* words, int64_t stride, int (&sums)[2]) {
        split_planes<true, MAX_CHUNK>(values, blocks, words, stride, sums);
    }

    // Sums of at most 64 columns; all but the last are put together as one integer of at most 64 * 2**15 * 127.
    template <int M, int N>
    static QUANTKIT_INLINE void dot(const uint8_t* codes, int64_t panel_bytes, int64_t next, int64_t blocks,
                                    const uint32_t* x, const int32_t* sums, vf (&out)[M][N][PARTS]) {
        const __m512i tables[2] = {_mm512_load_si512(TABLE.planes[0]), _mm512_load_si512(TABLE.planes[1])};
        __m512i total[2][2][M][N];  // planes of weights, planes of x
        unroll<2>(EACH(plane) {
            unroll<M>(EACH(row) {
                unroll<N>(EACH(n) {
                    total[0][plane][row][n] = _mm512_set1_epi32(sums[2 * row + plane]);
                    total[1][plane][row][n] = _mm512_setzero_si512();
                });
            });
        });
        for (int64_t block = 0; block < blocks; ++block, codes += BYTES, x += M * WORDS)
            unroll<N>(EACH(n) {
                const uint8_t* at = codes + n * panel_bytes;
                prefetch_once(at + next);
                const __m512i words = load_once(at);
                unroll<2>(EACH(half) {  // low nibbles, then high ones
                    const __m512i nibbles = half == 0 ? words : _mm512_srli_epi16(words, 4);
                    unroll<2>(EACH(table) {
                        const __m512i weights = _mm512_permutexvar_epi8(nibbles, tables[table]);
                        unroll<2>(EACH(plane) {
                            unroll<M>(EACH(row) {
                                const uint32_t word = x[row * WORDS + 2 * plane + half];
                                __m512i& into = total[table][plane][row][n];
                                into = _mm512_dpbusd_epi32(into, weights, _mm512_set1_epi32(static_cast<int>(word)));
                            });
                        });
                    });
                });
            });
        unroll<M>(EACH(row) {
            unroll<N>(EACH(n) {
                const auto& [high, low] = total;
                const __m512i mixed = _mm512_add_epi32(high[1][row][n], low[0][row][n]);
                const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(high[0][row][n], 8), mixed);
                out[row][n][0] = fused(_mm512_cvtepi32_ps(low[1][row][n]), _mm512_cvtepi32_ps(upper), 256.0f);
            });
        });
    }
};

constexpr Bytes::Table Bytes::TABLE;
