// How a repacked matrix lies in memory, and the parameters of one multiplication.
//
// Rows are taken 16 at a time. Such a panel is one stream of bytes, read once from front to back:
//
//     codes | scales | zero points | nested scales | padding to 64 bytes
//
// Codes lie in blocks of 8 columns. A group is what shares a scale in each row; its columns are padded to whole
// blocks with codes that meet zeros of x.
//
//     4 bits, 64 bytes a block: 32-bit word r belongs to row r; its low half holds columns 0 2 4 6 and its high
//     half columns 1 3 5 7, least significant nibble first, so that one shift leaves a column in every 32-bit lane
//     and a pair of neighbours in every pair of 16-bit lanes.
//     8 bits, 128 bytes a block: 32-bit word r of the first half holds columns 0 1 2 3 of row r, of the second 4 5 6 7.
//     int4 and int8 stay in offset binary, the code of 0 being 8 and 128.
//
// Scales: 16 a group, in the type they are stored in. Zero points (asymmetric int4): 8 bytes a group, low nibble
// first, offset binary. Nested scales (NF4, double-quantized): the first block's place in its nested block (u32),
// the offset (f32), and the panel's nested scales (f32).
//
// NF4's blocks run over the flattened matrix. Where they do not divide a row, every window of `block` columns
// meets two of them: its codes are stored twice, each time with those of the other block replaced by the code of 0.
#pragma once

#include <cstdint>

// Files are compiled for different instruction sets: a function emitted by one must not serve another.
#define QUANTKIT_INLINE __attribute__((always_inline)) inline

// A plain loop for several instruction sets, chosen when the module is loaded.
#if defined(QUANTKIT_X86) && defined(__GLIBC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define QUANTKIT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define QUANTKIT_CLONES
#endif

constexpr int64_t PANEL = 16;      // rows
constexpr int64_t BLOCK = 8;       // columns
constexpr uint32_t NESTED = 256;  // scales that share a nested scale
constexpr int NF4_ZERO_CODE = 7;

enum class Kind : int { int8, int4, nf4 };
enum class Type : int { f32, bf16, f16, nested };  // of scales; x and the result are f32 or bf16

// The values of nested scales' 256 codes: as they are, and their halves and bytes apart, the lowest first.
struct Map {
    float values[256];
    alignas(64) uint16_t halves[2][256];
    alignas(64) uint8_t bytes[4][256];

    QUANTKIT_INLINE explicit Map(const float* from) {
        for (int code = 0; code < 256; ++code) {
            values[code] = from[code];
            const uint32_t bits = __builtin_bit_cast(uint32_t, from[code]);
            for (int half = 0; half < 2; ++half) halves[half][code] = static_cast<uint16_t>(bits >> 16 * half);
            for (int byte = 0; byte < 4; ++byte) bytes[byte][code] = static_cast<uint8_t>(bits >> 8 * byte);
        }
    }
};

struct Layout {
    Kind kind;
    int64_t rows, cols;
    int64_t group;  // columns that share a scale, cols where the whole row does; NF4: elements of a block
    Type scale;
    bool zeros;
    const Map* map;  // of nested scales, else null

    // derived
    bool ragged;          // NF4 blocks that do not divide a row
    int64_t window;       // columns of a window
    int64_t windows;      // of a row; the last may be narrower
    int64_t last_width;   // its columns, padded to whole blocks
    int64_t repeat_bits;  // a window has 1 << repeat_bits groups
    int64_t groups;
    int64_t padded_cols;
    int64_t scale_bytes;
    int64_t nested_scales;  // of a panel: enough wherever it starts
    int64_t panels;
    int64_t scales_at, zeros_at, nested_at, panel_bytes;
    int64_t nbytes;

    QUANTKIT_INLINE Layout(Kind kind_, int64_t rows_, int64_t cols_, int64_t group_, Type scale_, bool zeros_,
                           const Map* map_)
        : kind(kind_), rows(rows_), cols(cols_), group(group_), scale(scale_), zeros(zeros_), map(map_) {
        ragged = kind == Kind::nf4 && cols % group != 0;
        if (ragged && scale == Type::nested) scale = Type::f32;  // unfolded when packed
        window = group < cols ? group : cols;
        windows = (cols + window - 1) / window;
        last_width = (cols - (windows - 1) * window + BLOCK - 1) / BLOCK * BLOCK;
        repeat_bits = ragged ? 1 : 0;
        groups = windows << repeat_bits;
        padded_cols = (windows - 1) * window + last_width;
        scale_bytes = scale == Type::f32 ? 4 : scale == Type::nested ? 1 : 2;
        nested_scales = scale == Type::nested ? (PANEL * groups + NESTED - 2) / NESTED + 1 : 0;
        panels = (rows + PANEL - 1) / PANEL;
        scales_at = PANEL * padded_cols * (kind == Kind::int8 ? 8 : 4) / 8 << repeat_bits;
        zeros_at = scales_at + groups * PANEL * scale_bytes;
        nested_at = zeros_at + (zeros ? groups * PANEL / 2 : 0);
        const int64_t end = nested_at + (scale == Type::nested ? 8 + 4 * nested_scales : 0);
        panel_bytes = (end + 63) / 64 * 64;
        nbytes = panels * panel_bytes;
    }
    // columns of a window, padded to whole blocks
    QUANTKIT_INLINE int64_t width(int64_t index) const {
        return index + 1 < windows ? window : windows == 1 ? padded_cols : last_width;
    }
};

// y (m, rows) = x (m, cols) times the matrix transposed, plus bias (rows,) or null. Rows of x and y are contiguous.
struct Product {
    const Layout* layout;
    const uint8_t* weight;
    Type type;  // of x and y: f32 or bf16
    const void* x;
    void* y;
    int64_t m;
    const float* bias;
    int threads;
};

// y (m, rows) = x (m, cols) times a bfloat16 matrix (rows, cols) transposed, plus bias (rows,) or null; m is 1 or 2.
struct PlainProduct {
    const uint16_t* weight;
    int64_t rows, cols;
    const uint16_t* x;
    uint16_t* y;
    int64_t m;
    const float* bias;
    int threads;
};

// Canonical parts of a matrix, as QuantizedTensor has them.
struct Canonical {
    const uint8_t* codes;
    const uint8_t* scales;
    const int32_t* zeros;        // or null
    const float* nested_scales;  // or null
    float nested_offset;
};
