// AVX-512 with BF16: products of pairs of bfloat16, summed in float32, where x is bfloat16.
#include <immintrin.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "codebook.h"
#include "kernels.h"

namespace avx512bf16 {
namespace {

constexpr int LANES = 16;
typedef __m512 vf;
constexpr int ROWS_DIRECT = 4, ROWS_TILE = 12, TILE_PANELS = 2, TILE_K = 1;

template <Kind K>
inline void decode_f32(const uint8_t* codes, vf (*out)[PANEL / LANES]);

#include "product.inl"

#include "avx512.inl"

#include "engines.inl"

constexpr float INT4_CODEBOOK[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};

// 32 bfloat16: the 16 values twice, so that the bit above a code does not matter.
struct Table {
    alignas(64) uint16_t values[32] = {};
    constexpr Table(const float* codebook, float factor) {
        for (int code = 0; code < 32; ++code) values[code] = to_bf16(codebook[code % 16] * factor);
    }
};

template <Kind K>
constexpr Table TABLE{K == Kind::nf4 ? NF4_CODEBOOK : INT4_CODEBOOK, K == Kind::nf4 ? NF4_BF16_FACTOR : 1};

template <Kind K>
struct BF16 {
    using X = uint32_t;  // a pair of columns, the even one low
    using W = __m512i;   // 16 rows of pairs
    static constexpr int UNITS = BLOCK / 2;
    static constexpr int64_t BYTES = PANEL * BLOCK * (K == Kind::int8 ? 8 : 4) / 8;
    static constexpr float FACTOR = K == Kind::nf4 ? NF4_BF16_FACTOR : 1;

    static inline void decode(const uint8_t* codes, W (*out)[PARTS]) {
        if constexpr (K == Kind::int8) {
            const auto* columns = reinterpret_cast<const __m128i*>(codes);
#pragma GCC unroll 4
            for (int unit = 0; unit < UNITS; ++unit) {  // the upper half of a float is its bfloat16
                const __m512 even = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(columns + 2 * unit)));
                const __m512 odd = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(columns + 2 * unit + 1)));
                out[unit][0] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(even), 16),
                                                       _mm512_castps_si512(odd));
            }
        } else {
            const __m512i table = _mm512_load_si512(TABLE<K>.values);
            const __m512i words = _mm512_load_si512(codes);
#pragma GCC unroll 4
            for (int unit = 0; unit < UNITS; ++unit)
                out[unit][0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * unit), table);
        }
    }
    static inline vf fma(vf sum, W weights, X x) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights),
                                reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x))));
    }
    static constexpr bool TAKES_BF16 = true;
    static inline void pack(const float* values, X* out) {
        for (int unit = 0; unit < UNITS; ++unit)
            out[unit] = to_bf16(values[2 * unit]) | static_cast<uint32_t>(to_bf16(values[2 * unit + 1])) << 16;
    }
};

}  // namespace

void product(const Product& p) {
    // one row of int8 is cheaper to convert to float32
    if (p.type == Type::f32 || (p.layout->kind == Kind::int8 && p.m == 1)) return product_by<F32>(p);
    product_by<BF16>(p);
}

}  // namespace avx512bf16
