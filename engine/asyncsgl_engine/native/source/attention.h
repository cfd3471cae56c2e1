/* The shares that a step's attention is divided into. Compiled once for each element type, after
   blocks.h and rows.h. */

typedef struct {
    const Step *step;
    NAME(Block) * block;
    NAME(Heads) * heads; /* [kv_heads] */
} NAME(Scratch);

static void NAME(attend_span)(const NAME(Scratch) * scratch, const NAME(Layer) * layer,
                              const Task *task) {
    const Step *step = scratch->step;
    NAME(Block) *block = scratch->block;
    const int64_t group = layer->heads / layer->kv_heads, span = task->index;
    const int64_t begin = step->span_begin[span], start = step->span_start[span];
    const Places places = {NULL, step->span_slots[span], 0};
    block->rows = (task->last - task->first) * group;
    for (int64_t r = 0; r < block->rows; r++) {
        const int64_t token = task->first + r / group, end = start + token + 1;
        block->token[r] = begin + token;
        block->head[r] = task->kv * group + r % group;
        block->low[r] = (int32_t)(layer->window > 0 ? most(0, end - layer->window) : 0);
        block->high[r] = (int32_t)end;
    }
    NAME(open_block)(block, layer);
    NAME(attend_block)(block, layer, task->kv, &places, block->low[0], start + task->last);
    NAME(emit_block)(block, layer);
}

INLINE int64_t NAME(first_seen)(const NAME(Layer) * layer, const Step *step, int64_t row) {
    return layer->window > 0 ? most(0, step->lengths[row] - layer->window) : 0;
}

/* A row that shares nothing, or whose window slides off what it shares. */
static void NAME(attend_single)(const NAME(Scratch) * scratch, const NAME(Layer) * layer,
                                int64_t row, int64_t kv, int64_t end) {
    const int64_t from = NAME(first_seen)(layer, scratch->step, row);
    NAME(attend_row)(scratch->heads, layer, scratch->step, row, kv, end, from, NULL, 0);
}

/* Rows whose first pages are the same: those together, then each row's own. */
static void NAME(attend_sharing)(const NAME(Scratch) * scratch, const NAME(Layer) * layer,
                                 const Task *task) {
    const Step *step = scratch->step;
    NAME(Block) *block = scratch->block;
    const int64_t group = layer->heads / layer->kv_heads, common = step->common[task->index];
    const int64_t *members = step->members;
    if (layer->window > 0) {
        for (int64_t m = task->first; m < task->last; m++)
            NAME(attend_single)(scratch, layer, members[m], task->kv, task->kv + 1);
        return;
    }
    const int32_t *table = step->table + members[task->first] * step->table_width;
    const Places places = {table, NULL, step->page_size};
    block->rows = (task->last - task->first) * group;
    for (int64_t r = 0; r < block->rows; r++) {
        block->token[r] = members[task->first + r / group];
        block->head[r] = task->kv * group + r % group;
        block->low[r] = 0;
        block->high[r] = (int32_t)common;
    }
    for (int64_t m = task->first; m < task->last; m++)
        NAME(fetch_row)(layer, step, members[m], task->kv, task->kv + 1, common);
    NAME(open_block)(block, layer);
    NAME(attend_block)(block, layer, task->kv, &places, 0, common);
    for (int64_t m = task->first; m < task->last; m++)
        NAME(attend_row)(scratch->heads, layer, step, members[m], task->kv, task->kv + 1, common,
                         block, (m - task->first) * group);
}

static void NAME(attend_task)(const NAME(Scratch) * scratch, const NAME(Layer) * layer,
                              const Task *task) {
    if (task->kind == SPAN) NAME(attend_span)(scratch, layer, task);
    else if (task->kind == SHARING) NAME(attend_sharing)(scratch, layer, task);
    else NAME(attend_single)(scratch, layer, task->index, task->kv, task->last);
}

/* What a task reads first, where it is too short to hide that. */
static void NAME(fetch_task)(const NAME(Scratch) * scratch, const NAME(Layer) * layer,
                             const Task *task) {
    if (task->kind != SINGLE) return;
    const int64_t from = NAME(first_seen)(layer, scratch->step, task->index);
    NAME(fetch_row)(layer, scratch->step, task->index, task->kv, task->last, from);
}

INLINE void NAME(store_head)(ELEMENT *to, const float *from, int64_t dim) {
    for (int64_t d = 0; d < dim; d++) to[d] = NAME(narrow)(from[d]);
}
