// A few rows of x by a plain bfloat16 matrix (rows, cols), read once as it lies: sums in float32.

template <int M, int R>
QUANTKIT_INLINE void plain_rows(const PlainProduct& p, const float* x, int64_t first) {
    const uint16_t* weights = p.weight + first * p.cols;
    const int64_t whole = p.cols / LANES * LANES;
    vf sum[R][M] = {};
    for (int64_t column = 0; column < whole; column += LANES) {
        vf factors[M];
        unroll<M>(EACH(m) { factors[m] = load(x + m * p.cols + column); });
        unroll<R>(EACH(row) {
            const uint16_t* at = weights + row * p.cols + column;
            if (column * 2 % 64 == 0) __builtin_prefetch(at + AHEAD);  // twice as many bytes
            const vf values = load_bf16(at);
            unroll<M>(EACH(m) { sum[row][m] = fused(sum[row][m], values, factors[m]); });
        });
    }
    for (int row = 0; row < R; ++row)
        for (int m = 0; m < M; ++m) {
            alignas(64) float lanes[LANES];
            std::memcpy(lanes, &sum[row][m], sizeof lanes);
            float total = 0;
            for (int lane = 0; lane < LANES; ++lane) total += lanes[lane];
            for (int64_t column = whole; column < p.cols; ++column)
                total += from_bf16(weights[row * p.cols + column]) * x[m * p.cols + column];
            if (p.bias != nullptr) total += p.bias[first + row];
            p.y[m * p.rows + first + row] = to_bf16(total);
        }
}

template <int M>
void run_plain(const PlainProduct& p) {
    constexpr int64_t STEP = 4;
    float* x = static_cast<float*>(scratch<10>(M * p.cols * sizeof(float)));
    for (int64_t index = 0; index < M * p.cols; ++index) x[index] = from_bf16(p.x[index]);
    const int64_t steps = (p.rows + STEP - 1) / STEP;
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t step = 0; step < steps; ++step) {
        if ((step + 1) * STEP <= p.rows) {
            plain_rows<M, STEP>(p, x, step * STEP);
        } else {
            for (int64_t row = step * STEP; row < p.rows; ++row) plain_rows<M, 1>(p, x, row);
        }
    }
}

inline void plain_by(const PlainProduct& p) { p.m == 1 ? run_plain<1>(p) : run_plain<2>(p); }
