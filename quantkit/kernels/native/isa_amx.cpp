// AMX: many rows of bfloat16 in tiles; all else as AVX-512 with BF16 has it.
#include <immintrin.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "codebook.h"
#include "kernels.h"

namespace amx {
namespace {

#include "lanes512.inl"

constexpr int ROWS_DIRECT = 4, ROWS_TILE = 1, STRIP_PANELS = 1;

#include "product.inl"

#include "avx512.inl"
#include "bf16.inl"

#include "amx.inl"

}  // namespace

void product(const Product& p) {
    if (p.type != Type::bf16 || p.m <= (p.layout->kind == Kind::int8 ? ROWS_DIRECT : 2)) return avx512bf16::product(p);
    switch (p.layout->kind) {
        case Kind::int8: return tile_rows<BF16<Kind::int8>>(p);
        case Kind::int4: return tile_rows<BF16<Kind::int4>>(p);
        case Kind::nf4: return tile_rows<BF16<Kind::nf4>>(p);
    }
}

void plain(const PlainProduct& p) { avx512bf16::plain(p); }
void decode(const Token& t) { avx512bf16::decode(t); }
void attend(const Attention& a) { avx512bf16::attend(a); }
void quantize(const Quantization& q) { avx512bf16::quantize(q); }
Squares squares(const Quantization& q) { return avx512bf16::squares(q); }

}  // namespace amx
