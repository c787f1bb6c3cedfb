// Plain C++ on vectors of four floats, for any processor.
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "codebook.h"
#include "kernels.h"

namespace portable {
namespace {

constexpr int LANES = 4;
constexpr int TOGETHER = 1;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef double vd __attribute__((vector_size(4 * LANES)));
constexpr int ROWS_DIRECT = 2, ROWS_DIRECT_4_BITS = 2, ROWS_TILE = 2, STRIP_PANELS = 1;
constexpr int ROWS_DIRECT_BF16 = ROWS_DIRECT;

template <Kind K>
QUANTKIT_INLINE void decode_f32(const uint8_t* codes, vf (*out)[PANEL / LANES]);

inline vf look_up(const float* table, int64_t, vu index) {
    vf out;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = table[index[lane]];
    return out;
}

inline float horizontal(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }

constexpr float from_bf16(uint16_t bits);
inline float from_f16(uint16_t half);

inline vf load_bf16(const uint16_t* at) {
    return vf{from_bf16(at[0]), from_bf16(at[1]), from_bf16(at[2]), from_bf16(at[3])};
}

inline vf load_f16(const uint16_t* at) {
    return vf{from_f16(at[0]), from_f16(at[1]), from_f16(at[2]), from_f16(at[3])};
}

inline vd load_double(const float* at) { return vd{at[0], at[1]}; }
inline vu load_bytes(const uint8_t* at) { return vu{at[0], at[1], at[2], at[3]}; }

inline void store_bytes(vu values, uint8_t* at) {
    for (int lane = 0; lane < LANES; ++lane) at[lane] = static_cast<uint8_t>(values[lane]);
}

#include "product.inl"

template <>
QUANTKIT_INLINE void decode_f32<Kind::int8>(const uint8_t* codes, vf (*out)[PARTS]) {
    for (int column = 0; column < BLOCK; ++column)
        for (int part = 0; part < PARTS; ++part)
            for (int lane = 0; lane < LANES; ++lane)
                out[column][part][lane] =
                    static_cast<float>(codes[column / 4 * 64 + 4 * (part * LANES + lane) + column % 4] - 128);
}

template <Kind K>
QUANTKIT_INLINE void decode_words(const uint8_t* codes, vf (*out)[PARTS]) {
    for (int part = 0; part < PARTS; ++part)
        for (int lane = 0; lane < LANES; ++lane) {
            uint32_t word;
            std::memcpy(&word, codes + 4 * (part * LANES + lane), 4);
            for (int column = 0; column < BLOCK; ++column) {
                const uint32_t code = word >> (4 * column) & 0xf;
                out[column][part][lane] =
                    K == Kind::nf4 ? NF4_CODEBOOK[code] : static_cast<float>(static_cast<int>(code) - 8);
            }
        }
}

template <>
QUANTKIT_INLINE void decode_f32<Kind::int4>(const uint8_t* codes, vf (*out)[PARTS]) {
    decode_words<Kind::int4>(codes, out);
}

template <>
QUANTKIT_INLINE void decode_f32<Kind::nf4>(const uint8_t* codes, vf (*out)[PARTS]) {
    decode_words<Kind::nf4>(codes, out);
}

QUANTKIT_INLINE vf fused(vf sum, vf weights, float x) { return sum + weights * x; }
QUANTKIT_INLINE vf fused(vf sum, vf weights, vf x) { return sum + weights * x; }

#include "engines.inl"
#include "plain.inl"

void few(const Product& p) { direct_by_kind<F32>(p); }

void many(const Product& p) { tiled_by_kind<F32>(p); }

#include "decode.inl"
using Attending = F32<Kind::int4>;
#include "attention.inl"
#include "quantize.inl"

}  // namespace

#include "entries.inl"

}  // namespace portable
