/* Keys and values that attention reads next, asked for while products keep the processor busy.

   Attention of single rows waits for memory, which products leave idle. What is asked for during
   the products before it comes from the cache that the cores share. */

#ifndef ASYNCSGL_COMING_H
#define ASYNCSGL_COMING_H

#include "step.h"
#include "vectors.h"

#define COMING_BYTES 32 /* of keys and of values, at most, for each unit of a tile */

/* One thread's way through the pages of its share of a step's single rows. */
typedef struct {
    const Step *step;
    const char *keys, *values;    /* of one layer */
    int64_t slot_bytes, window;   /* window: 0 for none */
    int64_t member, members_end;  /* places in step->members: the next row to begin with */
    int64_t group, row, page, pages_end;
} Coming;

/* As many bytes at either address, which may both be NULL. */
typedef struct {
    const char *keys, *values;
    int64_t bytes;
} Piece;

static void begin_coming(Coming *coming, const Step *step, const void *keys, const void *values,
                         int64_t slot_bytes, int64_t window, int thread, int threads) {
    *coming = (Coming){step, keys, values, slot_bytes, window,
                       step->singles * thread / threads, step->singles * (thread + 1) / threads,
                       0, 0, 0, 0};
}

/* Go to a row's first page that its group does not read for all of its members. */
INLINE void begin_row(Coming *coming) {
    const Step *step = coming->step;
    const int64_t member = coming->member++;
    while (coming->group < step->groups && member >= step->group_first[coming->group + 1])
        coming->group++;
    coming->row = step->members[member];
    const int64_t length = step->lengths[coming->row];
    int64_t from = coming->group < step->groups ? step->common[coming->group] : 0;
    if (coming->window > 0) from = most(0, length - coming->window);
    coming->page = from / step->page_size;
    coming->pages_end = ceil_div(length, step->page_size);
}

/* The next pages that lie beside each other, up to `room` bytes of them. */
INLINE Piece next_piece(Coming *coming, int64_t room) {
    const Step *step = coming->step;
    while (coming->page == coming->pages_end) {
        if (coming->member == coming->members_end) return (Piece){NULL, NULL, 0};
        begin_row(coming);
    }
    const int32_t *table = step->table + coming->row * step->table_width;
    const int64_t page_bytes = step->page_size * coming->slot_bytes;
    const int64_t offset = table[coming->page] * page_bytes;
    int64_t bytes = page_bytes;
    for (coming->page++; coming->page < coming->pages_end; coming->page++, bytes += page_bytes)
        if (table[coming->page] != table[coming->page - 1] + 1 || bytes + page_bytes > room) break;
    return (Piece){coming->keys + offset, coming->values + offset, least(bytes, room)};
}

#endif
