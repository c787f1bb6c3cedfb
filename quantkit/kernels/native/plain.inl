// A few rows of x by a plain bfloat16 matrix (rows, cols), read once from front to back: sums in float32.

template <int M>
QUANTKIT_INLINE void plain_row(const PlainProduct& p, const float* x, int64_t row) {
    constexpr int CHAINS = 4;        // sums in flight
    constexpr int64_t NEXT = AHEAD;  // elements: one stream, so twice as far as codes
    constexpr int64_t STEP = CHAINS * LANES;
    const uint16_t* weights = p.weight + row * p.cols;
    vf sum[CHAINS][M] = {};
    int64_t column = 0;
    for (; column + STEP <= p.cols; column += STEP) {
        unroll<(STEP * 2 + 63) / 64>(EACH(line) { prefetch_once(weights + column + 32 * line + NEXT); });
        unroll<CHAINS>(EACH(chain) {
            const int64_t at = column + chain * LANES;
            const vf values = load_bf16(weights + at);
            unroll<M>(EACH(m) { sum[chain][m] = fused(sum[chain][m], values, load(x + m * p.cols + at)); });
        });
    }
    for (; column + LANES <= p.cols; column += LANES)
        unroll<M>(EACH(m) {
            sum[0][m] = fused(sum[0][m], load_bf16(weights + column), load(x + m * p.cols + column));
        });
    for (int m = 0; m < M; ++m) {
        float total = horizontal((sum[0][m] + sum[1][m]) + (sum[2][m] + sum[3][m]));
        for (int64_t rest = column; rest < p.cols; ++rest) total += from_bf16(weights[rest]) * x[m * p.cols + rest];
        if (p.bias != nullptr) total += p.bias[row];
        p.y[m * p.rows + row] = to_bf16(total);
    }
}

template <int M>
void run_plain(const PlainProduct& p) {
    float* x = static_cast<float*>(scratch<10>(M * p.cols * sizeof(float)));
    for (int64_t index = 0; index < M * p.cols; ++index) x[index] = from_bf16(p.x[index]);
#pragma omp parallel for schedule(guided, 16) num_threads(p.threads)
    for (int64_t row = 0; row < p.rows; ++row) plain_row<M>(p, x, row);
}

inline void plain_by(const PlainProduct& p) { p.m == 1 ? run_plain<1>(p) : run_plain<2>(p); }
