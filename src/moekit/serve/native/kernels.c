/* Rows of a few tokens times the weights of the experts that they chose: one call for a layer's experts.

   A weight W [outputs, inputs] lies as a store has it (see moekit/serve/forms.py):
     16  bfloat16, row after row
      8  int8, row after row; scale: bfloat16 of each row
      4  blocks of 64 rows: for each column 32 bytes, row n in the low and row n + 32 in the high half, 8 added;
         scale: for each group of columns and each row two bfloat16, the scale and 0
   Sums are taken in float32. Between the steps numbers are rounded to bfloat16 where PyTorch would round them.

   The inner loops (block.h) are compiled for several instruction sets; `moekit_isa` says which this CPU has. */

#include <math.h>
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
    long bits, group, outputs, inputs;
} Weight;

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
#define ISA avx512
#define WIDTH 16
#include "block.h"
#undef ISA
#undef WIDTH
#undef TARGET
#endif

typedef void (*Block)(const Weight *, long, const float *, const float *, long, float *);
typedef void (*Act)(int, int, const float *, float *, long);

/* 0: any CPU, 1: AVX2 and FMA, 2: AVX-512 (F, BW, DQ, VL). */
int moekit_isa(void) {
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

static Block block_of(int isa) {
#ifdef X86
    if (isa == 2) return block_avx512;
    if (isa == 1) return block_avx2;
#endif
    return block_plain;
}

static Act act_of(int isa) {
#ifdef X86
    if (isa == 2) return act_avx512;
    if (isa == 1) return act_avx2;
#endif
    return act_plain;
}

static void sums_of(const float *x, long inputs, long group, float *sums) {
    for (long g = 0; g < inputs / group; g++) {
        float total = 0;
        for (long i = 0; i < group; i++) total += x[g * group + i];
        sums[g] = total;
    }
}

static Weight weight_of(const int64_t *row, int down, long outputs, long inputs) {
    const int64_t *p = row + 2 + 3 * down;
    Weight w = {(const uint8_t *)p[0], (const uint16_t *)p[1], (const uint16_t *)p[2], row[0], row[1], outputs, inputs};
    return w;
}

/* Bytes that moekit_experts needs to work in. */
long moekit_scratch(long pairs, long hidden, long up, long inner) {
    return 4 * pairs * (hidden + up + inner + hidden + inner) + 256;
}

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
    float *xs = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    float *ups = xs + pairs * hidden, *mids = ups + pairs * up;
    float *x_sums = mids + pairs * inner, *mid_sums = x_sums + pairs * hidden;
    const Block block = block_of(isa);
    const Act apply = act_of(isa);
    const long up_blocks = (up + BLOCK - 1) / BLOCK, down_blocks = (hidden + BLOCK - 1) / BLOCK;
    for (int e = 0; e < n; e++)
        for (long p = starts[e] - first; p < starts[e + 1] - first; p++) {
            const uint16_t *from = x + tokens[first + p] * hidden;
            for (long i = 0; i < hidden; i++) xs[p * hidden + i] = widen(from[i]);
            if (table[8 * e] == 4) sums_of(xs + p * hidden, hidden, table[8 * e + 1], x_sums + p * hidden);
        }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (long unit = 0; unit < n * up_blocks; unit++) {
            const long e = unit / up_blocks, at = starts[e] - first;
            const Weight w = weight_of(table + 8 * e, 0, up, hidden);
            for (long r = 0; r < starts[e + 1] - starts[e]; r += TILE)
                block(&w, unit % up_blocks, xs + (at + r) * hidden, x_sums + (at + r) * hidden,
                      starts[e + 1] - starts[e] - r, ups + (at + r) * up);
        }
#pragma omp for schedule(static)
        for (int e = 0; e < n; e++)
            for (long p = starts[e] - first; p < starts[e + 1] - first; p++) {
                apply(act, gated, ups + p * up, mids + p * inner, inner);
                if (table[8 * e] == 4) sums_of(mids + p * inner, inner, table[8 * e + 1], mid_sums + p * inner);
            }
#pragma omp for schedule(static)
        for (long unit = 0; unit < n * down_blocks; unit++) {
            const long e = unit / down_blocks, at = starts[e] - first, rows = starts[e + 1] - starts[e];
            const Weight w = weight_of(table + 8 * e, 1, hidden, inner);
            for (long r = 0; r < rows; r += TILE)
                block(&w, unit % down_blocks, mids + (at + r) * inner, mid_sums + (at + r) * inner, rows - r,
                      out + (starts[e] + r) * hidden);
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
    for (long i = 0; i < rows * hidden; i++) total[i] = narrow(scratch[i]);
}

/* Rows x [rows, inputs] times one bfloat16 weight; out [rows, outputs], both bfloat16. */
void moekit_linear(const void *q, const uint16_t *bias, long outputs, long inputs, const uint16_t *x, long rows,
                   float *scratch, uint16_t *out, int isa, int threads) {
    const Weight w = {(const uint8_t *)q, 0, bias, 16, 0, outputs, inputs};
    const Block block = block_of(isa);
    const long blocks = (outputs + BLOCK - 1) / BLOCK;
    float *sums = scratch + rows * inputs;
    for (long i = 0; i < rows * inputs; i++) scratch[i] = widen(x[i]);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long b = 0; b < blocks; b++)
        for (long r = 0; r < rows; r += TILE)
            block(&w, b, scratch + r * inputs, sums, rows - r, sums + r * outputs);
    for (long i = 0; i < rows * outputs; i++) out[i] = narrow(sums[i]);
}
