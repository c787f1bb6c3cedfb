// One set of kernels for each instruction set. Every file below is compiled with flags of its own.
#pragma once

#include "layout.h"

namespace portable { void product(const Product&); }
#ifdef QUANTKIT_X86
namespace avx2 { void product(const Product&); }
namespace avx512 { void product(const Product&); }
namespace avx512bf16 { void product(const Product&); }
#endif
