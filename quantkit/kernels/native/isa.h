// Which instruction set to run. Ordered: each level includes those below it.
#pragma once

enum class Isa { portable, avx2, avx512, avx512bf16, amx };

// The level in use: the best this machine has, or a lower one that QUANTKIT_ISA names.
// Throws std::invalid_argument where the variable names none that this machine has.
Isa isa();
