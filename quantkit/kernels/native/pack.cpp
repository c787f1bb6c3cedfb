#include "pack.h"

#include <omp.h>

#include <cstring>

#include "pages.h"

namespace {

// Eight codes from `column` on of a row, the first in the lowest nibble; beyond `stop`, or before `start`, `blank`.
class Nibbles {
public:
    Nibbles(const Layout& l, const uint8_t* codes, int64_t row)
        : nf4_(l.kind == Kind::nf4), blank_(nf4_ ? NF4_ZERO_CODE : 8), codes_(codes) {
        // int4 rows begin with a byte; NF4 is flat
        first_ = nf4_ ? row * l.cols : row * ((l.cols + 1) / 2) * 2;
    }
    uint32_t word(int64_t column, int64_t start, int64_t stop) const {
        const int64_t at = first_ + column;
        uint32_t word = 0;
        if (column >= start && column + BLOCK <= stop && at % 2 == 0) {
            std::memcpy(&word, codes_ + at / 2, 4);
            return nf4_ ? (word & 0x0f0f0f0fu) << 4 | (word >> 4 & 0x0f0f0f0fu) : word;
        }
        for (int64_t index = 0; index < BLOCK; ++index) {
            uint32_t code = blank_;
            if (column + index >= start && column + index < stop) {
                const uint8_t byte = codes_[(at + index) / 2];
                code = ((at + index) % 2 == 0) != nf4_ ? byte & 0xf : byte >> 4;
            }
            word |= code << (4 * index);
        }
        return word;
    }

private:
    bool nf4_;
    uint32_t blank_;
    const uint8_t* codes_;
    int64_t first_;
};

template <class T>
QUANTKIT_INLINE T even_nibbles(T word) {
    word &= 0x0f0f0f0fu;
    word = (word | word >> 4) & 0x00ff00ffu;
    return (word | word >> 8) & 0xffffu;
}

// Even nibbles to the lower half, odd ones to the upper.
template <class T>
QUANTKIT_INLINE T split(T word) {
    return even_nibbles(word) | even_nibbles(word >> 4) << 16;
}

// One lane of a panel, from `begin` on: any shape.
void pack_lane(const Layout& l, const Canonical& from, int64_t first, int64_t lane, int64_t begin_at, uint8_t* to) {
    const bool inside = first + lane < l.rows;
    const int64_t row = inside ? first + lane : 0;
    const Nibbles nibbles(l, from.codes, row);
    uint8_t* at = to + 4 * lane;
    for (int64_t group = 0; group < l.groups; ++group) {
        const int64_t window = group >> l.repeat_bits;
        const int64_t begin = window * l.window;
        int64_t start = begin, stop = begin + l.window < l.cols ? begin + l.window : l.cols;
        if (l.ragged) {  // the flat block that the window begins in, then the one after it
            const int64_t edge = ((row * l.cols + begin) / l.group + 1) * l.group - row * l.cols;
            if (group % 2 == 0) stop = edge < stop ? edge : stop;
            else start = edge < stop ? edge : stop;
        }
        if (!inside) start = stop;
        for (int64_t column = begin; column < begin + l.width(window); column += BLOCK, at += 4 * PANEL) {
            if (column < begin_at) continue;
            const uint32_t word = split(nibbles.word(column, start, stop));
            std::memcpy(at, &word, 4);
        }
    }
}

typedef uint32_t Four __attribute__((vector_size(16)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Four{__VA_ARGS__})
#endif

// Four words of four rows each to four lanes of four blocks each.
QUANTKIT_INLINE void transpose(const uint8_t* rows, int64_t row_bytes, uint32_t* out) {
    Four in[4];
    for (int row = 0; row < 4; ++row) std::memcpy(in + row, rows + row * row_bytes, sizeof(Four));
    const Four low[] = {SHUFFLE(in[0], in[1], 0, 4, 1, 5), SHUFFLE(in[2], in[3], 0, 4, 1, 5)};
    const Four high[] = {SHUFFLE(in[0], in[1], 2, 6, 3, 7), SHUFFLE(in[2], in[3], 2, 6, 3, 7)};
    const Four lanes[] = {SHUFFLE(low[0], low[1], 0, 1, 4, 5), SHUFFLE(low[0], low[1], 2, 3, 6, 7),
                          SHUFFLE(high[0], high[1], 0, 1, 4, 5), SHUFFLE(high[0], high[1], 2, 3, 6, 7)};
    for (int word = 0; word < 4; ++word) std::memcpy(out + word * PANEL, lanes + word, sizeof(Four));
}

// All lanes of a panel at once; codes of a row are `row_bytes` apart. Returns how many of `blocks` it has packed.
QUANTKIT_CLONES
int64_t pack_lanes(const uint8_t* codes, int64_t row_bytes, int64_t blocks, bool nf4, uint8_t* to) {
    constexpr int64_t MOST = 16;  // blocks that are gathered before their words are split
    alignas(64) uint32_t words[MOST][PANEL];
    int64_t first = 0;
    for (; first + MOST <= blocks; first += MOST, to += sizeof words) {
        for (int64_t lane = 0; lane < PANEL; ++lane)
            __builtin_prefetch(codes + (PANEL + lane) * row_bytes + 4 * first);  // the next panel's
        for (int64_t lane = 0; lane < PANEL; lane += 4)
            for (int64_t block = 0; block < MOST; block += 4)
                transpose(codes + lane * row_bytes + 4 * (first + block), row_bytes, &words[block][lane]);
        uint32_t* flat = words[0];
        for (int64_t at = 0; at < MOST * PANEL; ++at) {
            const uint32_t word = split(flat[at]);
            flat[at] = nf4 ? word << 16 | word >> 16 : word;  // NF4's first code is the high nibble
        }
        std::memcpy(to, words, sizeof words);
    }
    return first;
}

void pack_words(const Layout& l, const Canonical& from, int64_t first, uint8_t* to) {
    int64_t whole = 0;  // columns of blocks that lie in every row and in one group
    const bool nf4 = l.kind == Kind::nf4;
    if (first + PANEL <= l.rows && !l.ragged && (!nf4 || l.cols % 2 == 0)) {
        const int64_t row_bytes = (l.cols + 1) / 2;
        whole = BLOCK * pack_lanes(from.codes + first * row_bytes, row_bytes, l.cols / BLOCK, nf4, to);
    }
    if (whole < l.padded_cols)
        for (int64_t lane = 0; lane < PANEL; ++lane) pack_lane(l, from, first, lane, whole, to);
}

void pack_bytes(const Layout& l, const Canonical& from, int64_t first, uint8_t* to) {
    constexpr int64_t WORD = 4;
    const int64_t lanes = l.rows - first < PANEL ? l.rows - first : PANEL;
    for (int64_t column = 0; column < l.padded_cols; column += WORD)
        for (int64_t lane = 0; lane < PANEL; ++lane, to += WORD) {
            const uint8_t* codes = from.codes + (first + lane) * l.cols + column;
            if (lane < lanes && column + WORD <= l.cols) {
                std::memcpy(to, codes, WORD);
                continue;
            }
            for (int64_t index = 0; index < WORD; ++index)
                to[index] = lane < lanes && column + index < l.cols ? codes[index] : 128;
        }
}

float nested_scale(const Layout& l, const Canonical& from, int64_t block) {
    const float product = l.map->values[from.scales[block]] * from.nested_scales[block / NESTED];
    return product + from.nested_offset;
}

template <int SIZE>
void pack_whole_scales(const Layout& l, const Canonical& from, int64_t first, uint8_t* to) {
    const int64_t groups = l.groups;
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t lane = 0; lane < PANEL; ++lane, to += SIZE) {
            if (first + lane < l.rows) std::memcpy(to, from.scales + ((first + lane) * groups + group) * SIZE, SIZE);
            else std::memset(to, 0, SIZE);
        }
}

void pack_ragged_scales(const Layout& l, const Canonical& from, int64_t first, uint8_t* to) {
    for (int64_t lane = 0; lane < PANEL; ++lane)
        for (int64_t group = 0; group < l.groups; ++group) {
            const int64_t row = first + lane;
            const int64_t begin = row * l.cols + group / 2 * l.window;
            const int64_t last = (l.rows * l.cols - 1) / l.group;  // a matrix may end before the second block
            const int64_t next = begin / l.group + group % 2, block = next < last ? next : last;
            float scale = 0;
            if (row < l.rows && from.nested_scales != nullptr) scale = nested_scale(l, from, block);
            else if (row < l.rows) std::memcpy(&scale, from.scales + 4 * block, 4);
            std::memcpy(to + 4 * (group * PANEL + lane), &scale, 4);
        }
}

void pack_scales(const Layout& l, const Canonical& from, int64_t first, uint8_t* to) {
    if (l.ragged) pack_ragged_scales(l, from, first, to);
    else if (l.scale_bytes == 1) pack_whole_scales<1>(l, from, first, to);
    else if (l.scale_bytes == 2) pack_whole_scales<2>(l, from, first, to);
    else pack_whole_scales<4>(l, from, first, to);
}

void pack_zeros(const Layout& l, const Canonical& from, int64_t first, uint8_t* to) {
    std::memset(to, 0, l.groups * PANEL / 2);
    for (int64_t group = 0; group < l.groups; ++group)
        for (int64_t lane = 0; lane < PANEL && first + lane < l.rows; ++lane) {
            const int64_t row = first + lane;
            const uint32_t word = static_cast<uint32_t>(from.zeros[row / 8 * l.groups + group]);
            to[group * PANEL / 2 + lane / 2] |= (word >> (row % 8 * 4) & 0xf) << (lane % 2 * 4);
        }
}

void pack_nested(const Layout& l, const Canonical& from, int64_t first, uint8_t* to) {
    const int64_t begin = first * l.groups;
    const int64_t last = (l.rows * l.groups - 1) / NESTED;
    const uint32_t start = begin % NESTED;
    std::memcpy(to, &start, 4);
    std::memcpy(to + 4, &from.nested_offset, 4);
    for (int64_t index = 0; index < l.nested_scales; ++index) {
        const int64_t at = begin / NESTED + index;
        const float scale = at <= last ? from.nested_scales[at] : 0.0f;
        std::memcpy(to + 8 + 4 * index, &scale, 4);
    }
}

}  // namespace

void pack(const Layout& layout, const Canonical& from, uint8_t* to, int threads) {
    const Layout l = layout;
    const int64_t bytes = l.rows * l.cols / (l.kind == Kind::int8 ? 1 : 2);  // of codes, about
#pragma omp parallel num_threads(threads)
    {
        const int64_t count = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t start = bytes * thread / count;  // of those that it packs, about, too: codes may lie in a file
        populate(from.codes + start, bytes * (thread + 1) / count - start);
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < l.panels; ++panel) {
        uint8_t* at = to + panel * l.panel_bytes;
        const int64_t first = panel * PANEL;
        if (l.kind == Kind::int8) pack_bytes(l, from, first, at);
        else pack_words(l, from, first, at);
        pack_scales(l, from, first, at + l.scales_at);
        if (l.zeros) pack_zeros(l, from, first, at + l.zeros_at);
        const int64_t nested = l.nested_at;
        int64_t end = nested;
        if (l.scale == Type::nested) {
            pack_nested(l, from, first, at + nested);
            end += 8 + 4 * l.nested_scales;
        }
        std::memset(at + end, 0, l.panel_bytes - end);
    }
}
