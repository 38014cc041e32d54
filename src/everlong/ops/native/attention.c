/* Causal attention over a window, forward and backward, with keys that every token sees (see
 * ../attention.py): a block of queries at a time, whose scores stay in the thread's cache. */

#include "common.h"

typedef struct {
    int64_t batch, heads, key_heads, tokens, keys, size, prefix, each, window, block, threads;
    double scale;
    Rows q, k, v, y;             /* [B, N, T, K], [B, M, S, K] */
    Rows prefix_k, prefix_v;     /* [B, M, P, K] */
    real *log_sum;               /* [B, N, T] */
    Rows dq, dk, dv, dy;
    Rows dprefix_k, dprefix_v;
    real *scratch;
    gemm_t gemm;
} Attention;

/* Query i sees the keys begin_of(i) ... end_of(i) - 1; `each` keys belong to a token, and the queries
 * are the last tokens. window 0: all before it. */
static int64_t end_of(const Attention *s, int64_t i) { return s->keys - s->each * (s->tokens - i - 1); }

static int64_t begin_of(const Attention *s, int64_t i) {
    const int64_t begin = s->window ? end_of(s, i) - s->each * s->window : 0;
    return begin > 0 ? begin : 0;
}

static int64_t most_keys(const Attention *s) { /* that a block sees, the prefix included */
    const int64_t window = s->window ? s->each * (s->window + s->block) : s->keys;
    return s->prefix + (window < s->keys ? window : s->keys);
}

int64_t everlong_attention_scratch(const Attention *s) { /* of a thread */
    return 2 * (s->block * most_keys(s) + LINE) + s->block + LINE;
}

static real *head_of(const Rows *x, int64_t b, int64_t h, int64_t row) {
    return x->at + b * x->batch + h * x->head + row * x->row;
}

typedef struct { /* queries first ... last - 1 of a head against the keys begin ... end - 1 */
    int64_t b, n, m, first, last, rows, begin, keys, ld;
} Block;

static Block block_of(const Attention *s, int64_t b, int64_t n, int64_t index) {
    Block o;
    o.b = b, o.n = n, o.m = n / (s->heads / s->key_heads), o.first = index * s->block;
    o.last = o.first + s->block < s->tokens ? o.first + s->block : s->tokens;
    o.rows = o.last - o.first, o.begin = begin_of(s, o.first);
    o.keys = end_of(s, o.last - 1) - o.begin, o.ld = s->prefix + o.keys;
    return o;
}

/* out [rows, P + keys] = x times the keys (or values), transposed. */
static void against_keys(const Attention *s, const Block *o, const Rows *x, const Rows *prefix, const Rows *rows,
                         real *out) {
    const real *left = head_of(x, o->b, o->n, o->first);
    if (s->prefix)
        multiply(s->gemm, 0, 1, o->rows, s->prefix, s->size, left, x->row, head_of(prefix, o->b, o->m, 0),
                 prefix->row, 0, out, o->ld);
    multiply(s->gemm, 0, 1, o->rows, o->keys, s->size, left, x->row, head_of(rows, o->b, o->m, o->begin), rows->row,
             0, out + s->prefix, o->ld);
}

/* x = weights [rows, P + keys] times the values (or keys). */
static void over_keys(const Attention *s, const Block *o, const real *weights, const Rows *prefix, const Rows *rows,
                      const Rows *x) {
    real *to = head_of(x, o->b, o->n, o->first);
    multiply(s->gemm, 0, 0, o->rows, s->size, o->keys, weights + s->prefix, o->ld,
             head_of(rows, o->b, o->m, o->begin), rows->row, 0, to, x->row);
    if (s->prefix)
        multiply(s->gemm, 0, 0, o->rows, s->size, s->prefix, weights, o->ld, head_of(prefix, o->b, o->m, 0),
                 prefix->row, 1, to, x->row);
}

/* the keys' (or values') gradients += weights^T x. */
static void into_keys(const Attention *s, const Block *o, const real *weights, const Rows *prefix, const Rows *rows,
                      const Rows *x) {
    const real *from = head_of(x, o->b, o->n, o->first);
    multiply(s->gemm, 1, 0, o->keys, s->size, o->rows, weights + s->prefix, o->ld, from, x->row, 1,
             head_of(rows, o->b, o->m, o->begin), rows->row);
    if (s->prefix)
        multiply(s->gemm, 1, 0, s->prefix, s->size, o->rows, weights, o->ld, from, x->row, 1,
                 head_of(prefix, o->b, o->m, 0), prefix->row);
}

/* What query i sees of its row of a block: the prefix, and from *begin to *end; the rest is cleared. */
static void seen(const Attention *s, const Block *o, int64_t i, real *row, int64_t *begin, int64_t *end) {
    *begin = s->prefix + begin_of(s, i) - o->begin, *end = s->prefix + end_of(s, i) - o->begin;
    memset(row + s->prefix, 0, (*begin - s->prefix) * sizeof(real));
    memset(row + *end, 0, (o->ld - *end) * sizeof(real));
}

static real largest(const real *x, int64_t n, real most) {
    _Pragma("omp simd reduction(max : most)") for (int64_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
    return most;
}

static real exponentials(real *x, int64_t n, real scale, real less) {
    real sum = 0;
    _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; i++) {
        x[i] = exponential(x[i] * scale - less);
        sum += x[i];
    }
    return sum;
}

static void block_forward(const Attention *s, const Block *o, real *scratch) {
    real *scores = take(&scratch, s->block * most_keys(s)), *inverse = take(&scratch, s->block);
    const real scale = (real)s->scale;
    against_keys(s, o, &s->q, &s->prefix_k, &s->k, scores);
    for (int64_t i = o->first; i < o->last; i++) {
        real *row = scores + (i - o->first) * o->ld;
        int64_t begin, end;
        seen(s, o, i, row, &begin, &end);
        const real most = scale * largest(row + begin, end - begin, largest(row, s->prefix, row[begin]));
        const real sum = exponentials(row, s->prefix, scale, most) +
                         exponentials(row + begin, end - begin, scale, most);
        inverse[i - o->first] = 1 / sum;
        s->log_sum[(o->b * s->heads + o->n) * s->tokens + i] = most + (real)log((double)sum);
    }
    over_keys(s, o, scores, &s->prefix_v, &s->v, &s->y);
    for (int64_t i = 0; i < o->rows; i++) {
        real *y = head_of(&s->y, o->b, o->n, o->first + i);
        EACH(int64_t j = 0; j < s->size; j++) y[j] *= inverse[i];
    }
}

static void block_backward(const Attention *s, const Block *o, real *scratch) {
    real *weights = take(&scratch, s->block * most_keys(s)), *grads = take(&scratch, s->block * most_keys(s));
    const real scale = (real)s->scale;
    against_keys(s, o, &s->q, &s->prefix_k, &s->k, weights);
    against_keys(s, o, &s->dy, &s->prefix_v, &s->v, grads);
    for (int64_t i = o->first; i < o->last; i++) {
        real *row = weights + (i - o->first) * o->ld, *grad = grads + (i - o->first) * o->ld;
        const real log_sum = s->log_sum[(o->b * s->heads + o->n) * s->tokens + i];
        const real along = dot(head_of(&s->dy, o->b, o->n, i), head_of(&s->y, o->b, o->n, i), s->size);
        int64_t begin, end;
        seen(s, o, i, row, &begin, &end);
        exponentials(row, s->prefix, scale, log_sum);
        exponentials(row + begin, end - begin, scale, log_sum);
        EACH(int64_t j = 0; j < o->ld; j++) grad[j] = row[j] * (grad[j] - along) * scale;
    }
    over_keys(s, o, grads, &s->prefix_k, &s->k, &s->dq);
    into_keys(s, o, grads, &s->dprefix_k, &s->dk, &s->q);
    into_keys(s, o, weights, &s->dprefix_v, &s->dv, &s->dy);
}

/* Work i of the way there is a block, of the way back all queries of a head of keys: no two threads add
 * to the same gradients, which begin at zero. */
static void forward_of(const Attention *s, int64_t i, real *scratch) {
    const int64_t blocks = (s->tokens + s->block - 1) / s->block;
    const Block o = block_of(s, i / blocks / s->heads, i / blocks % s->heads, i % blocks);
    block_forward(s, &o, scratch);
}

static void backward_of(const Attention *s, int64_t i, real *scratch) {
    const int64_t blocks = (s->tokens + s->block - 1) / s->block, group = s->heads / s->key_heads;
    for (int64_t n = i % s->key_heads * group; n < (i % s->key_heads + 1) * group; n++)
        for (int64_t j = 0; j < blocks; j++) {
            const Block o = block_of(s, i / s->key_heads, n, j);
            block_backward(s, &o, scratch);
        }
}

static int64_t for_each(const Attention *s, int64_t count, void (*work)(const Attention *, int64_t, real *)) {
    const int64_t each = everlong_attention_scratch(s);
    if (s->threads == 1) {
        for (int64_t i = 0; i < count; i++) work(s, i, s->scratch);
        return 0;
    }
#pragma omp parallel for num_threads((int)s->threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) work(s, i, s->scratch + thread_number() * each);
    return 0;
}

int64_t everlong_attention_forward(const Attention *s) {
    return for_each(s, s->batch * s->heads * ((s->tokens + s->block - 1) / s->block), forward_of);
}

int64_t everlong_attention_backward(const Attention *s) {
    return for_each(s, s->batch * s->key_heads, backward_of);
}
