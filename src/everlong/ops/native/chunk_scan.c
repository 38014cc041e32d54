/* The chunk scan of the neural memory for CPUs, forward and backward (see ../chunk_scan.py).
 *
 * One thread reads one memory (a row's head) from its first chunk to its last, so that its weights,
 * their momentum and the gradients of both stay in the thread's cache; all between the matrix products
 * happens while the data is there. The products are BLAS's (`gemm`, handed in by the caller).
 *
 * A layer's weights W and momentum S stand in one buffer, and so do their gradients: one above the
 * other where the layer widens ("tall"), side by side where it narrows. A pair of products with W and
 * with S is then one product, and what scales rows of it acts on the narrow side. All matrices are
 * row-major. `parts` is 2 with momentum, 1 without.
 */

#include "common.h"

#define MAX_LAYERS 8
#define NORM_EPS ((real)1e-5)

typedef struct {
    int64_t batch, heads, tokens, size, chunk, layers, parts, decay, interval, train, threads, scaled;
    int64_t widths[MAX_LAYERS + 1];
} Shape;

typedef struct { /* a tensor [B, H, L, T] */
    real *at;
    int64_t batch, head, layer, token;
} Gate;

typedef struct {
    Rows q, k, v, y;
    Gate theta, log_retain, log_eta;
    const real *scale;                              /* [H, K] */
    Rows weights[MAX_LAYERS], momentum[MAX_LAYERS]; /* at the start */
    Rows last_weights[MAX_LAYERS], last_momentum[MAX_LAYERS];
    real *states; /* [M, groups - 1, state]: of every interval-th chunk but the first */
    real *kept;   /* [M, chunks, kept]: products of the reads */
    Rows dq, dk, dv, dy;
    Gate dtheta, dlog_retain, dlog_eta;
    real *dscale;                                     /* [M, K] */
    Rows dweights[MAX_LAYERS], dmomentum[MAX_LAYERS]; /* in: of the end; out: of the start */
    real *scratch;
    gemm_t gemm;
} Tensors;

/* --- sizes, in numbers ------------------------------------------------------------------------- */

static int64_t state_size(const Shape *s) {
    int64_t n = 0;
    for (int l = 0; l < s->layers; l++) n += s->parts * s->widths[l] * s->widths[l + 1];
    return n;
}

static int tall(const Shape *s, int l) { return s->widths[l] <= s->widths[l + 1]; }

/* What the reads of a chunk keep for the way back, unless it is quickly made again: a layer's x z^T (of the
 * first it is narrow), x [W | S] where that is narrow, and its output (of the last, the sum of these). */
static int64_t product_kept(const Shape *s, int l) { return l ? s->chunk * s->chunk : 0; }
static int64_t through_kept(const Shape *s, int l) { return tall(s, l) ? 0 : s->chunk * s->parts * s->widths[l + 1]; }
static int64_t out_kept(const Shape *s, int l) {
    return l == s->layers - 1 && !tall(s, l) ? 0 : s->chunk * s->widths[l + 1];
}

static int64_t kept_size(const Shape *s) { /* of a chunk */
    int64_t n = 0;
    for (int l = 0; l < s->layers; l++) n += product_kept(s, l) + through_kept(s, l) + out_kept(s, l);
    return n;
}

static int64_t spare_size(const Shape *s) { return s->chunk * (s->chunk + s->size); } /* for the rest */

static int64_t widest(const Shape *s) {
    int64_t n = 0;
    for (int l = 0; l <= s->layers; l++) n = s->widths[l] > n ? s->widths[l] : n;
    return n;
}

static int64_t inner_size(const Shape *s) { /* the buffers of `place` */
    const int64_t c = s->chunk;
    int64_t n = c * (3 * s->size + 1) + 4 * LINE;
    for (int l = 0; l < s->layers; l++)
        n += c * (3 * c + 7 + s->widths[l] + 5 * s->widths[l + 1]) + 16 * LINE;
    return n;
}

static int64_t scratch_size(const Shape *s) { /* of a thread: the larger need of both directions */
    const int64_t c = s->chunk, wide = widest(s), state = state_size(s) + LINE;
    int64_t grads = state + c * s->size, work = c * (6 * wide + 2 * s->parts * wide + 2 * c) + 16 * LINE;
    for (int l = 0; l < s->layers; l++) {
        grads += c * (s->widths[l] + s->widths[l + 1] + c + 3) + 8 * LINE;
        work += c * s->widths[l + 1] + LINE;
    }
    return s->interval * (inner_size(s) + state) + grads + work + kept_size(s) + spare_size(s) + 8 * LINE;
}

int64_t everlong_state_size(const Shape *s) { return state_size(s); }
int64_t everlong_kept_size(const Shape *s) { return kept_size(s); }
int64_t everlong_scratch_size(const Shape *s) { return scratch_size(s); }

/* --- small pieces ------------------------------------------------------------------------------ */

/* The normal density and distribution at x. In float32: Q(x) = exp(-x^2/2) R(1 / (1 + 0.24 x)) for
 * x >= 0 with a polynomial R fitted to 3e-9. */
static inline void normal(real x, real *density, real *below) {
    if (!IS_FLOAT) {
        *density = exp(-0.5 * x * x) * 0.3989422804014327;
        *below = 0.5 * erfc(-x * 0.7071067811865476);
        return;
    }
    const float a = x < 0 ? -(float)x : (float)x;
    const float e = exp_float(-0.5f * a * a), t = 1.0f / (1.0f + 0.24f * a);
    float r = 0.02547196f;
    r = r * t - 0.12432701f;
    r = r * t + 0.20470582f;
    r = r * t - 0.1431691f;
    r = r * t + 0.14046753f;
    r = r * t + 0.02872534f;
    r = r * t + 0.0875479f;
    r = r * t + 0.08898446f;
    r = r * t + 0.09585068f;
    r = r * t + 0.09574244f;
    r = r * t * e;
    *density = e * 0.39894228f;
    *below = x < 0 ? r : 1.0f - r;
}

static void gelu(const real *h, real *z, int64_t n) {
    EACH(int64_t i = 0; i < n; i++) {
        real density, below;
        normal(h[i], &density, &below);
        z[i] = h[i] * below;
    }
}

static void gelu_and_slope(const real *h, real *z, real *slope, int64_t n) {
    EACH(int64_t i = 0; i < n; i++) {
        real density, below;
        normal(h[i], &density, &below);
        z[i] = h[i] * below;
        slope[i] = below + h[i] * density;
    }
}

static void gelu_slope_curve(const real *h, real *z, real *slope, real *curve, int64_t n) {
    EACH(int64_t i = 0; i < n; i++) {
        real density, below;
        normal(h[i], &density, &below);
        z[i] = h[i] * below;
        slope[i] = below + h[i] * density;
        curve[i] = density * (2 - h[i] * h[i]);
    }
}

/* normed = (x - mean) / sqrt(var + eps) of a row; returns the inverse deviation. */
static real normalise(const real *x, real *normed, int64_t n) {
    real sum = 0, square = 0;
    _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; i++) sum += x[i];
    const real mean = sum / n;
    EACH(int64_t i = 0; i < n; i++) normed[i] = x[i] - mean;
    square = dot(normed, normed, n);
    const real inverse = 1 / (real)sqrt((double)(square / n + NORM_EPS));
    EACH(int64_t i = 0; i < n; i++) normed[i] *= inverse;
    return inverse;
}

/* out = the LayerNorm's Jacobian times grad, of a row (it is symmetric). */
static void normalise_back(const real *grad, const real *normed, real inverse, real *out, int64_t n) {
    real sum = 0;
    _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; i++) sum += grad[i];
    const real mean = sum / n, along = dot(grad, normed, n) / n;
    EACH(int64_t i = 0; i < n; i++) out[i] = inverse * (grad[i] - mean - normed[i] * along);
}

/* y = q + scale LN(last) of some rows, or last without a scale; normed: room for a row. */
static void put_output(const Shape *s, const real *scale, int64_t rows, const real *q, int64_t ldq, const real *last,
                       real *normed, real *y, int64_t ldy) {
    const int64_t size = s->size;
    for (int64_t t = 0; t < rows; t++, q += ldq, y += ldy, last += size) {
        if (!scale) {
            memcpy(y, last, size * sizeof(real));
            continue;
        }
        normalise(last, normed, size);
        EACH(int64_t i = 0; i < size; i++) y[i] = q[i] + scale[i] * normed[i];
    }
}

/* Back through `put_output`: the gradient of `last`, and dscale is added to; q's is dy. */
static void output_back(const Shape *s, const real *scale, int64_t rows, const real *dy, int64_t lddy, const real *last,
                        real *normed, real *scaled, real *dlast, real *dscale) {
    const int64_t size = s->size;
    for (int64_t t = 0; t < rows; t++, dy += lddy, last += size, dlast += size) {
        if (!scale) {
            memcpy(dlast, dy, size * sizeof(real));
            continue;
        }
        const real inverse = normalise(last, normed, size);
        EACH(int64_t i = 0; i < size; i++) {
            dscale[i] += dy[i] * normed[i];
            scaled[i] = dy[i] * scale[i];
        }
        normalise_back(scaled, normed, inverse, dlast, size);
    }
}

/* out rows = a x rows | b x rows side by side (part 1 only with momentum), [C, parts n]. */
static void scale_rows(const Shape *s, const real *x, int64_t ldx, const real *a, const real *b, real *out,
                       int64_t n) {
    const int64_t ld = s->parts * n;
    for (int64_t t = 0; t < s->chunk; t++) {
        const real *from = x + t * ldx;
        real *to = out + t * ld, at = a[t], bt = s->parts > 1 ? b[t] : 0;
        EACH(int64_t i = 0; i < n; i++) to[i] = at * from[i];
        if (s->parts > 1) EACH(int64_t i = 0; i < n; i++) to[n + i] = bt * from[i];
    }
}

/* out (+)= a first + b second, where x = [first | second] rows [C, parts n]; and, where asked, the rows'
 * products with y: da (+)= <first, y>, db (+)= <second, y>. */
static void join_rows(const Shape *s, const real *x, const real *a, const real *b, real *out, int add,
                      const real *y, int64_t ldy, real *da, real *db, int64_t n) {
    for (int64_t t = 0; t < s->chunk; t++) {
        const real *first = x + t * s->parts * n, *second = first + n;
        real *to = out ? out + t * n : NULL;
        const real at = a[t], bt = s->parts > 1 ? b[t] : 0;
        if (to && !add) memset(to, 0, n * sizeof(real));
        if (to) EACH(int64_t i = 0; i < n; i++) to[i] += at * first[i];
        if (to && s->parts > 1) EACH(int64_t i = 0; i < n; i++) to[i] += bt * second[i];
        if (y) da[t] += dot(first, y + t * ldy, n);
        if (y && s->parts > 1) db[t] += dot(second, y + t * ldy, n);
    }
}

/* --- a memory's state -------------------------------------------------------------------------- */

static int64_t part_offset(const Shape *s, int l) { /* from W to S */
    return tall(s, l) ? s->widths[l] * s->widths[l + 1] : s->widths[l + 1];
}

static int64_t row_stride(const Shape *s, int l) {
    return tall(s, l) ? s->widths[l + 1] : s->parts * s->widths[l + 1];
}

static void copy_state(const Shape *s, const Rows *w, const Rows *m, int64_t b, int64_t h, real *state,
                       int out) {
    for (int l = 0; l < s->layers; l++) {
        const int64_t in = s->widths[l], n = s->widths[l + 1], ld = row_stride(s, l);
        for (int part = 0; part < s->parts; part++) {
            const Rows *x = part ? &m[l] : &w[l];
            real *theirs = x->at + b * x->batch + h * x->head, *ours = state + part * part_offset(s, l);
            for (int64_t i = 0; i < in; i++)
                memcpy(out ? theirs + i * x->row : ours + i * ld, out ? ours + i * ld : theirs + i * x->row,
                       n * sizeof(real));
        }
        state += s->parts * in * n;
    }
}

/* --- a chunk's coefficients (see ../decay.py), by recursion over its rows ------------------------ */

typedef struct {
    /* [C, C], up to the diagonal: A E diag(-theta), A E and, with momentum only, E */
    real *write, *path, *surprise;
    real *memory, *momentum, *start, *final, *retain, *eta, *theta; /* [C] */
} Coefficients;

static const real *gate_row(const Gate *g, int64_t b, int64_t h, int l, int64_t first, int64_t n, real *to,
                            int exponent) {
    const real *from = g->at + b * g->batch + h * g->head + l * g->layer + first * g->token;
    for (int64_t t = 0; t < n; t++) {
        const real x = from[t * g->token];
        to[t] = exponent ? (real)exp((double)x) : x;
    }
    return to;
}

static void coefficients(const Shape *s, const Tensors *x, int64_t b, int64_t h, int l, int64_t first,
                         Coefficients *o) {
    const int64_t c = s->chunk;
    const int momentum = s->parts > 1;
    gate_row(&x->theta, b, h, l, first, c, o->theta, 0);
    if (s->decay) gate_row(&x->log_retain, b, h, l, first, c, o->retain, 1);
    if (momentum) gate_row(&x->log_eta, b, h, l, first, c, o->eta, 1);
    real memory = 1, carry = 0, start = 1;
    for (int64_t t = 0; t < c; t++) {
        const real r = s->decay ? o->retain[t] : 1, e = momentum ? o->eta[t] : 0;
        real *path = o->path + t * c, *surprise = o->surprise + t * c, *write = o->write + t * c;
        const real *path_before = path - c, *surprise_before = surprise - c;
        if (momentum) {
            EACH(int64_t i = 0; i < t; i++) surprise[i] = e * surprise_before[i];
            EACH(int64_t i = 0; i < t; i++) path[i] = r * path_before[i] + surprise[i];
            surprise[t] = 1;
        } else {
            EACH(int64_t i = 0; i < t; i++) path[i] = r * path_before[i];
        }
        path[t] = 1;
        EACH(int64_t i = 0; i <= t; i++) write[i] = -path[i] * o->theta[i];
        o->memory[t] = memory *= r;
        if (momentum) {
            o->start[t] = start *= e;
            o->momentum[t] = carry = r * carry + start;
        }
    }
    if (momentum) EACH(int64_t i = 0; i < c; i++) o->final[i] = -o->surprise[(c - 1) * c + i] * o->theta[i];
}

typedef struct { /* the gradients of a chunk's coefficients */
    real *write, *memory, *momentum, *final, carry;
} CoefficientGrads;

static void coefficients_back(const Shape *s, const Tensors *x, int64_t b, int64_t h, int l, int64_t first,
                              const Coefficients *o, CoefficientGrads *d, real *g, real *ge) {
    const int64_t c = s->chunk, last = c - 1;
    const int momentum = s->parts > 1;
    real *dtheta = x->dtheta.at + b * x->dtheta.batch + h * x->dtheta.head + l * x->dtheta.layer + first;
    real *dretain = s->decay ? x->dlog_retain.at + b * x->dlog_retain.batch + h * x->dlog_retain.head +
                                   l * x->dlog_retain.layer + first : NULL;
    real *deta = momentum ? x->dlog_eta.at + b * x->dlog_eta.batch + h * x->dlog_eta.head +
                                l * x->dlog_eta.layer + first : NULL;
    real gb = 0, gs = 0, ga = 0, r_next = 0, e_next = 0;
    memset(g, 0, c * sizeof(real));
    memset(ge, 0, c * sizeof(real));
    for (int64_t i = 0; i < c; i++)
        dtheta[i] = momentum ? -d->final[i] * o->surprise[last * c + i] : 0;
    for (int64_t t = last; t >= 0; t--) {
        const real *path = o->path + t * c, *dwrite = d->write + t * c;
        EACH(int64_t i = 0; i <= t; i++) {
            dtheta[i] -= dwrite[i] * path[i];
            g[i] = r_next * g[i] - dwrite[i] * o->theta[i];
        }
        ga = d->memory[t] + r_next * ga;
        if (momentum) {
            if (t == last) EACH(int64_t i = 0; i < c; i++) ge[i] = -d->final[i] * o->theta[i];
            EACH(int64_t i = 0; i <= t; i++) ge[i] = g[i] + (t == last ? ge[i] : e_next * ge[i]);
            gb = d->momentum[t] + r_next * gb;
            gs = gb + (t == last ? d->carry : e_next * gs);
            e_next = o->eta[t];
            const real before = t ? dot(ge, o->surprise + (t - 1) * c, t) : 0;
            deta[t] = (before + gs * (t ? o->start[t - 1] : 1)) * e_next;
        }
        r_next = s->decay ? o->retain[t] : 1;
        if (s->decay) {
            const real before = t ? dot(g, path - c, t) + (momentum ? gb * o->momentum[t - 1] : 0) : 0;
            dretain[t] = (before + ga * (t ? o->memory[t - 1] : 1)) * r_next;
        }
    }
}

/* --- a chunk ----------------------------------------------------------------------------------- */

typedef struct {
    const Shape *s;
    const Tensors *x;
    int64_t b, h, first; /* row, head, first token */
    const real *scale;   /* [K] or NULL */
    real *state;         /* at the chunk's start */
    Coefficients of[MAX_LAYERS];
    const real *z[MAX_LAYERS]; /* layers' inputs; z[0] are k's rows */
    int64_t ldz[MAX_LAYERS];
    real *hidden[MAX_LAYERS], *error[MAX_LAYERS], *slope[MAX_LAYERS], *curve[MAX_LAYERS], *pulled[MAX_LAYERS];
    real *normed, *inverse, *residual, *along; /* the last layer's norm: [C, K], [C], [C, K], [C, K] */
    real *product[MAX_LAYERS], *out[MAX_LAYERS], *through[MAX_LAYERS]; /* kept of the reads */
} Chunk;

static const real *rows_at(const Rows *r, const Chunk *n) {
    return r->at + n->b * r->batch + n->h * r->head + n->first * r->row;
}

static void place(Chunk *n, real **at) { /* the buffers of the inner gradient and the coefficients */
    const Shape *s = n->s;
    const int64_t c = s->chunk;
    for (int l = 0; l < s->layers; l++) {
        const int64_t m = c * s->widths[l + 1];
        Coefficients *o = &n->of[l];
        o->write = take(at, c * c), o->path = take(at, c * c), o->surprise = take(at, c * c);
        real **each[] = {&o->memory, &o->momentum, &o->start, &o->final, &o->retain, &o->eta, &o->theta};
        for (int i = 0; i < 7; i++) *each[i] = take(at, c);
        if (l) n->z[l] = take(at, c * s->widths[l]), n->ldz[l] = s->widths[l];
        n->hidden[l] = take(at, m), n->error[l] = take(at, m), n->slope[l] = take(at, m);
        n->curve[l] = take(at, m), n->pulled[l] = take(at, m);
    }
    n->normed = take(at, c * s->size), n->residual = take(at, c * s->size);
    n->along = take(at, c * s->size), n->inverse = take(at, c);
}

static void place_kept(Chunk *n, real *at, real *spare) { /* spare: room for what is not kept */
    const Shape *s = n->s;
    for (int l = 0; l < s->layers; l++) {
        n->product[l] = product_kept(s, l) ? at : spare, at += product_kept(s, l);
        n->out[l] = out_kept(s, l) ? at : spare + s->chunk * s->chunk, at += out_kept(s, l);
        n->through[l] = at, at += through_kept(s, l);
    }
}

static real *layer_of(const Shape *s, real *state, int l) {
    for (int i = 0; i < l; i++) state += s->parts * s->widths[i] * s->widths[i + 1];
    return state;
}

/* The factors z, delta of the gradient of |M(k) - v|^2 at the chunk's start. */
static void inner_gradient(Chunk *n, int curve) {
    const Shape *s = n->s;
    const int64_t c = s->chunk, size = s->size;
    const int last = (int)s->layers - 1;
    gemm_t gemm = n->x->gemm;
    n->z[0] = rows_at(&n->x->k, n), n->ldz[0] = n->x->k.row;
    for (int l = 0; l <= last; l++) {
        const int64_t in = s->widths[l], out = s->widths[l + 1];
        multiply(gemm, 0, 0, c, out, in, n->z[l], n->ldz[l], layer_of(s, n->state, l), row_stride(s, l), 0,
                 n->hidden[l], out);
        if (l < last && curve)
            gelu_slope_curve(n->hidden[l], (real *)n->z[l + 1], n->slope[l], n->curve[l], c * out);
        else if (l < last)
            gelu_and_slope(n->hidden[l], (real *)n->z[l + 1], n->slope[l], c * out);
    }
    for (int64_t t = 0; t < c; t++) {
        const real *k = n->z[0] + t * n->ldz[0], *v = rows_at(&n->x->v, n) + t * n->x->v.row;
        real *error = n->error[last] + t * size, *h = n->hidden[last] + t * size;
        if (!n->scale) {
            EACH(int64_t i = 0; i < size; i++) error[i] = 2 * (h[i] - v[i]);
            continue;
        }
        real *normed = n->normed + t * size, *residual = n->residual + t * size, *along = n->along + t * size;
        n->inverse[t] = normalise(h, normed, size);
        EACH(int64_t i = 0; i < size; i++) {
            residual[i] = k[i] - v[i] + n->scale[i] * normed[i];
            along[i] = 2 * n->scale[i] * residual[i];
        }
        normalise_back(along, normed, n->inverse[t], error, size);
    }
    for (int l = last; l > 0; l--) {
        const int64_t in = s->widths[l], out = s->widths[l + 1];
        multiply(gemm, 0, 1, c, in, out, n->error[l], out, layer_of(s, n->state, l), row_stride(s, l), 0,
                 n->pulled[l - 1], in);
        real *error = n->error[l - 1], *pulled = n->pulled[l - 1], *slope = n->slope[l - 1];
        EACH(int64_t i = 0; i < c * in; i++) error[i] = pulled[i] * slope[i];
    }
}

/* A layer's x z^T of the rows x, up to the diagonal. */
static void scores(Chunk *n, int l, const real *x, int64_t ldx) {
    const int64_t c = n->s->chunk;
    multiply_part(WANTED, n->x->gemm, 0, 1, c, c, n->s->widths[l], x, ldx, n->z[l], n->ldz[l], 0, n->product[l], c);
}

/* A layer's output: what stood at the chunk's start (narrow layers: from `through`) and the writes since. */
static void sum_output(Chunk *n, int l, real *weighted) {
    const Shape *s = n->s;
    const int64_t c = s->chunk, out = s->widths[l + 1];
    const Coefficients *o = &n->of[l];
    if (!tall(s, l)) join_rows(s, n->through[l], o->memory, o->momentum, n->out[l], 0, NULL, 0, NULL, NULL, out);
    for (int64_t t = 0; t < c; t++) {
        const real *product = n->product[l] + t * c, *write = o->write + t * c;
        real *row = weighted + t * c;
        EACH(int64_t i = 0; i <= t; i++) row[i] = product[i] * write[i];
        memset(row + t + 1, 0, (c - t - 1) * sizeof(real));
    }
    multiply_part(LOWER, n->x->gemm, 0, 0, c, out, c, weighted, c, n->error[l], out, 1, n->out[l], out);
}

/* y_t = M_t(q_t) of all rows, keeping the products that the way back needs. */
static void read_rows(Chunk *n, real *scratch) {
    const Shape *s = n->s;
    const int64_t c = s->chunk;
    gemm_t gemm = n->x->gemm;
    real *scaled = take(&scratch, c * s->parts * widest(s)), *weighted = take(&scratch, c * c);
    real *hidden = take(&scratch, c * widest(s));
    const real *x = rows_at(&n->x->q, n);
    int64_t ldx = n->x->q.row;
    for (int l = 0; l < s->layers; l++) {
        const int64_t in = s->widths[l], out = s->widths[l + 1], both = s->parts * in;
        const Coefficients *o = &n->of[l];
        real *state = layer_of(s, n->state, l);
        if (tall(s, l)) {
            scale_rows(s, x, ldx, o->memory, o->momentum, scaled, in);
            multiply(gemm, 0, 0, c, out, both, scaled, both, state, out, 0, n->out[l], out);
        } else {
            multiply(gemm, 0, 0, c, s->parts * out, in, x, ldx, state, s->parts * out, 0, n->through[l],
                     s->parts * out);
        }
        scores(n, l, x, ldx);
        sum_output(n, l, weighted);
        if (l + 1 < s->layers) gelu(n->out[l], hidden, c * out), x = hidden, ldx = out;
    }
    put_output(s, n->scale, c, rows_at(&n->x->q, n), n->x->q.row, n->out[s->layers - 1], scaled,
               (real *)rows_at(&n->x->y, n), n->x->y.row);
}

/* `after` = the state after the chunk (may be the state itself). */
static void carry_state(Chunk *n, real *after, real *scratch) {
    const Shape *s = n->s;
    const int64_t c = s->chunk, end = c - 1;
    for (int l = 0; l < s->layers; l++) {
        const int64_t in = s->widths[l], out = s->widths[l + 1], ld = row_stride(s, l);
        const Coefficients *o = &n->of[l];
        const real *write = o->write + end * c, kept = o->memory[end];
        const real *w = layer_of(s, n->state, l), *m = w + part_offset(s, l);
        real *new_w = layer_of(s, after, l), *new_m = new_w + part_offset(s, l), *scaled = scratch;
        if (s->parts > 1) {
            const real added = o->momentum[end], kept_m = o->start[end];
            for (int64_t i = 0; i < in; i++, w += ld, m += ld, new_w += ld, new_m += ld)
                EACH(int64_t j = 0; j < out; j++) {
                    const real old = m[j];
                    new_w[j] = kept * w[j] + added * old;
                    new_m[j] = kept_m * old;
                }
        } else {
            EACH(int64_t i = 0; i < in * out; i++) new_w[i] = kept * w[i];
        }
        new_w = layer_of(s, after, l);
        if (tall(s, l)) {
            scale_rows(s, n->z[l], n->ldz[l], write, o->final, scaled, in);
            multiply(n->x->gemm, 1, 0, s->parts * in, out, c, scaled, s->parts * in, n->error[l], out, 1, new_w,
                     ld);
        } else {
            scale_rows(s, n->error[l], out, write, o->final, scaled, out);
            multiply(n->x->gemm, 1, 0, in, s->parts * out, c, n->z[l], n->ldz[l], scaled, s->parts * out, 1,
                     new_w, ld);
        }
    }
}

static void stand_at(Chunk *n, const Shape *s, const Tensors *x, int64_t memory, int64_t index, real *state) {
    n->s = s, n->x = x, n->state = state;
    n->b = memory / s->heads, n->h = memory % s->heads, n->first = index * s->chunk;
    n->scale = s->scaled ? x->scale + n->h * s->size : NULL;
}

static void begin(Chunk *n, const Shape *s, const Tensors *x, int64_t memory, int64_t index, real *state) {
    stand_at(n, s, x, memory, index, state);
    for (int l = 0; l < s->layers; l++) coefficients(s, x, n->b, n->h, l, n->first, &n->of[l]);
}

/* Whether nothing is written in a chunk: theta = 0 for all its tokens, and S = 0. */
static int is_still(const Chunk *n) {
    const Shape *s = n->s;
    const Gate *g = &n->x->theta;
    for (int l = 0; l < s->layers; l++) {
        const real *theta = g->at + n->b * g->batch + n->h * g->head + l * g->layer + n->first * g->token;
        for (int64_t t = 0; t < s->chunk; t++)
            if (theta[t * g->token] != 0) return 0;
    }
    for (int l = 0; l < s->layers && s->parts > 1; l++) {
        const real *m = layer_of(s, n->state, l) + part_offset(s, l);
        for (int64_t i = 0; i < s->widths[l]; i++, m += row_stride(s, l))
            for (int64_t j = 0; j < s->widths[l + 1]; j++)
                if (m[j] != 0) return 0;
    }
    return 1;
}

/* y_t = M_t(q_t) of a still chunk, where M_t is M times what was retained, and M after it. */
static void read_still(Chunk *n, real *scratch) {
    const Shape *s = n->s;
    const int64_t c = s->chunk;
    const real *x = rows_at(&n->x->q, n);
    int64_t ldx = n->x->q.row;
    real *rows[] = {take(&scratch, c * widest(s)), take(&scratch, c * widest(s))}, *normed = take(&scratch, s->size);
    for (int l = 0; l < s->layers; l++) {
        const int64_t in = s->widths[l], out = s->widths[l + 1], ld = row_stride(s, l);
        real *w = layer_of(s, n->state, l), *to = rows[l % 2], kept = 1;
        multiply(n->x->gemm, 0, 0, c, out, in, x, ldx, w, ld, 0, to, out);
        if (s->decay) {
            const real *retain = gate_row(&n->x->log_retain, n->b, n->h, l, n->first, c, n->of[l].retain, 1);
            for (int64_t t = 0; t < c; t++) {
                kept *= retain[t];
                EACH(int64_t j = 0; j < out; j++) to[t * out + j] *= kept;
            }
            for (int64_t i = 0; i < in; i++, w += ld) EACH(int64_t j = 0; j < out; j++) w[j] *= kept;
        }
        if (l + 1 < s->layers) gelu(to, to, c * out);
        x = to, ldx = out;
    }
    put_output(s, n->scale, c, rows_at(&n->x->q, n), n->x->q.row, x, normed, (real *)rows_at(&n->x->y, n),
               n->x->y.row);
}

static void forward_of(const Shape *s, const Tensors *x, int64_t memory, real *scratch) {
    const int64_t chunks = s->tokens / s->chunk, each = state_size(s), kept = kept_size(s);
    const int64_t groups = (chunks + s->interval - 1) / s->interval, b = memory / s->heads, h = memory % s->heads;
    Chunk n;
    n.s = s;
    place(&n, &scratch);
    real *state = take(&scratch, each), *own = take(&scratch, kept), *spare = take(&scratch, spare_size(s));
    copy_state(s, x->weights, x->momentum, b, h, state, 0);
    for (int64_t i = 0; i < chunks; i++) {
        if (s->train && i && i % s->interval == 0)
            memcpy(x->states + (memory * (groups - 1) + i / s->interval - 1) * each, state, each * sizeof(real));
        stand_at(&n, s, x, memory, i, state);
        if (!s->train && is_still(&n)) {
            read_still(&n, scratch);
            continue;
        }
        begin(&n, s, x, memory, i, state);
        place_kept(&n, s->train ? x->kept + (memory * chunks + i) * kept : own, spare);
        inner_gradient(&n, 0);
        read_rows(&n, scratch);
        carry_state(&n, state, scratch);
    }
    copy_state(s, x->last_weights, x->last_momentum, b, h, state, 1);
}

/* --- the way back ------------------------------------------------------------------------------ */

typedef struct {
    real *state; /* gradient of the state after, then before the chunk */
    real *z[MAX_LAYERS], *error[MAX_LAYERS];
    CoefficientGrads of[MAX_LAYERS];
    real *q, *scale; /* [C, K], [K] */
} Grads;

/* Back through `carry_state`: z, error and the last rows' coefficients; the state's gradient is scaled. */
static void carry_back(Chunk *n, Grads *d, real *scratch) {
    const Shape *s = n->s;
    const int64_t c = s->chunk, end = c - 1;
    gemm_t gemm = n->x->gemm;
    real *pulled = take(&scratch, c * s->parts * widest(s)), *dlast = take(&scratch, c);
    for (int l = 0; l < s->layers; l++) {
        const int64_t in = s->widths[l], out = s->widths[l + 1], ld = row_stride(s, l);
        const Coefficients *o = &n->of[l];
        const real *write = o->write + end * c;
        CoefficientGrads *g = &d->of[l];
        real *dw = layer_of(s, d->state, l), *w = layer_of(s, n->state, l);
        memset(dlast, 0, c * sizeof(real));
        if (tall(s, l)) {
            const int64_t both = s->parts * in;
            multiply(gemm, 0, 1, c, both, out, n->error[l], out, dw, ld, 0, pulled, both);
            join_rows(s, pulled, write, o->final, d->z[l], 0, n->z[l], n->ldz[l], dlast, g->final, in);
            scale_rows(s, n->z[l], n->ldz[l], write, o->final, pulled, in);
            multiply(gemm, 0, 0, c, out, both, pulled, both, dw, ld, 0, d->error[l], out);
        } else {
            const int64_t both = s->parts * out;
            multiply(gemm, 0, 0, c, both, in, n->z[l], n->ldz[l], dw, ld, 0, pulled, both);
            join_rows(s, pulled, write, o->final, d->error[l], 0, n->error[l], out, dlast, g->final, out);
            scale_rows(s, n->error[l], out, write, o->final, pulled, out);
            multiply(gemm, 0, 1, c, in, both, pulled, both, dw, ld, 0, d->z[l], in);
        }
        EACH(int64_t i = 0; i < c; i++) g->write[end * c + i] += dlast[i];
        const real kept = o->memory[end];
        real dkept = 0, dadded = 0, dfinal = 0;
        if (s->parts > 1) {
            const real added = o->momentum[end], kept_m = o->start[end];
            real *m = w + part_offset(s, l), *dm = dw + part_offset(s, l);
            for (int64_t i = 0; i < in; i++, w += ld, m += ld, dw += ld, dm += ld) {
                real one = 0, two = 0, three = 0;
                _Pragma("omp simd reduction(+ : one, two, three)") for (int64_t j = 0; j < out; j++) {
                    one += dw[j] * w[j];
                    two += dw[j] * m[j];
                    three += dm[j] * m[j];
                    dm[j] = kept_m * dm[j] + added * dw[j];
                    dw[j] *= kept;
                }
                dkept += one, dadded += two, dfinal += three;
            }
            g->momentum[end] += dadded;
            g->carry = dfinal;
        } else {
            dkept = dot(dw, w, in * out);
            EACH(int64_t i = 0; i < in * out; i++) dw[i] *= kept;
        }
        g->memory[end] += dkept;
    }
}

/* Back through `sum_output`'s weighted = product x write, up to the diagonal: given the gradient of weighted,
 * becomes that of product; dwrite is added to, weighted made again. */
static void weights_back(int64_t c, const real *product, const real *write, real *given, real *dwrite,
                         real *weighted) {
    for (int64_t t = 0; t < c; t++, product += c, write += c, given += c, dwrite += c, weighted += c) {
        EACH(int64_t i = 0; i <= t; i++) {
            dwrite[i] += product[i] * given[i];
            weighted[i] = product[i] * write[i];
            given[i] *= write[i];
        }
        memset(given + t + 1, 0, (c - t - 1) * sizeof(real));
        memset(weighted + t + 1, 0, (c - t - 1) * sizeof(real));
    }
}

/* Back through `read_rows`, with dy in n->x->dy: adds to z, error, state, coefficients; gives q. */
static void read_back(Chunk *n, Grads *d, real *scratch) {
    const Shape *s = n->s;
    const int64_t c = s->chunk, wide = widest(s);
    gemm_t gemm = n->x->gemm;
    real *dout = take(&scratch, c * wide), *dx = take(&scratch, c * wide), *x = take(&scratch, c * wide);
    real *slope = take(&scratch, c * wide), *both_rows = take(&scratch, c * s->parts * wide);
    real *dproduct = take(&scratch, c * c), *weighted = take(&scratch, c * c);
    scores(n, 0, rows_at(&n->x->q, n), n->x->q.row);
    if (!out_kept(s, (int)s->layers - 1)) sum_output(n, (int)s->layers - 1, weighted);
    output_back(s, n->scale, c, rows_at(&n->x->dy, n), n->x->dy.row, n->out[s->layers - 1], x, dx, dout, d->scale);
    for (int l = (int)s->layers - 1; l >= 0; l--) {
        const int64_t in = s->widths[l], out = s->widths[l + 1], ld = row_stride(s, l);
        const Coefficients *o = &n->of[l];
        CoefficientGrads *g = &d->of[l];
        real *state = layer_of(s, n->state, l), *dstate = layer_of(s, d->state, l);
        const real *from = x;
        int64_t ldx = in;
        if (l) gelu_and_slope(n->out[l - 1], x, slope, c * in);
        else from = rows_at(&n->x->q, n), ldx = n->x->q.row;
        multiply_part(WANTED, gemm, 0, 1, c, c, out, dout, out, n->error[l], out, 0, dproduct, c);
        weights_back(c, n->product[l], o->write, dproduct, g->write, weighted);
        multiply_part(UPPER, gemm, 1, 0, c, out, c, weighted, c, dout, out, 1, d->error[l], out);
        multiply_part(UPPER, gemm, 1, 0, c, in, c, dproduct, c, from, ldx, 1, d->z[l], in);
        real *to = l ? dx : d->q;
        multiply_part(LOWER, gemm, 0, 0, c, in, c, dproduct, c, n->z[l], n->ldz[l], 0, to, in);
        if (tall(s, l)) {
            const int64_t both = s->parts * in;
            multiply(gemm, 0, 1, c, both, out, dout, out, state, ld, 0, both_rows, both);
            join_rows(s, both_rows, o->memory, o->momentum, to, 1, from, ldx, g->memory, g->momentum, in);
            scale_rows(s, from, ldx, o->memory, o->momentum, both_rows, in);
            multiply(gemm, 1, 0, both, out, c, both_rows, both, dout, out, 1, dstate, ld);
        } else {
            const int64_t both = s->parts * out;
            join_rows(s, n->through[l], o->memory, o->momentum, NULL, 0, dout, out, g->memory, g->momentum,
                      out);
            scale_rows(s, dout, out, o->memory, o->momentum, both_rows, out);
            multiply(gemm, 0, 1, c, in, both, both_rows, both, state, ld, 1, to, in);
            multiply(gemm, 1, 0, in, both, c, from, ldx, both_rows, both, 1, dstate, ld);
        }
        if (l) EACH(int64_t i = 0; i < c * in; i++) dout[i] = dx[i] * slope[i];
    }
}

/* Back through the last error signal: gradients of the last hidden (into dh), of the residual. */
static void last_back(Chunk *n, Grads *d, real *dh, real *dresidual, real *scratch) {
    const Shape *s = n->s;
    const int64_t c = s->chunk, size = s->size;
    const int last = (int)s->layers - 1;
    real *derrors = d->error[last];
    if (!n->scale) {
        EACH(int64_t i = 0; i < c * size; i++) dh[i] = dresidual[i] = 2 * derrors[i];
        return;
    }
    real *dslope = take(&scratch, size), *dnormed = take(&scratch, size);
    for (int64_t t = 0; t < c; t++) {
        const real *normed = n->normed + t * size, *slope = n->along + t * size, *derror = derrors + t * size;
        const real *residual = n->residual + t * size, inverse = n->inverse[t];
        const real along = dot(slope, normed, size), across = dot(derror, normed, size);
        const real shrink = dot(derror, n->error[last] + t * size, size) * inverse / size;
        real *dr = dresidual + t * size, *to = dh + t * size;
        normalise_back(derror, normed, inverse, dslope, size);
        EACH(int64_t i = 0; i < size; i++) {
            dr[i] = 2 * n->scale[i] * dslope[i];
            dnormed[i] = dr[i] * n->scale[i] - (slope[i] * across + derror[i] * along) * inverse / size;
            d->scale[i] += 2 * dslope[i] * residual[i] + dr[i] * normed[i];
        }
        normalise_back(dnormed, normed, inverse, to, size);
        EACH(int64_t i = 0; i < size; i++) to[i] -= normed[i] * shrink;
    }
}

/* Back through `inner_gradient`: adds to the state's gradient; gives dk, dv. */
static void inner_back(Chunk *n, Grads *d, real *scratch) {
    const Shape *s = n->s;
    const int64_t c = s->chunk, size = s->size;
    const int last = (int)s->layers - 1;
    gemm_t gemm = n->x->gemm;
    real *dh[MAX_LAYERS], *dresidual = take(&scratch, c * size), *dpulled = take(&scratch, c * widest(s));
    for (int l = 0; l <= last; l++) dh[l] = take(&scratch, c * s->widths[l + 1]);
    for (int l = 0; l < last; l++) {
        const int64_t in = s->widths[l + 1], out = s->widths[l + 2], ld = row_stride(s, l + 1);
        const real *derror = d->error[l], *slope = n->slope[l], *pulled = n->pulled[l];
        EACH(int64_t i = 0; i < c * in; i++) {
            dpulled[i] = derror[i] * slope[i];
            dh[l][i] = derror[i] * pulled[i];
        }
        multiply(gemm, 0, 0, c, out, in, dpulled, in, layer_of(s, n->state, l + 1), ld, 1, d->error[l + 1], out);
        multiply(gemm, 1, 0, in, out, c, dpulled, in, n->error[l + 1], out, 1, layer_of(s, d->state, l + 1), ld);
    }
    last_back(n, d, dh[last], dresidual, scratch);
    for (int l = last; l >= 0; l--) {
        const int64_t in = s->widths[l], out = s->widths[l + 1], ld = row_stride(s, l);
        multiply(gemm, 1, 0, in, out, c, n->z[l], n->ldz[l], dh[l], out, 1, layer_of(s, d->state, l), ld);
        multiply(gemm, 0, 1, c, in, out, dh[l], out, layer_of(s, n->state, l), ld, 1, d->z[l], in);
        if (!l) break;
        const real *dz = d->z[l], *slope = n->slope[l - 1], *curve = n->curve[l - 1];
        real *below = dh[l - 1];
        EACH(int64_t i = 0; i < c * in; i++) below[i] = dz[i] * slope[i] + below[i] * curve[i];
    }
    for (int64_t t = 0; t < c; t++) {
        real *dk = (real *)rows_at(&n->x->dk, n) + t * n->x->dk.row;
        real *dv = (real *)rows_at(&n->x->dv, n) + t * n->x->dv.row;
        const real *dz = d->z[0] + t * size, *dr = dresidual + t * size;
        EACH(int64_t i = 0; i < size; i++) {
            dk[i] = n->scale ? dz[i] + dr[i] : dz[i];
            dv[i] = -dr[i];
        }
    }
}

static void chunk_back(Chunk *n, Grads *d, real *scratch) {
    const Shape *s = n->s;
    const int64_t c = s->chunk, size = s->size;
    for (int l = 0; l < s->layers; l++) {
        memset(d->of[l].write, 0, c * c * sizeof(real));
        memset(d->of[l].memory, 0, c * sizeof(real));
        memset(d->of[l].momentum, 0, c * sizeof(real));
        memset(d->of[l].final, 0, c * sizeof(real));
    }
    carry_back(n, d, scratch);
    read_back(n, d, scratch);
    const real *dy = rows_at(&n->x->dy, n);
    real *dq = (real *)rows_at(&n->x->dq, n);
    for (int64_t t = 0; t < c; t++, dy += n->x->dy.row, dq += n->x->dq.row)
        EACH(int64_t i = 0; i < size; i++) dq[i] = d->q[t * size + i] + (n->scale ? dy[i] : 0);
    inner_back(n, d, scratch);
    real *g = take(&scratch, c), *ge = take(&scratch, c);
    for (int l = 0; l < s->layers; l++)
        coefficients_back(s, n->x, n->b, n->h, l, n->first, &n->of[l], &d->of[l], g, ge);
}

static void backward_of(const Shape *s, const Tensors *x, int64_t memory, real *scratch) {
    const int64_t c = s->chunk, chunks = s->tokens / c, each = state_size(s), kept = kept_size(s);
    const int64_t groups = (chunks + s->interval - 1) / s->interval, b = memory / s->heads, h = memory % s->heads;
    Chunk group[s->interval];
    real *states[s->interval];
    for (int64_t i = 0; i < s->interval; i++) {
        group[i].s = s;
        place(&group[i], &scratch);
        states[i] = take(&scratch, each);
    }
    real *spare = take(&scratch, spare_size(s));
    Grads d;
    d.state = take(&scratch, each), d.q = take(&scratch, c * s->size);
    d.scale = x->dscale + memory * s->size;
    for (int l = 0; l < s->layers; l++) {
        d.z[l] = take(&scratch, c * s->widths[l]), d.error[l] = take(&scratch, c * s->widths[l + 1]);
        d.of[l].write = take(&scratch, c * c), d.of[l].memory = take(&scratch, c);
        d.of[l].momentum = take(&scratch, c), d.of[l].final = take(&scratch, c);
        d.of[l].carry = 0;
    }
    copy_state(s, x->dweights, x->dmomentum, b, h, d.state, 0);
    for (int64_t i = groups - 1; i >= 0; i--) {
        const int64_t first = i * s->interval, end = first + s->interval < chunks ? first + s->interval : chunks;
        if (i) memcpy(states[0], x->states + (memory * (groups - 1) + i - 1) * each, each * sizeof(real));
        else copy_state(s, x->weights, x->momentum, b, h, states[0], 0);
        for (int64_t j = first; j < end; j++) {
            Chunk *n = &group[j - first];
            begin(n, s, x, memory, j, states[j - first]);
            place_kept(n, x->kept + (memory * chunks + j) * kept, spare);
            inner_gradient(n, 1);
            if (j + 1 < end) carry_state(n, states[j + 1 - first], scratch);
        }
        for (int64_t j = end - 1; j >= first; j--) chunk_back(&group[j - first], &d, scratch);
    }
    copy_state(s, x->dweights, x->dmomentum, b, h, d.state, 1);
}

/* --- reading at given weights, nothing written ---------------------------------------------------- */

typedef struct { /* some rows on their way through the network */
    int64_t b, h, first, rows;
    const real *scale;
    real *hidden[MAX_LAYERS], *z[MAX_LAYERS], *slope[MAX_LAYERS], *grad, *other, *normed;
} Reading;

static const real *reading_rows(const Rows *r, const Reading *o) {
    return r->at + o->b * r->batch + o->h * r->head + o->first * r->row;
}

static void place_reading(const Shape *s, const Tensors *x, int64_t memory, Reading *o, real *scratch) {
    const int64_t c = s->chunk;
    o->b = memory / s->heads, o->h = memory % s->heads;
    o->scale = s->scaled ? x->scale + o->h * s->size : NULL;
    for (int l = 0; l < s->layers; l++) {
        o->hidden[l] = take(&scratch, c * s->widths[l + 1]);
        o->z[l] = take(&scratch, c * s->widths[l]), o->slope[l] = take(&scratch, c * s->widths[l]);
    }
    o->grad = take(&scratch, c * widest(s)), o->other = take(&scratch, c * widest(s));
    o->normed = take(&scratch, c * s->size);
}

static void read_through(const Shape *s, const Tensors *x, Reading *o) {
    for (int l = 0; l < s->layers; l++) {
        const int64_t in = s->widths[l], out = s->widths[l + 1];
        const Rows *w = &x->weights[l];
        const real *from = l ? o->z[l] : reading_rows(&x->q, o);
        if (l) gelu_and_slope(o->hidden[l - 1], o->z[l], o->slope[l], o->rows * in);
        multiply(x->gemm, 0, 0, o->rows, out, in, from, l ? in : x->q.row, w->at + o->b * w->batch + o->h * w->head,
                 w->row, 0, o->hidden[l], out);
    }
}

static void reading_forward(const Shape *s, const Tensors *x, int64_t memory, real *scratch) {
    Reading o;
    place_reading(s, x, memory, &o, scratch);
    for (o.first = 0; o.first < s->tokens; o.first += o.rows) {
        o.rows = s->tokens - o.first < s->chunk ? s->tokens - o.first : s->chunk;
        read_through(s, x, &o);
        put_output(s, o.scale, o.rows, reading_rows(&x->q, &o), x->q.row, o.hidden[s->layers - 1], o.normed,
                   (real *)reading_rows(&x->y, &o), x->y.row);
    }
}

static void reading_backward(const Shape *s, const Tensors *x, int64_t memory, real *scratch) {
    const int64_t size = s->size;
    Reading o;
    place_reading(s, x, memory, &o, scratch);
    for (o.first = 0; o.first < s->tokens; o.first += o.rows) {
        o.rows = s->tokens - o.first < s->chunk ? s->tokens - o.first : s->chunk;
        read_through(s, x, &o);
        const real *dy = reading_rows(&x->dy, &o);
        output_back(s, o.scale, o.rows, dy, x->dy.row, o.hidden[s->layers - 1], o.normed, o.other, o.grad,
                    x->dscale + memory * size);
        for (int l = (int)s->layers - 1; l >= 0; l--) {
            const int64_t in = s->widths[l], out = s->widths[l + 1];
            const Rows *w = &x->weights[l], *dw = &x->dweights[l];
            const real *from = l ? o.z[l] : reading_rows(&x->q, &o);
            multiply(x->gemm, 1, 0, in, out, o.rows, from, l ? in : x->q.row, o.grad, out, 1,
                     dw->at + o.b * dw->batch + o.h * dw->head, dw->row);
            multiply(x->gemm, 0, 1, o.rows, in, out, o.grad, out, w->at + o.b * w->batch + o.h * w->head, w->row, 0,
                     o.other, in);
            if (l) EACH(int64_t i = 0; i < o.rows * in; i++) o.grad[i] = o.other[i] * o.slope[l][i];
        }
        real *dq = (real *)reading_rows(&x->dq, &o);
        for (int64_t t = 0; t < o.rows; t++, dq += x->dq.row, dy += x->dy.row)
            EACH(int64_t i = 0; i < size; i++) dq[i] = o.other[t * size + i] + (o.scale ? dy[i] : 0);
    }
}

/* --- entry points ------------------------------------------------------------------------------ */

typedef void (*Work)(const Shape *, const Tensors *, int64_t, real *);

static int64_t for_each_memory(const Shape *s, const Tensors *x, Work work) {
    const int64_t memories = s->batch * s->heads, each = scratch_size(s);
    if (s->threads == 1) {
        for (int64_t m = 0; m < memories; m++) work(s, x, m, x->scratch);
        return 0;
    }
    /* All threads, even for fewer memories: within a team of one BLAS would make threads of its own. */
#pragma omp parallel for num_threads((int)s->threads) schedule(dynamic, 1)
    for (int64_t m = 0; m < memories; m++) work(s, x, m, x->scratch + thread_number() * each);
    return 0;
}

int64_t everlong_scan_forward(const Shape *s, const Tensors *x) { return for_each_memory(s, x, forward_of); }
int64_t everlong_scan_backward(const Shape *s, const Tensors *x) { return for_each_memory(s, x, backward_of); }
int64_t everlong_read_forward(const Shape *s, const Tensors *x) { return for_each_memory(s, x, reading_forward); }
int64_t everlong_read_backward(const Shape *s, const Tensors *x) { return for_each_memory(s, x, reading_backward); }
