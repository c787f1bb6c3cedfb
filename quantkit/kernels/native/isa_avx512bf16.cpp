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

constexpr int ROWS_DIRECT_BF16 = 8;

#include "avx512bf16.inl"

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
using Attending = BF16<Kind::int4>;
#include "attention.inl"
#include "quantize.inl"

}  // namespace

#include "entries.inl"

}  // namespace avx512bf16
