// AMX: bfloat16 in tiles, but for a row or two; all else as AVX-512 with BF16 has it.
#include <immintrin.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "codebook.h"
#include "kernels.h"

namespace amx {
namespace {

constexpr int ROWS_DIRECT_BF16 = 2;

#include "avx512bf16.inl"

#include "bytes.inl"

#include "amx.inl"

template <class I>
void one_or_two(const Product& p) {
    p.m == 1 ? integer_rows<I, 1>(p) : integer_rows<I, 2>(p);
}

void few(const Product& p) {
    if (p.type == Type::f32) return direct_by_kind<F32>(p);
    switch (p.layout->kind) {
        case Kind::int8: return one_or_two<Planes<Kind::int8>>(p);
        case Kind::int4: return one_or_two<Planes<Kind::int4>>(p);
        case Kind::nf4: return one_or_two<Bytes>(p);
    }
}

template <Kind K>
void by_pairs(const Product& p) {
    tile_rows<PairTiles, Decoder<BF16<K>>>(p);
}

void many(const Product& p) {
    if (p.type == Type::f32) return tiled_by_kind<F32>(p);
    switch (p.layout->kind) {
        case Kind::int8:
            if (!ByteTiles::takes(*p.layout)) return by_pairs<Kind::int8>(p);
            return tile_rows<ByteTiles, Loader<BF16<Kind::int8>>>(p);
        case Kind::int4: return by_pairs<Kind::int4>(p);
        case Kind::nf4: return by_pairs<Kind::nf4>(p);
    }
}

#include "decode.inl"
using Attending = F32<Kind::int4>;  // a product of bfloat16 pairs takes four times as long as of floats
#include "attention.inl"
#include "quantize.inl"

}  // namespace

#include "entries.inl"

}  // namespace amx
