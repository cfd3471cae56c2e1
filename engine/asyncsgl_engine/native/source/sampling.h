/* Draws tokens from logits, and describes tokens, row by row.

   One thread works on a row, and nothing but the row decides what it gives: the same draw comes out
   whatever other rows there are. A row is read in chunks, whose maxima tell which of them can hold
   a candidate; only candidates are sorted. */

#define CHUNK 128 /* logits looked at together; a multiple of 32 and of LANES */
#define LEAST_EXPONENT (-87.0f)
#define FIRST_DEPTH 6.0f
#define NO_TOKEN (-1)

/* What the Python side gives. Rows with a heat of 0 take their best token. */
typedef struct {
    const float *const *logits;     /* [rows]: each [vocab] */
    const int32_t *const *allowed;  /* [rows]: each [words] of bits, or NULL */
    const float *heat, *top_p, *min_p, *chance; /* [rows] */
    const int64_t *top_k;           /* [rows], 1 to vocab */
    int64_t *tokens; /* [rows]: what is drawn, NO_TOKEN where there are no finite numbers */
    int64_t rows, vocab, words, threads;
    void *workspace; /* asyncsgl_sampling_space bytes */
} Draw;

typedef struct {
    const float *const *logits; /* [rows] */
    double *totals;             /* [rows]: logarithm of the sum of exponentials */
    int64_t *ids;               /* [rows, top]: the best tokens, best first */
    int64_t rows, vocab, top, threads;
    void *workspace;
} Describe;

typedef struct {
    const float *logits;
    const int32_t *allowed;
    int64_t vocab, words;
} Line;

/* A thread's memory. A pair is a logit, as bits that sort downwards, above a token's id. */
typedef struct {
    float *maxima, *sums, *weights;
    uint64_t *pairs, *spare;
} Room;

static int64_t chunks_of(int64_t vocab) { return ceil_div(vocab, CHUNK); }

static int64_t room_size(int64_t vocab) {
    const int64_t padded = chunks_of(vocab) * CHUNK;
    return 64 * ceil_div(2 * chunks_of(vocab) * 4 + padded * 4 + 2 * padded * 8, 64);
}

static Room room_at(void *workspace, int64_t vocab, int64_t thread) {
    const int64_t chunks = chunks_of(vocab), padded = chunks * CHUNK;
    Room room;
    room.pairs = (uint64_t *)((char *)workspace + thread * room_size(vocab));
    room.spare = room.pairs + padded;
    room.weights = (float *)(room.spare + padded);
    room.maxima = room.weights + padded;
    room.sums = room.maxima + chunks;
    return room;
}

int64_t asyncsgl_sampling_space(int64_t vocab, int64_t threads) {
    return threads * room_size(vocab);
}

/* Chunk c: where it lies, or in `space` where parts of it are refused or past the end, those at
   minus infinity; NULL where no token of it is allowed. */
INLINE const float *chunk_at(const Line *line, int64_t c, float *space) {
    const int64_t first = c * CHUNK, count = least(CHUNK, line->vocab - first);
    const float *from = line->logits + first;
    if (line->allowed == NULL) {
        if (count == CHUNK) return from;
        for (int64_t i = 0; i < CHUNK; i++) space[i] = i < count ? from[i] : -INFINITY;
        return space;
    }
    uint32_t words[CHUNK / 32], any = 0;
    for (int64_t w = 0; w < CHUNK / 32; w++) {
        const int64_t at = first / 32 + w;
        words[w] = at < line->words ? (uint32_t)line->allowed[at] : 0;
        any |= words[w];
    }
    if (any == 0) return NULL;
    if (count == CHUNK) {
        for (int64_t w = 0; w < CHUNK / 32; w++)
            for (int64_t b = 0; b < 32; b++)
                space[32 * w + b] = words[w] >> b & 1u ? from[32 * w + b] : -INFINITY;
        return space;
    }
    for (int64_t i = 0; i < CHUNK; i++)
        space[i] = i < count && (words[i / 32] >> (i % 32) & 1u) ? from[i] : -INFINITY;
    return space;
}

/* The greatest of a chunk's values, NAN where one of them is no number. */
INLINE float chunk_maximum(const float *values) {
#if defined(__AVX512F__)
    __m512 best = _mm512_set1_ps(-INFINITY);
    __mmask16 faulty = 0;
    for (int64_t i = 0; i < CHUNK; i += LANES) {
        const __m512 value = _mm512_loadu_ps(values + i);
        best = _mm512_max_ps(value, best);
        faulty |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    }
    return faulty ? NAN : _mm512_reduce_max_ps(best);
#else
    float lanes[LANES];
    vf best = load(values);
    vi faulty = (vi)(best != best);
    for (int64_t i = LANES; i < CHUNK; i += LANES) {
        const vf value = load(values + i);
        const vi greater = (vi)(value > best);
        best = (vf)((greater & (vi)value) | (~greater & (vi)best));
        faulty |= (vi)(value != value);
    }
    store(lanes, best);
    for (int64_t i = 0; i < LANES; i++) {
        if (faulty[i]) return NAN;
        lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    }
    return lanes[0];
#endif
}

/* Note each chunk's maximum; the first chunk that has the greatest, or -1 where all is refused or
   anything is no number. */
static int64_t find_maxima(const Line *line, float *maxima) {
    float space[CHUNK], highest = -INFINITY;
    int64_t best = -1;
    for (int64_t c = 0; c < chunks_of(line->vocab); c++) {
        const float *values = chunk_at(line, c, space);
        maxima[c] = values == NULL ? -INFINITY : chunk_maximum(values);
        if (maxima[c] != maxima[c]) return -1;
        if (maxima[c] > highest) {
            highest = maxima[c];
            best = c;
        }
    }
    return best;
}

static int64_t first_of(const Line *line, int64_t c, float value) {
    float space[CHUNK];
    const float *values = chunk_at(line, c, space);
    for (int64_t i = 0; i < CHUNK; i++)
        if (values[i] == value) return c * CHUNK + i;
    return 0;
}

INLINE float weight_of(float exponent) {
    const float weight = exp_down(exponent);
    return exponent < LEAST_EXPONENT ? 0.0f : weight;
}

/* Each chunk's sum of weights exp((logit - best) / heat), and the sum of all. */
static double find_sums(const Line *line, const Room *room, float best, float cold) {
    float space[CHUNK];
    double total = 0.0;
    for (int64_t c = 0; c < chunks_of(line->vocab); c++) {
        float sum = 0.0f;
        if ((room->maxima[c] - best) * cold >= LEAST_EXPONENT) {
            const float *values = chunk_at(line, c, space);
            for (int64_t i = 0; i < CHUNK; i++) sum += weight_of((values[i] - best) * cold);
        }
        room->sums[c] = sum;
        total += sum;
    }
    return total;
}

/* Invert the distribution function over the whole vocabulary, in its order. */
static int64_t draw_from_all(const Line *line, const Room *room, float best, float cold,
                             float chance) {
    float space[CHUNK];
    const double target = chance * find_sums(line, room, best, cold);
    double reached = 0.0;
    int64_t token = 0;
    for (int64_t c = 0; c < chunks_of(line->vocab); c++) {
        if (room->sums[c] == 0.0f) continue;
        if (reached + room->sums[c] <= target) {
            reached += room->sums[c];
            continue;
        }
        const float *values = chunk_at(line, c, space);
        for (int64_t i = 0; i < CHUNK; i++) {
            const float weight = weight_of((values[i] - best) * cold);
            reached += weight;
            if (weight > 0.0f) token = c * CHUNK + i;
            if (weight > 0.0f && reached > target) break;
        }
        break; /* where single weights add up to less than their sum, it was the last of them */
    }
    return token;
}

INLINE uint64_t pair_of(float value, int64_t id) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u; /* now ordered as the values are */
    return (uint64_t)~bits << 32 | (uint32_t)id;
}

INLINE float value_of(uint64_t pair) {
    uint32_t bits = ~(uint32_t)(pair >> 32);
    bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Pairs of all allowed tokens whose logits are at least `floor`; how many. */
static int64_t gather(const Line *line, const Room *room, float floor) {
    float space[CHUNK];
    int64_t count = 0;
    for (int64_t c = 0; c < chunks_of(line->vocab); c++) {
        if (!(room->maxima[c] >= floor)) continue;
        const float *values = chunk_at(line, c, space);
        if (values == NULL) continue;
        const int64_t first = c * CHUNK, size = least(CHUNK, line->vocab - first);
        for (int64_t i = 0; i < size; i += 16) {
            uint32_t found = 0;
            const int64_t some = least(16, size - i);
            for (int64_t j = 0; j < some; j++) found |= (uint32_t)(values[i + j] >= floor) << j;
            for (; found; found &= found - 1) {
                const int64_t at = i + __builtin_ctz(found);
                room->pairs[count++] = pair_of(values[at], first + at);
            }
        }
    }
    return count;
}

/* Sort pairs by their upper halves, equal ones as they stand. */
static void rank(Room *room, int64_t count) {
    if (count <= 32) {
        for (int64_t i = 1; i < count; i++) {
            const uint64_t pair = room->pairs[i];
            int64_t j = i;
            for (; j > 0 && room->pairs[j - 1] >> 32 > pair >> 32; j--)
                room->pairs[j] = room->pairs[j - 1];
            room->pairs[j] = pair;
        }
        return;
    }
    int32_t places[4][256] = {0};
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < 4; d++) places[d][room->pairs[i] >> (32 + 8 * d) & 255]++;
    for (int64_t d = 0; d < 4; d++) {
        const int64_t shift = 32 + 8 * d;
        if (places[d][room->pairs[0] >> shift & 255] == count) continue;
        int32_t next = 0;
        for (int64_t b = 0; b < 256; b++) {
            const int32_t size = places[d][b];
            places[d][b] = next;
            next += size;
        }
        for (int64_t i = 0; i < count; i++)
            room->spare[places[d][room->pairs[i] >> shift & 255]++] = room->pairs[i];
        uint64_t *sorted = room->spare;
        room->spare = room->pairs;
        room->pairs = sorted;
    }
}

/* A logit that at least `wanted` chunks reach, so that as many tokens do; needs as many chunks. */
static float reached_by(const Line *line, Room *room, int64_t wanted) {
    const int64_t chunks = chunks_of(line->vocab);
    for (int64_t c = 0; c < chunks; c++) room->pairs[c] = pair_of(room->maxima[c], c);
    rank(room, chunks);
    return value_of(room->pairs[wanted - 1]);
}

/* Sum of the first pairs' weights, each kept. */
static double weigh(const Room *room, int64_t count, float best, float cold) {
    for (int64_t i = 0; i < count; i++)
        room->weights[i] = weight_of((value_of(room->pairs[i]) - best) * cold);
    double total = 0.0;
    for (int64_t i = 0; i < count; i++) total += room->weights[i];
    return total;
}

/* How a row is filtered: exponents are (logit - best) / heat, `cold` is 1 / heat. */
typedef struct {
    float best, cold, top_p, least_exponent;
    int64_t top_k;
} Filter;

/* Gather at least the tokens that the filter keeps.

   `total` is the sum of all weights where top_p cuts the whole vocabulary, else negative. Down to
   which exponent to look is tried, starting from where a language model's candidates mostly are;
   at log(vocab / (1 - top_p)) what is left out is surely less than 1 - top_p. */
static int64_t gather_candidates(const Line *line, Room *room, const Filter *filter,
                                 double total) {
    const int64_t chunks = chunks_of(line->vocab);
    const int cut = filter->top_p < 1.0f;
    float depth = -LEAST_EXPONENT;
    if (!cut || total >= 0.0) depth = fminf(depth, -filter->least_exponent);
    if (total >= 0.0) depth = fminf(depth, logf(line->vocab / (1.0f - filter->top_p)));
    depth = depth * 1.00001f + 0.00001f; /* rounding must not lose what stands at the edge */
    if (filter->top_k <= chunks / 2) {
        const float floor = reached_by(line, room, filter->top_k);
        const float deepest = filter->best - depth / filter->cold;
        return gather(line, room, fmaxf(fmaxf(floor, deepest), -__FLT_MAX__));
    }
    for (float tried = FIRST_DEPTH;; tried *= 2.0f) {
        const float down = fminf(tried, depth);
        const float floor = filter->best - down / filter->cold;
        const int64_t count = gather(line, room, fmaxf(floor, -__FLT_MAX__));
        if (down >= depth || count >= filter->top_k) return count;
        if (total >= 0.0 &&
            weigh(room, count, filter->best, filter->cold) >= filter->top_p * total)
            return count;
    }
}

/* Invert the distribution function over what the filter keeps, the best first. */
static int64_t draw_filtered(const Line *line, Room *room, const Filter *filter, float chance) {
    const int cut = filter->top_p < 1.0f;
    double total = -1.0;
    if (cut && filter->top_k >= line->vocab)
        total = find_sums(line, room, filter->best, filter->cold);
    int64_t count = gather_candidates(line, room, filter, total);
    if (count == 0) return 0;
    rank(room, count);
    count = least(count, filter->top_k);
    const double within = weigh(room, count, filter->best, filter->cold);
    const double limit = cut ? filter->top_p * (total >= 0.0 ? total : within) : INFINITY;
    double mass = 0.0;
    int64_t kept = 0;
    for (; kept < count && (kept == 0 || mass < limit); kept++) {
        const float exponent = (value_of(room->pairs[kept]) - filter->best) * filter->cold;
        if (kept > 0 && exponent < filter->least_exponent) break;
        mass += room->weights[kept];
    }
    const double target = chance * mass;
    double reached = 0.0;
    int64_t chosen = 0;
    for (int64_t i = 0; i < kept && reached <= target; i++) {
        if (room->weights[i] > 0.0f) chosen = i;
        reached += room->weights[i];
    }
    return (uint32_t)room->pairs[chosen];
}

static int64_t draw_row(const Draw *draw, int64_t row, Room *room) {
    const Line line = {draw->logits[row], draw->allowed[row], draw->vocab, draw->words};
    const int64_t chunk = find_maxima(&line, room->maxima);
    if (chunk < 0 || room->maxima[chunk] == INFINITY) return NO_TOKEN;
    const float best = room->maxima[chunk];
    if (draw->heat[row] == 0.0f) return first_of(&line, chunk, best);
    const float min_p = draw->min_p[row];
    const Filter filter = {best, 1.0f / draw->heat[row], draw->top_p[row],
                           min_p > 0.0f ? logf(min_p) : -INFINITY, draw->top_k[row]};
    if (filter.top_p >= 1.0f && min_p <= 0.0f && filter.top_k >= draw->vocab)
        return draw_from_all(&line, room, best, filter.cold, draw->chance[row]);
    return draw_filtered(&line, room, &filter, draw->chance[row]);
}

void asyncsgl_draw(const Draw *draw) {
#pragma omp parallel for num_threads(draw->threads) schedule(dynamic, 1) if (draw->rows > 1)
    for (int64_t row = 0; row < draw->rows; row++) {
        Room room = room_at(draw->workspace, draw->vocab, omp_get_thread_num());
        draw->tokens[row] = draw_row(draw, row, &room);
    }
}

static void describe_row(const Describe *describe, int64_t row, Room *room) {
    const Line line = {describe->logits[row], NULL, describe->vocab, 0};
    const int64_t chunk = find_maxima(&line, room->maxima), top = describe->top;
    int64_t *ids = describe->ids + row * top;
    if (chunk < 0) {
        describe->totals[row] = NAN;
        for (int64_t i = 0; i < top; i++) ids[i] = i;
        return;
    }
    const float best = room->maxima[chunk];
    describe->totals[row] = best + log(find_sums(&line, room, best, 1.0f));
    if (top == 0) return;
    const int few = top <= chunks_of(describe->vocab) / 2;
    rank(room, gather(&line, room, few ? reached_by(&line, room, top) : -INFINITY));
    for (int64_t i = 0; i < top; i++) ids[i] = (uint32_t)room->pairs[i];
}

void asyncsgl_describe(const Describe *describe) {
#pragma omp parallel for num_threads(describe->threads) schedule(dynamic, 1) \
    if (describe->rows > 1)
    for (int64_t row = 0; row < describe->rows; row++) {
        Room room = room_at(describe->workspace, describe->vocab, omp_get_thread_num());
        describe_row(describe, row, &room);
    }
}
