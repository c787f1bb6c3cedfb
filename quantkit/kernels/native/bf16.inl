// An engine on pairs of bfloat16 for AVX-512: codes decoded to bfloat16, 16 rows of two columns in a register.

// 32 bfloat16: the 16 values twice, so that the bit above a code does not matter.
struct Table {
    alignas(64) uint16_t values[32] = {};
    constexpr Table(const float* codebook, float factor) {
        for (int code = 0; code < 32; ++code) values[code] = to_bf16(codebook[code % 16] * factor);
    }
};

template <Kind K>
constexpr Table TABLE{K == Kind::nf4 ? NF4_CODEBOOK : INT4_CODEBOOK, K == Kind::nf4 ? NF4_BF16_FACTOR : 1};

template <Kind K>
struct BF16 {
    using X = uint32_t;  // a pair of columns, the even one low
    using W = __m512i;   // 16 rows of pairs
    static constexpr int UNITS = BLOCK / 2;
    static constexpr int64_t BYTES = PANEL * BLOCK * (K == Kind::int8 ? 8 : 4) / 8;
    static constexpr float FACTOR = K == Kind::nf4 ? NF4_BF16_FACTOR : 1;

    static QUANTKIT_INLINE void decode(const uint8_t* codes, W (*out)[PARTS]) {
        if constexpr (K == Kind::int8) {
            vf columns[BLOCK][PARTS];
            decode_f32<K>(codes, columns);
            unroll<UNITS>(EACH(unit) {  // the upper half of such a float is its bfloat16
                out[unit][0] = _mm512_mask_blend_epi16(
                    0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(columns[2 * unit][0]), 16),
                    _mm512_castps_si512(columns[2 * unit + 1][0]));
            });
        } else {
            const __m512i table = _mm512_load_si512(TABLE<K>.values);
            const __m512i words = load_once(codes);
            unroll<UNITS>(EACH(unit) {
                out[unit][0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * unit), table);
            });
        }
    }
    static QUANTKIT_INLINE vf fma(vf sum, W weights, X x) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights),
                                reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x))));
    }
    static constexpr bool TAKES_BF16 = true;
    static inline void pack(const float* values, X* out) {
        for (int unit = 0; unit < UNITS; ++unit)
            out[unit] = to_bf16(values[2 * unit]) | static_cast<uint32_t>(to_bf16(values[2 * unit + 1])) << 16;
    }
};
