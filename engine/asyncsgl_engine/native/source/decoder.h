/* A whole forward pass of a Llama-like decoder, or one layer's attention alone. Compiled once for
   each element type, after products.h and attention.h. */

typedef struct {
    const uint32_t *qkv, *output, *gate_up, *down; /* packed; gate and up by turns */
    const float *qkv_bias, *output_bias;           /* or NULL */
    const float *norm, *mlp_norm;                  /* [hidden] */
    const float *query_norm, *key_norm;            /* [dim], or NULL */
    ELEMENT *keys, *values;                        /* [slots, kv_heads, dim] */
    int64_t window;                                /* 0: none */
} NAME(LayerWeights);

typedef struct {
    const NAME(LayerWeights) * layers;
    const ELEMENT *embedding; /* [vocab, hidden] */
    const uint32_t *head;     /* packed */
    const float *norm;        /* [hidden] */
    const float *frequencies; /* [dim / 2], of the rotary embedding */
    int64_t num_layers, hidden, inner, heads, kv_heads, dim, vocab;
    float epsilon, scale, rotary_scale;
} NAME(Model);

typedef struct {
    const int64_t *input_ids, *positions; /* [tokens] */
    const int64_t *logit_rows;            /* [rows] */
    float *logits;                        /* [rows, vocab] */
    int64_t rows;
} NAME(Call);

/* The parts of the workspace. */
typedef struct {
    float *hidden, *qkv, *cosines, *sines;
    uint32_t *normed, *attended, *gated, *last;
    Task *tasks;
    int64_t *next; /* [layers]: the next task that nobody has taken */
    char *scratch;
} NAME(Space);

INLINE void *NAME(take)(char **at, int64_t bytes) {
    char *from = *at;
    *at += ceil_div(bytes, 64) * 64;
    return from;
}

INLINE int64_t NAME(scratch_bytes)(int64_t kv_heads) {
    return ceil_div(sizeof(NAME(Block)), 64) * 64 +
           ceil_div(kv_heads * sizeof(NAME(Heads)), 64) * 64;
}

/* Lay out the workspace from `base` on; the address past its end. */
static char *NAME(lay_out)(NAME(Space) * space, const NAME(Model) * model, const Step *step,
                           int64_t rows, char *base) {
    const int64_t tokens = step->tokens, units = sizeof(uint32_t);
    const int64_t wide = (model->heads + 2 * model->kv_heads) * model->dim;
    char *at = base;
    space->hidden = NAME(take)(&at, tokens * model->hidden * sizeof(float));
    space->qkv = NAME(take)(&at, tokens * wide * sizeof(float));
    space->cosines = NAME(take)(&at, tokens * model->dim / 2 * sizeof(float));
    space->sines = NAME(take)(&at, tokens * model->dim / 2 * sizeof(float));
    space->normed = NAME(take)(&at, tokens * NAME(row_units)(model->hidden) * units);
    space->attended = NAME(take)(&at, tokens * NAME(row_units)(model->heads * model->dim) * units);
    space->gated = NAME(take)(&at, tokens * NAME(row_units)(model->inner) * units);
    space->last = NAME(take)(&at, rows * NAME(row_units)(model->hidden) * units);
    space->tasks = NAME(take)(&at, step->tokens * model->kv_heads * sizeof(Task));
    space->next = NAME(take)(&at, model->num_layers * sizeof(int64_t));
    space->scratch = NAME(take)(&at, step->threads * NAME(scratch_bytes)(model->kv_heads));
    return at;
}

INLINE NAME(Scratch) NAME(scratch_of)(const Step *step, int64_t kv_heads, char *base, int thread) {
    char *at = base + thread * NAME(scratch_bytes)(kv_heads);
    const NAME(Scratch) scratch = {step, (NAME(Block) *)at,
                                   (NAME(Heads) *)(at + ceil_div(sizeof(NAME(Block)), 64) * 64)};
    return scratch;
}

/* x * weight / sqrt(mean(x * x) + epsilon) */
INLINE void NAME(normalise)(const float *x, const float *weight, float epsilon, int64_t count,
                            float *to) {
    float squares = 0.0f;
    for (int64_t i = 0; i < count; i++) squares += x[i] * x[i];
    const float factor = 1.0f / sqrtf(squares / (float)count + epsilon);
    for (int64_t i = 0; i < count; i++) to[i] = x[i] * factor * weight[i];
}

INLINE void NAME(normalise_row)(const float *x, const float *weight, float epsilon,
                                const NAME(Activations) * to, int64_t row) {
    float part[256];
    float squares = 0.0f;
    for (int64_t i = 0; i < to->inner; i++) squares += x[i] * x[i];
    const float factor = 1.0f / sqrtf(squares / (float)to->inner + epsilon);
    for (int64_t begin = 0; begin < to->inner; begin += 256) {
        const int64_t count = least(256, to->inner - begin);
        for (int64_t i = 0; i < count; i++) part[i] = x[begin + i] * factor * weight[begin + i];
        NAME(put)(to, row, begin, part, count);
    }
}

/* Rotate the halves of a head against each other (Su et al., 2021, as Llama lays it out). */
INLINE void NAME(rotate)(float *head, const float *cosines, const float *sines, int64_t half) {
    for (int64_t d = 0; d < half; d++) {
        const float one = head[d], two = head[d + half];
        head[d] = one * cosines[d] - two * sines[d];
        head[d + half] = two * cosines[d] + one * sines[d];
    }
}

/* A token's heads: normalised where the model does that, rotated, keys and values stored. */
static void NAME(place_token)(const NAME(Model) * model, const NAME(LayerWeights) * layer,
                              const Step *step, const NAME(Space) * space, int64_t token) {
    const int64_t dim = model->dim, half = dim / 2, all = model->heads + model->kv_heads;
    float *row = space->qkv + token * (all + model->kv_heads) * dim;
    const float *cosines = space->cosines + token * half, *sines = space->sines + token * half;
    const int64_t slot = step->write_slots[token] * model->kv_heads * dim;
    for (int64_t h = 0; h < all; h++) {
        const float *norm = h < model->heads ? layer->query_norm : layer->key_norm;
        if (norm != NULL) NAME(normalise)(row + h * dim, norm, model->epsilon, dim, row + h * dim);
        NAME(rotate)(row + h * dim, cosines, sines, half);
    }
    for (int64_t h = 0; h < model->kv_heads; h++) {
        NAME(store_head)(layer->keys + slot + h * dim, row + (model->heads + h) * dim, dim);
        NAME(store_head)(layer->values + slot + h * dim, row + (all + h) * dim, dim);
    }
}

INLINE void NAME(attend_all)(const NAME(Scratch) * scratch, const NAME(Layer) * layer,
                             const Task *tasks, int64_t count, int64_t *next) {
    int64_t mine = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    while (mine < count) {
        const int64_t then = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (then < count) NAME(fetch_task)(scratch, layer, tasks + then);
        NAME(attend_task)(scratch, layer, tasks + mine);
        mine = then;
    }
}

/* From this many tokens for each thread on, a thread computes all columns of its own tokens rather
   than its own columns of all tokens: what one product gives the next then stays in its cache, and
   the threads meet only around attention. Each of them reads all weights, which takes tokens
   enough to hide that behind. */
#define TOKENS_APART 16

#define SHARE(total, part) ((total) * (part) / threads)
#define MINE(i, total) \
    int64_t i = SHARE(total, thread), i##_end = SHARE(total, thread + 1); i < i##_end; i++
#define PANEL(weights, inner, panel) ((weights) + (panel) * UNITS(inner) * TILE_COLUMNS)

static void NAME(run_layer)(const NAME(Model) * model, const NAME(LayerWeights) * layer,
                            const Step *step, const NAME(Space) * space, int64_t count,
                            int64_t *next, const NAME(LayerWeights) * after, Coming *coming,
                            Gate *gate, int thread, int threads) {
    const int64_t tokens = step->tokens, hidden = model->hidden, inner = model->inner;
    const int64_t width = model->heads * model->dim;
    const int64_t wide = width + 2 * model->kv_heads * model->dim;
    const NAME(Activations) normed = NAME(activations)(space->normed, hidden);
    const NAME(Activations) attended = NAME(activations)(space->attended, width);
    const NAME(Activations) gated = NAME(activations)(space->gated, inner);
    const NAME(Scratch) scratch = NAME(scratch_of)(step, model->kv_heads, space->scratch, thread);
    const int apart = tokens >= TOKENS_APART * threads;
    const int part = apart ? 0 : thread, parts = apart ? 1 : threads; /* of the columns */
    const int64_t row = apart ? SHARE(tokens, thread) : 0;
    const int64_t rows_end = apart ? SHARE(tokens, thread + 1) : tokens;
#define COLUMNS_BARRIER if (!apart) BARRIER
#define FIRST(panels) ((panels) * part / parts)
#define PART(panels) (NAME(Part)){row, rows_end, FIRST(panels), (panels) * (part + 1) / parts}
    const int64_t qkv_panels = ceil_div(wide, TILE_COLUMNS);
    const int64_t panels = ceil_div(hidden, TILE_COLUMNS), gate_panels = ceil_div(inner, LANES);
    const uint32_t *then_output = PANEL(layer->output, width, FIRST(panels));
    const uint32_t *then_gate = PANEL(layer->gate_up, hidden, FIRST(gate_panels));
    const uint32_t *then_down = PANEL(layer->down, inner, FIRST(panels));
    const uint32_t *then_qkv = PANEL(after->qkv, hidden, FIRST(qkv_panels));
    for (MINE(t, tokens))
        NAME(normalise_row)(space->hidden + t * hidden, layer->norm, model->epsilon, &normed, t);
    COLUMNS_BARRIER
    const NAME(Weights) qkv = {layer->qkv, layer->qkv_bias, wide, hidden};
    const NAME(Target) to_qkv = {space->qkv, wide, {0}};
    NAME(product)(NAME(STORE), &normed, &qkv, &to_qkv, PART(qkv_panels), then_output, coming);
    COLUMNS_BARRIER
    for (MINE(t, tokens)) NAME(place_token)(model, layer, step, space, t);
    BARRIER
    const NAME(Layer) attention = {layer->keys, layer->values, space->qkv, wide, model->heads,
                                   model->kv_heads, model->dim, layer->window, model->scale, 0.0f,
                                   attended, NULL};
    NAME(attend_all)(&scratch, &attention, space->tasks, count, next);
    BARRIER
    begin_coming(coming, step, after->keys, after->values,
                 model->kv_heads * model->dim * sizeof(ELEMENT), after->window, thread, threads);
    const NAME(Weights) output = {layer->output, layer->output_bias, hidden, width};
    const NAME(Target) to_hidden = {space->hidden, hidden, {0}};
    NAME(product)(NAME(ADD), &attended, &output, &to_hidden, PART(panels), then_gate, coming);
    COLUMNS_BARRIER
    for (MINE(t, tokens))
        NAME(normalise_row)(space->hidden + t * hidden, layer->mlp_norm, model->epsilon, &normed, t);
    COLUMNS_BARRIER
    const NAME(Weights) gate_up = {layer->gate_up, NULL, 2 * inner, hidden};
    const NAME(Target) to_gated = {NULL, 0, gated};
    NAME(product)(NAME(GATE), &normed, &gate_up, &to_gated, PART(gate_panels), then_down, coming);
    COLUMNS_BARRIER
    const NAME(Weights) down = {layer->down, NULL, hidden, inner};
    NAME(product)(NAME(ADD), &gated, &down, &to_hidden, PART(panels), then_qkv, coming);
    COLUMNS_BARRIER
}

static void NAME(begin_token)(const NAME(Model) * model, const NAME(Call) * call,
                              const NAME(Space) * space, int64_t token) {
    const int64_t hidden = model->hidden, half = model->dim / 2;
    const ELEMENT *line = model->embedding + call->input_ids[token] * hidden;
    float *to = space->hidden + token * hidden;
    for (int64_t i = 0; i < hidden; i++) to[i] = NAME(widen)(line[i]);
    const float position = (float)call->positions[token];
    for (int64_t d = 0; d < half; d++) {
        const float angle = position * model->frequencies[d];
        space->cosines[token * half + d] = cosf(angle) * model->rotary_scale;
        space->sines[token * half + d] = sinf(angle) * model->rotary_scale;
    }
}

/* Bytes of workspace that a step needs. */
int64_t NAME(asyncsgl_forward_space)(const NAME(Model) * model, const Step *step, int64_t rows) {
    NAME(Space) space;
    return NAME(lay_out)(&space, model, step, rows, (char *)64) - (char *)64;
}

void NAME(asyncsgl_forward)(const NAME(Model) * model, const Step *step, const NAME(Call) * call) {
    NAME(Space) space;
    NAME(lay_out)(&space, model, step, call->rows, step->workspace);
    const int64_t count =
        list_tasks(step, model->kv_heads, model->heads / model->kv_heads, space.tasks);
    memset(space.next, 0, model->num_layers * sizeof(int64_t));
    const int64_t tokens = step->tokens, rows = call->rows;
    Gate meeting = {0}, *gate = &meeting;
    _Pragma("omp parallel num_threads(step->threads)") {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (MINE(t, tokens)) NAME(begin_token)(model, call, &space, t);
        BARRIER
        Coming coming = {0};
        for (int64_t l = 0; l < model->num_layers; l++)
            NAME(run_layer)(model, model->layers + l, step, &space, count, space.next + l,
                            model->layers + (l + 1) % model->num_layers, &coming, gate, thread,
                            threads);
        BARRIER
        const NAME(Activations) last = NAME(activations)(space.last, model->hidden);
        for (MINE(r, rows))
            NAME(normalise_row)(space.hidden + call->logit_rows[r] * model->hidden, model->norm,
                                model->epsilon, &last, r);
        BARRIER
        const NAME(Weights) head = {model->head, NULL, model->vocab, model->hidden};
        const NAME(Target) to_logits = {call->logits, model->vocab, {0}};
        const int64_t panels = ceil_div(model->vocab, TILE_COLUMNS);
        const NAME(Part) part = {0, rows, SHARE(panels, thread), SHARE(panels, thread + 1)};
        NAME(product)(NAME(STORE), &last, &head, &to_logits, part, NULL, NULL);
    }
}

/* One layer's keys and values into their pages, then its attention. */
typedef struct {
    const ELEMENT *query, *key, *value; /* [tokens, heads or kv_heads, dim], strides below */
    ELEMENT *keys, *values;             /* [slots, kv_heads, dim] */
    ELEMENT *out;                       /* [tokens, heads, dim] */
    int64_t heads, kv_heads, dim, window;
    int64_t query_row, query_head, key_row, key_head, value_row, value_head;
    float scale, softcap;
} NAME(Attention);

int64_t NAME(asyncsgl_attend_space)(const NAME(Attention) * call, const Step *step) {
    return ceil_div(step->tokens * call->heads * call->dim * sizeof(float), 64) * 64 +
           ceil_div(step->tokens * call->kv_heads * sizeof(Task), 64) * 64 +
           step->threads * NAME(scratch_bytes)(call->kv_heads) + 64;
}

void NAME(asyncsgl_attend)(const NAME(Attention) * call, const Step *step) {
    const int64_t tokens = step->tokens, dim = call->dim, width = call->heads * dim;
    char *at = step->workspace;
    float *query = NAME(take)(&at, tokens * width * sizeof(float));
    Task *tasks = NAME(take)(&at, tokens * call->kv_heads * sizeof(Task));
    char *base = NAME(take)(&at, step->threads * NAME(scratch_bytes)(call->kv_heads));
    const int64_t count = list_tasks(step, call->kv_heads, call->heads / call->kv_heads, tasks);
    int64_t next = 0;
    Gate meeting = {0}, *gate = &meeting;
    _Pragma("omp parallel num_threads(step->threads)") {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (MINE(t, tokens)) {
            const int64_t slot = step->write_slots[t] * call->kv_heads * dim;
            for (int64_t h = 0; h < call->heads; h++) {
                const ELEMENT *from = call->query + t * call->query_row + h * call->query_head;
                float *to = query + t * width + h * dim;
                for (int64_t d = 0; d < dim; d++) to[d] = NAME(widen)(from[d]);
            }
            for (int64_t h = 0; h < call->kv_heads; h++) {
                memcpy(call->keys + slot + h * dim,
                       call->key + t * call->key_row + h * call->key_head, dim * sizeof(ELEMENT));
                memcpy(call->values + slot + h * dim,
                       call->value + t * call->value_row + h * call->value_head,
                       dim * sizeof(ELEMENT));
            }
        }
        BARRIER
        const NAME(Scratch) scratch = NAME(scratch_of)(step, call->kv_heads, base, thread);
        const NAME(Layer) layer = {call->keys, call->values, query, width, call->heads,
                                   call->kv_heads, dim, call->window, call->scale, call->softcap,
                                   {0}, call->out};
        NAME(attend_all)(&scratch, &layer, tasks, count, &next);
    }
}
