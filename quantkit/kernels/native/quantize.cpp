// Python's side of quantizing: every argument is checked before a kernel runs.
#include "quantize.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "kernels.h"

namespace nb = nanobind;

namespace {

constexpr int64_t MOST_GROUP = 1 << 30;  // elements

Type float_type(const Array& array) {
    return array.dtype() == BF16 ? Type::bf16 : array.dtype() == F16 ? Type::f16 : Type::f32;
}

// Checks everything that both directions share.
Quantization describe(const Array& values, const std::string& kind_name, int64_t group, const Array& codes,
                      const Array& scales, const std::optional<Array>& zeros, int threads) {
    check(values, "values", {nb::dtype<float>(), BF16, F16});
    if (values.ndim() != 2 || values.size() == 0) throw std::invalid_argument("values must be a matrix with elements");
    const int64_t rows = values.shape(0), cols = values.shape(1);
    const Kind kind = kind_of(kind_name);
    const bool nf4 = kind == Kind::nf4;
    if (group < 1 || group > MOST_GROUP || (nf4 && group % 2 != 0))
        throw std::invalid_argument("group is " + std::to_string(group) + "; it must be 1 to " +
                                    std::to_string(MOST_GROUP) + (nf4 ? ", and even" : ""));
    const int64_t elements = rows * cols, groups = (cols + group - 1) / group;
    const int64_t bytes = nf4 ? (elements + 1) / 2 : rows * (kind == Kind::int8 ? cols : (cols + 1) / 2);
    check(codes, "codes", {nb::dtype<uint8_t>()}, bytes);
    if (nf4) check(scales, "scales", {nb::dtype<float>()}, (elements + group - 1) / group);
    else check(scales, "scales", {nb::dtype<float>(), BF16, F16}, rows * groups);
    if (zeros && kind != Kind::int4) throw std::invalid_argument("zeros: only int4 has zero points");
    if (zeros) check(*zeros, "zeros", {nb::dtype<uint8_t>()}, rows * groups);
    check_threads(threads);
    return {values.data(), float_type(values), rows, cols, kind, group, data<uint8_t>(codes), scales.data(),
            float_type(scales), zeros ? data<uint8_t>(*zeros) : nullptr, nullptr, 0, threads};
}

void quantize_matrix(const Array& values, const std::string& kind, int64_t group, const Array& codes,
                     const Array& scales, const std::optional<Array>& zeros, const std::vector<float>& factors,
                     int threads) {
    Quantization q = describe(values, kind, group, codes, scales, zeros, threads);
    if (q.kind == Kind::int4 && factors.empty()) throw std::invalid_argument("factors must not be empty for int4");
    for (const float factor : factors)
        if (!(factor > 0) || std::isinf(factor)) throw std::invalid_argument("factors must be positive");
    q.factors = factors.data(), q.tried = static_cast<int>(factors.size());
    const Isa level = isa();
    nb::gil_scoped_release release;
    advise_huge_pages(q.codes, codes.size(), true);  // new memory: a fault for each small page would take as long
    QUANTKIT_CALL(level, quantize, q);
}

std::pair<double, double> squares_of(const Array& values, const std::string& kind, int64_t group, const Array& codes,
                                     const Array& scales, const std::optional<Array>& zeros, int threads) {
    const Quantization q = describe(values, kind, group, codes, scales, zeros, threads);
    const Isa level = isa();
    nb::gil_scoped_release release;
    const Squares found = QUANTKIT_CALL(level, squares, q);
    return {found.signal, found.noise};
}

}  // namespace

void bind_quantize(nb::module_& module) {
    module.def("quantize", &quantize_matrix, nb::arg("values"), nb::arg("kind"), nb::arg("group"),
               nb::arg("codes"), nb::arg("scales"), nb::arg("zeros").none(),
               nb::arg("factors"), nb::arg("threads"));
    module.def("squares", &squares_of, nb::arg("values"), nb::arg("kind"), nb::arg("group"),
               nb::arg("codes"), nb::arg("scales"), nb::arg("zeros").none(),
               nb::arg("threads"));
}
