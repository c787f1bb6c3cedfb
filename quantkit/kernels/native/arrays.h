// Arguments that are tensors: what they must be, and errors that name the one that is not.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.h"

using Dtype = nanobind::dlpack::dtype;

constexpr Dtype BF16{static_cast<uint8_t>(nanobind::dlpack::dtype_code::Bfloat), 16, 1};
constexpr Dtype F16{static_cast<uint8_t>(nanobind::dlpack::dtype_code::Float), 16, 1};

// A tensor of torch's that lies in the CPU's memory, kept alive.
class Array {
public:
    // False unless `object` is such a tensor.
    bool take(nanobind::handle object) noexcept;

    const nanobind::object& tensor() const { return tensor_; }
    Dtype dtype() const { return view_.dtype; }
    int64_t ndim() const { return view_.ndim; }
    int64_t shape(int64_t dim) const { return view_.shape[dim]; }
    int64_t stride(int64_t dim) const { return view_.strides[dim]; }
    int64_t size() const;
    void* data() const { return static_cast<uint8_t*>(view_.data) + view_.byte_offset; }

private:
    friend Array new_array(const std::vector<int64_t>& shape, Dtype dtype);

    nanobind::object tensor_;
    nanobind::dlpack::dltensor view_;  // its shape and strides are the tensor's own
};

// A new tensor of unset values. (Made here, a small result costs a third of what an empty tensor of torch's does when
// its instructions are in no cache.)
Array new_array(const std::vector<int64_t>& shape, Dtype dtype);

inline Dtype scale_dtype(Type type) {
    return type == Type::f32 ? nanobind::dtype<float>() : type == Type::bf16 ? BF16
         : type == Type::f16 ? F16 : nanobind::dtype<uint8_t>();
}

inline Kind kind_of(const std::string& name) {
    if (name == "int8") return Kind::int8;
    if (name == "int4") return Kind::int4;
    if (name == "nf4") return Kind::nf4;
    throw std::invalid_argument("kind is '" + name + "'; known are int8, int4, nf4");
}

// Throws std::invalid_argument unless `array` is C-contiguous, of one of `dtypes`, has `size` elements (-1: any) and
// lies at a multiple of `alignment` bytes.
inline void check(const Array& array, const char* name, std::initializer_list<Dtype> dtypes, int64_t size = -1,
                  std::size_t alignment = 1) {
    bool known = false;
    for (const Dtype& dtype : dtypes) known = known || array.dtype() == dtype;
    if (!known) throw std::invalid_argument(std::string(name) + " has the wrong dtype");
    int64_t stride = 1;
    for (int64_t dim = array.ndim(); dim-- > 0; stride *= array.shape(dim))
        if (array.shape(dim) > 1 && array.stride(dim) != stride)
            throw std::invalid_argument(std::string(name) + " is not contiguous");
    if (size >= 0 && array.size() != size)
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.size()) + " elements, not " +
                                    std::to_string(size));
    const auto address = reinterpret_cast<std::uintptr_t>(array.data());
    if (address % alignment != 0 || address % (array.dtype().bits / 8) != 0)
        throw std::invalid_argument(std::string(name) + " is not aligned");
}

inline void check_threads(int threads) {
    if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be 1 to 1024");
}

template <class T>
T* data(const Array& array) {
    return static_cast<T*>(array.data());
}

namespace nanobind::detail {

template <>
struct type_caster<Array> {
    NB_TYPE_CASTER(Array, const_name("torch.Tensor"))

    bool from_python(handle source, uint8_t, cleanup_list*) noexcept { return value.take(source); }
    static handle from_cpp(const Array& array, rv_policy, cleanup_list*) noexcept {
        return array.tensor().inc_ref();
    }
};

}  // namespace nanobind::detail
