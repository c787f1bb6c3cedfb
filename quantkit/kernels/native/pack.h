// Repacking canonical codes and scales into panels, and back to float.
#pragma once

#include "layout.h"

// Writes a matrix into its panels. Threads take panels in turn.
void pack(const Layout& layout, const Canonical& from, uint8_t* to, int threads);
