/* Matrix products over packed operands. Compiled once for each element type.

   Everything is counted in units of 32 bits along the inner dimension: a float, or two bfloat16
   that stand beside each other, which is what one multiply-add takes in.

   weights: panels of TILE_COLUMNS output columns, [panel][unit][column]
   activations: blocks of rows, as many as fit a tile and about equally many in each, so that the
   fetching of weights is spread evenly: [block][unit][row of the block]

   A product streams each panel once for a group of blocks, so a single row reads the weights in
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
    int64_t rows, inner, height; /* height: rows in a block, fewer in the last */
} NAME(Activations);

INLINE NAME(Activations) NAME(activations)(uint32_t *units, int64_t rows, int64_t inner) {
    const int64_t blocks = most(1, ceil_div(rows, TILE_ROWS));
    return (NAME(Activations)){units, rows, inner, most(1, ceil_div(rows, blocks))};
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

/* One tile: `rows` is a constant where this is inlined. Meanwhile one cache line a unit is fetched
   from `ahead` on, which hides the memory behind the arithmetic. */
INLINE void NAME(tile_of)(const uint32_t *a, const uint32_t *b, int64_t units, const int rows,
                          float *tile, const uint32_t *ahead) {
    vf sums[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = splat(0.0f);
    for (int64_t u = 0; u < units; u++, a += rows, b += TILE_COLUMNS) {
        const vu left = load_bits(b), right = load_bits(b + LANES);
        if (rows > 2) {
            __builtin_prefetch(ahead + u * LINE, 0, 2);
        } else { /* nothing to hide it behind: as far ahead as memory takes to answer */
            for (int64_t c = 0; c < TILE_COLUMNS; c += LINE)
                __builtin_prefetch(b + 64 * TILE_COLUMNS + c);
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const vu value = splat_bits(a[r]);
            sums[r][0] = NAME(multiply_add)(sums[r][0], value, left);
            sums[r][1] = NAME(multiply_add)(sums[r][1], value, right);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        store(tile + r * TILE_COLUMNS, sums[r][0]);
        store(tile + r * TILE_COLUMNS + LANES, sums[r][1]);
    }
}

/* tile[r][c] = the sum over u of a[u][r] * b[u][c]. */
static void NAME(multiply)(const uint32_t *a, const uint32_t *b, int64_t units, int64_t rows,
                           float *tile, const uint32_t *ahead) {
    switch (rows) {
#define CASE(count) \
    case count: NAME(tile_of)(a, b, units, count, tile, ahead); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}

/* A row's first unit, and how far apart its units are. */
INLINE uint32_t *NAME(units_of)(const NAME(Activations) * to, int64_t row, int64_t *height) {
    const int64_t first = row / to->height * to->height;
    *height = least(to->height, to->rows - first);
    return to->units + first * UNITS(to->inner) + row - first;
}

/* Write `count` values of a row, beginning with column `column`; both are even. */
INLINE void NAME(put)(const NAME(Activations) * to, int64_t row, int64_t column,
                      const float *values, int64_t count) {
    int64_t height;
    uint32_t *unit = NAME(units_of)(to, row, &height);
    unit += UNITS(column) * height;
#if !BF16
    for (int64_t i = 0; i < count; i++) memcpy(unit + i * height, values + i, 4);
#else
    uint16_t narrow[64];
    for (int64_t begin = 0; begin < count; begin += 64) {
        const int64_t some = least(64, count - begin);
        narrow_all(values + begin, some, narrow);
        for (int64_t i = 0; i < some; i += 2)
            memcpy(unit + (begin + i) / 2 * height, narrow + i, 4);
    }
#endif
}

/* What becomes of a product. */
enum NAME(Ending) { NAME(STORE), NAME(ADD), NAME(GATE) };

typedef struct {
    float *to;                    /* STORE, ADD: [rows, stride] */
    int64_t stride;
    NAME(Activations) gated;      /* GATE */
} NAME(Target);

INLINE void NAME(end_tile)(const enum NAME(Ending) ending, const NAME(Target) * target,
                           const NAME(Weights) * weights, const float *tile, int64_t row,
                           int64_t rows, int64_t column) {
    const int64_t count = least(TILE_COLUMNS, weights->columns - column);
    for (int64_t r = 0; r < rows; r++) {
        float *to = target->to + (row + r) * target->stride + column;
        const float *from = tile + r * TILE_COLUMNS;
        if (weights->bias != NULL) {
            const float *bias = weights->bias + column;
            if (ending == NAME(ADD))
                for (int64_t c = 0; c < count; c++) to[c] += from[c] + bias[c];
            else
                for (int64_t c = 0; c < count; c++) to[c] = from[c] + bias[c];
        } else if (ending == NAME(ADD)) {
            for (int64_t c = 0; c < count; c++) to[c] += from[c];
        } else {
            for (int64_t c = 0; c < count; c++) to[c] = from[c];
        }
    }
}

/* silu(gate) * up: the panels of both stand by turns. */
INLINE void NAME(end_gate)(const NAME(Target) * target, int64_t inner, const float *gate,
                           const float *up, int64_t row, int64_t rows, int64_t column) {
    const int64_t count = least(TILE_COLUMNS, inner - column);
    float values[TILE_COLUMNS];
    for (int64_t r = 0; r < rows; r++) {
        const float *g = gate + r * TILE_COLUMNS, *u = up + r * TILE_COLUMNS;
        for (int64_t c = 0; c < TILE_COLUMNS; c += LANES) {
            const vf x = load(g + c);
            const vf power = NAME(exp2)(-larger(x * splat(LOG2_E), splat(-126.0f)));
            store(values + c, x / (splat(1.0f) + power) * load(u + c));
        }
        NAME(put)(&target->gated, row + r, column, values, count);
    }
}

#define NEAR_BYTES (192 * 1024) /* of weights that are used again before others are touched */

/* Where to fetch from during a tile of row block `block`: the panels that come after the `near`
   ones at hand, spread over the first blocks; once they are all asked for, what is there. */
INLINE const uint32_t *NAME(ahead_of)(const uint32_t *panel, const uint32_t *next, int64_t units,
                                      int64_t block) {
    const int64_t offset = block * units * LINE;
    return next != NULL && offset < units * TILE_COLUMNS ? next + offset : panel;
}

/* This thread's share of a product: panels `first` to `last` - 1. What is at `then` is needed
   next. */
INLINE void NAME(product)(const enum NAME(Ending) ending, const NAME(Activations) * from,
                          const NAME(Weights) * weights, const NAME(Target) * target,
                          int64_t first, int64_t last, const uint32_t *then) {
    const int64_t units = UNITS(weights->inner), size = units * TILE_COLUMNS;
    const int64_t near = most(2, NEAR_BYTES / (size * 4) / 2 * 2);
    const int64_t step = ending == NAME(GATE) ? 2 : 1;
    float tile[TILE_ROWS * TILE_COLUMNS], other[TILE_ROWS * TILE_COLUMNS];
    for (int64_t begin = first; begin < last; begin += near) {
        const int64_t end = least(begin + near, last);
        for (int64_t row = 0; row < from->rows; row += from->height) {
            const int64_t rows = least(from->height, from->rows - row);
            const uint32_t *block = from->units + row * units;
            for (int64_t panel = begin; panel < end; panel += step) {
                const uint32_t *at = weights->panels + panel * size, *next = at + near * size;
                if (panel + near >= last) next = then == NULL ? NULL : then + (panel - begin) * size;
                NAME(multiply)(block, at, units, rows, tile,
                               NAME(ahead_of)(at, next, units, row / from->height));
                if (ending == NAME(GATE)) {
                    if (next != NULL) next += size;
                    NAME(multiply)(block, at + size, units, rows, other,
                                   NAME(ahead_of)(at + size, next, units, row / from->height));
                    NAME(end_gate)(target, target->gated.inner, tile, other, row, rows,
                                   panel / 2 * TILE_COLUMNS);
                } else {
                    NAME(end_tile)(ending, target, weights, tile, row, rows,
                                   panel * TILE_COLUMNS);
                }
            }
        }
    }
}

/* Pack a matrix [columns, inner] into panels; those past the last column are zero.
   every, offset: the panels go to places offset, offset + every, ... */
void NAME(asyncsgl_pack)(const ELEMENT *from, int64_t columns, int64_t inner, int64_t every,
                         int64_t offset, uint32_t *to) {
    const int64_t units = UNITS(inner), panels = ceil_div(columns, TILE_COLUMNS);
    _Pragma("omp parallel for schedule(static)") for (int64_t p = 0; p < panels; p++) {
        uint32_t *panel = to + (p * every + offset) * units * TILE_COLUMNS;
        for (int64_t c = 0; c < TILE_COLUMNS; c++) {
            const int64_t column = p * TILE_COLUMNS + c;
            if (column >= columns) {
                for (int64_t u = 0; u < units; u++) panel[u * TILE_COLUMNS + c] = 0;
                continue;
            }
            const uint32_t *line = (const uint32_t *)(from + column * inner);
            for (int64_t u = 0; u < units; u++) panel[u * TILE_COLUMNS + c] = line[u];
        }
    }
}
