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

// Entries for 32 codes of a table of 256 floats, whose lower and upper halves lie apart: a permutation takes twice as
// many 16-bit words as floats.
inline void look_up_32(const uint16_t (*halves)[256], const uint8_t* codes, vf* out) {
    const __m512i at = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __mmask32 second = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64));
    const __mmask32 upper = _mm512_test_epi16_mask(at, _mm512_set1_epi16(128));
    const auto entries = [&](const uint16_t* table) {
        const auto part = [&](int quarter) {
            const uint16_t* from = table + 64 * quarter;
            return _mm512_permutex2var_epi16(_mm512_load_si512(from), at, _mm512_load_si512(from + 32));
        };
        return _mm512_mask_blend_epi16(upper, _mm512_mask_blend_epi16(second, part(0), part(1)),
                                       _mm512_mask_blend_epi16(second, part(2), part(3)));
    };
    const __m512i low = entries(halves[0]), high = entries(halves[1]);
    const __m512i wide = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                          5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    out[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(low, wide, high));
    out[1] = _mm512_castsi512_ps(
        _mm512_permutex2var_epi16(low, _mm512_add_epi16(wide, _mm512_set1_epi16(16)), high));
}

inline float horizontal(vf x) { return _mm512_reduce_add_ps(x); }

// The sum of each of 16 vectors.
inline vf horizontals(const vf (&x)[LANES]) {
    vf fours[4];
    for (int index = 0; index < 4; ++index) {
        const vf* from = x + 4 * index;
        const vf first = _mm512_unpacklo_ps(from[0], from[1]) + _mm512_unpackhi_ps(from[0], from[1]);
        const vf second = _mm512_unpacklo_ps(from[2], from[3]) + _mm512_unpackhi_ps(from[2], from[3]);
        const __m512d low = _mm512_castps_pd(first), high = _mm512_castps_pd(second);
        fours[index] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high)) + _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
    const auto fold = [](vf a, vf b) { return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd); };
    return fold(fold(fours[0], fours[1]), fold(fours[2], fours[3]));
}

inline vf load_bf16(const uint16_t* at) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
