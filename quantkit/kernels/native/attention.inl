// Causal attention of many queries: keys and values of a head are packed once, as panels that rows of queries meet.
//
// Queries that share a key head make one matrix: its row r is of token r / group and of head r % group. Up to ROWS_TILE
// rows meet CHUNK_KEYS keys at a time; softmax keeps each row's largest score and its sum, and scales what it has when
// a chunk brings a larger one. Scores and sums are float32; in pairs of bfloat16, so are powers before they meet values.

constexpr int64_t CHUNK_KEYS = 256;
constexpr int64_t STRIP = STRIP_PANELS * PANEL;  // lanes
constexpr int64_t up_to_strips(int64_t size) { return (size + STRIP - 1) / STRIP * STRIP; }

template <class E>
constexpr int64_t DEPTH = E::TAKES_BF16 ? 2 : 1;  // columns of a unit

// One unit from `first` and, where it is a pair, `second`.
template <class E>
QUANTKIT_INLINE typename E::X unit_of(uint16_t first, uint16_t second) {
    if constexpr (E::TAKES_BF16) return first | static_cast<uint32_t>(second) << 16;
    else return from_bf16(first);
}

// Keys of a strip: (head_dim / DEPTH, STRIP), zeros beyond the last.
template <class E>
void pack_keys(const Attention& a, const uint16_t* keys, int64_t first, typename E::X* out) {
    const int64_t units = a.head_dim / DEPTH<E>;
    for (int64_t lane = 0; lane < STRIP; ++lane) {
        const uint16_t* key = keys + (first + lane) * a.key_strides[2];
        for (int64_t unit = 0; unit < units; ++unit) {
            const uint16_t* at = key + unit * DEPTH<E>;
            out[unit * STRIP + lane] = first + lane < a.count ? unit_of<E>(at[0], at[DEPTH<E> - 1]) : 0;
        }
    }
}

// Values of DEPTH keys from `first` on: a row of every strip of dimensions, `stride` elements apart.
template <class E>
void pack_values(const Attention& a, const uint16_t* values, int64_t first, int64_t stride, typename E::X* out) {
    const int64_t second = first + DEPTH<E> - 1, step = a.value_strides[2];
    for (int64_t strip = 0; strip < up_to_strips(a.head_dim); strip += STRIP, out += stride)
        for (int64_t lane = 0; lane < STRIP; ++lane) {
            const bool inside = strip + lane < a.head_dim;
            const uint16_t* at = values + strip + lane;
            out[lane] = unit_of<E>(inside && first < a.count ? at[first * step] : 0,
                                   inside && second < a.count ? at[second * step] : 0);
        }
}

// A row of scores to powers, in units as `multiply_strip` takes them; keys before `first` and from `stop` on count for
// nothing. Returns the factor that earlier sums have to be scaled by.
template <class E>
QUANTKIT_INLINE float soften(float* scores, int64_t padded, int64_t first, int64_t stop, float& most, float& total,
                             typename E::X* powers) {
    const vf nothing = splat(-__builtin_inff());
    vf top = nothing;
    alignas(64) float places[LANES];
    for (int lane = 0; lane < LANES; ++lane) places[lane] = static_cast<float>(lane);
    for (int64_t at = 0; at < padded; at += LANES) {
        vf score = load(scores + at);
        if (at < first || at + LANES > stop) {
            const vf place = load(places) + splat(static_cast<float>(at));
            score = place < splat(static_cast<float>(first)) ? nothing : score;
            score = place < splat(static_cast<float>(stop)) ? score : nothing;
            std::memcpy(scores + at, &score, sizeof score);
        }
        top = score > top ? score : top;
    }
    const float before = most, now = largest(top);
    most = now > before ? now : before;
    const vf shift = splat(most < -3.0e38f ? 0.0f : most);  // a window may hide a whole chunk
    vf sum{};
    for (int64_t at = 0; at < padded; at += LANES) {
        const vf power = exponential(load(scores + at) - shift);
        sum += power;
        if constexpr (E::TAKES_BF16) store_bf16(power, reinterpret_cast<uint16_t*>(powers) + at);
        else std::memcpy(powers + at, &power, sizeof power);
    }
    const float factor = exponential(splat(before) - shift)[0];
    total = total * factor + horizontal(sum);
    return factor;
}

// M rows of one key head, from `first` on.
template <class E, int M>
void attend_rows(const Attention& a, int64_t batch, int64_t head, int64_t first, const typename E::X* keys,
                 const typename E::X* values) {
    using X = typename E::X;
    using W = typename E::W;
    constexpr int64_t WIDTH = STRIP_PANELS * PARTS;
    const int64_t group = a.n_heads / a.n_kv_heads, units = a.head_dim / DEPTH<E>, dims = up_to_strips(a.head_dim);
    const int64_t value_units = up_to_strips(a.count) / DEPTH<E>;
    alignas(64) X q[M][MOST_HEAD_DIM / DEPTH<E>], powers[M][CHUNK_KEYS / DEPTH<E>];
    alignas(64) float scores[M][CHUNK_KEYS], out[M][MOST_HEAD_DIM], most[M], total[M], factor[M];
    int64_t place[M], position[M];  // of a row's query in q and in out, and among the keys
    for (int row = 0; row < M; ++row) {
        const int64_t token = (first + row) / group;
        position[row] = a.count - a.tokens + token;
        place[row] = ((batch * a.tokens + token) * a.n_heads + head * group + (first + row) % group) * a.head_dim;
        const uint16_t* from = a.q + place[row];
        for (int64_t unit = 0; unit < units; ++unit, from += DEPTH<E>)
            q[row][unit] = unit_of<E>(from[0], from[DEPTH<E> - 1]);
        most[row] = -__builtin_inff(), total[row] = 0;
        std::memset(out[row], 0, dims * sizeof(float));
    }
    const vf scale = splat(1.0f / __builtin_sqrtf(static_cast<float>(a.head_dim)));
    const int64_t stop = position[M - 1] + 1, seen = position[0] + 1 - a.window;
    for (int64_t chunk = seen > 0 ? seen / STRIP * STRIP : 0; chunk < stop; chunk += CHUNK_KEYS) {
        const int64_t padded = up_to_strips(stop - chunk < CHUNK_KEYS ? stop - chunk : CHUNK_KEYS);
        for (int64_t strip = 0; strip < padded; strip += STRIP) {
            vf sum[M][WIDTH] = {};
            const auto* panel = reinterpret_cast<const W*>(keys + (chunk + strip) * units);
            multiply_strip<E, M, MOST_HEAD_DIM / DEPTH<E>, 1>(panel, q[0], units, sum);
            unroll<M>(EACH(row) {
                unroll<WIDTH>(EACH(part) {
                    const vf scaled = sum[row][part] * scale;
                    std::memcpy(scores[row] + strip + part * LANES, &scaled, sizeof scaled);
                });
            });
        }
        for (int row = 0; row < M; ++row)
            factor[row] = soften<E>(scores[row], padded, position[row] + 1 - a.window - chunk, position[row] + 1 - chunk,
                                    most[row], total[row], powers[row]);
        for (int64_t dim = 0; dim < dims; dim += STRIP) {
            vf sum[M][WIDTH] = {};
            const auto* panel = reinterpret_cast<const W*>(values + dim * value_units + chunk / DEPTH<E> * STRIP);
            multiply_strip<E, M, CHUNK_KEYS / DEPTH<E>, 1>(panel, powers[0], padded / DEPTH<E>, sum);
            unroll<M>(EACH(row) {
                unroll<WIDTH>(EACH(part) {
                    float* at = out[row] + dim + part * LANES;
                    const vf whole = load(at) * splat(factor[row]) + sum[row][part];
                    std::memcpy(at, &whole, sizeof whole);
                });
            });
        }
    }
    for (int row = 0; row < M; ++row)
        for (int64_t at = 0; at < a.head_dim; at += LANES)
            store_bf16(load(out[row] + at) * splat(1.0f / total[row]), a.out + place[row] + at);
}

template <class E, std::size_t... I>
auto attend_of(int64_t rows, std::index_sequence<I...>) {
    using Attend = void (*)(const Attention&, int64_t, int64_t, int64_t, const typename E::X*, const typename E::X*);
    static constexpr Attend kernels[] = {attend_rows<E, static_cast<int>(I) + 1>...};
    return kernels[rows - 1];
}

template <class E>
void attend_all(const Attention& a) {
    using X = typename E::X;
    const int64_t padded = up_to_strips(a.count), units = padded / DEPTH<E>;
    auto* keys = static_cast<X*>(scratch<13>(padded * a.head_dim / DEPTH<E> * sizeof(X)));
    auto* values = static_cast<X*>(scratch<14>(units * up_to_strips(a.head_dim) * sizeof(X)));
    const Blocks blocks(a.tokens * (a.n_heads / a.n_kv_heads), ROWS_TILE);
#pragma omp parallel num_threads(a.threads)
    for (int64_t item = 0; item < a.batch * a.n_kv_heads; ++item) {
        const int64_t batch = item / a.n_kv_heads, head = item % a.n_kv_heads;
        const uint16_t* key = a.keys + batch * a.key_strides[0] + head * a.key_strides[1];
        const uint16_t* value = a.values + batch * a.value_strides[0] + head * a.value_strides[1];
#pragma omp for schedule(static) nowait
        for (int64_t strip = 0; strip < padded; strip += STRIP)
            pack_keys<E>(a, key, strip, keys + strip * (a.head_dim / DEPTH<E>));
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < units; ++unit)
            pack_values<E>(a, value, unit * DEPTH<E>, units * STRIP, values + unit * STRIP);
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < blocks.count; ++index) {
            const int64_t block = blocks.count - 1 - index;  // the longest rows first
            attend_of<E>(blocks.size(block), std::make_index_sequence<ROWS_TILE>())(
                a, batch, head, blocks.start(block), keys, values);
        }
    }
}
