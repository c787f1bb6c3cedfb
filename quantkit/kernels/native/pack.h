// Repacking canonical codes and scales into panels, and back to float.
#pragma once

#include "layout.h"

// Writes a matrix into its panels; `map` is that of nested scales. Threads take panels in turn.
void pack(const Layout& layout, const Canonical& from, const float* map, uint8_t* to, int threads);
