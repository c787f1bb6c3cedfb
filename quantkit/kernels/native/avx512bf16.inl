// What `avx512bf16` and `amx` share: bfloat16 x is multiplied in pairs and summed in float32, or as integers.

#include "lanes512.inl"

constexpr int ROWS_DIRECT = 8, ROWS_DIRECT_4_BITS = 6, ROWS_TILE = 12, STRIP_PANELS = 2;

#include "product.inl"

#include "avx512.inl"

#include "engines.inl"
#include "plain.inl"

#include "bf16.inl"

#include "integer.inl"

// x in two planes of bytes, x = 256 * high + low, multiplied by VNNI.
template <Kind K>
struct Planes {
    static constexpr int64_t MAX_CHUNK = 256, BYTES = BF16<K>::BYTES;
    static constexpr float LIMIT = 32512, FACTOR = 1;
    static constexpr int OFFSET = K == Kind::int8 ? 128 : 8, PANELS = 2;

    static inline void split(const int16_t* values, int64_t blocks, uint32_t* words, int64_t stride, int (&sums)[2]) {
        split_planes<K == Kind::int4, MAX_CHUNK>(values, blocks, words, stride, sums);
    }

    template <int M, int N>
    static QUANTKIT_INLINE void dot(const uint8_t* codes, int64_t panel_bytes, int64_t next, int64_t blocks,
                                    const uint32_t* x, const int32_t* sums, vf (&out)[M][N][PARTS]) {
        __m512i total[2][2][M][N];  // halves of a block, planes: so many sums that none is waited for
        unroll<M>(EACH(row) {
            unroll<2>(EACH(plane) {
                unroll<N>(EACH(n) {
                    total[0][plane][row][n] = _mm512_set1_epi32(sums[2 * row + plane]);
                    total[1][plane][row][n] = _mm512_setzero_si512();
                });
            });
        });
        for (int64_t block = 0; block < blocks; ++block) {
            __m512i halves[2][N];
            unroll<N>(EACH(n) {
                const uint8_t* at = codes + n * panel_bytes;
                unroll<BYTES / 64>(EACH(line) { prefetch_once(at + next + 64 * line); });
                if constexpr (K == Kind::int8) {
                    halves[0][n] = load_once(at);
                    halves[1][n] = load_once(at + 64);
                } else {
                    const __m512i words = load_once(at), nibble = _mm512_set1_epi8(0xf);
                    halves[0][n] = _mm512_and_si512(words, nibble);
                    halves[1][n] = _mm512_and_si512(_mm512_srli_epi32(words, 4), nibble);
                }
            });
            unroll<2>(EACH(half) {
                unroll<2>(EACH(plane) {
                    unroll<M>(EACH(row) {
                        const __m512i word = _mm512_set1_epi32(static_cast<int>(x[row * WORDS + 2 * plane + half]));
                        unroll<N>(EACH(n) {
                            __m512i& into = total[half][plane][row][n];
                            into = _mm512_dpbusd_epi32(into, halves[half][n], word);
                        });
                    });
                });
            });
            codes += BYTES;
            x += M * WORDS;
        }
        unroll<M>(EACH(row) {
            unroll<N>(EACH(n) {
                const __m512i high = _mm512_add_epi32(total[0][0][row][n], total[1][0][row][n]);
                const __m512i low = _mm512_add_epi32(total[0][1][row][n], total[1][1][row][n]);
                out[row][n][0] = fused(_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(high), 256.0f);
            });
        });
    }
};
