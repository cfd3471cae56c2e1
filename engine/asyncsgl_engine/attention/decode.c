/* Stores a step's keys and values in their pages and attends single-token rows over them.

   Built twice from this file: ELEMENT float, or uint16_t holding bfloat16 bits. Sums are in
   float. The softmax runs online over blocks of positions (Milakov and Gimelshein, 2018), and a
   group of query heads shares each key and value that is read. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 32
#define MOST_GROUP 16
#define MOST_DIM 256
#define LOWEST (-1e30f)

typedef struct {
    const void *query, *key, *value; /* [tokens, heads or kv_heads, dim] with the strides below */
    void *keys, *values;             /* [slots, kv_heads, dim] */
    void *out;                       /* [tokens, heads, dim] */
    const int64_t *write_slots;      /* [tokens] */
    const int32_t *table;            /* [rows, table_width] */
    const int64_t *lengths;          /* [rows] */
    int64_t tokens, rows, heads, kv_heads, dim, page_size, table_width, window;
    int64_t query_row, query_head, key_row, key_head, value_row, value_head;
    float scale, softcap;
} Step;

static inline float widen_bf16(uint16_t bits) {
    uint32_t whole = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &whole, 4);
    return value;
}

static inline uint16_t narrow_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float widen_f32(float value) { return value; }
static inline float narrow_f32(float value) { return value; }

/* exp for arguments up to 0, by Cody and Waite's reduction and a minimax polynomial (Cephes): within
   2 units in the last place, and unlike expf it is vectorised. */
static inline float exp_down(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float count = rintf(x * 1.44269504f);
    const float rest = (x - count * 0.693145752f) - count * 1.42860677e-6f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const int32_t bits = ((int32_t)count + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return sum * power;
}

#define DEFINE(SUFFIX, ELEMENT)                                                                   \
    static inline __attribute__((always_inline)) void attend_##SUFFIX(                            \
        const Step *s, int64_t row, int64_t kv, const int64_t dim, const int64_t group) {         \
        const ELEMENT *keys = (const ELEMENT *)s->keys + kv * dim;                                \
        const ELEMENT *values = (const ELEMENT *)s->values + kv * dim;                            \
        const int32_t *table = s->table + row * s->table_width;                                   \
        const int64_t length = s->lengths[row], slot_size = s->kv_heads * dim;                    \
        const int64_t first = s->window > 0 && length > s->window ? length - s->window : 0;       \
        float query[MOST_GROUP][MOST_DIM], sum[MOST_GROUP][MOST_DIM];                             \
        float best[MOST_GROUP], total[MOST_GROUP], wide[MOST_DIM], score[MOST_GROUP][BLOCK];      \
        const ELEMENT *place[BLOCK];                                                              \
        for (int64_t g = 0; g < group; g++) {                                                     \
            const ELEMENT *from = (const ELEMENT *)s->query + row * s->query_row +                \
                                  (kv * group + g) * s->query_head;                               \
            for (int64_t d = 0; d < dim; d++) {                                                   \
                query[g][d] = widen_##SUFFIX(from[d]) * s->scale;                                 \
                sum[g][d] = 0.0f;                                                                 \
            }                                                                                     \
            best[g] = LOWEST;                                                                     \
            total[g] = 0.0f;                                                                      \
        }                                                                                         \
        for (int64_t begin = first; begin < length; begin += BLOCK) {                             \
            const int64_t count = length - begin < BLOCK ? length - begin : BLOCK;                \
            for (int64_t t = 0; t < count; t++) {                                                 \
                const int64_t position = begin + t;                                               \
                const int64_t slot = (int64_t)table[position / s->page_size] * s->page_size +     \
                                     position % s->page_size;                                     \
                const ELEMENT *key = keys + slot * slot_size;                                     \
                place[t] = values + slot * slot_size;                                             \
                for (int64_t d = 0; d < dim; d++) wide[d] = widen_##SUFFIX(key[d]);               \
                for (int64_t g = 0; g < group; g++) {                                             \
                    float dot = 0.0f;                                                             \
                    for (int64_t d = 0; d < dim; d++) dot += query[g][d] * wide[d];               \
                    score[g][t] = dot;                                                            \
                }                                                                                 \
            }                                                                                     \
            for (int64_t g = 0; g < group; g++) {                                                 \
                if (s->softcap > 0.0f)                                                            \
                    for (int64_t t = 0; t < count; t++)                                           \
                        score[g][t] = s->softcap * tanhf(score[g][t] / s->softcap);               \
                float top = best[g];                                                              \
                for (int64_t t = 0; t < count; t++)                                               \
                    top = score[g][t] > top ? score[g][t] : top;                                  \
                const float fade = exp_down(best[g] - top);                                       \
                float more = 0.0f;                                                                \
                for (int64_t t = 0; t < count; t++) {                                             \
                    score[g][t] = exp_down(score[g][t] - top);                                    \
                    more += score[g][t];                                                          \
                }                                                                                 \
                total[g] = total[g] * fade + more;                                                \
                best[g] = top;                                                                    \
                for (int64_t d = 0; d < dim; d++) sum[g][d] *= fade;                              \
            }                                                                                     \
            for (int64_t t = 0; t < count; t++) {                                                 \
                for (int64_t d = 0; d < dim; d++) wide[d] = widen_##SUFFIX(place[t][d]);          \
                for (int64_t g = 0; g < group; g++)                                               \
                    for (int64_t d = 0; d < dim; d++) sum[g][d] += score[g][t] * wide[d];         \
            }                                                                                     \
        }                                                                                         \
        for (int64_t g = 0; g < group; g++) {                                                     \
            ELEMENT *to = (ELEMENT *)s->out + (row * s->heads + kv * group + g) * dim;            \
            const float share = 1.0f / total[g];                                                  \
            for (int64_t d = 0; d < dim; d++) to[d] = narrow_##SUFFIX(sum[g][d] * share);         \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    static void attend_any_##SUFFIX(const Step *s, int64_t row, int64_t kv) {                     \
        const int64_t group = s->heads / s->kv_heads;                                             \
        if (s->dim == 64 && group == 3) attend_##SUFFIX(s, row, kv, 64, 3);                       \
        else if (s->dim == 64) attend_##SUFFIX(s, row, kv, 64, group);                            \
        else if (s->dim == 128 && group == 4) attend_##SUFFIX(s, row, kv, 128, 4);                \
        else if (s->dim == 128) attend_##SUFFIX(s, row, kv, 128, group);                          \
        else attend_##SUFFIX(s, row, kv, s->dim, group);                                          \
    }                                                                                             \
                                                                                                  \
    static void store_##SUFFIX(const Step *s, int64_t token) {                                    \
        const int64_t slot_size = s->kv_heads * s->dim;                                           \
        ELEMENT *key_to = (ELEMENT *)s->keys + s->write_slots[token] * slot_size;                 \
        ELEMENT *value_to = (ELEMENT *)s->values + s->write_slots[token] * slot_size;             \
        for (int64_t kv = 0; kv < s->kv_heads; kv++) {                                            \
            memcpy(key_to + kv * s->dim,                                                          \
                   (const ELEMENT *)s->key + token * s->key_row + kv * s->key_head,               \
                   s->dim * sizeof(ELEMENT));                                                     \
            memcpy(value_to + kv * s->dim,                                                        \
                   (const ELEMENT *)s->value + token * s->value_row + kv * s->value_head,         \
                   s->dim * sizeof(ELEMENT));                                                     \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    void asyncsgl_step_##SUFFIX(const Step *s) {                                                  \
        const int64_t tasks = s->rows * s->kv_heads;                                              \
        _Pragma("omp parallel if (tasks + s->tokens > 1)") {                                      \
            _Pragma("omp for schedule(static)") for (int64_t token = 0; token < s->tokens;        \
                                                     token++) store_##SUFFIX(s, token);           \
            _Pragma("omp for schedule(dynamic, 1)") for (int64_t task = 0; task < tasks; task++)  \
                attend_any_##SUFFIX(s, task / s->kv_heads, task % s->kv_heads);                   \
        }                                                                                         \
    }

DEFINE(f32, float)
DEFINE(bf16, uint16_t)
