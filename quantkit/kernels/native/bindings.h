// What each part of the extension adds to the module.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "layout.h"

// Python's `Layout`: with the map that the layout points to.
struct HeldLayout {
    std::unique_ptr<const Map> map;
    Layout layout;
};

void bind_arrays(nanobind::module_& module);
void bind_memory(nanobind::module_& module);
void bind_isa(nanobind::module_& module);
void bind_linear(nanobind::module_& module);
void bind_attention(nanobind::module_& module);
void bind_decode(nanobind::module_& module);
void bind_quantize(nanobind::module_& module);
