// What an instruction set offers: see kernels.h.

void product(const Product& p) {
    const int most = p.layout->kind == Kind::int8 ? ROWS_DIRECT : ROWS_DIRECT_4_BITS;
    if (p.m > most || (p.type == Type::bf16 && p.m > ROWS_DIRECT_BF16)) return many(p);
#pragma omp parallel num_threads(p.threads)
    few(p);
}

void plain(const PlainProduct& p) { plain_by(p); }

void decode(const Token& t) {
#pragma omp parallel num_threads(t.threads)
    decode_in_team(t);
}

void attend(const Attention& a) { attend_all<Attending>(a); }

void quantize(const Quantization& q) {
    const Pieces pieces(q);
#pragma omp parallel for schedule(static) num_threads(q.threads)
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
        const int64_t first = piece * pieces.size, stop = pieces.stop(piece);
        auto* values = static_cast<float*>(scratch<2>((q.group + LANES) * sizeof(float)));
        auto* codes = static_cast<uint8_t*>(scratch<3>(pieces.size + LANES));
        if (q.kind == Kind::nf4) quantize_blocks(q, first, stop, values, codes);
        else quantize_row(q, piece, values, codes);
    }
}

// Sums piece by piece, so that the result is the same for any number of threads.
Squares squares(const Quantization& q) {
    const Pieces pieces(q);
    auto* parts = static_cast<Squares*>(scratch<6>(pieces.count * sizeof(Squares)));
#pragma omp parallel for schedule(static) num_threads(q.threads)
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
        const int64_t first = piece * pieces.size, stop = pieces.stop(piece);
        auto* values = static_cast<float*>(scratch<2>((pieces.size + LANES) * sizeof(float)));
        auto* codes = static_cast<uint8_t*>(scratch<3>(pieces.size + LANES));
        auto* restored = static_cast<float*>(scratch<5>((pieces.size + LANES) * sizeof(float)));
        widen(q.values, q.type, first, stop - first, values);
        restore(q, first, stop, codes, restored);
        parts[piece] = sum_squares(values, restored, stop - first);
    }
    Squares total{0, 0};
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
        total.signal += parts[piece].signal;
        total.noise += parts[piece].noise;
    }
    return total;
}
