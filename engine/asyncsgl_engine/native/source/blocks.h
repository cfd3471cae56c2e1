/* Attention of many queries over the same positions, by matrix products. Compiled once for each
   element type, after products.h.

   Queries lie side by side in the lanes of vectors, so that the softmax has no work across lanes,
   keys are broadcast as they are stored, and shares come out in the order in which the product
   with the values reads them. The softmax runs online over blocks of positions (Milakov and
   Gimelshein, 2018). What it subtracts moves only once a score is larger by SLACK, since shares
   up to 2^SLACK are as exact as those up to 1. */

#define BLOCK_KEYS 64 /* positions in a block; a multiple of KEY_ROWS */
#define BLOCK_QUERIES 192 /* a multiple of ABREAST */
#define LOWEST (-1e30f) /* before anything was seen */
#define UNSEEN (-2e30f) /* the score of a position that a query does not see */
#define SLACK 8.0f

/* One layer's attention. */
typedef struct {
    const ELEMENT *keys, *values; /* [slots, kv_heads, dim] */
    const float *query;           /* [tokens, query_stride], heads of dim elements */
    int64_t query_stride, heads, kv_heads, dim, window;
    float scale, softcap;
    NAME(Activations) packed; /* where results go; or, without units, */
    ELEMENT *out;             /* [tokens, heads, dim] */
} NAME(Layer);

/* The queries of a block, one for each head of each token, and their running state. A panel is
   ABREAST of them. */
typedef struct {
    uint32_t query[BLOCK_QUERIES * UNITS(MOST_DIM)]; /* [panel][unit][ABREAST] */
    float sum[BLOCK_QUERIES * MOST_DIM];             /* [panel][dimension][ABREAST] */
    uint32_t keys[BLOCK_KEYS * UNITS(MOST_DIM)];     /* [position][unit] */
    uint32_t values[UNITS(BLOCK_KEYS) * MOST_DIM];   /* [unit][dimension] */
    float score[BLOCK_KEYS * ABREAST];               /* [position][ABREAST] */
    uint32_t share[UNITS(BLOCK_KEYS) * ABREAST];     /* [unit][ABREAST] */
    float best[BLOCK_QUERIES], total[BLOCK_QUERIES]; /* best: in powers of two */
    int32_t low[BLOCK_QUERIES], high[BLOCK_QUERIES]; /* sees low <= position < high */
    int64_t token[BLOCK_QUERIES], head[BLOCK_QUERIES];
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

/* Scaled so that scores come out as powers of two. */
INLINE void NAME(scale_query)(const NAME(Layer) * layer, int64_t token, int64_t head, float *to) {
    const float *from = layer->query + token * layer->query_stride + head * layer->dim;
    const float scale = layer->scale * LOG2_E;
    for (int64_t d = 0; d < layer->dim; d++) to[d] = from[d] * scale;
}

static void NAME(open_block)(NAME(Block) * block, const NAME(Layer) * layer) {
    const int64_t dim = layer->dim, units = UNITS(dim);
    const int64_t lanes = ceil_div(block->rows, ABREAST) * ABREAST;
    float scaled[MOST_DIM];
    ELEMENT line[MOST_DIM];
    for (int64_t r = 0; r < lanes; r++) {
        uint32_t *query = block->query + r / ABREAST * ABREAST * units + r % ABREAST;
        block->best[r] = LOWEST;
        block->total[r] = 0.0f;
        if (r >= block->rows) { /* a lane that nobody reads */
            for (int64_t u = 0; u < units; u++) query[u * ABREAST] = 0;
            block->low[r] = 0;
            block->high[r] = INT32_MAX;
            continue;
        }
        NAME(scale_query)(layer, block->token[r], block->head[r], scaled);
        for (int64_t d = 0; d < dim; d++) line[d] = NAME(narrow)(scaled[d]);
        for (int64_t u = 0; u < units; u++) memcpy(query + u * ABREAST, line + u * UNIT, 4);
    }
    memset(block->sum, 0, lanes * whole_tiles(dim) * sizeof(float));
}

/* sums[r][v] += the sum over u of a[r * row + u * unit] * b[u][v]. */
INLINE void NAME(broadcast_tile)(const uint32_t *a, const int64_t row, const int64_t unit,
                                 const uint32_t *b, const int64_t units, const int vectors,
                                 vf sums[KEY_ROWS][3]) {
    for (int64_t u = 0; u < units; u++, a += unit, b += ABREAST) {
        vu right[3];
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) right[v] = load_bits(b + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < KEY_ROWS; r++) {
            const vu left = splat_bits(a[r * row]);
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++)
                sums[r][v] = NAME(multiply_add)(sums[r][v], left, right[v]);
        }
    }
}

/* A score as it counts: bounded by tanh where the model does that, unseen positions left out. */
INLINE vf NAME(refine)(const NAME(Block) * block, vf score, int64_t lane, int64_t position,
                       float softcap) {
    if (softcap > 0.0f) {
        const float bound = softcap * LOG2_E;
        for (int i = 0; i < LANES; i++) score[i] = bound * tanhf(score[i] / bound);
    }
    const vi low = *(const vi *)(block->low + lane), high = *(const vi *)(block->high + lane);
    const vi at = (vi){0} + (int32_t)position;
    return choose((low <= at) & (at < high), score, splat(UNSEEN));
}

/* The same for a panel's scores over the block at `begin`, and their largest anew. */
static void NAME(refine_panel)(NAME(Block) * block, int64_t first, int64_t begin, int64_t count,
                               const int vectors, float softcap, vf top[3]) {
    for (int v = 0; v < vectors; v++) {
        top[v] = splat(LOWEST);
        for (int64_t t = 0; t < count; t++) {
            float *at = block->score + t * ABREAST + v * LANES;
            const vf score =
                NAME(refine)(block, load(at), first + v * LANES, begin + t, softcap);
            top[v] = larger(top[v], score);
            store(at, score);
        }
    }
}

/* Scores of a panel over a block; the largest of each lane into `top`. */
INLINE void NAME(score_panel)(NAME(Block) * block, int64_t first, int64_t count,
                              const int64_t units, const int vectors, vf top[3]) {
    const uint32_t *query = block->query + first * units;
    for (int v = 0; v < vectors; v++) top[v] = splat(LOWEST);
    for (int64_t t = 0; t < count; t += KEY_ROWS) {
        vf sums[KEY_ROWS][3];
        for (int r = 0; r < KEY_ROWS; r++)
            for (int v = 0; v < vectors; v++) sums[r][v] = splat(0.0f);
        NAME(broadcast_tile)(block->keys + t * units, units, 1, query, units, vectors, sums);
#pragma GCC unroll 8
        for (int r = 0; r < KEY_ROWS; r++)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) {
                top[v] = larger(top[v], sums[r][v]);
                store(block->score + (t + r) * ABREAST + v * LANES, sums[r][v]);
            }
    }
}

/* Move what is subtracted from scores up to the largest so far, and fade what was summed. */
static void NAME(raise_panel)(NAME(Block) * block, int64_t first, const int64_t dims,
                              const int vectors, const vf top[3]) {
    float *sum = block->sum + first * dims;
    vf fade[3];
    for (int v = 0; v < vectors; v++) {
        float *best = block->best + first + v * LANES, *total = block->total + first + v * LANES;
        const vf more = larger(load(best), top[v]);
        fade[v] = exp2_f32(load(best) - more);
        store(best, more);
        store(total, load(total) * fade[v]);
    }
    for (int64_t d = 0; d < dims; d++)
        for (int v = 0; v < vectors; v++) {
            float *at = sum + d * ABREAST + v * LANES;
            store(at, load(at) * fade[v]);
        }
}

INLINE int NAME(outgrown)(const NAME(Block) * block, int64_t first, const int vectors,
                          const vf top[3]) {
    vi grown = {0};
    for (int v = 0; v < vectors; v++)
        grown |= top[v] > load(block->best + first + v * LANES) + splat(SLACK);
    int any = 0;
    for (int i = 0; i < LANES; i++) any |= grown[i];
    return any;
}

/* A unit of shares: one float, or two bfloat16 of positions that follow each other. */
INLINE vu NAME(share_unit)(const vf *shares) {
#if !BF16
    return (vu)shares[0];
#elif defined(__AVX512BF16__)
    static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)shares[1], (__m512)shares[0]);
    return (vu)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)both);
#else
    const vu one = (vu)shares[0], two = (vu)shares[1];
    const vu low = (one + 0x7fffu + ((one >> 16) & 1u)) >> 16;
    return low | ((two + 0x7fffu + ((two >> 16) & 1u)) & 0xffff0000u);
#endif
}

/* Scores to shares of the softmax so far; lanes' sums of them into the totals. */
INLINE void NAME(weigh_panel)(NAME(Block) * block, int64_t first, int64_t count,
                              const int vectors) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) {
        float *at = block->total + first + v * LANES;
        const vf best = load(block->best + first + v * LANES);
        const float *score = block->score + v * LANES;
        uint32_t *share = block->share + v * LANES;
        vf total[UNIT];
        for (int j = 0; j < UNIT; j++) total[j] = splat(0.0f);
#pragma GCC unroll 4
        for (int64_t u = 0; u < count / UNIT; u++) {
            vf shares[UNIT];
            for (int j = 0; j < UNIT; j++) {
                shares[j] = NAME(exp2)(load(score + (u * UNIT + j) * ABREAST) - best);
                total[j] += shares[j];
            }
            *(vu *)(share + u * ABREAST) = NAME(share_unit)(shares);
        }
        for (int j = 1; j < UNIT; j++) total[0] += total[j];
        store(at, load(at) + total[0]);
    }
}

/* Attend one panel over the block of `count` positions at `begin`. */
INLINE void NAME(attend_panel)(NAME(Block) * block, const NAME(Layer) * layer, int64_t first,
                               int64_t begin, int64_t count, const int64_t dim, const int vectors,
                               int rough) {
    const int64_t dims = whole_tiles(dim);
    vf top[3];
    NAME(score_panel)(block, first, count, UNITS(dim), vectors, top);
    if (rough) NAME(refine_panel)(block, first, begin, count, vectors, layer->softcap, top);
    if (NAME(outgrown)(block, first, vectors, top))
        NAME(raise_panel)(block, first, dims, vectors, top);
    NAME(weigh_panel)(block, first, count, vectors);
    float *sum = block->sum + first * dims;
    for (int64_t d = 0; d < dims; d += KEY_ROWS) {
        vf sums[KEY_ROWS][3];
#pragma GCC unroll 8
        for (int r = 0; r < KEY_ROWS; r++)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++)
                sums[r][v] = load(sum + (d + r) * ABREAST + v * LANES);
        NAME(broadcast_tile)(block->values + d, 1, dims, block->share, count / UNIT, vectors,
                             sums);
#pragma GCC unroll 8
        for (int r = 0; r < KEY_ROWS; r++)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++)
                store(sum + (d + r) * ABREAST + v * LANES, sums[r][v]);
    }
}

static void NAME(attend_panel_any)(NAME(Block) * block, const NAME(Layer) * layer, int64_t first,
                                   int64_t begin, int64_t count, int rough) {
    const int64_t dim = layer->dim;
    const int vectors = (int)least(3, ceil_div(block->rows - first, LANES));
#define CASE(size, some)                                                                     \
    if (dim == size && vectors == some) {                                                    \
        NAME(attend_panel)(block, layer, first, begin, count, size, some, rough);            \
        return;                                                                              \
    }
    CASE(64, 3) CASE(64, 2) CASE(64, 1) CASE(128, 3) CASE(128, 2) CASE(128, 1)
#undef CASE
    NAME(attend_panel)(block, layer, first, begin, count, dim, 3, rough);
}

/* Copy the keys and values of `count` positions from `begin` on, filled up to whole tiles: keys
   with what is masked, values with zeros, since zero times anything that is no number is not. */
INLINE void NAME(fetch_block)(NAME(Block) * block, const NAME(Layer) * layer, int64_t kv,
                              const Places *places, int64_t begin, int64_t count,
                              int64_t until) {
    static const ELEMENT none[MOST_DIM];
    const int64_t dim = layer->dim, units = UNITS(dim), dims = whole_tiles(dim);
    const int64_t slot_size = layer->kv_heads * dim, all = whole_tiles(count);
    const ELEMENT *lines[BLOCK_KEYS];
    int64_t at[2 * BLOCK_KEYS]; /* the next block's too: they are fetched ahead */
    const int64_t known = least(until - begin, 2 * BLOCK_KEYS);
    slots_of(places, begin, known, slot_size, at);
    for (int64_t t = 0; t < count; t++) {
        memcpy(block->keys + t * units, layer->keys + at[t] + kv * dim, dim * sizeof(ELEMENT));
        lines[t] = layer->values + at[t] + kv * dim;
    }
    for (int64_t t = count; t < known; t++) {
        prefetch_line(layer->keys + at[t] + kv * dim, dim * sizeof(ELEMENT));
        prefetch_line(layer->values + at[t] + kv * dim, dim * sizeof(ELEMENT));
    }
    for (int64_t t = count; t < all; t++) {
        memset(block->keys + t * units, 0, dim * sizeof(ELEMENT));
        lines[t] = none;
    }
    for (int64_t u = 0; u < all / UNIT; u++) {
        uint32_t *to = block->values + u * dims;
        const ELEMENT *one = lines[u * UNIT];
#if BF16
        const ELEMENT *two = lines[u * UNIT + 1];
        for (int64_t d = 0; d < dim; d++) to[d] = (uint32_t)one[d] | (uint32_t)two[d] << 16;
#else
        memcpy(to, one, dim * sizeof(ELEMENT));
#endif
        for (int64_t d = dim; d < dims; d++) to[d] = 0;
    }
}

/* Attend a block's queries over positions `from` to `until` - 1. */
static void NAME(attend_block)(NAME(Block) * block, const NAME(Layer) * layer, int64_t kv,
                               const Places *places, int64_t from, int64_t until) {
    for (int64_t begin = from; begin < until; begin += BLOCK_KEYS) {
        const int64_t count = least(BLOCK_KEYS, until - begin), all = whole_tiles(count);
        NAME(fetch_block)(block, layer, kv, places, begin, count, until);
        for (int64_t first = 0; first < block->rows; first += ABREAST) {
            int32_t low = INT32_MAX, high = 0, clear_low = 0, clear_high = INT32_MAX;
            for (int64_t r = first; r < least(first + ABREAST, block->rows); r++) {
                low = block->low[r] < low ? block->low[r] : low;
                high = block->high[r] > high ? block->high[r] : high;
                clear_low = block->low[r] > clear_low ? block->low[r] : clear_low;
                clear_high = block->high[r] < clear_high ? block->high[r] : clear_high;
            }
            if (begin + count <= low || begin >= high) continue;
            const int rough =
                begin < clear_low || begin + all > clear_high || layer->softcap > 0.0f;
            NAME(attend_panel_any)(block, layer, first, begin, all, rough);
        }
    }
}

/* One query's sum of values, [dim], as it is so far. */
INLINE void NAME(read_sum)(const NAME(Block) * block, int64_t row, int64_t dim, float *to) {
    const float *from =
        block->sum + row / ABREAST * ABREAST * whole_tiles(dim) + row % ABREAST;
    for (int64_t d = 0; d < dim; d++) to[d] = from[d * ABREAST];
}

static void NAME(emit_block)(const NAME(Block) * block, const NAME(Layer) * layer) {
    float sum[MOST_DIM];
    for (int64_t r = 0; r < block->rows; r++) {
        NAME(read_sum)(block, r, layer->dim, sum);
        NAME(emit)(layer, block->token[r], block->head[r], sum, block->total[r]);
    }
}
