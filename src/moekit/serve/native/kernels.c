/* Rows of a few tokens times the weights of the experts that they chose: one call for a layer's experts.

   A weight W [outputs, inputs] lies as a store has it (see moekit/serve/forms.py):
     16  bfloat16, row after row
      8  int8, row after row; scale: bfloat16 of each row
      4  blocks of 64 rows: for each column 32 bytes, row n in the low and row n + 32 in the high half, 8 added;
         scale: for each group of columns and each row two bfloat16, the scale and 0
   Sums are taken in float32. Between the steps numbers are rounded to bfloat16 where PyTorch would round them.

   The inner loops (block.h) are compiled for several instruction sets; `moekit_isa` says which this CPU has. */

#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifndef _WIN32
#include "reads.h"
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define X86
#endif

#define BLOCK 64
#define TILE 4 /* rows of x that share one pass over the weights */

typedef struct {
    const uint8_t *q;
    const uint16_t *scale, *bias;
    int64_t bits, group, outputs, inputs;
} Weight;

/* Rows of inputs that are bfloat16 numbers: f as float32, h as they are. */
typedef struct {
    const float *f;
    const uint16_t *h;
    long stride;
} Rows;

static inline float widen(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint16_t narrow(float f) { /* to nearest, ties to even */
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline float rounded(float f) { return widen(narrow(f)); }

/* Vectors are those of GCC and Clang, as wide as the instruction set's; but widening loads need an instruction's name. */
#define ALWAYS static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define LOAD(type, name, from) \
    type name;                 \
    memcpy(&name, from, sizeof name)
#define VECTORS(isa, width)                                                      \
    typedef float Floats_##isa __attribute__((vector_size(4 * width), may_alias)); \
    typedef int32_t Ints_##isa __attribute__((vector_size(4 * width), may_alias));
#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define HERE(name) JOIN(name, ISA)
#define Floats HERE(Floats)
#define Ints HERE(Ints)

VECTORS(plain, 4)
#define WIDENED(name, type)                                                      \
    ALWAYS Ints_plain name##_plain(const void *from) {                           \
        const type *p = (const type *)from;                                      \
        return (Ints_plain){p[0], p[1], p[2], p[3]};                             \
    }
WIDENED(unsigned_bytes, uint8_t)
WIDENED(signed_bytes, int8_t)
WIDENED(halves, uint16_t)
ALWAYS float sum_plain(Floats_plain v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#define ISA plain
#define WIDTH 4
#define TARGET
#include "block.h"
#undef ISA
#undef WIDTH
#undef TARGET

#ifdef X86
VECTORS(avx2, 8)
#define TARGET __attribute__((target("avx2,fma")))
#define WIDENED2(name, load, convert) \
    TARGET ALWAYS Ints_avx2 name##_avx2(const void *from) { return (Ints_avx2)convert(load((const __m128i *)from)); }
WIDENED2(unsigned_bytes, _mm_loadl_epi64, _mm256_cvtepu8_epi32)
WIDENED2(signed_bytes, _mm_loadl_epi64, _mm256_cvtepi8_epi32)
WIDENED2(halves, _mm_loadu_si128, _mm256_cvtepu16_epi32)
TARGET ALWAYS float sum_avx2(Floats_avx2 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#define ISA avx2
#define WIDTH 8
#include "block.h"
#undef ISA
#undef WIDTH
#undef TARGET

VECTORS(avx512, 16)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define WIDENED5(name, load, type, convert) \
    TARGET ALWAYS Ints_avx512 name##_avx512(const void *from) { return (Ints_avx512)convert(load((const type *)from)); }
WIDENED5(unsigned_bytes, _mm_loadu_si128, __m128i, _mm512_cvtepu8_epi32)
WIDENED5(signed_bytes, _mm_loadu_si128, __m128i, _mm512_cvtepi8_epi32)
WIDENED5(halves, _mm256_loadu_si256, __m256i, _mm512_cvtepu16_epi32)
TARGET ALWAYS float sum_avx512(Floats_avx512 v) { return _mm512_reduce_add_ps((__m512)v); }
#define ISA avx512
#define WIDTH 16
#include "block.h"
#undef ISA
#undef WIDTH
#undef TARGET

#if !defined(__clang__) && __GNUC__ >= 10 || defined(__clang__) && __clang_major__ >= 10
#define DOTS
VECTORS(bf16, 16)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma")))
#define WIDENED5B(name, load, type, convert) \
    TARGET ALWAYS Ints_bf16 name##_bf16(const void *from) { return (Ints_bf16)convert(load((const type *)from)); }
WIDENED5B(unsigned_bytes, _mm_loadu_si128, __m128i, _mm512_cvtepu8_epi32)
WIDENED5B(signed_bytes, _mm_loadu_si128, __m128i, _mm512_cvtepi8_epi32)
WIDENED5B(halves, _mm256_loadu_si256, __m256i, _mm512_cvtepu16_epi32)
TARGET ALWAYS float sum_bf16(Floats_bf16 v) { return _mm512_reduce_add_ps((__m512)v); }
#define ISA bf16
#define WIDTH 16
#define DOT
#include "block.h"
#undef DOT
#undef ISA
#undef WIDTH
#undef TARGET
#endif
#endif

/* What is compiled for each instruction set. */
typedef struct {
    void (*block)(const Weight *, long begin, long end, Rows, long left, float *out, long stride);
    void (*act)(int act, const float *gate, const float *up, float *mid, long count);
    void (*norm)(const float *x, const float *weight, float eps, int kind, long count, float *out);
    void (*attend)(const float *q, const uint16_t *keys, const uint16_t *values, const float *key, const float *value,
                   long past, long size, float scaling, float *scores, float *out);
    void (*scores)(int kind, const float *logits, float *out, long count);
} Kernels;

/* 0: any CPU, 1: AVX2 and FMA, 2: AVX-512 (F, BW, DQ, VL), 3: and VBMI and BF16. */
int moekit_isa(void) {
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#ifdef DOTS
        if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16")) return 3;
#endif
        return 2;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

#define KERNELS(isa) (Kernels){block_##isa, act_##isa, norm_##isa, attend_##isa, scores_##isa}
static Kernels kernels_of(int isa) {
#ifdef DOTS
    if (isa == 3) return KERNELS(bf16);
#endif
#ifdef X86
    if (isa >= 2) return KERNELS(avx512);
    if (isa == 1) return KERNELS(avx2);
#endif
    return KERNELS(plain);
}

static void narrow_all(const float *from, uint16_t *to, long count) {
    for (long i = 0; i < count; i++) to[i] = narrow(from[i]);
}

static Weight weight_of(const int64_t *row, int down, long outputs, long inputs) {
    const int64_t *p = row + 2 + 3 * down;
    Weight w = {(const uint8_t *)p[0], (const uint16_t *)p[1], (const uint16_t *)p[2], row[0], row[1], outputs, inputs};
    return w;
}

/* Bytes that moekit_experts needs to work in. */
long moekit_scratch(long pairs, long hidden, long up, long inner) {
    return pairs * (6 * (hidden + inner) + 4 * up) + 256;
}

static void *aligned(void *p) { return (void *)(((uintptr_t)p + 63) & ~(uintptr_t)63); }

/* Outputs of experts, unweighted, rounded to bfloat16 but kept in float32.

   table   [n, 8]: bits, group; of the first and the second projection: numbers, scales, bias (addresses or 0)
   starts  [n + 1]: an expert's rows are pairs starts[e] to starts[e + 1]
   tokens  [pairs]: the row of x [*, hidden] (bfloat16) of each
   act     of the first projection's rows [up]; gated: the first half's act times the second half, up = 2 inner
   out     [pairs, hidden] */
void moekit_experts(const int64_t *table, const int32_t *starts, int n, const uint16_t *x, const int32_t *tokens,
                    long hidden, long up, long inner, int gated, int act, void *scratch, float *out, int isa,
                    int threads) {
    const long first = starts[0], pairs = starts[n] - first;
    float *xs = aligned(scratch);
    float *ups = xs + pairs * hidden, *mids = ups + pairs * up;
    uint16_t *halves = (uint16_t *)(mids + pairs * inner), *mid_halves = halves + pairs * hidden;
    const Kernels kernels = kernels_of(isa);
    const long up_blocks = (up + BLOCK - 1) / BLOCK, down_blocks = (hidden + BLOCK - 1) / BLOCK;
    for (long p = 0; p < pairs; p++) {
        const uint16_t *from = x + tokens[first + p] * hidden;
        for (long i = 0; i < hidden; i++) xs[p * hidden + i] = widen(from[i]);
        memcpy(halves + p * hidden, from, 2 * hidden);
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (long unit = 0; unit < n * up_blocks; unit++) {
            const long e = unit / up_blocks, begin = unit % up_blocks * BLOCK;
            const Weight w = weight_of(table + 8 * e, 0, up, hidden);
            for (long p = starts[e] - first; p < starts[e + 1] - first; p += TILE) {
                const Rows rows = {xs + p * hidden, halves + p * hidden, hidden};
                kernels.block(&w, begin, begin + BLOCK < up ? begin + BLOCK : up, rows, starts[e + 1] - first - p,
                              ups + p * up + begin, up);
            }
        }
#pragma omp for schedule(static)
        for (long p = 0; p < pairs; p++) {
            kernels.act(act, ups + p * up, gated ? ups + p * up + inner : 0, mids + p * inner, inner);
            narrow_all(mids + p * inner, mid_halves + p * inner, inner);
        }
#pragma omp for schedule(static)
        for (long unit = 0; unit < n * down_blocks; unit++) {
            const long e = unit / down_blocks, begin = unit % down_blocks * BLOCK;
            const Weight w = weight_of(table + 8 * e, 1, hidden, inner);
            for (long p = starts[e] - first; p < starts[e + 1] - first; p += TILE) {
                const Rows rows = {mids + p * inner, mid_halves + p * inner, inner};
                kernels.block(&w, begin, begin + BLOCK < hidden ? begin + BLOCK : hidden, rows,
                              starts[e + 1] - first - p, out + (first + p) * hidden + begin, hidden);
            }
        }
    }
}

/* Weighted sums of a token's outputs, in the order of pairs; total [rows, hidden] in bfloat16. */
void moekit_combine(const float *out, const int32_t *tokens, const float *weights, long pairs, long rows, long hidden,
                    float *scratch, uint16_t *total) {
    memset(scratch, 0, 4 * rows * hidden);
    for (long p = 0; p < pairs; p++) {
        float *to = scratch + tokens[p] * hidden;
        for (long i = 0; i < hidden; i++) to[i] += weights[p] * out[p * hidden + i];
    }
    narrow_all(scratch, total, rows * hidden);
}

/* Rows x [rows, inputs] times one weight; out [rows, outputs], both bfloat16. scratch: 4 rows (inputs + outputs). */
void moekit_linear(const Weight *w, const uint16_t *x, long rows, float *scratch, uint16_t *out, int isa, int threads) {
    const Kernels kernels = kernels_of(isa);
    const long blocks = (w->outputs + BLOCK - 1) / BLOCK, inputs = w->inputs, outputs = w->outputs;
    float *sums = scratch + rows * inputs;
    for (long i = 0; i < rows * inputs; i++) scratch[i] = widen(x[i]);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long b = 0; b < blocks; b++) {
        const long begin = b * BLOCK, end = begin + BLOCK < outputs ? begin + BLOCK : outputs;
        for (long r = 0; r < rows; r += TILE) {
            const Rows part = {scratch + r * inputs, x + r * inputs, inputs};
            kernels.block(w, begin, end, part, rows - r, sums + r * outputs + begin, outputs);
        }
    }
    narrow_all(sums, out, rows * outputs);
}

#include "token.h"
