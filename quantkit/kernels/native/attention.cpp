// Python's side of attention: every argument is checked before the kernel runs.
#include "attention.h"

#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>

#include "arrays.h"
#include "bindings.h"
#include "isa.h"
#include "kernels.h"

namespace nb = nanobind;

namespace {

// Throws unless `array` holds bfloat16 (batch, heads, count, head_dim), whose last dimension is contiguous.
void check_heads(const Array& array, const char* name) {
    if (array.dtype() != BF16) throw std::invalid_argument(std::string(name) + " has the wrong dtype");
    if (array.ndim() != 4) throw std::invalid_argument(std::string(name) + " must have four dimensions");
    if (array.shape(3) > 1 && array.stride(3) != 1)
        throw std::invalid_argument(std::string(name) + " has a last dimension that is not contiguous");
}

void attend_to(const Array& q, const Array& keys, const Array& values, const Array& out, int64_t window, int threads) {
    check(q, "q", {BF16});
    if (q.ndim() != 4) throw std::invalid_argument("q must have four dimensions");
    check(out, "out", {BF16}, q.size());
    check_heads(keys, "keys");
    check_heads(values, "values");
    for (int dim = 0; dim < 4; ++dim)
        if (values.shape(dim) != keys.shape(dim)) throw std::invalid_argument("values must have the shape of keys");
    check_threads(threads);
    Attention a{};
    a.q = data<uint16_t>(q), a.keys = data<uint16_t>(keys), a.values = data<uint16_t>(values), a.out = data<uint16_t>(out);
    a.batch = q.shape(0), a.tokens = q.shape(1), a.n_heads = q.shape(2), a.head_dim = q.shape(3);
    a.n_kv_heads = keys.shape(1), a.count = keys.shape(2);
    for (int dim = 0; dim < 3; ++dim)
        a.key_strides[dim] = keys.stride(dim), a.value_strides[dim] = values.stride(dim);
    a.window = window, a.threads = threads;
    if (keys.shape(0) != a.batch || keys.shape(3) != a.head_dim)
        throw std::invalid_argument("keys must have q's batch and head_dim");
    if (a.n_kv_heads < 1 || a.n_heads % a.n_kv_heads != 0)
        throw std::invalid_argument("keys: their heads must divide q's");
    if (a.head_dim < 16 || a.head_dim > MOST_HEAD_DIM || a.head_dim % 16 != 0)
        throw std::invalid_argument("head_dim must be a multiple of 16 up to " + std::to_string(MOST_HEAD_DIM));
    if (a.tokens > a.count) throw std::invalid_argument("keys are fewer than the tokens of q");
    if (window < 1) throw std::invalid_argument("window must be at least 1");
    if (a.batch == 0 || a.tokens == 0) return;
    const Isa level = isa();
    nb::gil_scoped_release release;
    QUANTKIT_CALL(level, attend, a);
}

}  // namespace

void bind_attention(nb::module_& module) {
    module.def("attend", &attend_to, nb::arg("q"), nb::arg("keys"),
               nb::arg("values"), nb::arg("out"), nb::arg("window"), nb::arg("threads"));
}
