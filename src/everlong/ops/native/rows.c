/* Row by row, in one pass each: the causal convolution with SiLU and unit length, and two norms, forward
 * and backward (see ../conv.py, ../norm.py). What they save is trips to memory. */

#include "common.h"

#define UNIT_EPS ((real)1e-6)

typedef struct {
    int64_t batch, tokens, width, taps, size, unit, threads;
    Rows x, y, dx, dy;            /* [B, 1, T, N] */
    const real *weight, *tail;    /* [N, J], [B, J - 1, N] */
    real *dweight, *dtail;        /* [B, N, J], [B, J - 1, N] */
} Conv;

static inline real logistic(real x) { return 1 / (1 + exponential(-x)); }

/* A row of a head's inputs, `back` tokens before t: of x or of the tail. */
static inline const real *input_row(const Conv *s, int64_t b, int64_t first, int64_t at) {
    if (at >= 0) return s->x.at + b * s->x.batch + at * s->x.row + first;
    return s->tail + (b * (s->taps - 1) + at + s->taps - 1) * s->width + first;
}

static void convolve(const Conv *s, int64_t b, int64_t first, int64_t t, const real *taps, real *out) {
    const int64_t n = s->size;
    memset(out, 0, n * sizeof(real));
    for (int64_t j = 0; j < s->taps; j++) {
        const real *in = input_row(s, b, first, t - s->taps + 1 + j), *tap = taps + j * n;
        EACH(int64_t i = 0; i < n; i++) out[i] += in[i] * tap[i];
    }
}

static void transpose_taps(const Conv *s, int64_t first, real *taps) {
    for (int64_t j = 0; j < s->taps; j++)
        for (int64_t i = 0; i < s->size; i++) taps[j * s->size + i] = s->weight[(first + i) * s->taps + j];
}

static void conv_forward(const Conv *s, int64_t b, int64_t first) {
    const int64_t n = s->size;
    real taps[s->taps * n], row[n];
    transpose_taps(s, first, taps);
    for (int64_t t = 0; t < s->tokens; t++) {
        real *y = s->y.at + b * s->y.batch + t * s->y.row + first;
        convolve(s, b, first, t, taps, row);
        EACH(int64_t i = 0; i < n; i++) y[i] = row[i] * logistic(row[i]);
        if (!s->unit) continue;
        const real inverse = 1 / (real)sqrt((double)(dot(y, y, n) + UNIT_EPS));
        EACH(int64_t i = 0; i < n; i++) y[i] *= inverse;
    }
}

static void conv_backward(const Conv *s, int64_t b, int64_t first) {
    const int64_t n = s->size, reach = s->taps - 1;
    real taps[s->taps * n], dtaps[s->taps * n], c[n], y[n], grad[n];
    transpose_taps(s, first, taps);
    memset(dtaps, 0, sizeof(dtaps));
    for (int64_t j = 0; j < reach; j++)
        memset(s->dtail + (b * reach + j) * s->width + first, 0, n * sizeof(real));
    for (int64_t t = 0; t < s->tokens; t++) {
        const real *dy = s->dy.at + b * s->dy.batch + t * s->dy.row + first;
        convolve(s, b, first, t, taps, c);
        EACH(int64_t i = 0; i < n; i++) y[i] = c[i] * logistic(c[i]);
        const real inverse = s->unit ? 1 / (real)sqrt((double)(dot(y, y, n) + UNIT_EPS)) : 1;
        const real along = s->unit ? dot(dy, y, n) * inverse * inverse : 0;
        EACH(int64_t i = 0; i < n; i++) {
            const real share = logistic(c[i]);
            grad[i] = (dy[i] - along * y[i]) * inverse * share * (1 + c[i] * (1 - share));
        }
        for (int64_t j = reach; j >= 0; j--) {
            const int64_t at = t - reach + j;
            const real *in = input_row(s, b, first, at), *tap = taps + j * n;
            real *dtap = dtaps + j * n;
            real *to = at >= 0 ? s->dx.at + b * s->dx.batch + at * s->dx.row + first
                               : s->dtail + (b * reach + at + reach) * s->width + first;
            if (j == reach) EACH(int64_t i = 0; i < n; i++) to[i] = 0;
            EACH(int64_t i = 0; i < n; i++) {
                dtap[i] += grad[i] * in[i];
                to[i] += grad[i] * tap[i];
            }
        }
    }
    for (int64_t j = 0; j < s->taps; j++)
        for (int64_t i = 0; i < n; i++)
            s->dweight[(b * s->width + first + i) * s->taps + j] = dtaps[j * n + i];
}

static int64_t conv(const Conv *s, void (*work)(const Conv *, int64_t, int64_t)) {
    const int64_t heads = s->width / s->size;
#pragma omp parallel for num_threads((int)s->threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < s->batch * heads; i++) work(s, i / heads, i % heads * s->size);
    return 0;
}

int64_t everlong_conv_forward(const Conv *s) { return conv(s, conv_forward); }
int64_t everlong_conv_backward(const Conv *s) { return conv(s, conv_backward); }

/* y = weight x / rms(x), and then times silu(gate) where there is one; rows [R, N], weight [N]. */
typedef struct {
    int64_t rows, size, threads;
    double eps;
    const real *x, *gate, *weight, *dy; /* dense */
    real *y, *dx, *dgate, *dweight;     /* dweight: [threads, N] */
} Norm;

int64_t everlong_norm_forward(const Norm *s) {
    const int64_t n = s->size;
#pragma omp parallel for num_threads((int)s->threads) schedule(static)
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
#pragma omp parallel for num_threads((int)s->threads) schedule(static, 1)
    for (int64_t part = 0; part < s->threads; part++) {
        const int64_t end = (part + 1) * each < rows ? (part + 1) * each : rows;
        real *dweight = s->dweight + part * s->size;
        memset(dweight, 0, s->size * sizeof(real));
        for (int64_t r = part * each; r < end; r++) norm_backward(s, r, dweight);
    }
    return 0;
}
