/* Row by row, in one pass each: the causal convolution with SiLU and a length, and two norms, forward
 * and backward (see ../conv.py, ../norm.py). What they save is trips to memory. */

#include "common.h"

#define UNIT_EPS ((real)1e-6)

typedef struct { /* a row's tokens are divided into `parts` */
    int64_t batch, tokens, width, taps, size, unit, threads, parts;
    double length; /* of each `size` numbers, where `unit` */
    Rows x, y, dx, dy;         /* [B, 1, T, N] */
    const real *weight, *tail; /* [J, N], [B, J - 1, N] */
    real *dweight, *dtail;     /* [B, parts, J, N], [B, J - 1, N] */
} Conv;

static inline real logistic(real x) { return 1 / (1 + exponential(-x)); }

/* The inputs of token t, tap by tap: rows of x or of the tail. */
static inline void inputs_of(const Conv *s, int64_t b, int64_t t, int64_t count, const real **in) {
    for (int64_t j = 0; j < count; j++) {
        const int64_t at = t - count + 1 + j;
        in[j] = at >= 0 ? s->x.at + b * s->x.batch + at * s->x.row
                        : s->tail + (b * (count - 1) + at + count - 1) * s->width;
    }
}

/* out = the sum over the taps of in[j] weight[j], rows of n numbers; four taps, the usual, in one pass. */
static inline void convolve(const real *const *in, const real *weight, int64_t count, int64_t n,
                            real *restrict out) {
    if (count == 4) {
        const real *a = in[0], *b = in[1], *c = in[2], *d = in[3];
        const real *wa = weight, *wb = wa + n, *wc = wb + n, *wd = wc + n;
        EACH(int64_t i = 0; i < n; i++) out[i] = a[i] * wa[i] + b[i] * wb[i] + c[i] * wc[i] + d[i] * wd[i];
        return;
    }
    EACH(int64_t i = 0; i < n; i++) out[i] = in[0][i] * weight[i];
    for (int64_t j = 1; j < count; j++) {
        const real *x = in[j], *tap = weight + j * n;
        EACH(int64_t i = 0; i < n; i++) out[i] += x[i] * tap[i];
    }
}

static inline real inverse_length(const Conv *s, const real *x) {
    return s->unit ? 1 / (real)sqrt((double)(dot(x, x, s->size) + UNIT_EPS)) : 1;
}

/* Tokens begin ... end - 1. */
static void forward_part(const Conv *s, int64_t b, int64_t begin, int64_t end, int64_t part) {
    const int64_t n = s->width;
    const real *in[s->taps];
    (void)part;
    for (int64_t t = begin; t < end; t++) {
        real *restrict y = s->y.at + b * s->y.batch + t * s->y.row;
        inputs_of(s, b, t, s->taps, in);
        convolve(in, s->weight, s->taps, n, y);
        EACH(int64_t i = 0; i < n; i++) y[i] *= logistic(y[i]);
        for (int64_t first = 0; s->unit && first < n; first += s->size) {
            const real factor = inverse_length(s, y + first) * (real)s->length;
            EACH(int64_t i = first; i < first + s->size; i++) y[i] *= factor;
        }
    }
}

/* The gradient of the convolution's output at a token, [N]; y, slope: room for as much. */
static void output_grad(const Conv *s, int64_t b, int64_t t, const real *const *in, real *restrict y,
                        real *restrict slope, real *restrict grad) {
    const int64_t n = s->width;
    convolve(in, s->weight, s->taps, n, y);
    EACH(int64_t i = 0; i < n; i++) {
        const real share = logistic(y[i]);
        slope[i] = share * (1 + y[i] * (1 - share));
        y[i] *= share;
    }
    for (int64_t first = 0; first < n; first += s->size) {
        const real *dy = s->dy.at + b * s->dy.batch + t * s->dy.row + first, *row = y + first;
        const real inverse = inverse_length(s, row);
        const real along = s->unit ? dot(dy, row, s->size) * inverse * inverse : 0;
        const real factor = inverse * (real)s->length;
        EACH(int64_t i = 0; i < s->size; i++)
            grad[first + i] = (dy[i] - along * row[i]) * factor * slope[first + i];
    }
}

/* Gradients of x in tokens begin ... end - 1 (of the tail before token 0), and of the taps there. The
 * first tokens of the next part give to x here: they are computed by both. */
static void backward_part(const Conv *s, int64_t b, int64_t begin, int64_t end, int64_t part) {
    const int64_t count = s->taps, n = s->width, reach = count - 1;
    const int64_t last = end + reach < s->tokens ? end + reach : s->tokens;
    real *dtaps = s->dweight + part * count * n, *room = calloc((count + 2) * n, sizeof(real));
    real *grads = room, *y = grads + count * n, *slope = y + n; /* grads: of the last tokens, in turns */
    const real *in[count], *now[count];
    if (!room) abort();
    memset(dtaps, 0, count * n * sizeof(real));
    for (int64_t t = begin; t < end + reach; t++) { /* gives x its gradient at t - reach */
        real *grad = grads + t % count * n;
        if (t < last) {
            inputs_of(s, b, t, count, in);
            output_grad(s, b, t, in, y, slope, grad);
        } else {
            memset(grad, 0, n * sizeof(real));
        }
        for (int64_t j = 0; j < count && t < end; j++) {
            real *restrict dtap = dtaps + j * n;
            const real *from = in[j];
            EACH(int64_t i = 0; i < n; i++) dtap[i] += grad[i] * from[i];
        }
        const int64_t at = t - reach;
        if (at < begin && begin) continue;
        for (int64_t j = 0; j < count; j++) now[j] = grads + (at + reach - j + count) % count * n;
        convolve(now, s->weight, count, n,
                 at >= 0 ? s->dx.at + b * s->dx.batch + at * s->dx.row : s->dtail + (b * reach + at + reach) * n);
    }
    free(room);
}

static int64_t conv(const Conv *s, void (*work)(const Conv *, int64_t, int64_t, int64_t, int64_t)) {
    const int64_t each = (s->tokens + s->parts - 1) / s->parts;
#pragma omp parallel for num_threads((int)s->threads) if (s->threads > 1) schedule(static, 1)
    for (int64_t i = 0; i < s->batch * s->parts; i++) {
        const int64_t begin = i % s->parts * each < s->tokens ? i % s->parts * each : s->tokens;
        work(s, i / s->parts, begin, begin + each < s->tokens ? begin + each : s->tokens, i);
    }
    return 0;
}

int64_t everlong_conv_forward(const Conv *s) { return conv(s, forward_part); }
int64_t everlong_conv_backward(const Conv *s) { return conv(s, backward_part); }

/* y = weight x / rms(x), and then times silu(gate) where there is one; rows [R, N], weight [N]. */
typedef struct {
    int64_t rows, size, threads;
    double eps;
    const real *x, *gate, *weight, *dy; /* dense */
    real *y, *dx, *dgate, *dweight;     /* dweight: [threads, N] */
} Norm;

int64_t everlong_norm_forward(const Norm *s) {
    const int64_t n = s->size;
#pragma omp parallel for num_threads((int)s->threads) if (s->threads > 1) schedule(static)
    for (int64_t r = 0; r < s->rows; r++) {
        const real *x = s->x + r * n, *gate = s->gate ? s->gate + r * n : NULL;
        const real inverse = 1 / (real)sqrt((double)(dot(x, x, n) / n) + s->eps);
        real *y = s->y + r * n;
        EACH(int64_t i = 0; i < n; i++) y[i] = s->weight[i] * (x[i] * inverse);
        if (s->gate) EACH(int64_t i = 0; i < n; i++) y[i] *= gate[i] * logistic(gate[i]);
    }
    return 0;
}

static void norm_backward(const Norm *s, int64_t r, real *dweight) {
    const int64_t n = s->size;
    const real *x = s->x + r * n, *gate = s->gate ? s->gate + r * n : NULL, *dy = s->dy + r * n;
    const real inverse = 1 / (real)sqrt((double)(dot(x, x, n) / n) + s->eps);
    real *dx = s->dx + r * n, *dgate = s->gate ? s->dgate + r * n : NULL, along;
    if (s->gate)
        EACH(int64_t i = 0; i < n; i++) {
            const real share = logistic(gate[i]), unit = x[i] * inverse, grad = dy[i] * gate[i] * share;
            dgate[i] = dy[i] * s->weight[i] * unit * share * (1 + gate[i] * (1 - share));
            dweight[i] += grad * unit;
            dx[i] = grad * s->weight[i];
        }
    else
        EACH(int64_t i = 0; i < n; i++) {
            dweight[i] += dy[i] * (x[i] * inverse);
            dx[i] = dy[i] * s->weight[i];
        }
    along = dot(dx, x, n) * inverse * inverse / n;
    EACH(int64_t i = 0; i < n; i++) dx[i] = (dx[i] - along * x[i]) * inverse;
}

int64_t everlong_norm_backward(const Norm *s) {
    const int64_t rows = s->rows, each = (rows + s->threads - 1) / s->threads;
#pragma omp parallel for num_threads((int)s->threads) if (s->threads > 1) schedule(static, 1)
    for (int64_t part = 0; part < s->threads; part++) {
        const int64_t end = (part + 1) * each < rows ? (part + 1) * each : rows;
        real *dweight = s->dweight + part * s->size;
        memset(dweight, 0, s->size * sizeof(real));
        for (int64_t r = part * each; r < end; r++) norm_backward(s, r, dweight);
    }
    return 0;
}

/* Rotary position embedding of x [B, N, T, K]: halves (l, r) -> (l cos - r sin, r cos + l sin). */
typedef struct {
    int64_t batch, heads, tokens, size, threads, table_batch; /* of the tables; 0 where rows agree */
    Rows x, y;
    const real *cos, *sin; /* [B or 1, T, K / 2] */
} Rotation;

int64_t everlong_rotate(const Rotation *s) {
    const int64_t half = s->size / 2;
#pragma omp parallel for num_threads((int)s->threads) if (s->threads > 1) schedule(static)
    for (int64_t i = 0; i < s->batch * s->tokens; i++) {
        const int64_t b = i / s->tokens, t = i % s->tokens, at = b * s->table_batch + t * half;
        const real *c = s->cos + at, *d = s->sin + at;
        for (int64_t h = 0; h < s->heads; h++) {
            const real *x = s->x.at + b * s->x.batch + h * s->x.head + t * s->x.row;
            real *y = s->y.at + b * s->y.batch + h * s->y.head + t * s->y.row;
            EACH(int64_t j = 0; j < half; j++) {
                const real left = x[j], right = x[half + j];
                y[j] = left * c[j] - right * d[j];
                y[half + j] = right * c[j] + left * d[j];
            }
        }
    }
    return 0;
}

/* y = silu(gate) x, or (plain) logistic(gate) x, and the way back, of n numbers. */
typedef struct {
    int64_t count, plain, threads;
    const real *gate, *x, *dy;
    real *y, *dgate, *dx;
} Product;

static void product_forward(const Product *s, int64_t begin, int64_t end) {
    const int plain = (int)s->plain;
    const real *gate = s->gate, *x = s->x;
    real *restrict y = s->y;
    EACH(int64_t i = begin; i < end; i++) y[i] = (plain ? 1 : gate[i]) * logistic(gate[i]) * x[i];
}

static void product_backward(const Product *s, int64_t begin, int64_t end) {
    const int plain = (int)s->plain;
    const real *gate = s->gate, *x = s->x, *dy = s->dy;
    real *restrict dgate = s->dgate, *restrict dx = s->dx;
    EACH(int64_t i = begin; i < end; i++) {
        const real share = logistic(gate[i]), factor = plain ? 1 : gate[i];
        dx[i] = dy[i] * factor * share;
        dgate[i] = dy[i] * x[i] * share * (factor * (1 - share) + (1 - plain));
    }
}

static int64_t product(const Product *s, void (*work)(const Product *, int64_t, int64_t)) {
    const int64_t each = (s->count + s->threads - 1) / s->threads;
#pragma omp parallel for num_threads((int)s->threads) if (s->threads > 1) schedule(static, 1)
    for (int64_t part = 0; part < s->threads; part++)
        work(s, part * each, (part + 1) * each < s->count ? (part + 1) * each : s->count);
    return 0;
}

int64_t everlong_product_forward(const Product *s) { return product(s, product_forward); }
int64_t everlong_product_backward(const Product *s) { return product(s, product_backward); }
