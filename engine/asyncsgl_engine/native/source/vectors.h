/* Vectors of floats as wide as the processor's, and elements as two float types store them.

   GCC's vector extensions serve every processor; intrinsics stand only where they are needed. */

#ifndef ASYNCSGL_VECTORS_H
#define ASYNCSGL_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

/* A register tile of a matrix product: TILE_ROWS rows by TILE_COLUMNS = 2 * LANES columns. It
   fills the register file: 24 sums, two vectors of weights and one broadcast of 32 registers, or
   12 + 2 + 1 of 16. */
#if defined(__AVX512F__)
#define LANES 16
#define TILE_ROWS 12
#elif defined(__AVX__)
#define LANES 8
#define TILE_ROWS 6
#else
#define LANES 4
#define TILE_ROWS 6
#endif
#define TILE_COLUMNS (2 * LANES)

/* A register tile of attention: KEY_ROWS positions or dimensions by ABREAST queries. It fills the
   register file as well, and broadcasts less often. */
#define ABREAST (3 * LANES)
#if defined(__AVX512F__)
#define KEY_ROWS 8
#else
#define KEY_ROWS 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#define LOG2_E 1.44269504f

/* Positions or dimensions, filled up to whole tiles of attention. */
INLINE int64_t whole_tiles(int64_t count) { return ceil_div(count, KEY_ROWS) * KEY_ROWS; }

INLINE void prefetch_line(const void *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)from + at, 0, 2);
}

INLINE vf splat(float value) { return value - (vf){0}; }
INLINE vu splat_bits(uint32_t bits) { return bits | (vu){0}; }
INLINE vf load(const float *from) { return *(const vf *)from; }
INLINE vu load_bits(const uint32_t *from) { return *(const vu *)from; }
INLINE void store(float *to, vf value) { *(vf *)to = value; }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE float widen_bf16(uint16_t bits) {
    const uint32_t whole = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &whole, 4);
    return value;
}

/* To the nearest, ties to even. */
INLINE uint16_t narrow_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INLINE void narrow_all(const float *from, int64_t count, uint16_t *to) {
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + 32 <= count; i += 32) {
        const __m512bh both =
            _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
        _mm512_storeu_si512(to + i, (__m512i)both);
    }
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256((__m256i *)(to + i),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
    for (; i < count; i++) to[i] = narrow_bf16(from[i]);
}

INLINE float widen_f32(float value) { return value; }
INLINE float narrow_f32(float value) { return value; }

/* What is left of x beside the nearest whole number; x is above -256 where it is rounded by way of
   integers, which truncate towards 0. */
INLINE vf fraction(vf x) {
#if defined(__AVX512DQ__)
    return (vf)_mm512_reduce_ps((__m512)x, 0);
#else
    const vi count = __builtin_convertvector(x + splat(256.5f), vi) - 256;
    return x - __builtin_convertvector(count, vf);
#endif
}

/* sum * 2 to the power of a whole number below 128; 0 where that is too small. */
INLINE vf scaled(vf sum, vf count) {
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)sum, (__m512)count);
#else
    const vi bits = (__builtin_convertvector(count, vi) + 127) << 23;
    return (vf)((vi)(sum * (vf)bits) & (count > splat(-127.0f)));
#endif
}

/* 2 to the power of x, by minimax polynomials: to 7.5e-8 for floats, and to 7.5e-5
   for what is narrowed to bfloat16 (which rounds by 2e-3). */
INLINE vf exp2_f32(vf x) {
#if !defined(__AVX512DQ__)
    x = larger(x, splat(-200.0f));
#endif
    const vf rest = fraction(x);
    vf sum = splat(1.3276468627e-3f);
    sum = sum * rest + splat(9.6755413538e-3f);
    sum = sum * rest + splat(5.5507132891e-2f);
    sum = sum * rest + splat(2.4022119727e-1f);
    sum = sum * rest + splat(6.9314696705e-1f);
    sum = sum * rest + splat(1.0f);
    return scaled(sum, x - rest);
}

INLINE vf exp2_bf16(vf x) {
#if !defined(__AVX512DQ__)
    x = larger(x, splat(-200.0f));
#endif
    const vf rest = fraction(x);
    vf sum = splat(5.5171669075e-2f);
    sum = sum * rest + splat(2.4261112219e-1f);
    sum = sum * rest + splat(6.9326098546e-1f);
    sum = sum * rest + splat(9.9992807354e-1f);
    return scaled(sum, x - rest);
}

/* 1 / x; for what is narrowed to bfloat16, to 2^-14. */
INLINE vf inverse_f32(vf x) { return splat(1.0f) / x; }
INLINE vf inverse_bf16(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_rcp14_ps((__m512)x);
#else
    return splat(1.0f) / x;
#endif
}

/* exp for arguments up to 0, by Cody and Waite's reduction and a minimax polynomial (Cephes): within
   2 units in the last place, and unlike expf it is vectorised. */
INLINE float exp_down(float x) {
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

#if defined(__AVX512F__)
/* The sums of the lanes of four vectors. */
INLINE __m128 sums_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 all = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#endif

#endif
