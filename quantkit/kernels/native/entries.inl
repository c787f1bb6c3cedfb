// What an instruction set offers: see kernels.h.

void product(const Product& p) {
    if (p.m > ROWS_DIRECT) return many(p);
#pragma omp parallel num_threads(p.threads)
    few(p);
}

void plain(const PlainProduct& p) { plain_by(p); }

void decode(const Token& t) {
#pragma omp parallel num_threads(t.threads)
    decode_in_team(t);
}
