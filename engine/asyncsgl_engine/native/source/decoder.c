/* The engine's arithmetic on processors, compiled on the machine that runs it: once with BF16 as 0,
   for floats, and once with it as 1. */

#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "gate.h"
#include "step.h"
#include "vectors.h"
#include "places.h"
#include "coming.h"

#define BARRIER meet(gate, threads);
#define SHARING_ROWS 16 /* rows of a group in one task */

/* Lists the tasks of a step's attention, the longest first; at most kv_heads for each token. */
static int64_t list_tasks(const Step *step, int64_t kv_heads, int64_t group, Task *tasks) {
    const int64_t height = most(1, 192 / group); /* tokens of a span in one task */
    int64_t count = 0;
    for (int64_t s = 0; s < step->spans; s++)
        for (int64_t last = step->span_length[s]; last > 0; last -= height)
            for (int64_t kv = 0; kv < kv_heads; kv++)
                tasks[count++] = (Task){SPAN, s, kv, most(0, last - height), last};
    for (int64_t g = 0; g < step->groups; g++)
        for (int64_t first = step->group_first[g]; first < step->group_first[g + 1];
             first += SHARING_ROWS)
            for (int64_t kv = 0; kv < kv_heads; kv++)
                tasks[count++] = (Task){
                    SHARING, g, kv, first, least(first + SHARING_ROWS, step->group_first[g + 1])};
    /* Many rows go as a whole, since that reads memory in order; few are spread over the threads. */
    const int64_t alone = step->singles - step->group_first[step->groups];
    const int64_t heads = alone >= 4 * step->threads ? kv_heads : 1;
    for (int64_t m = step->group_first[step->groups]; m < step->singles; m++)
        for (int64_t kv = 0; kv < kv_heads; kv += heads)
            tasks[count++] = (Task){SINGLE, step->members[m], kv, 0, kv + heads};
    return count;
}

#if BF16
#define ELEMENT uint16_t
#define UNIT 2
#define NAME(name) name##_bf16
#else
#define ELEMENT float
#define UNIT 1
#define NAME(name) name##_f32
int64_t asyncsgl_tile_columns(void) { return TILE_COLUMNS; }
#endif
#include "products.h"
#include "blocks.h"
#include "rows.h"
#include "attention.h"
#include "decoder.h"
#if !BF16
#include "sampling.h"
#endif
