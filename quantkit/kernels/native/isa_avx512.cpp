// AVX-512: vectors of sixteen floats, a panel's width.
#include <immintrin.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "codebook.h"
#include "kernels.h"

namespace avx512 {
namespace {

#include "lanes512.inl"

constexpr int ROWS_DIRECT = 4, ROWS_DIRECT_4_BITS = 4, ROWS_TILE = 12, STRIP_PANELS = 2;
constexpr int ROWS_DIRECT_BF16 = ROWS_DIRECT;

#include "product.inl"

#include "avx512.inl"

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

}  // namespace avx512
