// Python's side of packing and multiplying: every argument is checked before a kernel runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "isa.h"
#include "kernels.h"
#include "pack.h"

namespace nb = nanobind;

namespace {

// See `Layout`; Python's `Layout` describes one matrix.
HeldLayout make_layout(const std::string& kind_name, int64_t rows, int64_t cols, int64_t group,
                       const std::string& scale_name, bool zeros, const std::optional<Array>& map) {
    const Kind kind = kind_of(kind_name);
    Type scale;
    if (scale_name == "float32") scale = Type::f32;
    else if (scale_name == "bfloat16") scale = Type::bf16;
    else if (scale_name == "float16") scale = Type::f16;
    else if (scale_name == "uint8") scale = Type::nested;
    else throw std::invalid_argument("scale is '" + scale_name + "'; known are float32, bfloat16, float16, uint8");
    if (rows < 1 || cols < 1 || rows > (int64_t(1) << 31) || cols > (int64_t(1) << 31))
        throw std::invalid_argument("rows and cols are " + std::to_string(rows) + " x " + std::to_string(cols) +
                                    "; both must be 1 to 2**31");
    if (group < 1 || ((group < cols || kind == Kind::nf4) && group % BLOCK != 0))
        throw std::invalid_argument("group is " + std::to_string(group) + "; it must be a multiple of 8, or all of K");
    if (scale == Type::nested && kind != Kind::nf4) throw std::invalid_argument("scale: only NF4's are nested");
    if (zeros && kind != Kind::int4) throw std::invalid_argument("zeros: only int4 has zero points");
    if (map.has_value() != (scale == Type::nested))
        throw std::invalid_argument("map: nested scales, and no others, need the values of their codes");
    if (map) check(*map, "map", {nb::dtype<float>()}, 256);
    std::unique_ptr<const Map> held = map ? std::make_unique<const Map>(data<float>(*map)) : nullptr;
    const Layout layout(kind, rows, cols, group, scale, zeros, held.get());
    return {std::move(held), layout};
}

void pack_matrix(const HeldLayout& held, const Array& codes, const Array& scales, const std::optional<Array>& zeros,
                 const std::optional<Array>& nested_scales, float nested_offset, const Array& out, int threads) {
    const Layout& l = held.layout;
    const bool nested = l.map != nullptr;
    const int64_t elements = l.rows * l.cols;
    const int64_t blocks = l.kind == Kind::nf4 ? (elements + l.group - 1) / l.group : l.rows * l.groups;
    check(codes, "codes", {nb::dtype<uint8_t>()},
          l.kind == Kind::nf4 ? (elements + 1) / 2 : l.rows * (l.kind == Kind::int8 ? l.cols : (l.cols + 1) / 2));
    check(scales, "scales", {nested ? nb::dtype<uint8_t>() : scale_dtype(l.scale)}, blocks);
    if (nested_scales.has_value() != nested)
        throw std::invalid_argument("nested_scales do not belong to this layout");
    if (nested) check(*nested_scales, "nested_scales", {nb::dtype<float>()}, (blocks + NESTED - 1) / NESTED);
    if (zeros.has_value() != l.zeros) throw std::invalid_argument("zeros do not belong to this layout");
    if (l.zeros) check(*zeros, "zeros", {nb::dtype<int32_t>()}, (l.rows + 7) / 8 * l.groups);
    check(out, "out", {nb::dtype<uint8_t>()}, l.nbytes, 64);
    check_threads(threads);
    const Canonical from{data<uint8_t>(codes), data<uint8_t>(scales), l.zeros ? data<int32_t>(*zeros) : nullptr,
                         nested ? data<float>(*nested_scales) : nullptr, nested_offset};
    uint8_t* to = data<uint8_t>(out);
    nb::gil_scoped_release release;
    pack(l, from, to, threads);
}

// A new result (..., rows) for x (..., cols).
Array result_of(const Array& x, int64_t rows) {
    std::vector<int64_t> shape(x.ndim());
    for (int64_t dim = 0; dim < x.ndim(); ++dim) shape[dim] = x.shape(dim);
    shape.back() = rows;
    return new_array(shape, x.dtype());
}

// Rows of x (..., cols).
int64_t rows_of(const Array& x, int64_t cols) {
    if (x.ndim() < 1 || x.shape(x.ndim() - 1) != cols)
        throw std::invalid_argument("x must have shape (..., " + std::to_string(cols) + ")");
    return x.size() / cols;
}

Array multiply(const HeldLayout& held, const Array& weight, const Array& x, const std::optional<Array>& bias,
               int threads) {
    const Layout& l = held.layout;
    check(weight, "weight", {nb::dtype<uint8_t>()}, l.nbytes, 64);
    check(x, "x", {nb::dtype<float>(), BF16});
    const int64_t m = rows_of(x, l.cols);
    if (bias) check(*bias, "bias", {nb::dtype<float>()}, l.rows);
    check_threads(threads);
    const Array out = result_of(x, l.rows);
    if (m == 0) return out;
    const Product p{&l, data<uint8_t>(weight), x.dtype() == BF16 ? Type::bf16 : Type::f32, x.data(), out.data(), m,
                    bias ? data<float>(*bias) : nullptr, threads};
    const Isa level = isa();
    nb::gil_scoped_release release;
    QUANTKIT_CALL(level, product, p);
    return out;
}

Array multiply_plain(const Array& weight, const Array& x, const std::optional<Array>& bias, int threads) {
    check(weight, "weight", {BF16});
    check(x, "x", {BF16});
    if (weight.ndim() != 2) throw std::invalid_argument("weight must have two dimensions");
    const int64_t rows = weight.shape(0), cols = weight.shape(1);
    const int64_t m = rows_of(x, cols);
    if (m < 1 || m > 2) throw std::invalid_argument("x must have 1 or 2 rows, not " + std::to_string(m));
    if (bias) check(*bias, "bias", {nb::dtype<float>()}, rows);
    check_threads(threads);
    const Array out = result_of(x, rows);
    const PlainProduct p{data<uint16_t>(weight), rows, cols, data<uint16_t>(x), data<uint16_t>(out), m,
                         bias ? data<float>(*bias) : nullptr, threads};
    const Isa level = isa();
    nb::gil_scoped_release release;
    QUANTKIT_CALL(level, plain, p);
    return out;
}

}  // namespace

void bind_linear(nb::module_& module) {
    nb::class_<HeldLayout>(module, "Layout")
        .def("__init__",
             [](HeldLayout* self, const std::string& kind, int64_t rows, int64_t cols, int64_t group,
                const std::string& scale, bool zeros, const std::optional<Array>& map) {
                 new (self) HeldLayout(make_layout(kind, rows, cols, group, scale, zeros, map));
             },
             nb::arg("kind"), nb::arg("rows"), nb::arg("cols"), nb::arg("group"), nb::arg("scale"), nb::arg("zeros"),
             nb::arg("map") = nb::none())
        .def_prop_ro("nbytes", [](const HeldLayout& self) { return self.layout.nbytes; })
        .def_prop_ro("panel_bytes", [](const HeldLayout& self) { return self.layout.panel_bytes; })
        .def("pack", &pack_matrix, nb::arg("codes"), nb::arg("scales"), nb::arg("zeros").none(),
             nb::arg("nested_scales").none(), nb::arg("nested_offset"), nb::arg("out"), nb::arg("threads"))
        .def("multiply", &multiply, nb::arg("weight"), nb::arg("x"), nb::arg("bias").none(), nb::arg("threads"));
    module.def("multiply_plain", &multiply_plain, nb::arg("weight"), nb::arg("x"), nb::arg("bias").none(),
               nb::arg("threads"));
}
