// Memory itself: advice about its pages, filling it from files, and how fast it can be read, which is the line that a
// kernel that streams weights is held to. No single way of reading is the fastest on every machine, so there are
// several, and the caller takes the best.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "pages.h"

namespace nb = nanobind;

namespace {

// Half a cache line; the compiler splits it where the target's registers are narrower.
typedef uint64_t Words __attribute__((vector_size(32), may_alias));

constexpr int64_t LINE = 64;        // bytes of a cache line
constexpr int64_t STEP = 4 * LINE;  // bytes of one stream in one turn of the loop
constexpr int64_t PIECE = 1 << 20;  // bytes of a file that a thread reads at a time

struct Reader {
    const char* name;
    int streams;    // places that one thread reads in turn
    int64_t ahead;  // bytes between what is read and what is prefetched; 0: no prefetch
};

constexpr Reader READERS[] = {
    {"plain", 1, 0},
    {"prefetch-512", 1, 512},
    {"prefetch-2048", 1, 2048},
    {"prefetch-8192", 1, 8192},
    {"prefetch-16384", 1, 16384},
    {"streams-2", 2, 0},
    {"streams-4", 4, 0},
    {"streams-2-prefetch-4096", 2, 4096},
};

const Reader& find(const std::string& name) {
    std::string known;
    for (const Reader& reader : READERS) {
        if (name == reader.name) return reader;
        known += (known.empty() ? "" : ", ") + std::string(reader.name);
    }
    throw std::invalid_argument("reader is '" + name + "'; known are " + known);
}

// Sums all 8-byte words. Four sums, so that no addition waits for the one before it. Prefetching beyond the end is
// harmless: it never faults.
template <int STREAMS, bool PREFETCH>
[[gnu::always_inline]] inline uint64_t sum(const uint8_t* start, int64_t bytes, int64_t ahead) {
    Words first{}, second{}, third{}, fourth{};
    const int64_t stride = bytes / STREAMS / STEP * STEP;
    for (int64_t at = 0; at < stride; at += STEP)
        for (int stream = 0; stream < STREAMS; ++stream)
            for (int64_t pair = 0; pair < STEP; pair += 2 * LINE) {
                const uint8_t* here = start + stream * stride + at + pair;
                if (PREFETCH) __builtin_prefetch(here + ahead), __builtin_prefetch(here + ahead + LINE);
                const auto* words = reinterpret_cast<const Words*>(here);
                first += words[0], second += words[1], third += words[2], fourth += words[3];
            }
    for (int64_t at = stride * STREAMS; at < bytes; at += LINE) {
        const auto* words = reinterpret_cast<const Words*>(start + at);
        first += words[0], second += words[1];
    }
    first += second + third + fourth;
    return first[0] + first[1] + first[2] + first[3];
}

QUANTKIT_CLONES
uint64_t sum_by(const Reader& reader, const uint8_t* start, int64_t bytes) {
    const int64_t ahead = reader.ahead;
    switch (reader.streams) {
        case 2: return ahead ? sum<2, true>(start, bytes, ahead) : sum<2, false>(start, bytes, 0);
        case 4: return sum<4, false>(start, bytes, 0);
        default: return ahead ? sum<1, true>(start, bytes, ahead) : sum<1, false>(start, bytes, 0);
    }
}

// Returns the sum modulo 2**64 of the buffer's 8-byte words; each thread reads one piece of it.
uint64_t read_buffer(const Array& buffer, const std::string& name, int threads) {
    check(buffer, "buffer", {nb::dtype<uint8_t>()}, -1, LINE);
    if (buffer.size() % LINE != 0) throw std::invalid_argument("buffer must be whole lines of 64 bytes");
    check_threads(threads);
    const Reader& reader = find(name);
    const auto* start = data<const uint8_t>(buffer);
    const int64_t lines = buffer.size() / LINE;
    uint64_t total = 0;
    nb::gil_scoped_release released;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
    for (int thread = 0; thread < threads; ++thread) {
        const int64_t first = lines * thread / threads, last = lines * (thread + 1) / threads;
        total += sum_by(reader, start + first * LINE, (last - first) * LINE);
    }
    return total;
}

bool advise(const Array& buffer, bool wanted) {
    check(buffer, "buffer", {nb::dtype<uint8_t>()});
    return advise_huge_pages(buffer.data(), buffer.size(), wanted);
}

// Fills `out` from byte `offset` of an open file on, by all threads; returns the bytes that the file had.
int64_t read_file(int file, int64_t offset, const Array& out, int threads) {
    check(out, "out", {nb::dtype<uint8_t>()});
    check_threads(threads);
    if (offset < 0) throw std::invalid_argument("offset must not be negative");
    auto* to = data<uint8_t>(out);
    const int64_t bytes = out.size();
    int64_t total = 0;
    int failed = 0;
    {
        nb::gil_scoped_release released;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(+ : total) reduction(max : failed)
        for (int64_t piece = 0; piece < bytes; piece += PIECE) {
            const int64_t stop = piece + PIECE < bytes ? piece + PIECE : bytes;
            for (int64_t at = piece; at < stop;) {
                const ssize_t got = pread(file, to + at, stop - at, offset + at);
                if (got < 0 && errno == EINTR) continue;
                if (got < 0) failed = errno;
                if (got <= 0) break;
                at += got, total += got;
            }
        }
    }
    if (failed != 0) {
        errno = failed;
        PyErr_SetFromErrno(PyExc_OSError);
        throw nb::python_error();
    }
    return total;
}

std::vector<std::string> names() {
    std::vector<std::string> found;
    for (const Reader& reader : READERS) found.emplace_back(reader.name);
    return found;
}

}  // namespace

void bind_memory(nb::module_& module) {
    module.def("readers", &names);
    module.def("read", &read_buffer, nb::arg("buffer"), nb::arg("reader"), nb::arg("threads"));
    module.def("read_file", &read_file, nb::arg("file"), nb::arg("offset"), nb::arg("out"),
               nb::arg("threads"));
    module.def("advise_huge_pages", &advise, nb::arg("buffer"), nb::arg("wanted"));
}
