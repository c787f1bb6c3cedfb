// One set of kernels for each instruction set. Every file below is compiled with flags of its own.
#pragma once

#include "decode.h"
#include "layout.h"

#define QUANTKIT_KERNELS(ISA)            \
    namespace ISA {                      \
    void product(const Product&);        \
    void plain(const PlainProduct&);     \
    void decode(const Token&);           \
    }

QUANTKIT_KERNELS(portable)
#ifdef QUANTKIT_X86
QUANTKIT_KERNELS(avx2)
QUANTKIT_KERNELS(avx512)
QUANTKIT_KERNELS(avx512bf16)
#endif
