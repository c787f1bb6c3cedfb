// One token of one sequence through all layers: pre-norm blocks of attention and SwiGLU, in bfloat16.
#pragma once

#include "layout.h"

struct Matrix {
    const Layout* layout;
    const uint8_t* weight;
    const float* bias;  // (rows,) or null
};

struct Layer {
    const uint16_t* attention_norm;  // (hidden,)
    Matrix qkv, o;
    const uint16_t* ffn_norm;
    Matrix gate_up, down;
};

struct Shape {
    int64_t hidden, ffn, n_heads, n_kv_heads, head_dim;
    float eps;
};

struct Token {
    const Shape* shape;
    const Layer* layers;
    int64_t n_layers;
    const uint16_t* norm;        // (hidden,), the final one
    const uint16_t* x;           // (hidden,), the embedding
    const uint16_t *cos, *sin;   // (head_dim,), of the token's position
    uint16_t* cache;             // (n_layers, 2, n_kv_heads, slots, head_dim)
    int64_t slots, slot, keys;   // slot: where this token goes; the first `keys` slots are attended to
    uint16_t* states;            // (hidden,): the result, normed
    // what threads hand each other
    uint16_t *qkv, *attended, *o, *gate_up, *wide, *down;
    float* partials;             // (n_heads, chunks of keys, head_dim + 2)
    int threads;
};

constexpr int64_t KEY_CHUNK = 128;  // keys whose attention one thread computes at a time
