#include "pack.h"

#include <cstring>

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

// Even nibbles to the lower half, odd ones to the upper.
uint32_t split(uint32_t word) {
    auto gather = [](uint32_t nibbles) {
        nibbles &= 0x0f0f0f0fu;
        nibbles = (nibbles | nibbles >> 4) & 0x00ff00ffu;
        return (nibbles | nibbles >> 8) & 0xffffu;
    };
    return gather(word) | gather(word >> 4) << 16;
}

void pack_words(const Layout& l, const Canonical& from, int64_t first, uint8_t* to) {
    for (int64_t lane = 0; lane < PANEL; ++lane) {
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
                const uint32_t word = split(nibbles.word(column, start, stop));
                std::memcpy(at, &word, 4);
            }
        }
    }
}

void pack_bytes(const Layout& l, const Canonical& from, int64_t first, uint8_t* to) {
    constexpr int64_t WORD = 4;
    for (int64_t lane = 0; lane < PANEL; ++lane) {
        const uint8_t* row = from.codes + (first + lane) * l.cols;
        const int64_t inside = first + lane < l.rows ? l.cols : 0;
        uint8_t* at = to + WORD * lane;
        int64_t column = 0;
        for (; column + WORD <= inside; column += WORD, at += WORD * PANEL) std::memcpy(at, row + column, WORD);
        for (; column < l.padded_cols; column += WORD, at += WORD * PANEL)
            for (int64_t index = 0; index < WORD; ++index)
                at[index] = column + index < inside ? row[column + index] : 128;
    }
}

float nested_scale(const Canonical& from, const float* map, int64_t block) {
    const float product = map[from.scales[block]] * from.nested_scales[block / NESTED];
    return product + from.nested_offset;
}

void pack_scales(const Layout& l, const Canonical& from, const float* map, int64_t first, uint8_t* to) {
    const int64_t size = l.scale_bytes, groups = l.groups;
    for (int64_t lane = 0; lane < PANEL; ++lane) {
        const int64_t row = first + lane;
        for (int64_t group = 0; group < groups; ++group) {
            uint8_t* at = to + (group * PANEL + lane) * size;
            if (row >= l.rows) {
                std::memset(at, 0, size);
            } else if (l.ragged) {
                const int64_t begin = row * l.cols + group / 2 * l.window;
                const int64_t last = (l.rows * l.cols - 1) / l.group;  // a matrix may end before the second block
                const int64_t next = begin / l.group + group % 2, block = next < last ? next : last;
                float scale;
                if (from.nested_scales != nullptr) scale = nested_scale(from, map, block);
                else std::memcpy(&scale, from.scales + 4 * block, 4);
                std::memcpy(at, &scale, 4);
            } else {
                std::memcpy(at, from.scales + (row * groups + group) * size, size);
            }
        }
    }
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

void pack(const Layout& layout, const Canonical& from, const float* map, uint8_t* to, int threads) {
    const Layout l = layout;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < l.panels; ++panel) {
        uint8_t* at = to + panel * l.panel_bytes;
        const int64_t first = panel * PANEL;
        if (l.kind == Kind::int8) pack_bytes(l, from, first, at);
        else pack_words(l, from, first, at);
        pack_scales(l, from, map, first, at + l.scales_at);
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
