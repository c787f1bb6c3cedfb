// A vector of AVX-512 as `product.inl` needs it.

constexpr int LANES = 16;
typedef __m512 vf;
typedef uint32_t vu __attribute__((vector_size(64)));
typedef __m512d vd;

template <Kind K>
QUANTKIT_INLINE void decode_f32(const uint8_t* codes, vf (*out)[PANEL / LANES]);

// Entries of a table of `size`. In registers where it is short or has 256: a gather takes several times as long.
inline vf look_up(const float* table, int64_t size, vu index) {
    const auto at = reinterpret_cast<__m512i>(index);
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

template <int COUNT>
void look_up_codes(const Map& map, const uint8_t* codes, vf* out);

#ifdef __AVX512VBMI__
constexpr int TOGETHER = 4;

// Byte by byte: a permutation of bytes takes 64 of them.
template <>
inline void look_up_codes<TOGETHER>(const Map& map, const uint8_t* codes, vf* out) {
    // a lane of 128 bits ends up with four floats of each group
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i at = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
    const __mmask64 odd = _mm512_test_epi8_mask(at, _mm512_set1_epi8(64));
    const __mmask64 upper = _mm512_test_epi8_mask(at, _mm512_set1_epi8(-128));
    const auto entries = [&](const uint8_t* table) {
        const auto part = [&](int index) { return _mm512_load_si512(table + 64 * index); };
        __m512i found = _mm512_permutexvar_epi8(at, part(0));
        found = _mm512_mask_permutexvar_epi8(found, odd & ~upper, at, part(1));
        found = _mm512_mask_permutexvar_epi8(found, upper & ~odd, at, part(2));
        return _mm512_mask_permutexvar_epi8(found, upper & odd, at, part(3));
    };
    const __m512i bytes[4] = {entries(map.bytes[0]), entries(map.bytes[1]), entries(map.bytes[2]), entries(map.bytes[3])};
    const __m512i low[2] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1])};
    const __m512i high[2] = {_mm512_unpacklo_epi8(bytes[2], bytes[3]), _mm512_unpackhi_epi8(bytes[2], bytes[3])};
    for (int half = 0; half < 2; ++half) {
        out[2 * half] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low[half], high[half]));
        out[2 * half + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low[half], high[half]));
    }
}
#else
constexpr int TOGETHER = 2;

// Half by half: a permutation takes twice as many 16-bit words as floats.
template <>
inline void look_up_codes<TOGETHER>(const Map& map, const uint8_t* codes, vf* out) {
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
    const __m512i low = entries(map.halves[0]), high = entries(map.halves[1]);
    const __m512i wide = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                          5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i wider = _mm512_add_epi16(wide, _mm512_set1_epi16(16));
    out[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(low, wide, high));
    out[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(low, wider, high));
}
#endif

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

inline vf load_f16(const uint16_t* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

inline vd load_double(const float* at) { return _mm512_cvtps_pd(_mm256_loadu_ps(at)); }

inline vu load_bytes(const uint8_t* at) {
    return reinterpret_cast<vu>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
}

inline void store_bytes(vu values, uint8_t* at) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(values)));
}
