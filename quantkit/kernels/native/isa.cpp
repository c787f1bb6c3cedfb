#include "isa.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#ifdef QUANTKIT_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"

namespace {

const char* const NAMES[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};

// Whether there are tiles for bfloat16, and the system lets this process use them.
bool has_amx() {
#ifdef QUANTKIT_AMX
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                                __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("avx512vbmi") &&
                                syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
#else
    return false;
#endif
}

Isa best() {
#ifdef QUANTKIT_X86
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
        return Isa::portable;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
        return Isa::avx2;
    if (!(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))) return Isa::avx512;
    return has_amx() ? Isa::amx : Isa::avx512bf16;
#else
    return Isa::portable;
#endif
}

// The names of all levels that this machine can run, the lowest first.
std::vector<std::string> available() {
    return {NAMES, NAMES + static_cast<int>(best()) + 1};
}

}  // namespace

Isa isa() {
    const char* wanted = std::getenv("QUANTKIT_ISA");
    if (wanted == nullptr || *wanted == '\0') return best();
    const auto names = available();
    std::string known;
    for (std::size_t level = 0; level < names.size(); ++level) {
        if (names[level] == wanted) return static_cast<Isa>(level);
        known += (level ? ", " : "") + names[level];
    }
    throw std::invalid_argument("QUANTKIT_ISA=" + std::string(wanted) + " cannot run here; this machine has " + known);
}

void bind_isa(nanobind::module_& module) {
    module.def("isa", [] { return std::string(NAMES[static_cast<int>(isa())]); });
    module.def("available_isas", &available);
}
