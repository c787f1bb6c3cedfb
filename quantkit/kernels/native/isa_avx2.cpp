// AVX2 and FMA: vectors of eight floats.
#include <immintrin.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "codebook.h"
#include "kernels.h"

namespace avx2 {
namespace {

constexpr int LANES = 8;
typedef __m256 vf;
constexpr int ROWS_DIRECT = 3, ROWS_TILE = 6, TILE_PANELS = 1, TILE_K = 1;

template <Kind K>
inline void decode_f32(const uint8_t* codes, vf (*out)[PANEL / LANES]);

inline vf load_bf16(const uint16_t* at) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

#include "product.inl"

// Loads into a register: as an operand of every shift, the same bytes would be loaded again and again.
inline __m256i load_once(const uint8_t* codes, int part) {
    __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes) + part);
    __asm__("" : "+x"(words));
    return words;
}

template <>
inline void decode_f32<Kind::int8>(const uint8_t* codes, vf (*out)[PARTS]) {
    const __m256i sign = _mm256_set1_epi8(-128);
    for (int part = 0; part < 2 * PARTS; ++part) {
        const __m256i words = _mm256_xor_si256(load_once(codes, part), sign);
#pragma GCC unroll 4
        for (int column = 0; column < 4; ++column)
            out[part / PARTS * 4 + column][part % PARTS] =
                _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 24 - 8 * column), 24));
    }
}

template <>
inline void decode_f32<Kind::int4>(const uint8_t* codes, vf (*out)[PARTS]) {
    const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x88));
    for (int part = 0; part < PARTS; ++part) {
        const __m256i words = _mm256_xor_si256(load_once(codes, part), sign);
#pragma GCC unroll 8
        for (int column = 0; column < BLOCK; ++column)
            out[column][part] =
                _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 28 - 4 * column), 28));
    }
}

template <>
inline void decode_f32<Kind::nf4>(const uint8_t* codes, vf (*out)[PARTS]) {
    const __m256 low = _mm256_loadu_ps(NF4_CODEBOOK), high = _mm256_loadu_ps(NF4_CODEBOOK + 8);
    for (int part = 0; part < PARTS; ++part) {
        const __m256i words = load_once(codes, part);
#pragma GCC unroll 8
        for (int column = 0; column < BLOCK; ++column) {
            const __m256i index = _mm256_srli_epi32(words, 4 * column);  // its three lowest bits count
            const __m256 half = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * column));
            out[column][part] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                 _mm256_permutevar8x32_ps(high, index), half);
        }
    }
}

inline vf fused(vf sum, vf weights, float x) { return _mm256_fmadd_ps(weights, _mm256_set1_ps(x), sum); }

#include "engines.inl"

}  // namespace

void product(const Product& p) { product_by<F32>(p); }

}  // namespace avx2
