// Causal attention of many queries, in bfloat16. The queries are those of the last `tokens` of `count` positions.
#pragma once

#include <cstdint>

struct Attention {
    const uint16_t* q;  // (batch, tokens, n_heads, head_dim)
    const uint16_t *keys, *values;  // (batch, n_kv_heads, count, head_dim)
    int64_t key_strides[3], value_strides[3];  // elements between two batches, two heads, and two positions
    uint16_t* out;  // (batch, tokens, n_heads, head_dim)
    int64_t batch, tokens, count, n_heads, n_kv_heads, head_dim;
    int64_t window;  // keys that a query sees at most, itself among them
    int threads;
};

constexpr int64_t MOST_HEAD_DIM = 256;
