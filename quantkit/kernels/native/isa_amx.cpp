// AMX: bfloat16 in tiles, but for a row or two; all else as AVX-512 with BF16 has it.
#include <immintrin.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "codebook.h"
#include "kernels.h"

namespace amx {
namespace {

constexpr int ROWS_DIRECT_BF16 = 2;

#include "avx512bf16.inl"

#include "words.inl"

#include "amx.inl"

void few(const Product& p) {
    if (p.type == Type::f32) return direct_by_kind<F32>(p);
    switch (p.layout->kind) {
        case Kind::int8: return p.m == 1 ? integer_rows<Planes<Kind::int8>, 1>(p) : integer_rows<Planes<Kind::int8>, 2>(p);
        case Kind::int4: return p.m == 1 ? integer_rows<Planes<Kind::int4>, 1>(p) : integer_rows<Planes<Kind::int4>, 2>(p);
        case Kind::nf4: return p.m == 1 ? integer_rows<Words, 1>(p) : integer_rows<Words, 2>(p);
    }
}

void many(const Product& p) {
    if (p.type == Type::f32) return tiled_by_kind<F32>(p);
    switch (p.layout->kind) {
        case Kind::int8:
            if (ByteTiles::takes(*p.layout)) return tile_rows<ByteTiles, BF16<Kind::int8>, Loader<BF16<Kind::int8>>>(p);
            return tile_rows<PairTiles, BF16<Kind::int8>, Decoder<BF16<Kind::int8>>>(p);
        case Kind::int4: return tile_rows<PairTiles, BF16<Kind::int4>, Decoder<BF16<Kind::int4>>>(p);
        case Kind::nf4: return tile_rows<PairTiles, BF16<Kind::nf4>, Decoder<BF16<Kind::nf4>>>(p);
    }
}

#include "decode.inl"
using Attending = F32<Kind::int4>;  // a product of bfloat16 pairs takes four times as long as of floats
#include "attention.inl"
#include "quantize.inl"

}  // namespace

#include "entries.inl"

}  // namespace amx
