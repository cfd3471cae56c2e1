/* Matrix products over packed weights. Compiled once for each element type.

   Everything is counted in units of 32 bits along the inner dimension: a float, or two bfloat16
   that stand beside each other, which is what one multiply-add takes in.

   weights: panels of TILE_COLUMNS output columns, [panel][unit][column]
   activations: rows one after the other, [row][unit]

   A product streams each panel once for a group of rows, so a single row reads the weights in
   one sweep from front to back, and many rows find them in the cache. */

#define UNITS(elements) ((elements) / UNIT)
#define LINE 16 /* units in a cache line */

typedef struct {
    const uint32_t *panels;
    const float *bias; /* [columns], or NULL */
    int64_t columns, inner;
} NAME(Weights);

typedef struct {
    uint32_t *units;
    int64_t inner, stride; /* stride: units from one row to the next */
} NAME(Activations);

/* An odd number of cache lines, so that the rows of a tile do not compete for the same places in
   the cache. */
INLINE int64_t NAME(row_units)(int64_t inner) {
    return (ceil_div(UNITS(inner), LINE) | 1) * LINE;
}

INLINE NAME(Activations) NAME(activations)(uint32_t *units, int64_t inner) {
    return (NAME(Activations)){units, inner, NAME(row_units)(inner)};
}

INLINE vf NAME(multiply_add)(vf sum, vu a, vu b) {
#if !BF16
    return sum + (vf)a * (vf)b;
#elif defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const vu high = splat_bits(0xffff0000u);
    sum += (vf)(a << 16) * (vf)(b << 16);
    return sum + (vf)(a & high) * (vf)(b & high);
#endif
}

/* What is fetched during a tile, which hides the memory behind the arithmetic: weights, a cache
   line a unit, and of keys and values `pace` bytes a unit. */
typedef struct {
    const uint32_t *weights;
    const char *keys, *values;
    int64_t pace;
} NAME(Fetch);

/* One tile: `rows` is a constant where this is inlined. */
INLINE void NAME(tile_of)(const uint32_t *a, int64_t stride, const uint32_t *b, int64_t units,
                          const int rows, float *tile, const NAME(Fetch) * fetch) {
    const uint32_t *ahead = fetch->weights;
    const char *keys = fetch->keys, *values = fetch->values;
    const int64_t pace = fetch->pace;
    vf sums[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = splat(0.0f);
    const uint32_t *trio[4] = {a, a + (rows > 3 ? 3 : 0) * stride, a + (rows > 6 ? 6 : 0) * stride,
                               a + (rows > 9 ? 9 : 0) * stride};
    for (int64_t u = 0; u < units; u++, b += TILE_COLUMNS) {
        const vu left = load_bits(b), right = load_bits(b + LANES);
        /* Three rows are addressed from one pointer each. Left alone, the compiler addresses all
           from one, and has no registers left for so many distances. */
        __asm__("" : "+r"(trio[0]), "+r"(trio[1]), "+r"(trio[2]), "+r"(trio[3]));
        if (rows > 2) {
            __builtin_prefetch(ahead + u * LINE, 0, 2);
            __builtin_prefetch(keys + u * pace, 0, 2);
            __builtin_prefetch(values + u * pace, 0, 2);
        } else { /* nothing to hide it behind: as far ahead as memory takes to answer */
            for (int64_t c = 0; c < TILE_COLUMNS; c += LINE)
                __builtin_prefetch(b + 64 * TILE_COLUMNS + c);
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const vu value = splat_bits(trio[r / 3][r % 3 * stride]);
            sums[r][0] = NAME(multiply_add)(sums[r][0], value, left);
            sums[r][1] = NAME(multiply_add)(sums[r][1], value, right);
        }
        for (int i = 0; i < 4; i++) trio[i]++;
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        store(tile + r * TILE_COLUMNS, sums[r][0]);
        store(tile + r * TILE_COLUMNS + LANES, sums[r][1]);
    }
}

/* tile[r][c] = the sum over u of a[r][u] * b[u][c]. */
static void NAME(multiply)(const uint32_t *a, int64_t stride, const uint32_t *b, int64_t units,
                           int64_t rows, float *tile, const NAME(Fetch) * fetch) {
    switch (rows) {
#define CASE(count) \
    case count: NAME(tile_of)(a, stride, b, units, count, tile, fetch); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}

/* Write `count` values of a row, beginning with column `column`; both are even. */
INLINE void NAME(put)(const NAME(Activations) * to, int64_t row, int64_t column,
                      const float *values, int64_t count) {
    ELEMENT *at = (ELEMENT *)(to->units + row * to->stride) + column;
#if BF16
    narrow_all(values, count, at);
#else
    memcpy(at, values, count * sizeof(float));
#endif
}

/* What becomes of a product. */
enum NAME(Ending) { NAME(STORE), NAME(ADD), NAME(GATE) };

typedef struct {
    float *to;               /* STORE, ADD: [rows, stride] */
    int64_t stride;
    NAME(Activations) gated; /* GATE */
} NAME(Target);

/* One row of a tile, `count` columns of it. */
INLINE void NAME(end_row)(const enum NAME(Ending) ending, float *to, const float *from,
                          const float *bias, const int64_t count) {
    for (int64_t c = 0; c < count; c++) {
        const float value = bias == NULL ? from[c] : from[c] + bias[c];
        to[c] = ending == NAME(ADD) ? to[c] + value : value;
    }
}

INLINE void NAME(end_tile)(const enum NAME(Ending) ending, const NAME(Target) * target,
                           const NAME(Weights) * weights, const float *tile, int64_t row,
                           int64_t rows, int64_t column) {
    const int64_t count = least(TILE_COLUMNS, weights->columns - column);
    const float *bias = weights->bias == NULL ? NULL : weights->bias + column;
    float *to = target->to + row * target->stride + column;
    for (int64_t r = 0; r < rows; r++, to += target->stride, tile += TILE_COLUMNS)
        if (count < TILE_COLUMNS) NAME(end_row)(ending, to, tile, bias, count);
        else if (bias != NULL) NAME(end_row)(ending, to, tile, bias, TILE_COLUMNS);
        else
            for (int64_t c = 0; c < TILE_COLUMNS; c += LANES) {
                vf value = load(tile + c);
                if (ending == NAME(ADD)) value += load(to + c);
                store(to + c, value);
            }
}

/* silu(gate) * up: columns of both stand by turns, LANES of each. */
INLINE void NAME(end_gate)(const NAME(Target) * target, const float *tile, int64_t row,
                           int64_t rows, int64_t column) {
    const int64_t count = least(LANES, target->gated.inner - column);
    float values[LANES];
    for (int64_t r = 0; r < rows; r++, tile += TILE_COLUMNS) {
        const vf x = load(tile);
        const vf power = NAME(exp2)(-larger(x * splat(LOG2_E), splat(-126.0f)));
        store(values, x * NAME(inverse)(splat(1.0f) + power) * load(tile + LANES));
        if (count == LANES) NAME(put)(&target->gated, row + r, column, values, LANES);
        else NAME(put)(&target->gated, row + r, column, values, count);
    }
}

#define NEAR_BYTES (192 * 1024) /* of weights that are used again before others are touched */

/* Where to fetch from during a tile of the rows of number `block`: the panels that come after the
   `near` ones at hand, spread over the first blocks; once they are all asked for, what is there. */
INLINE const uint32_t *NAME(ahead_of)(const uint32_t *panel, const uint32_t *next, int64_t units,
                                      int64_t block) {
    const int64_t offset = block * units * LINE;
    return next != NULL && offset < units * TILE_COLUMNS ? next + offset : panel;
}

INLINE NAME(Fetch) NAME(fetch_of)(const uint32_t *weights, Coming *coming, int64_t units) {
    const char *here = (const char *)weights;
    if (coming == NULL) return (NAME(Fetch)){weights, here, here, 0};
    const Piece piece = next_piece(coming, units * COMING_BYTES);
    if (piece.bytes == 0) return (NAME(Fetch)){weights, here, here, 0};
    return (NAME(Fetch)){weights, piece.keys, piece.values, ceil_div(piece.bytes, units)};
}

/* A thread's share of a product: so many rows and panels. */
typedef struct {
    int64_t row, rows_end, panel, panels_end;
} NAME(Part);

/* Compute `part` of a product. What is at `then` is needed next, and what is coming, if anything is.
   Tiles are about equally high, so that the fetching of weights is spread evenly. */
INLINE void NAME(product)(const enum NAME(Ending) ending, const NAME(Activations) * from,
                          const NAME(Weights) * weights, const NAME(Target) * target,
                          NAME(Part) part, const uint32_t *then, Coming *coming) {
    const int64_t units = UNITS(weights->inner), size = units * TILE_COLUMNS;
    const int64_t near = most(2, NEAR_BYTES / (size * 4));
    const int64_t blocks = most(1, ceil_div(part.rows_end - part.row, TILE_ROWS));
    const int64_t height = most(1, ceil_div(part.rows_end - part.row, blocks));
    float tile[TILE_ROWS * TILE_COLUMNS];
    for (int64_t begin = part.panel; begin < part.panels_end; begin += near) {
        const int64_t end = least(begin + near, part.panels_end);
        const int last = end == part.panels_end;
        for (int64_t row = part.row, block = 0; row < part.rows_end; row += height, block++) {
            const int64_t rows = least(height, part.rows_end - row);
            for (int64_t panel = begin; panel < end; panel++) {
                const uint32_t *at = weights->panels + panel * size, *next = at + near * size;
                if (last) next = then == NULL ? NULL : then + (panel - begin) * size;
                const NAME(Fetch) fetch =
                    NAME(fetch_of)(NAME(ahead_of)(at, next, units, block), coming, units);
                NAME(multiply)(from->units + row * from->stride, from->stride, at, units, rows,
                               tile, &fetch);
                if (ending == NAME(GATE))
                    NAME(end_gate)(target, tile, row, rows, panel * LANES);
                else
                    NAME(end_tile)(ending, target, weights, tile, row, rows,
                                   panel * TILE_COLUMNS);
            }
        }
    }
}

/* Pack a matrix [columns, inner] into panels; those past the last column are zero.
   every, offset: LANES columns each go to places offset, offset + every, ... */
void NAME(asyncsgl_pack)(const ELEMENT *from, int64_t columns, int64_t inner, int64_t every,
                         int64_t offset, uint32_t *to) {
    const int64_t units = UNITS(inner), strips = ceil_div(columns, LANES);
    const int64_t whole = every % 2 == 0 ? strips : ceil_div(strips, 2) * 2;
    _Pragma("omp parallel for schedule(static)") for (int64_t s = 0; s < whole; s++) {
        const int64_t place = s * every + offset;
        uint32_t *strip = to + place / 2 * units * TILE_COLUMNS + place % 2 * LANES;
        for (int64_t c = 0; c < LANES; c++) {
            const int64_t column = s * LANES + c;
            if (column >= columns) {
                for (int64_t u = 0; u < units; u++) strip[u * TILE_COLUMNS + c] = 0;
                continue;
            }
            const uint32_t *line = (const uint32_t *)(from + column * inner);
            for (int64_t u = 0; u < units; u++) strip[u * TILE_COLUMNS + c] = line[u];
        }
    }
}
