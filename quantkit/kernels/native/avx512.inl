// Decoding to float32 with AVX-512: one register holds a table of 16 floats.

// Loads into a register: as an operand of every shift, the same bytes would be loaded again and again.
QUANTKIT_INLINE __m512i load_once(const uint8_t* codes) {
    __m512i words = _mm512_load_si512(codes);
    __asm__("" : "+v"(words));
    return words;
}

template <>
QUANTKIT_INLINE void decode_f32<Kind::int8>(const uint8_t* codes, vf (*out)[PARTS]) {
    unroll<2>(EACH(half) {
        const __m512i words = _mm512_xor_si512(load_once(codes + 64 * half), _mm512_set1_epi8(-128));
        unroll<4>(EACH(column) {
            out[4 * half + column][0] =
                _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 24 - 8 * column), 24));
        });
    });
}

QUANTKIT_INLINE void decode_by_table(const uint8_t* codes, const __m512 table, vf (*out)[PARTS]) {
    const __m512i words = load_once(codes);
    unroll<BLOCK>(EACH(column) {  // a lane's four lowest bits count
        out[column][0] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * column), table);
    });
}

template <>
QUANTKIT_INLINE void decode_f32<Kind::int4>(const uint8_t* codes, vf (*out)[PARTS]) {
    decode_by_table(codes, _mm512_loadu_ps(INT4_CODEBOOK), out);
}

template <>
QUANTKIT_INLINE void decode_f32<Kind::nf4>(const uint8_t* codes, vf (*out)[PARTS]) {
    decode_by_table(codes, _mm512_loadu_ps(NF4_CODEBOOK), out);
}

QUANTKIT_INLINE vf fused(vf sum, vf weights, float x) { return _mm512_fmadd_ps(weights, _mm512_set1_ps(x), sum); }
QUANTKIT_INLINE vf fused(vf sum, vf weights, vf x) { return _mm512_fmadd_ps(weights, x, sum); }
