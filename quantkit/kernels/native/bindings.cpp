// The module `_native`: each part binds its own functions.

#include <nanobind/nanobind.h>

#include "bindings.h"

NB_MODULE(_native, module) {
    nanobind::set_leak_warnings(false);  // Python keeps layouts in caches until it exits
    bind_arrays(module);
    bind_memory(module);
    bind_isa(module);
    bind_linear(module);
    bind_attention(module);
    bind_decode(module);
    bind_quantize(module);
}
