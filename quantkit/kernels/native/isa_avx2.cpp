// AVX2 and FMA: vectors of eight floats.
#include <immintrin.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "codebook.h"
#include "kernels.h"

namespace avx2 {
namespace {

constexpr int LANES = 8;
constexpr int TOGETHER = 1;
typedef __m256 vf;
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef __m256d vd;
constexpr int ROWS_DIRECT = 3, ROWS_DIRECT_4_BITS = 3, ROWS_TILE = 6, STRIP_PANELS = 1;
constexpr int ROWS_DIRECT_BF16 = ROWS_DIRECT;

template <Kind K>
QUANTKIT_INLINE void decode_f32(const uint8_t* codes, vf (*out)[PANEL / LANES]);

inline vf look_up(const float* table, int64_t, vu index) {
    return _mm256_i32gather_ps(table, reinterpret_cast<__m256i>(index), 4);
}

inline float horizontal(vf x) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

inline vf load_bf16(const uint16_t* at) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline vf load_f16(const uint16_t* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

inline vd load_double(const float* at) { return _mm256_cvtps_pd(_mm_loadu_ps(at)); }

inline vu load_bytes(const uint8_t* at) {
    return reinterpret_cast<vu>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
}

inline void store_bytes(vu values, uint8_t* at) {
    const auto whole = reinterpret_cast<__m256i>(values);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(at), _mm_packus_epi16(halves, halves));
}

#include "product.inl"

// Loads into a register: as an operand of every shift, the same bytes would be loaded again and again.
QUANTKIT_INLINE __m256i load_once(const uint8_t* codes, int part) {
    __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes) + part);
    __asm__("" : "+x"(words));
    return words;
}

template <>
QUANTKIT_INLINE void decode_f32<Kind::int8>(const uint8_t* codes, vf (*out)[PARTS]) {
    const __m256i sign = _mm256_set1_epi8(-128);
    unroll<2 * PARTS>(EACH(part) {
        const __m256i words = _mm256_xor_si256(load_once(codes, part), sign);
        unroll<4>(EACH(column) {
            out[part / PARTS * 4 + column][part % PARTS] =
                _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 24 - 8 * column), 24));
        });
    });
}

template <>
QUANTKIT_INLINE void decode_f32<Kind::int4>(const uint8_t* codes, vf (*out)[PARTS]) {
    const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x88));
    unroll<PARTS>(EACH(part) {
        const __m256i words = _mm256_xor_si256(load_once(codes, part), sign);
        unroll<BLOCK>(EACH(column) {
            out[column][part] =
                _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 28 - 4 * column), 28));
        });
    });
}

template <>
QUANTKIT_INLINE void decode_f32<Kind::nf4>(const uint8_t* codes, vf (*out)[PARTS]) {
    const __m256 low = _mm256_loadu_ps(NF4_CODEBOOK), high = _mm256_loadu_ps(NF4_CODEBOOK + 8);
    unroll<PARTS>(EACH(part) {
        const __m256i words = load_once(codes, part);
        unroll<BLOCK>(EACH(column) {
            const __m256i index = _mm256_srli_epi32(words, 4 * column);  // its three lowest bits count
            const __m256 half = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * column));
            out[column][part] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                 _mm256_permutevar8x32_ps(high, index), half);
        });
    });
}

QUANTKIT_INLINE vf fused(vf sum, vf weights, float x) { return _mm256_fmadd_ps(weights, _mm256_set1_ps(x), sum); }
QUANTKIT_INLINE vf fused(vf sum, vf weights, vf x) { return _mm256_fmadd_ps(weights, x, sum); }

#include "engines.inl"
#include "plain.inl"

#include "integer.inl"

// int4: x in two planes of bytes, x = 256 * high + low; products of pairs fit 16 bits.
struct Planes {
    static constexpr int64_t MAX_CHUNK = 256, BYTES = 64;
    static constexpr float LIMIT = 32512, FACTOR = 1;
    static constexpr int OFFSET = 8, PANELS = 1;

    static inline void split(const int16_t* values, int64_t blocks, uint32_t* words, int64_t stride, int (&sums)[2]) {
        split_planes<true, MAX_CHUNK>(values, blocks, words, stride, sums);
    }

    template <int M, int N>
    static QUANTKIT_INLINE void dot(const uint8_t* codes, int64_t, int64_t next, int64_t blocks, const uint32_t* x,
                                    const int32_t* sums, vf (&out)[M][N][PARTS]) {
        static_assert(M == 1 && N == 1);
        const __m256i nibble = _mm256_set1_epi8(0xf), ones = _mm256_set1_epi16(1);
        __m256i total[2][PARTS];
        unroll<2>(EACH(plane) {
            unroll<PARTS>(EACH(part) { total[plane][part] = _mm256_set1_epi32(sums[plane]); });
        });
        while (blocks > 0) {
            const int64_t now = blocks < 4 ? blocks : 4;  // 8 sums of at most 2 * 15 * 128 fit 16 bits
            __m256i narrow[2][PARTS] = {};
            for (int64_t block = 0; block < now; ++block) {
                prefetch_once(codes + next);
                unroll<PARTS>(EACH(part) {
                    const __m256i bytes = load_once(codes, part);
                    const __m256i low = _mm256_and_si256(bytes, nibble);
                    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
                    unroll<2>(EACH(plane) {
                        const __m256i first = _mm256_set1_epi32(static_cast<int>(x[2 * plane]));
                        const __m256i second = _mm256_set1_epi32(static_cast<int>(x[2 * plane + 1]));
                        const __m256i pairs =
                            _mm256_add_epi16(_mm256_maddubs_epi16(low, first), _mm256_maddubs_epi16(high, second));
                        narrow[plane][part] = _mm256_add_epi16(narrow[plane][part], pairs);
                    });
                });
                codes += BYTES;
                x += WORDS;
            }
            unroll<2>(EACH(plane) {
                unroll<PARTS>(EACH(part) {
                    total[plane][part] =
                        _mm256_add_epi32(total[plane][part], _mm256_madd_epi16(narrow[plane][part], ones));
                });
            });
            blocks -= now;
        }
        unroll<PARTS>(EACH(part) {
            out[0][0][part] = fused(_mm256_cvtepi32_ps(total[1][part]), _mm256_cvtepi32_ps(total[0][part]), 256.0f);
        });
    }
};

// int8: codes and x in 16 bits; sums of a chunk fit 32, up to what the sums of x take off.
struct Wide {
    static constexpr int64_t MAX_CHUNK = 256, BYTES = 128;
    static constexpr float LIMIT = 32512, FACTOR = 1;
    static constexpr int OFFSET = 128, PANELS = 1;

    static inline void split(const int16_t* values, int64_t blocks, uint32_t* words, int64_t stride, int (&sums)[2]) {
        for (int64_t block = 0; block < blocks; ++block, values += BLOCK, words += stride) {
            std::memcpy(words, values, BLOCK * sizeof *values);
            for (int column = 0; column < BLOCK; ++column) sums[0] += values[column];
        }
    }

    template <int M, int N>
    static QUANTKIT_INLINE void dot(const uint8_t* codes, int64_t, int64_t next, int64_t blocks, const uint32_t* x,
                                    const int32_t* sums, vf (&out)[M][N][PARTS]) {
        static_assert(M == 1 && N == 1);
        const __m256i zero = _mm256_setzero_si256();
        __m256i total[2][PARTS] = {};  // rows 0 1 and 2 3 of each 128 bits, two lanes a row
        for (int64_t block = 0; block < blocks; ++block) {
            unroll<BYTES / 64>(EACH(line) { prefetch_once(codes + next + 64 * line); });
            unroll<2>(EACH(half) {  // columns 0 to 3, then 4 to 7
                long long columns;
                std::memcpy(&columns, x + 2 * half, sizeof columns);
                const __m256i factor = _mm256_set1_epi64x(columns);
                unroll<PARTS>(EACH(part) {
                    const __m256i bytes = load_once(codes, half * PARTS + part);
                    total[0][part] = _mm256_add_epi32(
                        total[0][part], _mm256_madd_epi16(_mm256_unpacklo_epi8(bytes, zero), factor));
                    total[1][part] = _mm256_add_epi32(
                        total[1][part], _mm256_madd_epi16(_mm256_unpackhi_epi8(bytes, zero), factor));
                });
            });
            codes += BYTES;
            x += WORDS;
        }
        const __m256i offset = _mm256_set1_epi32(sums[0]);
        unroll<PARTS>(EACH(part) {
            out[0][0][part] =
                _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_hadd_epi32(total[0][part], total[1][part]), offset));
        });
    }
};

// NF4: the codebook in 13 bits, x in 14, so that the sum of a chunk fits 32.
struct Pairs {
    static constexpr int64_t MAX_CHUNK = 64, BYTES = 64;
    static constexpr float LIMIT = 8191, FACTOR = 4096;
    static constexpr int OFFSET = 0, PANELS = 1;

    struct Table {
        alignas(32) uint8_t bytes[2][32] = {};
        constexpr Table() {
            for (int code = 0; code < 32; ++code) {
                const float exact = NF4_CODEBOOK[code % 16] * FACTOR;
                const auto value = static_cast<uint16_t>(static_cast<int>(exact + (exact < 0 ? -0.5f : 0.5f)));
                bytes[0][code] = static_cast<uint8_t>(value);
                bytes[1][code] = static_cast<uint8_t>(value >> 8);
            }
        }
    };
    static const Table TABLE;

    static inline void split(const int16_t* values, int64_t blocks, uint32_t* words, int64_t stride, int (&)[2]) {
        for (int64_t block = 0; block < blocks; ++block, values += BLOCK, words += stride)
            for (int index = 0; index < WORDS; ++index)
                words[index] = static_cast<uint16_t>(values[index]) | static_cast<uint32_t>(values[index + 4]) << 16;
    }

    template <int M, int N>
    static QUANTKIT_INLINE void dot(const uint8_t* codes, int64_t, int64_t next, int64_t blocks, const uint32_t* x, const int32_t*,
                                    vf (&out)[M][N][PARTS]) {
        static_assert(M == 1 && N == 1);
        const auto* table = reinterpret_cast<const __m256i*>(TABLE.bytes);
        const __m256i low_table = _mm256_load_si256(table), high_table = _mm256_load_si256(table + 1);
        const __m256i nibble = _mm256_set1_epi8(0xf);
        __m256i total[2][PARTS] = {};  // rows 0 1 and 2 3 of each 128 bits, two lanes a row
        for (int64_t block = 0; block < blocks; ++block) {
            prefetch_once(codes + next);
            unroll<PARTS>(EACH(part) {
                const __m256i bytes = load_once(codes, part);
                unroll<2>(EACH(half) {  // nibbles of columns 0 4 1 5, then of 2 6 3 7
                    const __m256i index =
                        _mm256_and_si256(half == 0 ? bytes : _mm256_srli_epi16(bytes, 4), nibble);
                    const __m256i low = _mm256_shuffle_epi8(low_table, index);
                    const __m256i high = _mm256_shuffle_epi8(high_table, index);
                    long long pairs;
                    std::memcpy(&pairs, x + 2 * half, sizeof pairs);
                    const __m256i factor = _mm256_set1_epi64x(pairs);
                    total[0][part] = _mm256_add_epi32(
                        total[0][part], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, high), factor));
                    total[1][part] = _mm256_add_epi32(
                        total[1][part], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, high), factor));
                });
            });
            codes += BYTES;
            x += WORDS;
        }
        unroll<PARTS>(EACH(part) {
            out[0][0][part] = _mm256_cvtepi32_ps(_mm256_hadd_epi32(total[0][part], total[1][part]));
        });
    }
};

constexpr Pairs::Table Pairs::TABLE;

void few(const Product& p) {
    if (p.m == 1 && p.type == Type::bf16) {
        if (p.layout->kind == Kind::int8) return integer_rows<Wide, 1>(p);
        if (p.layout->kind == Kind::int4) return integer_rows<Planes, 1>(p);
        if (p.layout->kind == Kind::nf4) return integer_rows<Pairs, 1>(p);
    }
    direct_by_kind<F32>(p);
}

void many(const Product& p) { tiled_by_kind<F32>(p); }

#include "decode.inl"
using Attending = F32<Kind::int4>;
#include "attention.inl"
#include "quantize.inl"

}  // namespace

#include "entries.inl"

}  // namespace avx2
