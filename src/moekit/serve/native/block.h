/* One instruction set's inner loops; included by kernels.c once for each, with ISA, WIDTH (numbers of a vector), TARGET,
   and DOT where it multiplies pairs of bfloat16 numbers (AVX512_BF16, with VBMI). */

#define PARTS (BLOCK / WIDTH)
#define AHEAD 2048 /* bytes that are asked for before they are needed: hardware stops at the ends of pages */

#ifdef DOT
/* 64 output rows of four-bit numbers, R rows of x, two columns at once. A byte is doubled into 16 bits, of which a
   table takes the lower five: bit 4 is the neighbour's, so the table holds everything twice. */
TARGET ALWAYS void HERE(twos)(const Weight *w, long begin, long end, Rows x, int R, float *out, long stride) {
    static const uint16_t numbers[16] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                         0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0}; /* -8 to 7 */
    uint8_t places[2][64];
    uint16_t twice[32];
    for (int i = 0; i < 32; i++) twice[i] = numbers[i & 15];
    for (int half = 0; half < 2; half++)
        for (int lane = 0; lane < 32; lane++)
            places[half][2 * lane] = places[half][2 * lane + 1] = (uint8_t)(32 * (lane & 1) + 16 * half + lane / 2);
    const __m512i table = _mm512_loadu_si512(twice);
    const __m512i lower = _mm512_loadu_si512(places[0]), upper = _mm512_loadu_si512(places[1]);
    const uint8_t *q = w->q + begin / BLOCK * (BLOCK / 2) * w->inputs;
    const long padded = (w->outputs + BLOCK - 1) / BLOCK * BLOCK, groups = w->inputs / w->group;
    Floats total[TILE][4];
    memset(total, 0, sizeof total);
    for (long g = 0; g < groups; g++) {
        __m512 part[TILE][2][4];
        for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < 4; j++) part[r][0][j] = part[r][1][j] = _mm512_setzero_ps();
        for (long i = g * w->group; i < (g + 1) * w->group; i += 4)
            UNROLL for (int way = 0; way < 2; way++, q += BLOCK) {
                __builtin_prefetch(q + AHEAD);
                const __m512i bytes = _mm512_loadu_si512(q);
                const __m512i a = _mm512_permutexvar_epi8(lower, bytes), b = _mm512_permutexvar_epi8(upper, bytes);
                const __m512bh v0 = (__m512bh)_mm512_permutexvar_epi16(a, table);
                const __m512bh v1 = (__m512bh)_mm512_permutexvar_epi16(b, table);
                const __m512bh v2 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(a, 4), table);
                const __m512bh v3 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(b, 4), table);
                UNROLL for (int r = 0; r < R; r++) {
                    int pair;
                    memcpy(&pair, x.h + r * x.stride + i + 2 * way, 4);
                    const __m512bh xs = (__m512bh)_mm512_set1_epi32(pair);
                    __m512 *to = part[r][R == 1 ? way : 0]; /* one row alone would wait for its own sums */
                    to[0] = _mm512_dpbf16_ps(to[0], v0, xs), to[1] = _mm512_dpbf16_ps(to[1], v1, xs);
                    to[2] = _mm512_dpbf16_ps(to[2], v2, xs), to[3] = _mm512_dpbf16_ps(to[3], v3, xs);
                }
            }
        UNROLL for (int j = 0; j < 4; j++) {
            LOAD(Ints, pair, w->scale + 2 * (g * padded + begin + WIDTH * j));
            const Floats scale = (Floats)(pair << 16);
            for (int r = 0; r < R; r++) total[r][j] += scale * (Floats)(part[r][0][j] + part[r][1][j]);
        }
    }
    for (int r = 0; r < R; r++) memcpy(out + r * stride, total[r], 4 * (end - begin));
}

/* Rows of bfloat16 numbers that lie one after the other, R rows of x. */
TARGET ALWAYS void HERE(pairs)(const Weight *w, long begin, long end, Rows x, int R, float *out, long stride) {
    const long even = w->inputs / 32 * 32;
    const uint16_t *q = (const uint16_t *)w->q;
    for (long o = begin; o < end; o += 4) {
        const int rows = end - o < 4 ? (int)(end - o) : 4;
        const uint16_t *q0 = q + o * w->inputs, *q1 = rows > 1 ? q0 + w->inputs : q0;
        const uint16_t *q2 = rows > 2 ? q1 + w->inputs : q0, *q3 = rows > 3 ? q2 + w->inputs : q0;
        const long next = 4 * w->inputs;
        __m512 acc[TILE][4];
        for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 4; j++) acc[r][j] = _mm512_setzero_ps();
        for (long i = 0; i < even; i += 32) {
            __builtin_prefetch(q0 + next + i), __builtin_prefetch(q1 + next + i);
            __builtin_prefetch(q2 + next + i), __builtin_prefetch(q3 + next + i);
            const __m512bh v0 = (__m512bh)_mm512_loadu_si512(q0 + i), v1 = (__m512bh)_mm512_loadu_si512(q1 + i);
            const __m512bh v2 = (__m512bh)_mm512_loadu_si512(q2 + i), v3 = (__m512bh)_mm512_loadu_si512(q3 + i);
            UNROLL for (int r = 0; r < R; r++) {
                const __m512bh xs = (__m512bh)_mm512_loadu_si512(x.h + r * x.stride + i);
                acc[r][0] = _mm512_dpbf16_ps(acc[r][0], v0, xs), acc[r][1] = _mm512_dpbf16_ps(acc[r][1], v1, xs);
                acc[r][2] = _mm512_dpbf16_ps(acc[r][2], v2, xs), acc[r][3] = _mm512_dpbf16_ps(acc[r][3], v3, xs);
            }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < rows; j++) {
                float total = HERE(sum)((Floats)acc[r][j]);
                for (long i = even; i < w->inputs; i++)
                    total += x.f[r * x.stride + i] * widen(q[(o + j) * w->inputs + i]);
                out[r * stride + o + j - begin] = total;
            }
    }
}
#endif

/* 64 output rows of four-bit numbers, R rows of x. */
TARGET ALWAYS void HERE(four)(const Weight *w, long begin, long end, Rows x, int R, float *out, long stride) {
    const uint8_t *q = w->q + begin / BLOCK * (BLOCK / 2) * w->inputs;
    const long padded = (w->outputs + BLOCK - 1) / BLOCK * BLOCK, groups = w->inputs / w->group;
    Floats total[TILE][PARTS];
    memset(total, 0, sizeof total);
    for (long g = 0; g < groups; g++) {
        Floats part[TILE][PARTS];
        float sums[TILE] = {0};
        for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < PARTS; j++) part[r][j] = (Floats){0};
        for (long i = g * w->group; i < (g + 1) * w->group; i++, q += BLOCK / 2) {
            Floats v[PARTS];
            __builtin_prefetch(q + AHEAD);
            UNROLL for (int j = 0; j < PARTS / 2; j++) {
                const Ints pair = HERE(unsigned_bytes)(q + WIDTH * j);
                v[j] = __builtin_convertvector(pair & 15, Floats);
                v[PARTS / 2 + j] = __builtin_convertvector(pair >> 4, Floats);
            }
            UNROLL for (int r = 0; r < R; r++) {
                const float s = x.f[r * x.stride + i];
                sums[r] += s;
                UNROLL for (int j = 0; j < PARTS; j++) part[r][j] += v[j] * s;
            }
        }
        UNROLL for (int j = 0; j < PARTS; j++) {
            LOAD(Ints, pair, w->scale + 2 * (g * padded + begin + WIDTH * j));
            const Floats scale = (Floats)(pair << 16);
            for (int r = 0; r < R; r++) total[r][j] += scale * (part[r][j] - 8 * sums[r]);
        }
    }
    for (int r = 0; r < R; r++) memcpy(out + r * stride, total[r], 4 * (end - begin));
}

TARGET ALWAYS Floats HERE(several)(const uint8_t *q, int bits) {
    if (bits == 32) {
        LOAD(Floats, numbers, q);
        return numbers;
    }
    if (bits == 16) return (Floats)(HERE(halves)(q) << 16);
    return __builtin_convertvector(HERE(signed_bytes)(q), Floats);
}

/* Rows of whole numbers that lie one after the other, R rows of x. */
TARGET ALWAYS void HERE(lines)(const Weight *w, long begin, long end, Rows x, int R, int bits, float *out,
                               long stride) {
    const long even = w->inputs / WIDTH * WIDTH, width = bits / 8, line = w->inputs * width;
    for (long o = begin; o < end; o += 4) {
        const int rows = end - o < 4 ? (int)(end - o) : 4;
        const uint8_t *q0 = w->q + o * line, *q1 = rows > 1 ? q0 + line : q0;
        const uint8_t *q2 = rows > 2 ? q1 + line : q0, *q3 = rows > 3 ? q2 + line : q0;
        Floats acc[TILE][4];
        for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = (Floats){0};
        for (long i = 0; i < even; i += WIDTH) {
            const long at = width * i, later = at + 4 * line;
            if (at % 64 == 0) {
                __builtin_prefetch(q0 + later), __builtin_prefetch(q1 + later);
                __builtin_prefetch(q2 + later), __builtin_prefetch(q3 + later);
            }
            const Floats v0 = HERE(several)(q0 + at, bits), v1 = HERE(several)(q1 + at, bits);
            const Floats v2 = HERE(several)(q2 + at, bits), v3 = HERE(several)(q3 + at, bits);
            for (int r = 0; r < R; r++) {
                LOAD(Floats, xs, x.f + r * x.stride + i);
                acc[r][0] += v0 * xs, acc[r][1] += v1 * xs, acc[r][2] += v2 * xs, acc[r][3] += v3 * xs;
            }
        }
        for (int r = 0; r < R; r++) {
            float totals[4] = {HERE(sum)(acc[r][0]), HERE(sum)(acc[r][1]), HERE(sum)(acc[r][2]), HERE(sum)(acc[r][3])};
            for (int j = 0; j < rows; j++) {
                for (long i = even; i < w->inputs; i++) {
                    const long at = (o + j) * w->inputs + i;
                    totals[j] += x.f[r * x.stride + i] * (bits == 32   ? ((const float *)w->q)[at]
                                                          : bits == 16 ? widen(((const uint16_t *)w->q)[at])
                                                                       : (float)((const int8_t *)w->q)[at]);
                }
                out[r * stride + o + j - begin] = bits == 8 ? totals[j] * widen(w->scale[o + j]) : totals[j];
            }
        }
    }
}

/* Output rows begin to end (of four-bit numbers: at most a block, and its first row) for up to TILE rows of x, rounded
   (but not those of float32 numbers); a bias is added to what was rounded. */
TARGET static void HERE(block)(const Weight *w, long begin, long end, Rows x, long left, float *out, long stride) {
    const int R = left < TILE ? (int)left : TILE;
#ifdef DOT
#define HALVES(n) HERE(pairs)(w, begin, end, x, n, out, stride)
#define FOUR(n) if (w->group % 4) HERE(four)(w, begin, end, x, n, out, stride); else HERE(twos)(w, begin, end, x, n, out, stride)
#else
#define HALVES(n) HERE(lines)(w, begin, end, x, n, 16, out, stride)
#define FOUR(n) HERE(four)(w, begin, end, x, n, out, stride)
#endif
#define CASE(n)                                                             \
    case n:                                                                 \
        if (w->bits == 4) { FOUR(n); }                                      \
        else if (w->bits == 8) HERE(lines)(w, begin, end, x, n, 8, out, stride); \
        else if (w->bits == 16) HALVES(n);                                  \
        else HERE(lines)(w, begin, end, x, n, 32, out, stride);             \
        break
    switch (R) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
    }
#undef CASE
#undef HALVES
#undef FOUR
    if (w->bits == 32) return;
    for (int r = 0; r < R; r++) {
        float *row = out + r * stride;
        for (long o = 0; o < end - begin; o++) row[o] = rounded(row[o]);
        if (w->bias)
            for (long o = 0; o < end - begin; o++) row[o] = rounded(row[o] + widen(w->bias[begin + o]));
    }
}

/* e^x to about 1e-7 of its value: 2^n times a polynomial of the rest. */
TARGET ALWAYS float HERE(power)(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = __builtin_floorf(x * 1.44269504f + 0.5f), f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

/* act: 0 silu, 1 gelu by tanh, 2 gelu by erf, 3 relu, 4 relu squared; times up, where there is one. */
TARGET static void HERE(act)(int act, const float *gate, const float *up, float *mid, long count) {
    switch (act) {
        case 0:
            for (long i = 0; i < count; i++) mid[i] = rounded(gate[i] / (1.0f + HERE(power)(-gate[i])));
            break;
        case 1:
            for (long i = 0; i < count; i++) {
                const float v = gate[i], t = 0.79788456080f * (v + 0.044715f * v * v * v);
                mid[i] = rounded(v / (1.0f + HERE(power)(-2.0f * t)));
            }
            break;
        case 2:
            for (long i = 0; i < count; i++) mid[i] = rounded(0.5f * gate[i] * (1.0f + erff(gate[i] * 0.70710678f)));
            break;
        default:
            for (long i = 0; i < count; i++) {
                const float v = gate[i] > 0 ? gate[i] : 0;
                mid[i] = act == 4 ? rounded(v * v) : v;
            }
    }
    if (up)
        for (long i = 0; i < count; i++) mid[i] = rounded(mid[i] * up[i]);
}

TARGET ALWAYS float HERE(product)(const float *a, const float *b, long count) {
    Floats total = {0};
    long i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
        LOAD(Floats, x, a + i);
        LOAD(Floats, y, b + i);
        total += x * y;
    }
    float sum = HERE(sum)(total);
    for (; i < count; i++) sum += a[i] * b[i];
    return sum;
}

/* x / sqrt(mean x^2 + eps) times weight; kind 0: rounded before that, too, 1: not. */
TARGET static void HERE(norm)(const float *x, const float *weight, float eps, int kind, long count, float *out) {
    const float factor = 1.0f / sqrtf(HERE(product)(x, x, count) / (float)count + eps);
    if (kind == 0)
        for (long i = 0; i < count; i++) out[i] = rounded(weight[i] * rounded(x[i] * factor));
    else
        for (long i = 0; i < count; i++) out[i] = rounded(weight[i] * (x[i] * factor));
}

/* One head's attention to the past and to the token itself: keys and values [past, size] in bfloat16, its own in
   float32; scores [past + 1]. */
TARGET static void HERE(attend)(const float *q, const uint16_t *keys, const uint16_t *values, const float *key,
                                const float *value, long past, long size, float scaling, float *scores, float *out) {
    const long even = size / WIDTH * WIDTH;
    float most = scores[past] = scaling * HERE(product)(q, key, size), sum = 0;
    for (long t = 0; t < past; t++, keys += size) {
        Floats total = {0};
        for (long i = 0; i < even; i += WIDTH) {
            LOAD(Floats, x, q + i);
            total += x * HERE(several)((const uint8_t *)(keys + i), 16);
        }
        float score = HERE(sum)(total);
        for (long i = even; i < size; i++) score += q[i] * widen(keys[i]);
        scores[t] = scaling * score;
        most = scores[t] > most ? scores[t] : most;
    }
    for (long t = 0; t <= past; t++) scores[t] = HERE(power)(scores[t] - most);
    for (long t = 0; t <= past; t++) sum += scores[t];
    for (long i = 0; i < size; i++) out[i] = scores[past] * value[i];
    for (long t = 0; t < past; t++, values += size) {
        const float share = scores[t];
        for (long i = 0; i < even; i += WIDTH) {
            LOAD(Floats, so_far, out + i);
            so_far += share * HERE(several)((const uint8_t *)(values + i), 16);
            memcpy(out + i, &so_far, sizeof so_far);
        }
        for (long i = even; i < size; i++) out[i] += share * widen(values[i]);
    }
    for (long i = 0; i < size; i++) out[i] = rounded(out[i] / sum);
}

/* kind 0: softmax, 1: sigmoid. */
TARGET static void HERE(scores)(int kind, const float *logits, float *out, long count) {
    float most = logits[0], sum = 0;
    for (long i = 1; i < count; i++) most = logits[i] > most ? logits[i] : most;
    for (long i = 0; i < count; i++) out[i] = kind ? 1.0f / (1.0f + HERE(power)(-logits[i])) : HERE(power)(logits[i] - most);
    if (kind) return;
    for (long i = 0; i < count; i++) sum += out[i];
    for (long i = 0; i < count; i++) out[i] /= sum;
}

#undef PARTS
#undef AHEAD
