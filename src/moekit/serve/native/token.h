/* One token through a whole decoder, in one call: for models whose layers are plain (see moekit/families/plain.py).

       h += attention(norm(h));  h += experts(norm(h)) or mlp(norm(h))

   Threads share each step's rows and meet after it; what is small every thread computes for itself. Numbers are rounded
   to bfloat16 where PyTorch rounds them. */

typedef struct {
    const float *norm1, *norm2; /* [hidden] */
    Weight q, k, v, o;
    const float *q_norm, *k_norm;       /* 0: none; [head] or [all heads' width] */
    int64_t q_width, k_width;           /* numbers that are normalised together */
    Weight router;                      /* outputs 0: no routed experts */
    const float *correction;            /* [experts], added to choose; or 0 */
    const int64_t *table;               /* [experts, 8] as moekit_experts has it; numbers 0: not in memory */
    Weight gate, up, down, shared_gate; /* of the shared expert, or a layer without routed ones; outputs 0: none */
    uint16_t *keys, *values;            /* [kv_heads, room, head] */
    int64_t room;                       /* columns that there is room for */
} Layer;

typedef struct {
    int64_t hidden, heads, kv_heads, head, rotary, interleaved, norm_kind;
    int64_t experts, top_k, inner, gated, act, shared_act;
    int64_t score, renormalised, round_weights; /* of the router */
    double eps, head_eps, scaling, weight_scaling;
    const float *norm; /* the last one */
    Weight output;
    int64_t widest; /* the most inputs of a matrix */
} Model;

typedef struct {
    int64_t past, begin, end, waiting, finish; /* tokens before; layers to run; whether the first one has only waited for
                                                  its experts; whether logits follow */
    const float *cos, *sin; /* [rotary / 2] at least */
    float *hidden;          /* [hidden]: in, and out */
    int32_t *chosen;        /* [layers, top_k] */
    float *weights;         /* [layers, top_k] */
    uint16_t *logits;       /* [vocabulary] */
} Step;

typedef struct { /* what threads share */
    float *qkv, *attended, *logits, *mids, *shared;
    uint16_t *attended_h, *mids_h, *shared_h;
} Common;

typedef struct { /* what one has for itself */
    float *x, *scores, *small, *key;
    uint16_t *xh;
} Own;

#define MAX_K 64
#define PAD(count) (((count) + 31) / 32 * 32)

static long largest(long a, long b) { return a > b ? a : b; }

/* Bytes that moekit_token needs to work in. */
long moekit_token_scratch(const Model *m, long shared_inner, long past, int threads) {
    const long q = m->heads * m->head, kv = m->kv_heads * m->head;
    const long common = 4 * (PAD(q + 2 * kv) + 2 * PAD(q) + PAD(m->experts + 1) + 2 * PAD(m->top_k * m->inner) +
                             2 * PAD(shared_inner) + 64);
    const long own = 4 * (2 * PAD(m->widest) + PAD(past + 1) + PAD(m->experts) + 4 * PAD(m->head) + 8 * BLOCK) + 256;
    return common + threads * own + 256;
}

static float *take(char **at, long count) {
    float *out = aligned(*at);
    *at = (char *)(out + PAD(count));
    return out;
}

static void share(long count, int me, int threads, long *begin, long *end) {
    *begin = count * me / threads, *end = count * (me + 1) / threads;
}

/* Output rows of one matrix from block to block. */
static void blocks(const Kernels *k, const Weight *w, long from, long to, Rows x, float *out) {
    for (long b = from; b < to; b++) {
        const long begin = b * BLOCK, end = begin + BLOCK < w->outputs ? begin + BLOCK : w->outputs;
        k->block(w, begin, end, x, 1, out + begin, w->outputs);
    }
}

static long blocks_of(const Weight *w) { return (w->outputs + BLOCK - 1) / BLOCK; }

/* Positions turn pairs of numbers. */
static void turn(const Model *m, const Step *s, float *x) {
    const long half = m->rotary / 2;
    for (long i = 0; i < half; i++) {
        const long a = m->interleaved ? 2 * i : i, b = m->interleaved ? 2 * i + 1 : i + half;
        const float u = x[a], v = x[b];
        x[a] = rounded(rounded(u * s->cos[i]) - rounded(v * s->sin[i]));
        x[b] = rounded(rounded(v * s->cos[i]) + rounded(u * s->sin[i]));
    }
}

/* One head's query or key from the projection of all, normalised where the model does that, and turned. */
static void head_of(const Kernels *k, const Model *m, const Step *s, const float *all, long number, long width,
                    const float *weight, long together, float *spare, float *out) {
    const float *mine = all + number * m->head;
    if (weight && together > m->head) {
        k->norm(all, weight, (float)m->head_eps, (int)m->norm_kind, width, spare);
        memcpy(out, spare + number * m->head, 4 * m->head);
    } else if (weight) {
        k->norm(mine, weight, (float)m->head_eps, (int)m->norm_kind, m->head, out);
    } else {
        memcpy(out, mine, 4 * m->head);
    }
    turn(m, s, out);
}

static void attention(const Kernels *k, const Model *m, const Layer *l, const Step *s, Common *c, Own *own, int me,
                      int threads) {
    const long group = m->heads / m->kv_heads, kv = m->kv_heads * m->head;
    const float *keys = c->qkv + m->heads * m->head, *values = keys + kv;
    float *query = own->key + PAD(m->head);
    long begin, end, last = -1;
    share(m->heads, me, threads, &begin, &end);
    for (long h = begin; h < end; h++) {
        const long g = h / group, place = (g * l->room + s->past) * m->head;
        if (g != last) head_of(k, m, s, keys, g, kv, l->k_norm, l->k_width, own->x, own->key);
        last = g;
        head_of(k, m, s, c->qkv, h, m->heads * m->head, l->q_norm, l->q_width, own->x, query);
        k->attend(query, l->keys + g * l->room * m->head, l->values + g * l->room * m->head, own->key,
                  values + g * m->head, s->past, m->head, (float)m->scaling, own->scores, c->attended + h * m->head);
        narrow_all(c->attended + h * m->head, c->attended_h + h * m->head, m->head);
        if (h % group == 0) {
            narrow_all(own->key, l->keys + place, m->head);
            narrow_all(values + g * m->head, l->values + place, m->head);
        }
    }
}

/* The k experts of the largest scores in ascending order, and their weights. */
static void choose(const Kernels *k, const Model *m, const Layer *l, const float *logits, float *scores,
                   int32_t *chosen, float *weights) {
    k->scores((int)m->score, logits, scores, m->experts);
    double sum = 0;
    for (long n = 0; n < m->top_k; n++) chosen[n] = -1;
    for (long n = 0; n < m->top_k; n++) {
        long best = -1;
        float most = 0;
        for (long e = 0; e < m->experts; e++) {
            const float score = scores[e] + (l->correction ? l->correction[e] : 0);
            int taken = best >= 0 && score <= most;
            for (long i = 0; i < n && !taken; i++) taken = chosen[i] == e;
            if (!taken) best = e, most = score;
        }
        long at = n;
        for (; at > 0 && chosen[at - 1] > best; at--) chosen[at] = chosen[at - 1];
        chosen[at] = (int32_t)best;
        sum += scores[best];
    }
    const float factor = (float)(m->weight_scaling / (m->renormalised ? sum : 1));
    for (long n = 0; n < m->top_k; n++) {
        weights[n] = scores[chosen[n]] * factor;
        if (m->round_weights) weights[n] = rounded(weights[n]);
    }
}

/* 64 rows of what a gated or plain first projection gives, acted upon. */
static void inner_rows(const Kernels *k, int act, const Weight *gate, long gate_row, const Weight *up, long up_row,
                       long count, Rows x, float *small, float *mid, uint16_t *mid_h) {
    k->block(gate, gate_row, gate_row + count, x, 1, small, 0);
    if (up) k->block(up, up_row, up_row + count, x, 1, small + BLOCK, 0);
    k->act(act, small, up ? small + BLOCK : 0, mid, count);
    narrow_all(mid, mid_h, count);
}

static void run(const Kernels *k, const Model *m, const Layer *layers, const Step *s, Common *c, Own *own, int me,
                int threads, long *at) {
    long begin, end;
    const Rows x = {own->x, own->xh, m->hidden}, attended = {c->attended, c->attended_h, m->heads * m->head};
    for (long n = s->begin; n < s->end; n++) {
        const Layer *l = layers + n;
        const int waited = s->waiting && n == s->begin;
        int32_t chosen[MAX_K];
        float weights[MAX_K];
        if (!waited) {
            k->norm(s->hidden, l->norm1, (float)m->eps, (int)m->norm_kind, m->hidden, own->x);
            narrow_all(own->x, own->xh, m->hidden);
            const Weight *parts[3] = {&l->q, &l->k, &l->v};
            share(blocks_of(&l->q) + blocks_of(&l->k) + blocks_of(&l->v), me, threads, &begin, &end);
            float *out = c->qkv;
            for (int i = 0; i < 3; i++) {
                const long count = blocks_of(parts[i]), to = end < count ? end : count;
                blocks(k, parts[i], begin > 0 ? begin : 0, to, x, out);
                begin -= count, end -= count, out += parts[i]->outputs;
            }
#pragma omp barrier
            attention(k, m, l, s, c, own, me, threads);
#pragma omp barrier
            share(blocks_of(&l->o), me, threads, &begin, &end);
            for (long b = begin; b < end; b++) {
                const long from = b * BLOCK, to = from + BLOCK < m->hidden ? from + BLOCK : m->hidden;
                k->block(&l->o, from, to, attended, 1, own->small, 0);
                for (long i = from; i < to; i++) s->hidden[i] = rounded(s->hidden[i] + own->small[i - from]);
            }
#pragma omp barrier
        }
        k->norm(s->hidden, l->norm2, (float)m->eps, (int)m->norm_kind, m->hidden, own->x);
        narrow_all(own->x, own->xh, m->hidden);
        if (l->router.outputs && !waited) {
            share((l->router.outputs + 3) / 4, me, threads, &begin, &end);
            for (long o = 4 * begin; o < 4 * end && o < l->router.outputs; o += 4)
                k->block(&l->router, o, o + 4 < l->router.outputs ? o + 4 : l->router.outputs, x, 1, c->logits + o, 0);
        }
        if (l->shared_gate.outputs && me == 0) k->block(&l->shared_gate, 0, 1, x, 1, c->logits + m->experts, 0);
#pragma omp barrier
        const long top = l->router.outputs ? m->top_k : 0;
        if (top && waited) {
            memcpy(chosen, s->chosen + n * top, 4 * top);
            memcpy(weights, s->weights + n * top, 4 * top);
        } else if (top) {
            choose(k, m, l, c->logits, own->scores, chosen, weights);
            int missing = 0;
            for (long i = 0; i < top; i++) missing |= !l->table[8 * chosen[i] + 2];
            if (me == 0) {
                memcpy(s->chosen + n * top, chosen, 4 * top);
                memcpy(s->weights + n * top, weights, 4 * top);
            }
            if (missing) {
                if (me == 0) *at = n;
                return;
            }
        }
        const long routed_blocks = m->inner / BLOCK + (m->inner % BLOCK != 0), shared = l->down.outputs ? l->down.inputs : 0;
        const long shared_blocks = (shared + BLOCK - 1) / BLOCK;
        share(top * routed_blocks + shared_blocks, me, threads, &begin, &end);
        for (long unit = begin; unit < end; unit++) {
            if (unit < top * routed_blocks) {
                const long i = unit / routed_blocks, from = unit % routed_blocks * BLOCK, at_ = i * m->inner + from;
                const Weight w = weight_of(l->table + 8 * chosen[i], 0, m->inner * (m->gated ? 2 : 1), m->hidden);
                inner_rows(k, (int)m->act, &w, from, m->gated ? &w : 0, m->inner + from,
                           from + BLOCK < m->inner ? BLOCK : m->inner - from, x, own->small, c->mids + at_,
                           c->mids_h + at_);
            } else {
                const long from = (unit - top * routed_blocks) * BLOCK;
                inner_rows(k, (int)m->shared_act, &l->gate, from, &l->up, from,
                           from + BLOCK < shared ? BLOCK : shared - from, x, own->small, c->shared + from,
                           c->shared_h + from);
            }
        }
#pragma omp barrier
        const Rows mid = {c->shared, c->shared_h, shared};
        share((m->hidden + BLOCK - 1) / BLOCK, me, threads, &begin, &end);
        for (long b = begin; b < end; b++) {
            const long from = b * BLOCK, count = from + BLOCK < m->hidden ? BLOCK : m->hidden - from;
            float *total = own->small + BLOCK, *part = own->small;
            memset(total, 0, 4 * BLOCK);
            for (long i = 0; i < top; i++) {
                const Weight w = weight_of(l->table + 8 * chosen[i], 1, m->hidden, m->inner);
                const Rows mids = {c->mids + i * m->inner, c->mids_h + i * m->inner, m->inner};
                k->block(&w, from, from + count, mids, 1, part, 0);
                for (long j = 0; j < count; j++) total[j] += weights[i] * part[j];
            }
            for (long j = 0; j < count; j++) total[j] = rounded(total[j]);
            if (shared) {
                k->block(&l->down, from, from + count, mid, 1, part, 0);
                if (l->shared_gate.outputs) {
                    const float open = rounded(1.0f / (1.0f + expf(-c->logits[m->experts])));
                    for (long j = 0; j < count; j++) part[j] = rounded(open * part[j]);
                }
                for (long j = 0; j < count; j++) total[j] = rounded(total[j] + part[j]);
            }
            for (long j = 0; j < count; j++) s->hidden[from + j] = rounded(s->hidden[from + j] + total[j]);
        }
#pragma omp barrier
    }
    if (!s->finish) return;
    k->norm(s->hidden, m->norm, (float)m->eps, (int)m->norm_kind, m->hidden, own->x);
    narrow_all(own->x, own->xh, m->hidden);
    share(blocks_of(&m->output), me, threads, &begin, &end);
    for (long b = begin; b < end; b++) {
        const long from = b * BLOCK, to = from + BLOCK < m->output.outputs ? from + BLOCK : m->output.outputs;
        k->block(&m->output, from, to, x, 1, own->small, 0);
        narrow_all(own->small, s->logits + from, to - from);
    }
}

/* Runs layers begin to end; the layer that waits for experts, or `end`. */
long moekit_token(const Model *m, const Layer *layers, const Step *s, long shared_inner, void *scratch, int isa,
                  int threads) {
    const Kernels kernels = kernels_of(isa);
    const long q = m->heads * m->head, kv = m->kv_heads * m->head;
    char *at = scratch;
    long reached = s->end;
    Common c;
    c.qkv = take(&at, q + 2 * kv), c.attended = take(&at, q), c.attended_h = (uint16_t *)take(&at, q);
    c.logits = take(&at, m->experts + 1), c.mids = take(&at, m->top_k * m->inner);
    c.mids_h = (uint16_t *)take(&at, m->top_k * m->inner);
    c.shared = take(&at, shared_inner), c.shared_h = (uint16_t *)take(&at, shared_inner);
    const long own = 4 * (2 * PAD(m->widest) + PAD(s->past + 1) + PAD(m->experts) + 4 * PAD(m->head) + 8 * BLOCK) + 256;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int me = 0, all = 1;
#ifdef _OPENMP
        me = omp_get_thread_num(), all = omp_get_num_threads();
#endif
        char *mine = (char *)aligned(at) + me * own;
        Own o;
        o.x = take(&mine, m->widest), o.xh = (uint16_t *)take(&mine, m->widest);
        o.scores = take(&mine, largest(s->past + 1, m->experts)), o.small = take(&mine, 4 * BLOCK);
        o.key = take(&mine, 2 * PAD(m->head));
        run(&kernels, m, layers, s, &c, &o, me, all, &reached);
    }
    return reached;
}
