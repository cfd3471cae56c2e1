/* What a step computes, as the Python side lays it out. Counts are int64_t throughout. */

#ifndef ASYNCSGL_STEP_H
#define ASYNCSGL_STEP_H

#include <stdint.h>

#define MOST_GROUP 16 /* query heads that share a key */
#define MOST_DIM 256

/* T tokens: first the rows of one token ("singles"), then spans of several. */
typedef struct {
    const int64_t *write_slots;       /* [tokens] */
    const int32_t *table;             /* [singles, table_width]: their pages */
    const int64_t *lengths;           /* [singles]: their contexts, their own token included */
    const int64_t *members;           /* [singles]: group by group, then those of no group */
    const int64_t *group_first;       /* [groups + 1]: where a group begins in `members` */
    const int64_t *common;            /* [groups]: positions whose pages its members share */
    const int64_t *span_begin;        /* [spans]: first token in the step */
    const int64_t *span_length;       /* [spans] */
    const int64_t *span_start;        /* [spans]: position of the first token */
    const int64_t *const *span_slots; /* [spans]: slots of positions 0 to start + length - 1 */
    int64_t tokens, singles, groups, spans, page_size, table_width, threads;
    void *workspace;
} Step;

/* A share of a step's attention: for key/value head `kv`, tokens `first` to `last` - 1 of span
   `index` or members `first` to `last` - 1 of group `index`; or of single `index` the key/value
   heads `kv` to `last` - 1. */
enum Kind { SPAN, SHARING, SINGLE };

typedef struct {
    int64_t kind, index, kv, first, last;
} Task;

#endif
