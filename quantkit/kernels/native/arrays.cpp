// Tensors come and go by torch's table of C functions for DLPack, `torch.Tensor.__dlpack_c_exchange_api__`: capsules
// take several times as long, which a product of one row would notice.
#include "arrays.h"

#include <cstdlib>
#include <new>

#include "bindings.h"

namespace nb = nanobind;

namespace {

// What follows is laid out as DLPack 1.3 has it.
struct Version {
    uint32_t major, minor;
};

struct Managed {  // DLManagedTensorVersioned
    Version version;
    void* context;
    void (*deleter)(Managed*);
    uint64_t flags;
    nb::dlpack::dltensor tensor;
};

struct Exchange {  // DLPackExchangeAPI; each function returns 0, or not and has set a Python error
    Version version;
    const void* older;
    void* allocate;
    int (*managed_of)(void* object, Managed** out);
    int (*object_of)(Managed* managed, void** out);
    int (*view_of)(void* object, nb::dlpack::dltensor* out);
    void* current_stream;
};

constexpr uint32_t MAJOR = 1, MINOR = 3;

PyTypeObject* tensor_type = nullptr;
const Exchange* exchange = nullptr;

// A new tensor's memory: this, then its sizes and strides, then its values.
void release(Managed* managed) { std::free(managed); }

}  // namespace

bool Array::take(nb::handle object) noexcept {
    if (!PyObject_TypeCheck(object.ptr(), tensor_type)) return false;
    if (exchange->view_of(object.ptr(), &view_) != 0) {
        PyErr_Clear();
        return false;
    }
    tensor_ = nb::borrow(object);
    return view_.device.device_type == nb::device::cpu::value;
}

int64_t Array::size() const {
    int64_t size = 1;
    for (int64_t dim = 0; dim < ndim(); ++dim) size *= shape(dim);
    return size;
}

Array new_array(const std::vector<int64_t>& shape, Dtype dtype) {
    const std::size_t dims = shape.size();
    std::size_t bytes = dtype.bits / 8;
    for (const int64_t size : shape) bytes *= size;
    const std::size_t head = (sizeof(Managed) + 2 * dims * sizeof(int64_t) + 63) / 64 * 64;
    auto* memory = static_cast<uint8_t*>(std::aligned_alloc(64, head + (bytes + 63) / 64 * 64));
    if (memory == nullptr) throw std::bad_alloc();
    auto* sizes = reinterpret_cast<int64_t*>(memory + sizeof(Managed));
    int64_t* strides = sizes + dims;
    int64_t stride = 1;
    for (std::size_t dim = dims; dim-- > 0; stride *= shape[dim]) sizes[dim] = shape[dim], strides[dim] = stride;
    Array array;
    array.view_ = {memory + head, {nb::device::cpu::value, 0}, static_cast<int32_t>(dims), dtype, sizes, strides, 0};
    auto* managed = new (memory) Managed{{MAJOR, MINOR}, nullptr, release, 0, array.view_};
    void* object = nullptr;
    if (exchange->object_of(managed, &object) != 0) throw nb::python_error();
    array.tensor_ = nb::steal(static_cast<PyObject*>(object));
    return array;
}

void bind_arrays(nb::module_&) {
    const nb::object type = nb::module_::import_("torch").attr("Tensor");
    const nb::object table = type.attr("__dlpack_c_exchange_api__");
    exchange = static_cast<const Exchange*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
    if (exchange == nullptr) throw nb::python_error();
    if (exchange->version.major != MAJOR) throw nb::import_error("torch speaks another version of DLPack");
    tensor_type = reinterpret_cast<PyTypeObject*>(type.ptr());
}
