// Python's side of decoding a token: the model is checked when it is built, the rest with every token.
#include "decode.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "isa.h"
#include "kernels.h"

namespace nb = nanobind;

namespace {

constexpr int64_t VECTOR = 16;  // what hidden sizes and heads are multiples of, whatever the instruction set

// Keeps the tensors that a Matrix points to; Python keeps the layout.
struct HeldMatrix {
    const Layout* layout;
    Array weight;
    std::optional<Array> bias;

    HeldMatrix(const HeldLayout& held, Array weight_, std::optional<Array> bias_)
        : layout(&held.layout), weight(std::move(weight_)), bias(std::move(bias_)) {
        check(weight, "weight", {nb::dtype<uint8_t>()}, layout->nbytes, 64);
        if (bias) check(*bias, "bias", {nb::dtype<float>()}, layout->rows);
    }
    Matrix view() const { return {layout, data<uint8_t>(weight), bias ? data<float>(*bias) : nullptr}; }
};

class Model {
public:
    Model(int64_t hidden, int64_t ffn, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, float eps, Array norm)
        : shape_{hidden, ffn, n_heads, n_kv_heads, head_dim, eps}, norm_(std::move(norm)) {
        for (const int64_t size : {hidden, ffn, head_dim})
            if (size < 1 || size % VECTOR != 0)
                throw std::invalid_argument("hidden, ffn and head_dim must be multiples of 16");
        if (n_kv_heads < 1 || n_heads < 1 || n_heads % n_kv_heads != 0)
            throw std::invalid_argument("n_kv_heads must divide n_heads");
        check(norm_, "norm", {BF16}, hidden);
        const int64_t attended = n_heads * head_dim;
        work_.resize(attended + 2 * n_kv_heads * head_dim + attended + 2 * hidden + 3 * ffn);
    }

    void add_layer(Array attention_norm, nb::object qkv, nb::object o, Array ffn_norm, nb::object gate_up,
                   nb::object down) {
        check(attention_norm, "attention_norm", {BF16}, shape_.hidden);
        check(ffn_norm, "ffn_norm", {BF16}, shape_.hidden);
        const int64_t attended = shape_.n_heads * shape_.head_dim;
        const Matrix of_qkv = matrix(qkv, "qkv", attended + 2 * shape_.n_kv_heads * shape_.head_dim, shape_.hidden);
        const Matrix of_o = matrix(o, "o", shape_.hidden, attended);
        const Matrix of_gate_up = matrix(gate_up, "gate_up", 2 * shape_.ffn, shape_.hidden);
        const Matrix of_down = matrix(down, "down", shape_.hidden, shape_.ffn);
        layers_.push_back({data<uint16_t>(attention_norm), of_qkv, of_o, data<uint16_t>(ffn_norm), of_gate_up, of_down});
        norms_.push_back(std::move(attention_norm));
        norms_.push_back(std::move(ffn_norm));
        for (nb::object* each : {&qkv, &o, &gate_up, &down}) matrices_.push_back(std::move(*each));
    }

    void run(const Array& x, const Array& cos, const Array& sin, const Array& cache, int64_t slot, int64_t keys,
             const Array& states, int threads) {
        const Shape& s = shape_;
        check(x, "x", {BF16}, s.hidden);
        check(cos, "cos", {BF16}, s.head_dim);
        check(sin, "sin", {BF16}, s.head_dim);
        check(states, "states", {BF16}, s.hidden);
        check_threads(threads);
        const auto n_layers = static_cast<int64_t>(layers_.size());
        check(cache, "cache", {BF16});
        if (cache.ndim() != 6 || cache.shape(0) != n_layers || cache.shape(1) != 2 ||
            cache.shape(2) != 1 || cache.shape(3) != s.n_kv_heads ||
            cache.shape(5) != s.head_dim)
            throw std::invalid_argument("cache must be (" + std::to_string(n_layers) + ", 2, 1, " +
                                        std::to_string(s.n_kv_heads) + ", slots, " + std::to_string(s.head_dim) + ")");
        const int64_t slots = cache.shape(4);
        if (keys < 1 || keys > slots || slot < 0 || slot >= keys)
            throw std::invalid_argument("slot and keys must lie within the cache's slots");
        const Isa level = isa();
        nb::gil_scoped_release release;
        const std::lock_guard<std::mutex> lock(busy_);
        partials_.resize(s.n_heads * ((keys + KEY_CHUNK - 1) / KEY_CHUNK) * (s.head_dim + 2));
        Token t{};
        t.shape = &shape_, t.layers = layers_.data(), t.n_layers = n_layers;
        t.norm = data<uint16_t>(norm_);
        t.x = data<uint16_t>(x), t.cos = data<uint16_t>(cos), t.sin = data<uint16_t>(sin);
        t.cache = data<uint16_t>(cache), t.slots = slots, t.slot = slot, t.keys = keys;
        t.states = data<uint16_t>(states);
        t.qkv = work_.data();
        t.attended = t.qkv + (s.n_heads + 2 * s.n_kv_heads) * s.head_dim;
        t.o = t.attended + s.n_heads * s.head_dim;
        t.gate_up = t.o + s.hidden;
        t.wide = t.gate_up + 2 * s.ffn;
        t.down = t.wide + s.ffn;
        t.partials = partials_.data();
        t.threads = threads;
        QUANTKIT_CALL(level, decode, t);
    }

private:
    Matrix matrix(const nb::object& held, const char* name, int64_t rows, int64_t cols) const {
        const Matrix view = nb::cast<const HeldMatrix&>(held).view();
        if (view.layout->rows != rows || view.layout->cols != cols)
            throw std::invalid_argument(std::string(name) + " must be " + std::to_string(rows) + " x " +
                                        std::to_string(cols));
        return view;
    }

    Shape shape_;
    Array norm_;
    std::vector<Layer> layers_;
    std::vector<Array> norms_;
    std::vector<nb::object> matrices_;
    std::vector<uint16_t> work_;
    std::vector<float> partials_;
    std::mutex busy_;  // work_ and partials_ serve one token at a time
};

}  // namespace

void bind_decode(nb::module_& module) {
    nb::class_<HeldMatrix>(module, "Matrix")
        .def(nb::init<const HeldLayout&, Array, std::optional<Array>>(), nb::keep_alive<1, 2>(), nb::arg("layout"),
             nb::arg("weight"), nb::arg("bias").none());
    nb::class_<Model>(module, "Model")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, float, Array>(),
             nb::arg("hidden"), nb::arg("ffn"), nb::arg("n_heads"), nb::arg("n_kv_heads"), nb::arg("head_dim"),
             nb::arg("eps"), nb::arg("norm"))
        .def("add_layer", &Model::add_layer, nb::arg("attention_norm"), nb::arg("qkv"), nb::arg("o"),
             nb::arg("ffn_norm"), nb::arg("gate_up"), nb::arg("down"))
        .def("run", &Model::run, nb::arg("x"), nb::arg("cos"), nb::arg("sin"),
             nb::arg("cache"), nb::arg("slot"), nb::arg("keys"), nb::arg("states"),
             nb::arg("threads"));
}
