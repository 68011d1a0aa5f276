/* One instruction set's inner loops; included by kernels.c once for each, with ISA, WIDTH (numbers of a vector) and
   TARGET. */

#define PARTS (BLOCK / WIDTH)

TARGET ALWAYS float HERE(sum)(Floats v) {
    float f[WIDTH];
    memcpy(f, &v, sizeof f);
    UNROLL for (int half = WIDTH / 2; half; half /= 2) UNROLL for (int i = 0; i < half; i++) f[i] += f[i + half];
    return f[0];
}

/* 64 output rows of four-bit numbers, R rows of x. */
TARGET ALWAYS void HERE(four)(const Weight *w, long block, const float *x, const float *sums, int R, float *out) {
    const uint8_t *q = w->q + block * (BLOCK / 2) * w->inputs;
    const long padded = (w->outputs + BLOCK - 1) / BLOCK * BLOCK, groups = w->inputs / w->group;
    Floats total[TILE][PARTS];
    memset(total, 0, sizeof total);
    for (long g = 0; g < groups; g++) {
        Floats part[TILE][PARTS];
        for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < PARTS; j++) part[r][j] = (Floats){0};
        for (long i = g * w->group; i < (g + 1) * w->group; i++, q += BLOCK / 2) {
            Floats v[PARTS];
            UNROLL for (int j = 0; j < PARTS / 2; j++) {
                const Ints pair = HERE(unsigned_bytes)(q + WIDTH * j);
                v[j] = __builtin_convertvector(pair & 15, Floats);
                v[PARTS / 2 + j] = __builtin_convertvector(pair >> 4, Floats);
            }
            UNROLL for (int r = 0; r < R; r++) {
                const float s = x[r * w->inputs + i];
                UNROLL for (int j = 0; j < PARTS; j++) part[r][j] += v[j] * s;
            }
        }
        UNROLL for (int j = 0; j < PARTS; j++) {
            LOAD(Ints, pair, w->scale + 2 * (g * padded + block * BLOCK + WIDTH * j));
            const Floats scale = (Floats)(pair << 16);
            for (int r = 0; r < R; r++) total[r][j] += scale * (part[r][j] - 8 * sums[r * w->inputs + g]);
        }
    }
    const long count = w->outputs - block * BLOCK < BLOCK ? w->outputs - block * BLOCK : BLOCK;
    for (int r = 0; r < R; r++) memcpy(out + r * w->outputs + block * BLOCK, total[r], 4 * count);
}

TARGET ALWAYS Floats HERE(several)(const uint8_t *q, int wide) {
    if (wide) return (Floats)(HERE(halves)(q) << 16);
    return __builtin_convertvector(HERE(signed_bytes)(q), Floats);
}

/* Up to 64 output rows that lie one after the other, R rows of x. */
TARGET ALWAYS void HERE(lines)(const Weight *w, long block, const float *x, int R, int wide, float *out) {
    const long end = (block + 1) * BLOCK < w->outputs ? (block + 1) * BLOCK : w->outputs;
    const long even = w->inputs / WIDTH * WIDTH, width = wide ? 2 : 1, line = w->inputs * width;
    for (long o = block * BLOCK; o < end; o += 4) {
        const int rows = end - o < 4 ? (int)(end - o) : 4;
        const uint8_t *q0 = w->q + o * line, *q1 = rows > 1 ? q0 + line : q0;
        const uint8_t *q2 = rows > 2 ? q1 + line : q0, *q3 = rows > 3 ? q2 + line : q0;
        Floats acc[TILE][4];
        for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = (Floats){0};
        for (long i = 0; i < even; i += WIDTH) {
            const Floats v0 = HERE(several)(q0 + width * i, wide), v1 = HERE(several)(q1 + width * i, wide);
            const Floats v2 = HERE(several)(q2 + width * i, wide), v3 = HERE(several)(q3 + width * i, wide);
            for (int r = 0; r < R; r++) {
                LOAD(Floats, xs, x + r * w->inputs + i);
                acc[r][0] += v0 * xs, acc[r][1] += v1 * xs, acc[r][2] += v2 * xs, acc[r][3] += v3 * xs;
            }
        }
        for (int r = 0; r < R; r++) {
            float totals[4] = {HERE(sum)(acc[r][0]), HERE(sum)(acc[r][1]), HERE(sum)(acc[r][2]), HERE(sum)(acc[r][3])};
            for (int j = 0; j < rows; j++) {
                for (long i = even; i < w->inputs; i++) {
                    const long at = (o + j) * w->inputs + i;
                    totals[j] += x[r * w->inputs + i] *
                                 (wide ? widen(((const uint16_t *)w->q)[at]) : (float)((const int8_t *)w->q)[at]);
                }
                out[r * w->outputs + o + j] = wide ? totals[j] : totals[j] * widen(w->scale[o + j]);
            }
        }
    }
}

/* One block of output rows for up to TILE rows of x, rounded; a bias is added to what was rounded. */
TARGET static void HERE(block)(const Weight *w, long block, const float *x, const float *sums, long left, float *out) {
    const int R = left < TILE ? (int)left : TILE;
#define CASE(n)                                                                              \
    case n:                                                                                  \
        if (w->bits == 4) HERE(four)(w, block, x, sums, n, out);                             \
        else if (w->bits == 8) HERE(lines)(w, block, x, n, 0, out);                          \
        else HERE(lines)(w, block, x, n, 1, out);                                            \
        break
    switch (R) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
    }
#undef CASE
    const long end = (block + 1) * BLOCK < w->outputs ? (block + 1) * BLOCK : w->outputs;
    for (int r = 0; r < R; r++) {
        float *row = out + r * w->outputs;
        for (long o = block * BLOCK; o < end; o++) row[o] = rounded(row[o]);
        if (w->bias)
            for (long o = block * BLOCK; o < end; o++) row[o] = rounded(row[o] + widen(w->bias[o]));
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

/* act: 0 silu, 1 gelu by tanh, 2 gelu by erf, 3 relu, 4 relu squared. */
TARGET static void HERE(act)(int act, int gated, const float *up, float *mid, long inner) {
    switch (act) {
        case 0:
            for (long i = 0; i < inner; i++) mid[i] = rounded(up[i] / (1.0f + HERE(power)(-up[i])));
            break;
        case 1:
            for (long i = 0; i < inner; i++) {
                const float v = up[i], t = 0.79788456080f * (v + 0.044715f * v * v * v);
                mid[i] = rounded(v / (1.0f + HERE(power)(-2.0f * t)));
            }
            break;
        case 2:
            for (long i = 0; i < inner; i++) mid[i] = rounded(0.5f * up[i] * (1.0f + erff(up[i] * 0.70710678f)));
            break;
        default:
            for (long i = 0; i < inner; i++) {
                const float v = up[i] > 0 ? up[i] : 0;
                mid[i] = act == 4 ? rounded(v * v) : v;
            }
    }
    if (gated)
        for (long i = 0; i < inner; i++) mid[i] = rounded(mid[i] * up[inner + i]);
}

#undef PARTS
