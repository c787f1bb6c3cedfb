// Quantizing: values to codes and scales, as `quantize/integer.py` and `quantize/nf4.py` define them.

constexpr int64_t CHUNK = 1 << 13;  // elements of a flattened matrix that one thread takes, at least

inline vf least(vf a, vf b) { return a < b ? a : b; }
inline vf most(vf a, vf b) { return a > b ? a : b; }

// To the nearest integer, ties to even, below 2**22; what is beyond stays beyond.
template <class T>
inline T nearest(T value) {
    constexpr float shifter = 12582912.0f;  // 1.5 * 2**23
    return (value + shifter) - shifter;
}

// Elements from `first` on as float32, with zeros up to a whole vector.
inline void widen(const void* values, Type type, int64_t first, int64_t count, float* out) {
    if (type == Type::f32) {
        std::memcpy(out, static_cast<const float*>(values) + first, count * sizeof(float));
    } else {
        const auto* from = static_cast<const uint16_t*>(values) + first;
        if (type == Type::bf16)
            for (int64_t at = 0; at < count; ++at) out[at] = from_bf16(from[at]);
        else
            for (int64_t at = 0; at < count; ++at) out[at] = from_f16(from[at]);
    }
    for (int64_t at = count; at % LANES != 0; ++at) out[at] = 0;
}

// A scale as it is stored: at least the type's smallest normal number.
inline float storable(float scale, Type type) {
    const float smallest = type == Type::f16 ? 0x1p-14f : 0x1p-126f;
    const float largest = type == Type::f16 ? 65504.0f : type == Type::bf16 ? 0x1.fep127f : 0x1.fffffep127f;
    scale = scale < smallest ? smallest : scale > largest ? largest : scale;
    if (type == Type::bf16) return from_bf16(to_bf16(scale));
    if (type == Type::f16) {  // 10 bits of the fraction
        uint32_t bits = __builtin_bit_cast(uint32_t, scale);
        bits = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu;
        return __builtin_bit_cast(float, bits);
    }
    return scale;
}

// Stores what `storable` returned.
inline void store_scale(float scale, Type type, void* scales, int64_t at) {
    if (type == Type::f32) static_cast<float*>(scales)[at] = scale;
    else if (type == Type::bf16) static_cast<uint16_t*>(scales)[at] = to_bf16(scale);
    else static_cast<uint16_t*>(scales)[at] =
        static_cast<uint16_t>((__builtin_bit_cast(uint32_t, scale) - 0x38000000u) >> 13);
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
    Range found{0, 0};
    for (int lane = 0; lane < LANES; ++lane) {
        found.low = low[lane] < found.low ? low[lane] : found.low;
        found.high = high[lane] > found.high ? high[lane] : found.high;
    }
    return found;
}

inline float absmax(const float* values, int64_t count) {
    const Range found = range(values, count);
    return found.high >= -found.low ? found.high : -found.low;  // +0 of zeros
}

// The squared error in units of the scale, of codes `low` to `high`.
inline float lost(const float* values, int64_t count, float scale, float low, float high) {
    const vf lowest = splat(low), highest = splat(high), unit = splat(scale);
    vf sum{};
    for (int64_t at = 0; at < count; at += LANES) {
        const vf exact = load(values + at) / unit;
        const vf distance = least(most(nearest(exact), lowest), highest) - exact;
        sum += distance * distance;
    }
    return horizontal(sum);
}

// Codes of one group, `zero` being that of 0, `low` to `high` about it.
inline void encode(const float* values, int64_t count, float scale, float low, float high, float zero, uint8_t* out) {
    const vf lowest = splat(low), highest = splat(high), unit = splat(scale), shift = splat(zero);
    for (int64_t at = 0; at < count; at += LANES) {
        const vf code = least(most(nearest(load(values + at) / unit), lowest), highest) + shift;
        for (int lane = 0; lane < LANES; ++lane) out[at + lane] = static_cast<uint8_t>(static_cast<int>(code[lane]));
    }
}

// int8 spreads 127 steps over the largest value. int4 tries several scales, in units of the first, so that squares
// of tiny or huge weights stay within float32. `out` has room for whole vectors.
inline void quantize_group(const Quantization& q, const float* values, int64_t count, int64_t group, uint8_t* out) {
    if (q.kind == Kind::int8) {
        const float scale = storable(absmax(values, count) / 127, q.scale_type);
        store_scale(scale, q.scale_type, q.scales, group);
        return encode(values, count, scale, -127, 127, 128, out);
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
    const float low = -zero, high = 15 - zero, unit = storable(base, q.scale_type);
    float best = unit, least_lost = __builtin_inff();
    for (int index = 0; index < q.tried; ++index) {
        const float scale = storable(base * q.factors[index], q.scale_type), ratio = scale / unit;
        const float error = lost(values, count, scale, low, high) * (ratio * ratio);
        if (error < least_lost) least_lost = error, best = scale;
    }
    store_scale(best, q.scale_type, q.scales, group);
    encode(values, count, best, low, high, zero, out);
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
    uint8_t* out = q.codes + row * ((q.cols + 1) / 2);
    if (q.cols % 2 != 0) codes[q.cols] = 0;
    for (int64_t at = 0; at < (q.cols + 1) / 2; ++at)
        out[at] = static_cast<uint8_t>(codes[2 * at] | codes[2 * at + 1] << 4);
}

// Counts the codebook's midpoints below each value. A whole block multiplies by its reciprocal, a short last one
// divides and stores its divisor: bitsandbytes does, and a bit of a code may hang on it.
inline void quantize_block(const Quantization& q, float* values, int64_t count, int64_t block, uint8_t* out) {
    constexpr float smallest = 1e-38f;
    const float largest = absmax(values, count), divisor = largest < smallest ? smallest : largest;
    static_cast<float*>(q.scales)[block] = count == q.group ? largest : divisor;
    const vf inverse = splat(1.0f / divisor), divide = splat(divisor);
    for (int64_t at = 0; at < count; at += LANES) {
        const vf scaled = count == q.group ? load(values + at) * inverse : load(values + at) / divide;
        vf code{};
        unroll<15>(EACH(index) {
            constexpr float midpoint = (NF4_CODEBOOK[index] + NF4_CODEBOOK[index + 1]) / 2;
            code += scaled > splat(midpoint) ? splat(1) : splat(0);
        });
        for (int lane = 0; lane < LANES; ++lane) out[at + lane] = static_cast<uint8_t>(static_cast<int>(code[lane]));
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
    uint8_t* out = q.codes + first / 2;
    for (int64_t at = 0; at < (stop - first + 1) / 2; ++at)
        out[at] = static_cast<uint8_t>(codes[2 * at] << 4 | codes[2 * at + 1]);
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

// Restores one piece of the matrix; `codes` has room for one more.
inline void restore(const Quantization& q, int64_t first, int64_t stop, uint8_t* codes, float* out) {
    const bool nf4 = q.kind == Kind::nf4;
    const int64_t count = stop - first, row = nf4 ? 0 : first / q.cols, groups = (q.cols + q.group - 1) / q.group;
    if (q.kind == Kind::int8) {
        std::memcpy(codes, q.codes + first, count);
    } else {
        const uint8_t* bytes = q.codes + (nf4 ? first / 2 : row * ((q.cols + 1) / 2));
        const int even = nf4 ? 4 : 0;
        for (int64_t at = 0; at < (count + 1) / 2; ++at) {
            codes[2 * at] = bytes[at] >> even & 0xf;
            codes[2 * at + 1] = bytes[at] >> (4 - even) & 0xf;
        }
    }
    for (int64_t begin = 0; begin < count; begin += q.group) {
        const int64_t end = count - begin < q.group ? count : begin + q.group;
        const int64_t group = nf4 ? (first + begin) / q.group : row * groups + begin / q.group;
        const float scale = load_scale(q.scale_type, q.scales, group);
        if (nf4) {
            for (int64_t at = begin; at < end; ++at) out[at] = NF4_CODEBOOK[codes[at]] * scale;
        } else {
            const int zero = q.kind == Kind::int8 ? 128 : q.zeros == nullptr ? 8 : q.zeros[group];
            for (int64_t at = begin; at < end; ++at) out[at] = static_cast<float>(codes[at] - zero) * scale;
        }
    }
}

inline Squares sum_squares(const float* values, const float* restored, int64_t count) {
    constexpr int64_t SUMS = 8;  // so that no addition waits for the one before it
    double signal[SUMS] = {}, noise[SUMS] = {};
    const auto add = [&](int64_t at, int64_t sum) {
        const double value = values[at], error = value - static_cast<double>(restored[at]);
        signal[sum] += value * value;
        noise[sum] += error * error;
    };
    int64_t at = 0;
    for (; at + SUMS <= count; at += SUMS)
        for (int64_t sum = 0; sum < SUMS; ++sum) add(at + sum, sum);
    for (; at < count; ++at) add(at, 0);
    Squares total{0, 0};
    for (int64_t sum = 0; sum < SUMS; ++sum) total.signal += signal[sum], total.noise += noise[sum];
    return total;
}
