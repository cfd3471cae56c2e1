/* Attention over pages. Included once for each element type, after products.h.

   Rows of one token are attended one by one, reading keys and values where they lie; rows of
   several tokens, and rows that share pages, are attended in blocks by matrix products. The softmax
   runs online over blocks of positions (Milakov and Gimelshein, 2018), and a group of query heads
   shares each key and value that is read. */

#define BLOCK_KEYS 64 /* positions in a block; a multiple of TILE_COLUMNS */
#define BLOCK_ROWS 192 /* query heads in a block */
#define LOWEST (-1e30f)

/* Where the positions of a sequence lie: a page table, or the slots themselves. */
typedef struct {
    const int32_t *table;
    const int64_t *slots;
    int64_t page_size;
} NAME(Places);

INLINE int64_t NAME(slot_of)(const NAME(Places) * places, int64_t position) {
    if (places->slots != NULL) return places->slots[position];
    return (int64_t)places->table[position / places->page_size] * places->page_size +
           position % places->page_size;
}

/* One layer's attention. */
typedef struct {
    const ELEMENT *keys, *values; /* [slots, kv_heads, dim] */
    const float *query;           /* [tokens, query_stride], heads of dim elements */
    int64_t query_stride, heads, kv_heads, dim, window;
    float scale, softcap;
    NAME(Activations) packed; /* where results go; or, without units, */
    ELEMENT *out;             /* [tokens, heads, dim] */
} NAME(Layer);

/* The running state of a block of rows: a row is one query head of one token. */
typedef struct {
    uint32_t query[BLOCK_ROWS * UNITS(MOST_DIM)];
    uint32_t share[BLOCK_ROWS * UNITS(BLOCK_KEYS)];
    uint32_t keys[UNITS(MOST_DIM) * BLOCK_KEYS];
    uint32_t values[UNITS(BLOCK_KEYS) * (MOST_DIM + TILE_COLUMNS)];
    float score[BLOCK_ROWS * BLOCK_KEYS];
    float sum[BLOCK_ROWS * MOST_DIM];
    float best[BLOCK_ROWS], total[BLOCK_ROWS];
    int64_t token[BLOCK_ROWS], head[BLOCK_ROWS];
    int64_t low[BLOCK_ROWS], high[BLOCK_ROWS]; /* positions it sees: low <= position < high */
    int64_t rows;
} NAME(Block);

INLINE void NAME(emit)(const NAME(Layer) * layer, int64_t token, int64_t head, const float *sum,
                       float total) {
    const int64_t dim = layer->dim;
    const float share = 1.0f / total;
    float values[MOST_DIM];
    for (int64_t d = 0; d < dim; d++) values[d] = sum[d] * share;
    if (layer->packed.units != NULL) {
        NAME(put)(&layer->packed, token, head * dim, values, dim);
        return;
    }
    ELEMENT *to = layer->out + (token * layer->heads + head) * dim;
    for (int64_t d = 0; d < dim; d++) to[d] = NAME(narrow)(values[d]);
}

static void NAME(open_block)(NAME(Block) * block, const NAME(Layer) * layer) {
    const NAME(Activations) query = {block->query, block->rows, layer->dim};
    for (int64_t r = 0; r < block->rows; r++) {
        block->best[r] = LOWEST;
        block->total[r] = 0.0f;
        memset(block->sum + r * layer->dim, 0, layer->dim * sizeof(float));
        NAME(put)(&query, r, 0,
                  layer->query + block->token[r] * layer->query_stride +
                      block->head[r] * layer->dim,
                  layer->dim);
    }
}

/* Pack keys [count, dim] as panels [position / TILE_COLUMNS][unit][position]. */
INLINE void NAME(pack_keys)(NAME(Block) * block, const ELEMENT *const *lines, int64_t dim) {
    const int64_t units = UNITS(dim);
    for (int64_t first = 0; first < BLOCK_KEYS; first += TILE_COLUMNS) {
        uint32_t *panel = block->keys + first * units;
        const uint32_t *const *from = (const uint32_t *const *)(lines + first);
        int64_t done = 0;
#if defined(__AVX512F__)
        for (; done + 16 <= units; done += 16) {
            transpose_16(from, done, panel + done * TILE_COLUMNS, TILE_COLUMNS);
            transpose_16(from + 16, done, panel + done * TILE_COLUMNS + 16, TILE_COLUMNS);
        }
#endif
        for (int64_t t = 0; t < TILE_COLUMNS; t++)
            for (int64_t u = done; u < units; u++) panel[u * TILE_COLUMNS + t] = from[t][u];
    }
}

/* Pack values [count, dim] as panels [dimension / TILE_COLUMNS][unit of positions][dimension];
   what is past `count` is zero, since zero times anything that is no number would not be. */
INLINE void NAME(pack_values)(NAME(Block) * block, const ELEMENT *const *lines, int64_t count,
                              int64_t dim) {
    static const ELEMENT none[MOST_DIM];
    const int64_t units = UNITS(BLOCK_KEYS);
    for (int64_t first = 0; first < dim; first += TILE_COLUMNS) {
        const int64_t some = least(TILE_COLUMNS, dim - first);
        uint32_t *panel = block->values + first * units;
        for (int64_t u = 0; u < units; u++, panel += TILE_COLUMNS) {
            const ELEMENT *one = (u * UNIT < count ? lines[u * UNIT] : none) + first;
#if BF16
            const ELEMENT *two = (u * UNIT + 1 < count ? lines[u * UNIT + 1] : none) + first;
            for (int64_t d = 0; d < some; d++)
                panel[d] = (uint32_t)one[d] | (uint32_t)two[d] << 16;
#else
            memcpy(panel, one, some * sizeof(ELEMENT));
#endif
        }
    }
}

/* Turn a row's scores into shares of the softmax so far. */
INLINE void NAME(weigh)(NAME(Block) * block, const NAME(Layer) * layer, int64_t row, int64_t begin,
                        const NAME(Activations) * shares) {
    const int64_t low = most(block->low[row] - begin, 0);
    const int64_t high = least(block->high[row] - begin, BLOCK_KEYS);
    float *score = block->score + row * BLOCK_KEYS;
    float *sum = block->sum + row * layer->dim;
    if (low >= high) {
        memset(score, 0, BLOCK_KEYS * sizeof(float));
        NAME(put)(shares, row, 0, score, BLOCK_KEYS);
        return;
    }
    for (int64_t t = 0; t < BLOCK_KEYS; t++) score[t] *= layer->scale;
    if (layer->softcap > 0.0f)
        for (int64_t t = low; t < high; t++)
            score[t] = layer->softcap * tanhf(score[t] / layer->softcap);
    for (int64_t t = 0; t < low; t++) score[t] = LOWEST;
    for (int64_t t = high; t < BLOCK_KEYS; t++) score[t] = LOWEST;
    float top = block->best[row], more = 0.0f;
    for (int64_t t = 0; t < BLOCK_KEYS; t++) top = score[t] > top ? score[t] : top;
    for (int64_t t = 0; t < BLOCK_KEYS; t++) {
        score[t] = exp_down(score[t] - top);
        more += score[t];
    }
    if (top > block->best[row]) {
        const float fade = exp_down(block->best[row] - top);
        block->total[row] *= fade;
        for (int64_t d = 0; d < layer->dim; d++) sum[d] *= fade;
        block->best[row] = top;
    }
    block->total[row] += more;
    NAME(put)(shares, row, 0, score, BLOCK_KEYS);
}

/* Attend a block's rows over positions `from` to `until` - 1. */
static void NAME(attend_block)(NAME(Block) * block, const NAME(Layer) * layer, int64_t kv,
                               const NAME(Places) * places, int64_t from, int64_t until) {
    const int64_t dim = layer->dim, slot_size = layer->kv_heads * dim, rows = block->rows;
    const NAME(Activations) shares = {block->share, rows, BLOCK_KEYS};
    const ELEMENT *keys[BLOCK_KEYS], *values[BLOCK_KEYS];
    float tile[TILE_ROWS * TILE_COLUMNS];
    for (int64_t begin = from; begin < until; begin += BLOCK_KEYS) {
        const int64_t count = least(BLOCK_KEYS, until - begin);
        for (int64_t t = 0; t < BLOCK_KEYS; t++) {
            const int64_t slot = NAME(slot_of)(places, begin + least(t, count - 1));
            keys[t] = layer->keys + slot * slot_size + kv * dim;
            values[t] = layer->values + slot * slot_size + kv * dim;
        }
        NAME(pack_keys)(block, keys, dim);
        for (int64_t first = 0; first < BLOCK_KEYS; first += TILE_COLUMNS)
            for (int64_t row = 0; row < rows; row += TILE_ROWS) {
                const int64_t some = least(TILE_ROWS, rows - row);
                NAME(multiply)(block->query + row * UNITS(dim), block->keys + first * UNITS(dim),
                               UNITS(dim), some, tile, block->keys);
                for (int64_t r = 0; r < some; r++)
                    memcpy(block->score + (row + r) * BLOCK_KEYS + first, tile + r * TILE_COLUMNS,
                           TILE_COLUMNS * sizeof(float));
            }
        for (int64_t row = 0; row < rows; row++)
            NAME(weigh)(block, layer, row, begin, &shares);
        NAME(pack_values)(block, values, count, dim);
        for (int64_t first = 0; first < dim; first += TILE_COLUMNS) {
            const int64_t some_dims = least(TILE_COLUMNS, dim - first);
            for (int64_t row = 0; row < rows; row += TILE_ROWS) {
                const int64_t some = least(TILE_ROWS, rows - row);
                NAME(multiply)(block->share + row * UNITS(BLOCK_KEYS),
                               block->values + first * UNITS(BLOCK_KEYS), UNITS(BLOCK_KEYS), some,
                               tile, block->values);
                for (int64_t r = 0; r < some; r++) {
                    float *sum = block->sum + (row + r) * dim + first;
                    for (int64_t d = 0; d < some_dims; d++) sum[d] += tile[r * TILE_COLUMNS + d];
                }
            }
        }
    }
}

/* -- rows of one token ------------------------------------------------------------------------ */

#define STRIDE_KEYS 32 /* positions of a row that are attended at a time */

/* One row's running state for a group of query heads. */
typedef struct {
    float query[MOST_GROUP][MOST_DIM], sum[MOST_GROUP][MOST_DIM];
    float best[MOST_GROUP], total[MOST_GROUP];
} NAME(Heads);

INLINE void NAME(scores_of)(const NAME(Heads) * heads, const ELEMENT *const *keys, int64_t count,
                            const int64_t dim, const int64_t group,
                            float score[MOST_GROUP][STRIDE_KEYS]) {
    int64_t done = 0;
#if BF16 && defined(__AVX512BF16__)
    if (dim % 32 == 0 && dim <= 128) {
        __m512bh query[MOST_GROUP][4];
        for (int64_t g = 0; g < group; g++)
            for (int64_t d = 0; d < dim / 32; d++)
                query[g][d] = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(heads->query[g] + d * 32 + 16),
                                                  _mm512_loadu_ps(heads->query[g] + d * 32));
        for (; done + 4 <= count; done += 4) {
            __m512bh key[4][4];
            for (int64_t t = 0; t < 4; t++)
                for (int64_t d = 0; d < dim / 32; d++)
                    key[t][d] = (__m512bh)_mm512_loadu_si512(keys[done + t] + d * 32);
            for (int64_t g = 0; g < group; g++) {
                __m512 dot[4];
                for (int64_t t = 0; t < 4; t++) {
                    dot[t] = _mm512_setzero_ps();
                    for (int64_t d = 0; d < dim / 32; d++)
                        dot[t] = _mm512_dpbf16_ps(dot[t], query[g][d], key[t][d]);
                }
                _mm_storeu_ps(score[g] + done, sums_of_four(dot[0], dot[1], dot[2], dot[3]));
            }
        }
    }
#elif !BF16 && defined(__AVX512F__)
    if (dim % 16 == 0)
        for (; done + 4 <= count; done += 4)
            for (int64_t g = 0; g < group; g++) {
                __m512 dot[4];
                for (int64_t t = 0; t < 4; t++) {
                    dot[t] = _mm512_setzero_ps();
                    for (int64_t d = 0; d < dim; d += 16)
                        dot[t] = _mm512_fmadd_ps(_mm512_loadu_ps(heads->query[g] + d),
                                                 _mm512_loadu_ps(keys[done + t] + d), dot[t]);
                }
                _mm_storeu_ps(score[g] + done, sums_of_four(dot[0], dot[1], dot[2], dot[3]));
            }
#endif
    for (; done < count; done++)
        for (int64_t g = 0; g < group; g++) {
            float dot = 0.0f;
            for (int64_t d = 0; d < dim; d++)
                dot += heads->query[g][d] * NAME(widen)(keys[done][d]);
            score[g][done] = dot;
        }
}

/* sum += the values, weighed by the scores. */
INLINE void NAME(gather)(NAME(Heads) * heads, const ELEMENT *const *values, int64_t count,
                         const int64_t dim, const int64_t group,
                         float score[MOST_GROUP][STRIDE_KEYS]) {
    int64_t first = 0;
#if defined(__AVX512F__)
    for (; first + 32 <= dim; first += 32) {
        __m512 sum[MOST_GROUP][2];
        for (int64_t g = 0; g < group; g++) {
            sum[g][0] = _mm512_loadu_ps(heads->sum[g] + first);
            sum[g][1] = _mm512_loadu_ps(heads->sum[g] + first + 16);
        }
        for (int64_t t = 0; t < count; t++) {
#if BF16
            const __m512i bits = _mm512_loadu_si512(values[t] + first);
            const __m512 left = _mm512_castsi512_ps(_mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16));
            const __m512 right = _mm512_castsi512_ps(_mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16));
#else
            const __m512 left = _mm512_loadu_ps(values[t] + first);
            const __m512 right = _mm512_loadu_ps(values[t] + first + 16);
#endif
            for (int64_t g = 0; g < group; g++) {
                const __m512 share = _mm512_set1_ps(score[g][t]);
                sum[g][0] = _mm512_fmadd_ps(share, left, sum[g][0]);
                sum[g][1] = _mm512_fmadd_ps(share, right, sum[g][1]);
            }
        }
        for (int64_t g = 0; g < group; g++) {
            _mm512_storeu_ps(heads->sum[g] + first, sum[g][0]);
            _mm512_storeu_ps(heads->sum[g] + first + 16, sum[g][1]);
        }
    }
#endif
    for (int64_t t = 0; t < count && first < dim; t++)
        for (int64_t g = 0; g < group; g++)
            for (int64_t d = first; d < dim; d++)
                heads->sum[g][d] += score[g][t] * NAME(widen)(values[t][d]);
}

/* Attend a group of heads over positions `from` to `until` - 1. `dim` and `group` are constants
   where this is inlined for the usual sizes. */
INLINE void NAME(attend_heads)(NAME(Heads) * heads, const NAME(Layer) * layer, int64_t kv,
                               const NAME(Places) * places, int64_t from, int64_t until,
                               const int64_t dim, const int64_t group) {
    const int64_t slot_size = layer->kv_heads * dim;
    const ELEMENT *keys[STRIDE_KEYS], *values[STRIDE_KEYS];
    float score[MOST_GROUP][STRIDE_KEYS];
    for (int64_t begin = from; begin < until; begin += STRIDE_KEYS) {
        const int64_t count = least(STRIDE_KEYS, until - begin);
        for (int64_t t = 0; t < count; t++) {
            const int64_t at = NAME(slot_of)(places, begin + t) * slot_size + kv * dim;
            keys[t] = layer->keys + at;
            values[t] = layer->values + at;
            for (int64_t d = 0; d < dim * (int64_t)sizeof(ELEMENT); d += 64)
                __builtin_prefetch((const char *)values[t] + d);
        }
        NAME(scores_of)(heads, keys, count, dim, group, score);
        for (int64_t g = 0; g < group; g++) {
            float top = heads->best[g], more = 0.0f;
            if (layer->softcap > 0.0f)
                for (int64_t t = 0; t < count; t++)
                    score[g][t] = layer->softcap * tanhf(score[g][t] / layer->softcap);
            for (int64_t t = count; t < STRIDE_KEYS; t++) score[g][t] = LOWEST;
            for (int64_t t = 0; t < STRIDE_KEYS; t++) top = score[g][t] > top ? score[g][t] : top;
            for (int64_t t = 0; t < STRIDE_KEYS; t++) {
                score[g][t] = exp_down(score[g][t] - top);
                more += score[g][t];
            }
            if (top > heads->best[g]) {
                const float fade = exp_down(heads->best[g] - top);
                for (int64_t d = 0; d < dim; d++) heads->sum[g][d] *= fade;
                heads->total[g] *= fade;
                heads->best[g] = top;
            }
            heads->total[g] += more;
        }
        NAME(gather)(heads, values, count, dim, group, score);
    }
}

static void NAME(attend_heads_any)(NAME(Heads) * heads, const NAME(Layer) * layer, int64_t kv,
                                   const NAME(Places) * places, int64_t from, int64_t until) {
    const int64_t dim = layer->dim, group = layer->heads / layer->kv_heads;
#define CASE(size, count)                                                                   \
    if (dim == size && group == count) {                                                    \
        NAME(attend_heads)(heads, layer, kv, places, from, until, size, count);             \
        return;                                                                             \
    }
    CASE(64, 1) CASE(64, 2) CASE(64, 3) CASE(64, 4) CASE(64, 7) CASE(64, 8)
    CASE(128, 1) CASE(128, 2) CASE(128, 4) CASE(128, 6) CASE(128, 8)
#undef CASE
    NAME(attend_heads)(heads, layer, kv, places, from, until, dim, group);
}

/* -- tasks ------------------------------------------------------------------------------------ */

/* A share of a step's attention: some tokens of a span, some rows that share pages, or one row. */
typedef struct {
    const Step *step;
    NAME(Block) * block;
    NAME(Heads) * heads;
} NAME(Scratch);

static void NAME(attend_span)(const NAME(Scratch) * scratch, const NAME(Layer) * layer,
                              const Task *task) {
    const Step *step = scratch->step;
    NAME(Block) *block = scratch->block;
    const int64_t group = layer->heads / layer->kv_heads, span = task->index;
    const int64_t begin = step->span_begin[span], start = step->span_start[span];
    const NAME(Places) places = {NULL, step->span_slots[span], 0};
    block->rows = (task->last - task->first) * group;
    for (int64_t r = 0; r < block->rows; r++) {
        const int64_t token = task->first + r / group, end = start + token + 1;
        block->token[r] = begin + token;
        block->head[r] = task->kv * group + r % group;
        block->low[r] = layer->window > 0 ? most(0, end - layer->window) : 0;
        block->high[r] = end;
    }
    NAME(open_block)(block, layer);
    NAME(attend_block)(block, layer, task->kv, &places, block->low[0], start + task->last);
    for (int64_t r = 0; r < block->rows; r++)
        NAME(emit)(layer, block->token[r], block->head[r], block->sum + r * layer->dim,
                   block->total[r]);
}

/* Attend one single row from position `from` on, beginning with what `block` has (or nothing). */
static void NAME(attend_row)(const NAME(Scratch) * scratch, const NAME(Layer) * layer, int64_t row,
                             int64_t kv, int64_t from, const NAME(Block) * block, int64_t at) {
    const Step *step = scratch->step;
    NAME(Heads) *heads = scratch->heads;
    const int64_t group = layer->heads / layer->kv_heads, dim = layer->dim;
    const NAME(Places) places = {step->table + row * step->table_width, NULL, step->page_size};
    for (int64_t g = 0; g < group; g++) {
        const float *query = layer->query + row * layer->query_stride + (kv * group + g) * dim;
        for (int64_t d = 0; d < dim; d++) heads->query[g][d] = query[d] * layer->scale;
        heads->best[g] = block == NULL ? LOWEST : block->best[at + g];
        heads->total[g] = block == NULL ? 0.0f : block->total[at + g];
        if (block == NULL) memset(heads->sum[g], 0, dim * sizeof(float));
        else memcpy(heads->sum[g], block->sum + (at + g) * dim, dim * sizeof(float));
    }
    NAME(attend_heads_any)(heads, layer, kv, &places, from, step->lengths[row]);
    for (int64_t g = 0; g < group; g++)
        NAME(emit)(layer, row, kv * group + g, heads->sum[g], heads->total[g]);
}

static void NAME(attend_single)(const NAME(Scratch) * scratch, const NAME(Layer) * layer,
                                const Task *task) {
    const int64_t length = scratch->step->lengths[task->index];
    const int64_t from = layer->window > 0 ? most(0, length - layer->window) : 0;
    NAME(attend_row)(scratch, layer, task->index, task->kv, from, NULL, 0);
}

/* Rows whose first pages are the same: those by matrix products, then each row's own. */
static void NAME(attend_sharing)(const NAME(Scratch) * scratch, const NAME(Layer) * layer,
                                 const Task *task) {
    const Step *step = scratch->step;
    NAME(Block) *block = scratch->block;
    const int64_t group = layer->heads / layer->kv_heads, common = step->common[task->index];
    const int64_t *members = step->members;
    if (layer->window > 0) { /* a window slides off the common pages, at each row by itself */
        for (int64_t m = task->first; m < task->last; m++) {
            const Task single = {SINGLE, members[m], task->kv, 0, 0};
            NAME(attend_single)(scratch, layer, &single);
        }
        return;
    }
    const int32_t *table = step->table + members[task->first] * step->table_width;
    const NAME(Places) places = {table, NULL, step->page_size};
    block->rows = (task->last - task->first) * group;
    for (int64_t r = 0; r < block->rows; r++) {
        block->token[r] = members[task->first + r / group];
        block->head[r] = task->kv * group + r % group;
        block->low[r] = 0;
        block->high[r] = common;
    }
    NAME(open_block)(block, layer);
    NAME(attend_block)(block, layer, task->kv, &places, 0, common);
    for (int64_t m = task->first; m < task->last; m++)
        NAME(attend_row)(scratch, layer, members[m], task->kv, common, block,
                         (m - task->first) * group);
}

static void NAME(attend_task)(const NAME(Scratch) * scratch, const NAME(Layer) * layer,
                              const Task *task) {
    if (task->kind == SPAN) NAME(attend_span)(scratch, layer, task);
    else if (task->kind == SHARING) NAME(attend_sharing)(scratch, layer, task);
    else NAME(attend_single)(scratch, layer, task);
}

INLINE void NAME(store_head)(ELEMENT *to, const float *from, int64_t dim) {
    for (int64_t d = 0; d < dim; d++) to[d] = NAME(narrow)(from[d]);
}
