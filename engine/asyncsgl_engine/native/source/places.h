/* Where the positions of a sequence lie in the cache. */

#ifndef ASYNCSGL_PLACES_H
#define ASYNCSGL_PLACES_H

#include "vectors.h"

/* A page table, or the slots themselves. */
typedef struct {
    const int32_t *table;
    const int64_t *slots;
    int64_t page_size;
} Places;

/* Where `count` positions from `begin` on lie: to[t] = slot * slot_size. */
INLINE void slots_of(const Places *places, int64_t begin, int64_t count, int64_t slot_size,
                     int64_t *to) {
    if (places->slots != NULL) {
        for (int64_t t = 0; t < count; t++) to[t] = places->slots[begin + t] * slot_size;
        return;
    }
    const int64_t size = places->page_size;
    int64_t page = begin / size, offset = begin % size;
    for (int64_t t = 0; t < count; page++, offset = 0)
        for (; offset < size && t < count; offset++, t++)
            to[t] = (places->table[page] * size + offset) * slot_size;
}

#endif
