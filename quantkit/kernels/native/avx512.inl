// Decoding to float32 with AVX-512: one register holds a table of 16 floats.

template <>
inline void decode_f32<Kind::int8>(const uint8_t* codes, vf (*out)[PARTS]) {
#pragma GCC unroll 8
    for (int column = 0; column < BLOCK; ++column) {
        const auto* at = reinterpret_cast<const __m128i*>(codes) + column;
        out[column][0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(at)));
    }
}

inline void decode_by_table(const uint8_t* codes, const __m512 table, vf (*out)[PARTS]) {
    const __m512i words = _mm512_load_si512(codes);
#pragma GCC unroll 8
    for (int column = 0; column < BLOCK; ++column)  // a lane's four lowest bits count
        out[column][0] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * column), table);
}

template <>
inline void decode_f32<Kind::int4>(const uint8_t* codes, vf (*out)[PARTS]) {
    decode_by_table(codes, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1), out);
}

template <>
inline void decode_f32<Kind::nf4>(const uint8_t* codes, vf (*out)[PARTS]) {
    decode_by_table(codes, _mm512_loadu_ps(NF4_CODEBOOK), out);
}

inline vf fused(vf sum, vf weights, float x) { return _mm512_fmadd_ps(weights, _mm512_set1_ps(x), sum); }
