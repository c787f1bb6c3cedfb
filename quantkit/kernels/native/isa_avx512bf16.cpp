// AVX-512 with BF16 and VNNI: bfloat16 x is multiplied in pairs and summed in float32, or as integers.
#include <immintrin.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "codebook.h"
#include "kernels.h"

namespace avx512bf16 {
namespace {

#include "lanes512.inl"

constexpr int ROWS_DIRECT = 4, ROWS_TILE = 12, TILE_PANELS = 2, TILE_K = 1;

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
    static constexpr int OFFSET = K == Kind::int8 ? 128 : 8, PANELS = 4;

    static inline void split(const int* values, uint32_t* words, int (&sums)[2]) {
        // as the bytes of a word of int8 codes, or the nibbles of int4's: low ones, then high ones
        static constexpr int COLUMNS[2][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {0, 4, 1, 5, 2, 6, 3, 7}};
        int8_t planes[2][BLOCK];
        for (int index = 0; index < BLOCK; ++index) {
            const int value = values[COLUMNS[K == Kind::int4][index]];
            const int high = (value + 128) >> 8, low = value - 256 * high;
            planes[0][index] = static_cast<int8_t>(high);
            planes[1][index] = static_cast<int8_t>(low);
            sums[0] += high;
            sums[1] += low;
        }
        std::memcpy(words, planes, sizeof planes);
    }

    template <int M, int N>
    static QUANTKIT_INLINE void dot(const uint8_t* codes, int64_t panel_bytes, int64_t blocks, const uint32_t* x,
                                    const int32_t* sums, vf (&out)[M][N][PARTS]) {
        __m512i total[2][2][M][N];  // planes, halves of a block
        unroll<M>(EACH(row) {
            unroll<2>(EACH(plane) {
                unroll<N>(EACH(n) {
                    total[plane][0][row][n] = _mm512_set1_epi32(sums[2 * row + plane]);
                    total[plane][1][row][n] = _mm512_setzero_si512();
                });
            });
        });
        for (int64_t block = 0; block < blocks; ++block) {
            __m512i halves[2][N];
            unroll<N>(EACH(n) {
                const uint8_t* at = codes + n * panel_bytes;
                unroll<BYTES / 64>(EACH(line) { prefetch<N>(at + 64 * line); });
                if constexpr (K == Kind::int8) {
                    halves[0][n] = load_once(at);
                    halves[1][n] = load_once(at + 64);
                } else {
                    const __m512i words = load_once(at), nibble = _mm512_set1_epi8(0xf);
                    halves[0][n] = _mm512_and_si512(words, nibble);
                    halves[1][n] = _mm512_and_si512(_mm512_srli_epi32(words, 4), nibble);
                }
            });
            unroll<2>(EACH(plane) {
                unroll<2>(EACH(half) {
                    unroll<M>(EACH(row) {
                        const __m512i word = _mm512_set1_epi32(static_cast<int>(x[row * WORDS + 2 * plane + half]));
                        unroll<N>(EACH(n) {
                            total[plane][half][row][n] =
                                _mm512_dpbusd_epi32(total[plane][half][row][n], halves[half][n], word);
                        });
                    });
                });
            });
            codes += BYTES;
            x += M * WORDS;
        }
        unroll<M>(EACH(row) {
            unroll<N>(EACH(n) {
                const __m512i high = _mm512_add_epi32(total[0][0][row][n], total[0][1][row][n]);
                const __m512i low = _mm512_add_epi32(total[1][0][row][n], total[1][1][row][n]);
                out[row][n][0] = _mm512_cvtepi32_ps(high) * 256.0f + _mm512_cvtepi32_ps(low);
            });
        });
    }
};

template <Kind K>
void few_bf16(const Product& p) {
    switch (p.m) {
        case 1: return integer_rows<Planes<K>, 1>(p);
        case 2: return integer_rows<Planes<K>, 2>(p);
        default: return direct_rows<BF16<K>>(p);
    }
}

void few(const Product& p) {
    if (p.type == Type::f32) return direct_by_kind<F32>(p);
    if (p.layout->kind == Kind::int8) return few_bf16<Kind::int8>(p);
    if (p.layout->kind == Kind::int4) return few_bf16<Kind::int4>(p);
    direct_rows<BF16<Kind::nf4>>(p);
}

void many(const Product& p) { p.type == Type::f32 ? tiled_by_kind<F32>(p) : tiled_by_kind<BF16>(p); }

#include "decode.inl"
#include "quantize.inl"

}  // namespace

#include "entries.inl"

}  // namespace avx512bf16
