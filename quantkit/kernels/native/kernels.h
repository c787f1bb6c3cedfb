// One set of kernels for each instruction set. Every file below is compiled with flags of its own.
#pragma once

#include "attention.h"
#include "decode.h"
#include "isa.h"
#include "layout.h"
#include "pages.h"
#include "quantize.h"

#define QUANTKIT_KERNELS(ISA)            \
    namespace ISA {                      \
    void product(const Product&);        \
    void plain(const PlainProduct&);     \
    void decode(const Token&);           \
    void attend(const Attention&);       \
    void quantize(const Quantization&);  \
    Squares squares(const Quantization&);\
    }

QUANTKIT_KERNELS(portable)
#ifdef QUANTKIT_X86
QUANTKIT_KERNELS(avx2)
QUANTKIT_KERNELS(avx512)
QUANTKIT_KERNELS(avx512bf16)
#ifdef QUANTKIT_AMX
QUANTKIT_KERNELS(amx)
#else
namespace amx = avx512bf16;  // the compiler knows no tiles
#endif
// Calls the function of one level.
#define QUANTKIT_CALL(LEVEL, FUNCTION, ARGUMENT)                           \
    ((LEVEL) == Isa::amx          ? amx::FUNCTION(ARGUMENT)                \
     : (LEVEL) == Isa::avx512bf16 ? avx512bf16::FUNCTION(ARGUMENT)         \
     : (LEVEL) == Isa::avx512   ? avx512::FUNCTION(ARGUMENT)               \
     : (LEVEL) == Isa::avx2     ? avx2::FUNCTION(ARGUMENT)                 \
                                : portable::FUNCTION(ARGUMENT))
#else
#define QUANTKIT_CALL(LEVEL, FUNCTION, ARGUMENT) portable::FUNCTION(ARGUMENT)
#endif
