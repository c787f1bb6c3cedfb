// The module `_native`: each part binds its own functions.

#include <nanobind/nanobind.h>

#include "bindings.h"

NB_MODULE(_native, module) {
    bind_isa(module);
}
