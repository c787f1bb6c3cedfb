// Engines on float32: every factor is exact. KIND is what the codes are.

template <Kind K>
struct F32 {
    using X = float;
    using W = vf;
    static constexpr int UNITS = BLOCK;
    static constexpr int64_t BYTES = PANEL * BLOCK * (K == Kind::int8 ? 8 : 4) / 8;
    static constexpr float FACTOR = 1;
    static QUANTKIT_INLINE void decode(const uint8_t* codes, W (*out)[PARTS]) { decode_f32<K>(codes, out); }
    static QUANTKIT_INLINE vf fma(vf sum, W weights, X x) { return fused(sum, weights, x); }
    static constexpr bool TAKES_BF16 = false;
    static inline void pack(const float* values, X* out) {
        // a word of 4-bit codes holds columns 0 2 4 6 1 3 5 7
        for (int unit = 0; unit < UNITS; ++unit)
            out[unit] = values[K == Kind::int8 ? unit : unit < 4 ? 2 * unit : 2 * unit - 7];
    }
};

template <template <Kind> class E>
void direct_by_kind(const Product& p) {
    switch (p.layout->kind) {
        case Kind::int8: return direct_rows<E<Kind::int8>>(p);
        case Kind::int4: return direct_rows<E<Kind::int4>>(p);
        case Kind::nf4: return direct_rows<E<Kind::nf4>>(p);
    }
}

template <template <Kind> class E>
void tiled_by_kind(const Product& p) {
    switch (p.layout->kind) {
        case Kind::int8: return tiled_rows<E<Kind::int8>>(p);
        case Kind::int4: return tiled_rows<E<Kind::int4>>(p);
        case Kind::nf4: return tiled_rows<E<Kind::nf4>>(p);
    }
}
