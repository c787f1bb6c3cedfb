// A vector of AVX-512 as `product.inl` needs it.

constexpr int LANES = 16;
typedef __m512 vf;

template <Kind K>
QUANTKIT_INLINE void decode_f32(const uint8_t* codes, vf (*out)[PANEL / LANES]);

inline vf gather(const float* table, const int32_t* index) {
    return _mm512_i32gather_ps(_mm512_load_si512(index), table, 4);
}

inline float horizontal(vf x) { return _mm512_reduce_add_ps(x); }

inline vf load_bf16(const uint16_t* at) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
