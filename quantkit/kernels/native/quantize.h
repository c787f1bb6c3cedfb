// The parameters of quantizing a matrix, and of summing what that loses.
#pragma once

#include <cstdint>

#include "layout.h"

// A plain (rows, cols) matrix, and its codes and scales in canonical layout: see Python's `QuantizedTensor`.
struct Quantization {
    const void* values;
    Type type;  // f32, bf16 or f16
    int64_t rows, cols;

    Kind kind;
    int64_t group;  // columns that share a scale; NF4: elements of the flattened matrix
    uint8_t* codes;
    void* scales;      // (rows, groups) of scale_type; NF4: float32 absmax of each block
    Type scale_type;   // f32, bf16 or f16
    uint8_t* zeros;    // (rows, groups), one byte each; null where int4 is symmetric
    const float* factors;  // on the absmax scale, that int4 tries; the first wins ties
    int tried;
    int threads;
};

struct Squares {
    double signal;  // of the values
    double noise;   // of what the codes lose of them
};
