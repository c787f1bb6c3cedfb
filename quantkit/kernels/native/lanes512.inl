// A vector of AVX-512 as `product.inl` needs it.

constexpr int LANES = 16;
typedef __m512 vf;

template <Kind K>
QUANTKIT_INLINE void decode_f32(const uint8_t* codes, vf (*out)[PANEL / LANES]);

// Entries of a table of `size`. In registers where it is short or has 256: a gather takes several times as long.
inline vf look_up(const float* table, int64_t size, const int32_t* index) {
    const __m512i at = _mm512_load_si512(index);
    if (size <= 16) {
        const auto inside = static_cast<__mmask16>((1u << size) - 1);
        return _mm512_permutexvar_ps(at, _mm512_maskz_loadu_ps(inside, table));
    }
    if (size != 256) return _mm512_i32gather_ps(at, table, 4);
    const auto entry = [&](int part) {
        return _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32 * part), at, _mm512_loadu_ps(table + 32 * part + 16));
    };
    const auto choose = [&](int bit, __m512 low, __m512 high) {
        return _mm512_mask_blend_ps(_mm512_test_epi32_mask(at, _mm512_set1_epi32(bit)), low, high);
    };
    const __m512 first = choose(64, choose(32, entry(0), entry(1)), choose(32, entry(2), entry(3)));
    const __m512 second = choose(64, choose(32, entry(4), entry(5)), choose(32, entry(6), entry(7)));
    return choose(128, first, second);
}

inline float horizontal(vf x) { return _mm512_reduce_add_ps(x); }

inline vf load_bf16(const uint16_t* at) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
