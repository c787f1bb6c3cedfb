// Quantizing: values to codes and scales, as `quantize/integer.py` and `quantize/nf4.py` define them.

constexpr int64_t CHUNK = 1 << 13;  // elements of a flattened matrix that one thread takes, at least
constexpr int TRIED_TOGETHER = 4;   // scales of a group, so that no sum is waited for

inline vf least(vf a, vf b) { return a < b ? a : b; }
inline vf most(vf a, vf b) { return a > b ? a : b; }

inline vf whole(vu values) { return __builtin_convertvector(reinterpret_cast<vi>(values), vf); }

// To the nearest integer, ties to even, below 2**22; what is beyond stays beyond.
template <class T>
inline T nearest(T value) {
    return (value + SHIFTER) - SHIFTER;
}

// Elements from `first` on as float32, with zeros up to a whole vector.
inline void widen(const void* values, Type type, int64_t first, int64_t count, float* out) {
    if (type == Type::f32) {
        std::memcpy(out, static_cast<const float*>(values) + first, count * sizeof(float));
    } else {
        const auto* from = static_cast<const uint16_t*>(values) + first;
        int64_t at = 0;
        for (; at + LANES <= count; at += LANES) {
            const vf wide = type == Type::bf16 ? load_bf16(from + at) : load_f16(from + at);
            std::memcpy(out + at, &wide, sizeof wide);
        }
        for (; at < count; ++at) out[at] = type == Type::bf16 ? from_bf16(from[at]) : from_f16(from[at]);
    }
    for (int64_t at = count; at % LANES != 0; ++at) out[at] = 0;
}

constexpr float SMALLEST_F16 = 0x1p-24f, NORMAL_F16 = 0x1p-14f;

// Scales as they are stored: at least the type's smallest number that is normal in float32.
inline vf storable(vf scale, Type type) {
    const float smallest = type == Type::f16 ? SMALLEST_F16 : 0x1p-126f;
    const float largest = type == Type::f16 ? 65504.0f : type == Type::bf16 ? 0x1.fep127f : 0x1.fffffep127f;
    scale = least(most(scale, splat(smallest)), splat(largest));
    if (type == Type::f32) return scale;
    const int dropped = type == Type::bf16 ? 16 : 13;  // bits of the fraction
    const uint32_t rest = (1u << dropped) - 1;
    const vu bits = reinterpret_cast<vu>(scale);
    const vf rounded = reinterpret_cast<vf>((bits + (rest >> 1) + (bits >> dropped & 1)) & ~rest);
    if (type == Type::bf16) return rounded;
    const vf subnormal = (scale + 0.5f) - 0.5f;  // to a multiple of SMALLEST_F16, the unit of float32 from 0.5 to 1
    return scale < NORMAL_F16 ? subnormal : rounded;
}

inline float storable(float scale, Type type) { return storable(splat(scale), type)[0]; }

// Stores what `storable` returned.
inline void store_scale(float scale, Type type, void* scales, int64_t at) {
    if (type == Type::f32) static_cast<float*>(scales)[at] = scale;
    else if (type == Type::bf16) static_cast<uint16_t*>(scales)[at] = to_bf16(scale);
    else static_cast<uint16_t*>(scales)[at] = static_cast<uint16_t>(
        scale < NORMAL_F16 ? static_cast<uint32_t>(scale / SMALLEST_F16)
                           : (__builtin_bit_cast(uint32_t, scale) - 0x38000000u) >> 13);
}

inline float load_scale(Type type, const void* scales, int64_t at) {
    if (type == Type::f32) return static_cast<const float*>(scales)[at];
    const uint16_t bits = static_cast<const uint16_t*>(scales)[at];
    return type == Type::bf16 ? from_bf16(bits) : from_f16(bits);
}

struct Range {
    float low, high;  // never beyond 0
};

inline Range range(const float* values, int64_t count) {
    vf low{}, high{};
    for (int64_t at = 0; at < count; at += LANES) {
        const vf here = load(values + at);
        low = least(low, here), high = most(high, here);
    }
    return {-largest(-low), largest(high)};
}

inline float absmax(const float* values, int64_t count) {
    vf found{};
    for (int64_t at = 0; at < count; at += LANES)
        found = most(found, reinterpret_cast<vf>(reinterpret_cast<vu>(load(values + at)) & 0x7fffffffu));
    return largest(found);
}

// The squared errors, in units of the scale, of a few scales and of codes `low` to `high`. They only tell scales
// apart: reciprocals will do. (A function by itself, or GCC would keep sums in memory.)
__attribute__((noinline)) inline void lost(const float* values, int64_t count, const float* inverses, float low,
                                           float high, vf* sums) {
    const vf lowest = splat(SHIFTER + low), highest = splat(SHIFTER + high), shifter = splat(SHIFTER);
    vf inverse[TRIED_TOGETHER], sum[TRIED_TOGETHER] = {};
    unroll<TRIED_TOGETHER>(EACH(index) { inverse[index] = splat(inverses[index]); });
    for (int64_t at = 0; at < count; at += LANES) {
        const vf value = load(values + at);
        unroll<TRIED_TOGETHER>(EACH(index) {
            const vf code = least(most(fused(shifter, value, inverse[index]), lowest), highest) - shifter;
            const vf distance = fused(code, value, -inverse[index]);
            sum[index] = fused(sum[index], distance, distance);
        });
    }
    unroll<TRIED_TOGETHER>(EACH(index) { sums[index] = sum[index]; });
}

// The best scale that int4 finds for a group: of those it tries, the first that loses least.
inline float search(const Quantization& q, const float* values, int64_t count, float base, float low, float high) {
    const float unit = storable(base, q.scale_type);
    float best = unit, least_lost = __builtin_inff();
    for (int first = 0; first < q.tried; first += LANES) {
        const int tried = q.tried - first < LANES ? q.tried - first : LANES;
        alignas(64) float scales[LANES], inverses[LANES], errors[LANES];
        for (int index = 0; index < LANES; ++index) scales[index] = q.factors[first + (index < tried ? index : 0)];
        const vf scale = storable(load(scales) * base, q.scale_type), ratio = scale / unit, inverse = 1 / scale;
        std::memcpy(scales, &scale, sizeof scale);
        std::memcpy(inverses, &inverse, sizeof inverse);
        vf sums[LANES];
        for (int index = 0; index < LANES; index += TRIED_TOGETHER) {
            if (index < tried) lost(values, count, inverses + index, low, high, sums + index);
            else unroll<TRIED_TOGETHER>(EACH(next) { sums[index + next] = vf{}; });
        }
        const vf error = horizontals(sums) * (ratio * ratio);
        std::memcpy(errors, &error, sizeof error);
        for (int index = 0; index < tried; ++index)
            if (errors[index] < least_lost) least_lost = errors[index], best = scales[index];
    }
    return best;
}

// Codes of one group, `zero` being that of 0, `low` to `high` about it.
inline void encode(const float* values, int64_t count, float scale, float low, float high, float zero, uint8_t* out) {
    const vf lowest = splat(low), highest = splat(high), unit = splat(scale), shift = splat(zero);
    for (int64_t at = 0; at < count; at += LANES) {
        const vf code = least(most(nearest(load(values + at) / unit), lowest), highest) + shift;
        store_bytes(reinterpret_cast<vu>(__builtin_convertvector(code, vi)), out + at);
    }
}

// Two codes to a byte and back, the even element's in the low nibble or, `HIGH_FIRST`, in the high one.
template <bool HIGH_FIRST>
inline void pack_codes(const uint8_t* codes, int64_t bytes, uint8_t* __restrict out) {
    for (int64_t at = 0; at < bytes; ++at) {
        uint16_t pair;
        std::memcpy(&pair, codes + 2 * at, sizeof pair);
        out[at] = static_cast<uint8_t>(HIGH_FIRST ? pair << 4 | pair >> 8 : pair | pair >> 4);
    }
}

template <bool HIGH_FIRST>
inline void unpack_codes(const uint8_t* bytes, int64_t count, uint8_t* __restrict codes) {
    for (int64_t at = 0; at < count; ++at) {
        const unsigned low = bytes[at] & 0xf, high = bytes[at] >> 4;
        const auto pair = static_cast<uint16_t>(HIGH_FIRST ? high | low << 8 : low | high << 8);
        std::memcpy(codes + 2 * at, &pair, sizeof pair);
    }
}

// int8 spreads 127 steps over the largest value. int4 tries several scales, in units of the first, so that squares
// of tiny or huge weights stay within float32. `out` has room for whole vectors.
inline void quantize_group(const Quantization& q, const float* values, int64_t count, int64_t group, uint8_t* out) {
    if (q.kind == Kind::int8) {
        const float scale = storable(absmax(values, count) / 127, q.scale_type);
        store_scale(scale, q.scale_type, q.scales, group);
        return encode(values, count, scale, -128, 127, 128, out);
    }
    float base, zero = 8;
    if (q.zeros == nullptr) {
        base = absmax(values, count) / 7.5f;
    } else {
        const Range found = range(values, count);
        base = storable((found.high - found.low) / 15, q.scale_type);
        zero = nearest(-found.low / base);
        zero = zero > 15 ? 15 : zero;
        q.zeros[group] = static_cast<uint8_t>(zero);
    }
    const float best = search(q, values, count, base, -zero, 15 - zero);
    store_scale(best, q.scale_type, q.scales, group);
    encode(values, count, best, -zero, 15 - zero, zero, out);
}

inline void quantize_row(const Quantization& q, int64_t row, float* values, uint8_t* codes) {
    const int64_t groups = (q.cols + q.group - 1) / q.group;
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * q.group, count = q.cols - first < q.group ? q.cols - first : q.group;
        widen(q.values, q.type, row * q.cols + first, count, values);
        quantize_group(q, values, count, row * groups + group, codes + first);
    }
    if (q.kind == Kind::int8) {
        std::memcpy(q.codes + row * q.cols, codes, q.cols);
        return;
    }
    const int64_t bytes = (q.cols + 1) / 2;
    if (q.cols % 2 != 0) codes[q.cols] = 0;
    pack_codes<false>(codes, bytes, q.codes + row * bytes);
}

struct Midpoints {
    float values[15] = {};
    constexpr Midpoints() {
        for (int code = 0; code < 15; ++code) values[code] = (NF4_CODEBOOK[code] + NF4_CODEBOOK[code + 1]) / 2;
    }
};
constexpr Midpoints MIDPOINTS;

// How many midpoints of the codebook are below each value.
inline vu nf4_codes(vf values) {
    vu code{};
    if constexpr (LANES == 16) {  // one permutation looks all lanes up: bit by bit
        unroll<4>(EACH(index) {
            constexpr uint32_t bit = 8 >> index;
            code += values > look_up(MIDPOINTS.values, 15, code + (bit - 1)) ? vu{} + bit : vu{};
        });
    } else {
        unroll<15>(EACH(index) { code += values > splat(MIDPOINTS.values[index]) ? vu{} + 1 : vu{}; });
    }
    return code;
}

// A whole block multiplies by its reciprocal, a short last one divides and stores its divisor: bitsandbytes does, and a
// bit of a code may hang on it.
inline void quantize_block(const Quantization& q, float* values, int64_t count, int64_t block, uint8_t* out) {
    constexpr float smallest = 1e-38f;
    const float greatest = absmax(values, count), divisor = greatest < smallest ? smallest : greatest;
    static_cast<float*>(q.scales)[block] = count == q.group ? greatest : divisor;
    const vf inverse = splat(1.0f / divisor), divide = splat(divisor);
    for (int64_t at = 0; at < count; at += LANES) {
        const vf scaled = count == q.group ? load(values + at) * inverse : load(values + at) / divide;
        store_bytes(nf4_codes(scaled), out + at);
    }
}

// An even number of blocks from `first` on.
inline void quantize_blocks(const Quantization& q, int64_t first, int64_t stop, float* values, uint8_t* codes) {
    for (int64_t at = first; at < stop; at += q.group) {
        const int64_t count = stop - at < q.group ? stop - at : q.group;
        widen(q.values, q.type, at, count, values);
        quantize_block(q, values, count, at / q.group, codes + (at - first));
    }
    if (stop % 2 != 0) codes[stop - first] = NF4_ZERO_CODE;
    pack_codes<true>(codes, (stop - first + 1) / 2, q.codes + first / 2);
}

// Pieces that threads take: rows, or even numbers of NF4's blocks.
struct Pieces {
    int64_t elements, size, count;
    explicit Pieces(const Quantization& q) : elements(q.rows * q.cols) {
        const int64_t pair = 2 * q.group;
        size = q.kind != Kind::nf4 ? q.cols : (CHUNK + pair - 1) / pair * pair;
        count = (elements + size - 1) / size;
    }
    int64_t stop(int64_t piece) const { return (piece + 1) * size < elements ? (piece + 1) * size : elements; }
};

// Restores one piece of the matrix; `codes` and `out` have room for whole vectors.
inline void restore(const Quantization& q, int64_t first, int64_t stop, uint8_t* codes, float* out) {
    const int64_t count = stop - first, row = first / q.cols, groups = (q.cols + q.group - 1) / q.group;
    if (q.kind == Kind::int8) std::memcpy(codes, q.codes + first, count);
    else if (q.kind == Kind::int4) unpack_codes<false>(q.codes + row * ((q.cols + 1) / 2), (count + 1) / 2, codes);
    else unpack_codes<true>(q.codes + first / 2, (count + 1) / 2, codes);
    for (int64_t begin = 0; begin < count; begin += q.group) {
        const int64_t end = count - begin < q.group ? count : begin + q.group;
        const int64_t group = q.kind == Kind::nf4 ? (first + begin) / q.group : row * groups + begin / q.group;
        const vf scale = splat(load_scale(q.scale_type, q.scales, group));
        const vf zero = splat(q.kind == Kind::int8 ? 128 : q.zeros == nullptr ? 8 : q.zeros[group]);
        for (int64_t at = begin; at < end; at += LANES) {
            const vu code = load_bytes(codes + at);
            const vf value = q.kind == Kind::nf4 ? look_up(NF4_CODEBOOK, 16, code & 0xf) : whole(code) - zero;
            const vf restored = value * scale;
            std::memcpy(out + at, &restored, sizeof restored);
        }
    }
}

inline Squares sum_squares(const float* values, const float* restored, int64_t count) {
    constexpr int SUMS = 2, WIDTH = LANES / 2;  // so that fewer additions wait for the one before them
    vd signal[SUMS] = {}, noise[SUMS] = {};
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES)
        unroll<SUMS>(EACH(sum) {
            const vd value = load_double(values + at + WIDTH * sum);
            const vd error = value - load_double(restored + at + WIDTH * sum);
            signal[sum] += value * value;
            noise[sum] += error * error;
        });
    Squares total{0, 0};
    for (; at < count; ++at) {
        const double value = values[at], error = value - static_cast<double>(restored[at]);
        total.signal += value * value;
        total.noise += error * error;
    }
    for (int sum = 0; sum < SUMS; ++sum)
        for (int lane = 0; lane < WIDTH; ++lane) total.signal += signal[sum][lane], total.noise += noise[sum][lane];
    return total;
}
