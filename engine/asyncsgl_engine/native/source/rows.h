/* Attention of single rows, each over its own positions. Compiled once for each element type, after
   blocks.h.

   Keys and values are read where they lie, all heads of a position together, so that memory is
   read in order; meanwhile the next positions are fetched. Every group of query heads shares what
   is read for its key and value head. */

#define STRIDE_KEYS 32 /* positions that are attended at a time; a multiple of LANES */

/* One row's running state for the query heads of one key and value head. */
typedef struct {
    float query[MOST_GROUP][MOST_DIM], sum[MOST_GROUP][MOST_DIM];
    float best[MOST_GROUP];
    vf total[MOST_GROUP]; /* summed over its lanes at the end */
} NAME(Heads);

/* Positions of a stride, and those of the next: offsets of their first head. */
typedef struct {
    int64_t at[STRIDE_KEYS], next[STRIDE_KEYS];
    int64_t count, coming;
} NAME(Stride);

/* Fetch the heads that stand at places `begin` to `end` - 1 of the next stride: a few at a time,
   since what waits for memory is limited. */
INLINE void NAME(fetch_next)(const ELEMENT *heads, const NAME(Stride) * stride, int64_t begin,
                             int64_t end, const int64_t dim) {
    for (int64_t t = begin; t < least(end, stride->coming); t++)
        prefetch_line(heads + stride->next[t], dim * sizeof(ELEMENT));
}

INLINE void NAME(scores_of)(const NAME(Heads) * heads, const ELEMENT *keys,
                            const NAME(Stride) * stride, const int64_t dim, const int64_t group,
                            float score[MOST_GROUP][STRIDE_KEYS]) {
    const int64_t count = stride->count;
    int64_t done = 0;
#if BF16 && defined(__AVX512BF16__)
    if (dim % 32 == 0 && dim <= 128) {
        __m512bh query[MOST_GROUP][4];
        for (int64_t g = 0; g < group; g++)
            for (int64_t d = 0; d < dim / 32; d++)
                query[g][d] = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(heads->query[g] + d * 32 + 16),
                                                  _mm512_loadu_ps(heads->query[g] + d * 32));
        for (; done + 4 <= count; done += 4) {
            NAME(fetch_next)(keys, stride, done, done + 4, dim);
            __m512bh key[4][4];
            for (int64_t t = 0; t < 4; t++)
                for (int64_t d = 0; d < dim / 32; d++)
                    key[t][d] = (__m512bh)_mm512_loadu_si512(keys + stride->at[done + t] + d * 32);
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
        for (; done + 4 <= count; done += 4) {
            NAME(fetch_next)(keys, stride, done, done + 4, dim);
            for (int64_t g = 0; g < group; g++) {
                __m512 dot[4];
                for (int64_t t = 0; t < 4; t++) {
                    dot[t] = _mm512_setzero_ps();
                    for (int64_t d = 0; d < dim; d += 16)
                        dot[t] = _mm512_fmadd_ps(
                            _mm512_loadu_ps(heads->query[g] + d),
                            _mm512_loadu_ps(keys + stride->at[done + t] + d), dot[t]);
                }
                _mm_storeu_ps(score[g] + done, sums_of_four(dot[0], dot[1], dot[2], dot[3]));
            }
        }
#endif
    NAME(fetch_next)(keys, stride, done, STRIDE_KEYS, dim);
    for (; done < count; done++)
        for (int64_t g = 0; g < group; g++) {
            const ELEMENT *key = keys + stride->at[done];
            float dot = 0.0f;
            for (int64_t d = 0; d < dim; d++) dot += heads->query[g][d] * NAME(widen)(key[d]);
            score[g][done] = dot;
        }
}

/* sum += the values, weighed by the scores; these are 0 past the last position. */
INLINE void NAME(gather)(NAME(Heads) * heads, const ELEMENT *values, const NAME(Stride) * stride,
                         const int64_t dim, const int64_t group,
                         float score[MOST_GROUP][STRIDE_KEYS]) {
    const int64_t count = stride->count;
    int64_t first = 0;
#if BF16 && defined(__AVX512BF16__)
    static const uint16_t order[2][32] = {
        {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    const __m512i left_order = _mm512_loadu_si512(order[0]);
    const __m512i right_order = _mm512_loadu_si512(order[1]);
    uint32_t pairs[MOST_GROUP][STRIDE_KEYS / 2]; /* shares of two positions each */
    for (int64_t g = 0; g < group; g++) {
        const __m512bh both =
            _mm512_cvtne2ps_pbh(_mm512_loadu_ps(score[g] + 16), _mm512_loadu_ps(score[g]));
        _mm512_storeu_si512(pairs[g], (__m512i)both);
    }
    for (; first + 32 <= dim; first += 32) {
        __m512 sum[MOST_GROUP][2];
        for (int64_t g = 0; g < group; g++) {
            sum[g][0] = _mm512_loadu_ps(heads->sum[g] + first);
            sum[g][1] = _mm512_loadu_ps(heads->sum[g] + first + 16);
        }
        for (int64_t t = 0; t < count; t += 2) {
            if (first == 0) NAME(fetch_next)(values, stride, t, t + 2, dim);
            const __m512i one = _mm512_loadu_si512(values + stride->at[t] + first);
            const __m512i two =
                _mm512_loadu_si512(values + stride->at[least(t + 1, count - 1)] + first);
            const __m512bh left = (__m512bh)_mm512_permutex2var_epi16(one, left_order, two);
            const __m512bh right = (__m512bh)_mm512_permutex2var_epi16(one, right_order, two);
            for (int64_t g = 0; g < group; g++) {
                const __m512bh share = (__m512bh)_mm512_set1_epi32((int)pairs[g][t / 2]);
                sum[g][0] = _mm512_dpbf16_ps(sum[g][0], share, left);
                sum[g][1] = _mm512_dpbf16_ps(sum[g][1], share, right);
            }
        }
        for (int64_t g = 0; g < group; g++) {
            _mm512_storeu_ps(heads->sum[g] + first, sum[g][0]);
            _mm512_storeu_ps(heads->sum[g] + first + 16, sum[g][1]);
        }
    }
#elif !BF16 && defined(__AVX512F__)
    for (; first + 32 <= dim; first += 32) {
        __m512 sum[MOST_GROUP][2];
        for (int64_t g = 0; g < group; g++) {
            sum[g][0] = _mm512_loadu_ps(heads->sum[g] + first);
            sum[g][1] = _mm512_loadu_ps(heads->sum[g] + first + 16);
        }
        for (int64_t t = 0; t < count; t++) {
            if (first == 0) NAME(fetch_next)(values, stride, t, t + 1, dim);
            const __m512 left = _mm512_loadu_ps(values + stride->at[t] + first);
            const __m512 right = _mm512_loadu_ps(values + stride->at[t] + first + 16);
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
    if (first == 0) NAME(fetch_next)(values, stride, 0, STRIDE_KEYS, dim);
    for (int64_t t = 0; t < count && first < dim; t++)
        for (int64_t g = 0; g < group; g++) {
            const ELEMENT *value = values + stride->at[t];
            for (int64_t d = first; d < dim; d++)
                heads->sum[g][d] += score[g][t] * NAME(widen)(value[d]);
        }
}

/* Scores of one query head to shares of the softmax so far. */
INLINE void NAME(weigh_row)(NAME(Heads) * heads, int64_t g, float *score, int64_t count,
                            const int64_t dim, float softcap) {
    if (softcap > 0.0f)
        for (int64_t t = 0; t < count; t++)
            score[t] = softcap * LOG2_E * tanhf(score[t] / (softcap * LOG2_E));
    for (int64_t t = count; t < STRIDE_KEYS; t++) score[t] = UNSEEN;
    vf tops = load(score);
    for (int64_t t = LANES; t < STRIDE_KEYS; t += LANES) tops = larger(tops, load(score + t));
    float top = tops[0];
    for (int i = 1; i < LANES; i++) top = tops[i] > top ? tops[i] : top;
    if (top > heads->best[g] + SLACK) {
        const float fade = exp2_f32(splat(heads->best[g] - top))[0];
        for (int64_t d = 0; d < dim; d++) heads->sum[g][d] *= fade;
        heads->total[g] *= splat(fade);
        heads->best[g] = top;
    }
    for (int64_t t = 0; t < STRIDE_KEYS; t += LANES) {
        const vf share = NAME(exp2)(load(score + t) - splat(heads->best[g]));
        heads->total[g] += share;
        store(score + t, share);
    }
}

/* Attend the key and value heads `kv` to `end` - 1 over positions `from` to `until` - 1. `dim` and
   `group` are constants where this is inlined for the usual sizes. */
INLINE void NAME(attend_heads)(NAME(Heads) * heads, const NAME(Layer) * layer, int64_t kv,
                               int64_t end, const Places *places, int64_t from, int64_t until,
                               const int64_t dim, const int64_t group) {
    const int64_t slot_size = layer->kv_heads * dim;
    NAME(Stride) stride;
    float score[MOST_GROUP][STRIDE_KEYS];
    stride.coming = least(STRIDE_KEYS, until - from);
    slots_of(places, from, stride.coming, slot_size, stride.next);
    for (int64_t begin = from; begin < until; begin += STRIDE_KEYS) {
        stride.count = stride.coming;
        memcpy(stride.at, stride.next, sizeof stride.at);
        stride.coming = most(0, least(STRIDE_KEYS, until - begin - STRIDE_KEYS));
        slots_of(places, begin + STRIDE_KEYS, stride.coming, slot_size, stride.next);
        for (int64_t h = kv; h < end; h++) {
            NAME(scores_of)(heads + h, layer->keys + h * dim, &stride, dim, group, score);
            for (int64_t g = 0; g < group; g++)
                NAME(weigh_row)(heads + h, g, score[g], stride.count, dim, layer->softcap);
            NAME(gather)(heads + h, layer->values + h * dim, &stride, dim, group, score);
        }
    }
}

static void NAME(attend_heads_any)(NAME(Heads) * heads, const NAME(Layer) * layer, int64_t kv,
                                   int64_t end, const Places *places, int64_t from,
                                   int64_t until) {
    const int64_t dim = layer->dim, group = layer->heads / layer->kv_heads;
#define CASE(size, count)                                                                   \
    if (dim == size && group == count) {                                                    \
        NAME(attend_heads)(heads, layer, kv, end, places, from, until, size, count);        \
        return;                                                                             \
    }
    CASE(64, 1) CASE(64, 3) CASE(64, 4) CASE(64, 7) CASE(128, 2) CASE(128, 4)
#undef CASE
    NAME(attend_heads)(heads, layer, kv, end, places, from, until, dim, group);
}

/* Fetch what a row reads first from position `from` on: nothing else would hide that. */
static void NAME(fetch_row)(const NAME(Layer) * layer, const Step *step, int64_t row, int64_t kv,
                            int64_t end, int64_t from) {
    const Places places = {step->table + row * step->table_width, NULL, step->page_size};
    const int64_t count = least(STRIDE_KEYS, step->lengths[row] - from);
    const int64_t bytes = (end - kv) * layer->dim * sizeof(ELEMENT), begin = kv * layer->dim;
    int64_t at[STRIDE_KEYS];
    slots_of(&places, from, count, layer->kv_heads * layer->dim, at);
    for (int64_t t = 0; t < count; t++) {
        prefetch_line(layer->keys + at[t] + begin, bytes);
        prefetch_line(layer->values + at[t] + begin, bytes);
    }
}

/* Attend one row's key and value heads `kv` to `end` - 1 from position `from` on, beginning with
   what `block` has from its query `at` on (or nothing). */
static void NAME(attend_row)(NAME(Heads) * heads, const NAME(Layer) * layer, const Step *step,
                             int64_t row, int64_t kv, int64_t end, int64_t from,
                             const NAME(Block) * block, int64_t at) {
    const int64_t group = layer->heads / layer->kv_heads, dim = layer->dim;
    const Places places = {step->table + row * step->table_width, NULL, step->page_size};
    for (int64_t h = kv; h < end; h++)
        for (int64_t g = 0; g < group; g++, at++) {
            NAME(scale_query)(layer, row, h * group + g, heads[h].query[g]);
            heads[h].best[g] = block == NULL ? LOWEST : block->best[at];
            heads[h].total[g] = splat(0.0f);
            heads[h].total[g][0] = block == NULL ? 0.0f : block->total[at];
            if (block == NULL) memset(heads[h].sum[g], 0, dim * sizeof(float));
            else NAME(read_sum)(block, at, dim, heads[h].sum[g]);
        }
    NAME(attend_heads_any)(heads, layer, kv, end, &places, from, step->lengths[row]);
    for (int64_t h = kv; h < end; h++)
        for (int64_t g = 0; g < group; g++) {
            float total = 0.0f;
            for (int i = 0; i < LANES; i++) total += heads[h].total[g][i];
            NAME(emit)(layer, row, h * group + g, heads[h].sum[g], total);
        }
}
