// Arguments that come as DLPack: what they must be, and errors that name the one that is not.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.h"

using Array = nanobind::ndarray<nanobind::device::cpu>;

constexpr nanobind::dlpack::dtype BF16{static_cast<uint8_t>(nanobind::dlpack::dtype_code::Bfloat), 16, 1};
constexpr nanobind::dlpack::dtype F16{static_cast<uint8_t>(nanobind::dlpack::dtype_code::Float), 16, 1};

inline nanobind::dlpack::dtype scale_dtype(Type type) {
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
inline void check(const Array& array, const char* name, std::initializer_list<nanobind::dlpack::dtype> dtypes,
                  int64_t size = -1, std::size_t alignment = 1) {
    bool known = false;
    for (const auto& dtype : dtypes) known = known || array.dtype() == dtype;
    if (!known) throw std::invalid_argument(std::string(name) + " has the wrong dtype");
    int64_t stride = 1;
    for (std::size_t dim = array.ndim(); dim-- > 0; stride *= static_cast<int64_t>(array.shape(dim)))
        if (array.shape(dim) > 1 && array.stride(dim) != stride)
            throw std::invalid_argument(std::string(name) + " is not contiguous");
    if (size >= 0 && static_cast<int64_t>(array.size()) != size)
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

// A new array of unset values. (Made here, a small result costs a third of what an empty tensor of torch's does when
// its instructions are in no cache.)
inline Array new_array(const std::vector<std::size_t>& shape, nanobind::dlpack::dtype dtype) {
    std::size_t bytes = dtype.bits / 8;
    for (const std::size_t size : shape) bytes *= size;
    void* memory = std::aligned_alloc(64, bytes / 64 * 64 + 64);
    if (memory == nullptr) throw std::bad_alloc();
    const nanobind::capsule owner(memory, [](void* kept) noexcept { std::free(kept); });
    return Array(memory, shape.size(), shape.data(), owner, nullptr, dtype);
}
