// Advice about the pages that memory lies in.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

constexpr std::size_t HUGE_PAGE = std::size_t(1) << 21;

// Asks for huge pages, or forbids them, in the whole pages of some memory; true where the system takes the advice. Only
// pages that have not been touched yet are sure to follow it.
inline bool advise_huge_pages(void* start, std::size_t bytes, bool wanted) {
#if defined(MADV_HUGEPAGE) && defined(MADV_NOHUGEPAGE)
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<std::uintptr_t>(start);
    const auto first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
    return last > first &&
           madvise(reinterpret_cast<void*>(first), last - first, wanted ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) == 0;
#else
    return static_cast<void>(start), static_cast<void>(bytes), static_cast<void>(wanted), false;
#endif
}

// Maps the pages of memory that will be read, all at once where the system can: a fault for each would take longer.
inline void populate(const void* start, std::size_t bytes) {
#ifdef MADV_POPULATE_READ
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<std::uintptr_t>(start), first = address / page * page;
    madvise(reinterpret_cast<void*>(first), address + bytes - first, MADV_POPULATE_READ);
#else
    static_cast<void>(start), static_cast<void>(bytes);
#endif
}
