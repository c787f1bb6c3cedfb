// Decoding a token by all threads of a parallel region.
//
// Roundings to bfloat16 are those of `models/decoder.py`; attention alone keeps float32 until its result. Cheap parts
// are computed by every thread for itself. What a thread writes for others is read after the barrier that ends the
// loop, and not written again before the next one.

typedef int32_t vi __attribute__((vector_size(sizeof(vf))));

// e**x within a few units in the last place, for x clamped to [-87, 88].
inline vf exponential(vf x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    const vf shifter = splat(SHIFTER);
    const vf shifted = x * splat(1.44269504f) + shifter;
    const vf power = shifted - shifter;
    const vf rest = (x - power * splat(0.693359375f)) - power * splat(-2.12194440e-4f);  // ln 2 in two parts
    vf sum = splat(1.0f / 720);
    for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * rest + splat(factor);
    vi bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000;
    vf scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return sum * scale;
}

inline float rounded(float value) { return from_bf16(to_bf16(value)); }

inline void store_bf16(vf values, uint16_t* to) {
    alignas(64) float lanes[LANES];
    std::memcpy(lanes, &values, sizeof lanes);
    for (int lane = 0; lane < LANES; ++lane) to[lane] = to_bf16(lanes[lane]);
}

// Hidden sizes and heads are whole vectors: the caller has checked.
inline void rms_norm(const uint16_t* x, const uint16_t* weight, int64_t size, float eps, uint16_t* out) {
    vf squares[4] = {};
    for (int64_t at = 0; at < size; at += LANES) {
        const vf values = load_bf16(x + at);
        squares[at / LANES % 4] += values * values;
    }
    const float mean = horizontal((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(size);
    const float scale = 1.0f / __builtin_sqrtf(mean + eps);
    for (int64_t at = 0; at < size; at += LANES) {
        uint16_t narrow[LANES];
        store_bf16(load_bf16(x + at) * splat(scale), narrow);
        store_bf16(load_bf16(narrow) * load_bf16(weight + at), out + at);
    }
}

inline void add(const uint16_t* other, int64_t size, uint16_t* x) {
    for (int64_t at = 0; at < size; at += LANES) store_bf16(load_bf16(x + at) + load_bf16(other + at), x + at);
}

// Half-split RoPE of one head.
inline void rotate_head(const Token& t, const uint16_t* head, uint16_t* out) {
    const int64_t half = t.shape->head_dim / 2;
    const auto turn = [&](int64_t at, float swapped) {
        const float turned = rounded(swapped * from_bf16(t.sin[at]));
        out[at] = to_bf16(rounded(from_bf16(head[at]) * from_bf16(t.cos[at])) + turned);
    };
    for (int64_t at = 0; at < half; ++at) turn(at, -from_bf16(head[at + half]));
    for (int64_t at = half; at < 2 * half; ++at) turn(at, from_bf16(head[at - half]));
}

#ifndef __AVX512F__  // else `lanes512.inl` has it, by shuffles
// The sum of each of so many vectors.
inline vf horizontals(const vf (&x)[LANES]) {
    vf sums;
    for (int lane = 0; lane < LANES; ++lane) sums[lane] = horizontal(x[lane]);
    return sums;
}
#endif

// Attention of G queries (G, head_dim), scaled already, to `count` keys: for each the largest score, the sum of
// e**(score - largest), and that many times the values (head_dim,), G results `stride` floats apart.
template <int G>
void attend_chunk(const float* q, const uint16_t* keys, const uint16_t* values, int64_t count, int64_t head_dim,
                  float* out, int64_t stride) {
    alignas(64) float scores[G][KEY_CHUNK];
    const int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t first = 0; first < count; first += LANES) {
        vf sum[G][LANES];
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const int64_t key = first + lane < count ? first + lane : count - 1;  // beyond the end: not looked at
            const uint16_t* k = keys + key * head_dim;
            for (int64_t at = 0; at < head_dim; at += 32) {  // lines: keys some way ahead, and values that come next
                __builtin_prefetch(k + at + AHEAD / 2);
                __builtin_prefetch(values + key * head_dim + at);
            }
            vf products[G] = {};
            for (int64_t at = 0; at < head_dim; at += LANES) {
                const vf wide = load_bf16(k + at);
                unroll<G>(EACH(g) { products[g] = fused(products[g], wide, load(q + g * head_dim + at)); });
            }
            unroll<G>(EACH(g) { sum[g][lane] = products[g]; });
        }
        unroll<G>(EACH(g) {
            const vf sums = horizontals(sum[g]);
            std::memcpy(scores[g] + first, &sums, sizeof sums);
        });
    }
    for (int g = 0; g < G; ++g) {
        for (int64_t key = count; key < padded; ++key) scores[g][key] = -__builtin_inff();
        vf mosts = splat(-__builtin_inff()), totals = {};
        for (int64_t at = 0; at < padded; at += LANES) {
            const vf here = load(scores[g] + at);
            mosts = here > mosts ? here : mosts;
        }
        const float most = largest(mosts);
        for (int64_t at = 0; at < padded; at += LANES) {
            const vf powers = exponential(load(scores[g] + at) - splat(most));
            std::memcpy(scores[g] + at, &powers, sizeof powers);
            totals += powers;  // (those beyond `count` are e**-87 each)
        }
        out[g * stride] = most;
        out[g * stride + 1] = horizontal(totals);
    }
    auto block = [&](auto width, int64_t at) __attribute__((always_inline)) {
        constexpr int WIDTH = decltype(width)::value;
        vf sum[G][WIDTH] = {};
        for (int64_t key = 0; key < count; ++key)
            unroll<WIDTH>(EACH(part) {
                const vf v = load_bf16(values + key * head_dim + at + part * LANES);
                unroll<G>(EACH(g) { sum[g][part] = fused(sum[g][part], v, scores[g][key]); });
            });
        unroll<G>(EACH(g) { std::memcpy(out + g * stride + 2 + at, sum[g], sizeof sum[g]); });
    };
    constexpr int WIDE = LANES == 16 ? 4 : 2;
    int64_t at = 0;
    for (; at + WIDE * LANES <= head_dim; at += WIDE * LANES) block(std::integral_constant<int, WIDE>{}, at);
    for (; at < head_dim; at += LANES) block(std::integral_constant<int, 1>{}, at);
}

// Rotates what this token asks and stores, then attends, each thread to some chunks of keys for some heads.
inline void attention(const Token& t, int64_t layer) {
    const Shape& s = *t.shape;
    const int64_t chunks = (t.keys + KEY_CHUNK - 1) / KEY_CHUNK, group = s.n_heads / s.n_kv_heads;
    const int64_t stride = s.head_dim + 2, head_size = t.slots * s.head_dim;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(s.head_dim));
    uint16_t* keys = t.cache + layer * 2 * s.n_kv_heads * head_size;
    uint16_t* values = keys + s.n_kv_heads * head_size;
    float* q = static_cast<float*>(scratch<11>((group + 1) * s.head_dim * sizeof(float)));
    auto* rotated = reinterpret_cast<uint16_t*>(q + group * s.head_dim);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < s.n_kv_heads * chunks; ++item) {
        const int64_t head = item / chunks, first = item % chunks * KEY_CHUNK;
        const int64_t count = t.keys - first < KEY_CHUNK ? t.keys - first : KEY_CHUNK;
        if (t.slot >= first && t.slot < first + count) {
            const int64_t to = head * head_size + t.slot * s.head_dim;
            rotate_head(t, t.qkv + (s.n_heads + head) * s.head_dim, keys + to);
            std::memcpy(values + to, t.qkv + (s.n_heads + s.n_kv_heads + head) * s.head_dim, 2 * s.head_dim);
        }
        for (int64_t g = 0; g < group; ++g) {
            rotate_head(t, t.qkv + (head * group + g) * s.head_dim, rotated);
            for (int64_t at = 0; at < s.head_dim; ++at) q[g * s.head_dim + at] = from_bf16(rotated[at]) * scale;
        }
        const int64_t start = head * head_size + first * s.head_dim;
        for (int64_t g = 0; g < group;) {
            const int64_t left = group - g;
            const auto by = left >= 4 ? attend_chunk<4> : left == 3 ? attend_chunk<3> : left == 2 ? attend_chunk<2> : attend_chunk<1>;
            float* out = t.partials + ((head * group + g) * chunks + item % chunks) * stride;
            by(q + g * s.head_dim, keys + start, values + start, count, s.head_dim, out, chunks * stride);
            g += left >= 4 ? 4 : left;
        }
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < s.n_heads; ++head) {
        float* parts = t.partials + head * chunks * stride;
        float most = parts[0], total = 0;
        for (int64_t chunk = 1; chunk < chunks; ++chunk)
            most = parts[chunk * stride] > most ? parts[chunk * stride] : most;
        float* sum = q;
        std::memset(sum, 0, s.head_dim * sizeof(float));
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const float* part = parts + chunk * stride;
            const vf factor = exponential(splat(part[0] - most));
            total += part[1] * factor[0];
            for (int64_t at = 0; at < s.head_dim; at += LANES) {
                const vf next = fused(load(sum + at), factor, load(part + 2 + at));
                std::memcpy(sum + at, &next, sizeof next);
            }
        }
        for (int64_t at = 0; at < s.head_dim; ++at) t.attended[head * s.head_dim + at] = to_bf16(sum[at] / total);
    }
}

inline void multiply(const Token& t, const Matrix& matrix, const uint16_t* x, uint16_t* y) {
    few(Product{matrix.layout, matrix.weight, Type::bf16, x, y, 1, matrix.bias, t.threads});
}

inline void swiglu(const Token& t) {
    const int64_t ffn = t.shape->ffn;
#pragma omp for schedule(static)
    for (int64_t at = 0; at < ffn; at += LANES) {
        uint16_t narrow[LANES];
        const vf gate = load_bf16(t.gate_up + at);
        store_bf16(gate / (splat(1.0f) + exponential(-gate)), narrow);
        store_bf16(load_bf16(narrow) * load_bf16(t.gate_up + ffn + at), t.wide + at);
    }
}

void decode_in_team(const Token& t) {
    const Shape& s = *t.shape;
    auto* x = static_cast<uint16_t*>(scratch<12>(2 * s.hidden * sizeof(uint16_t)));
    uint16_t* h = x + s.hidden;
    std::memcpy(x, t.x, s.hidden * sizeof(uint16_t));
    for (int64_t index = 0; index < t.n_layers; ++index) {
        const Layer& layer = t.layers[index];
        rms_norm(x, layer.attention_norm, s.hidden, s.eps, h);
        multiply(t, layer.qkv, h, t.qkv);
        attention(t, index);
        multiply(t, layer.o, t.attended, t.o);
        add(t.o, s.hidden, x);
        rms_norm(x, layer.ffn_norm, s.hidden, s.eps, h);
        multiply(t, layer.gate_up, h, t.gate_up);
        swiglu(t);
        multiply(t, layer.down, t.wide, t.down);
        add(t.down, s.hidden, x);
    }
    rms_norm(x, t.norm, s.hidden, s.eps, h);
#pragma omp single
    std::memcpy(t.states, h, s.hidden * sizeof(uint16_t));
}
