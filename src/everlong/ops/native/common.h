/* What the native kernels share. All matrices are row-major. */

#ifndef EVERLONG_COMMON_H
#define EVERLONG_COMMON_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef REAL
#define REAL float
#endif
typedef REAL real;
typedef void (*gemm_t)(const char *, const char *, const int *, const int *, const int *, const real *,
                       const real *, const int *, const real *, const int *, const real *, real *,
                       const int *);

#define EACH _Pragma("omp simd") for
#define LINE 16 /* numbers that `take` may add to a buffer's own */
#define IS_FLOAT (sizeof(real) == 4)

typedef struct { /* a tensor [B, H, N, size]: its numbers' places; the last dimension is dense */
    real *at;
    int64_t batch, head, row;
} Rows;

static inline real *take(real **at, int64_t n) { /* the next n numbers of a buffer, on a line of the cache */
    real *p = *at;
    *at += (n + LINE - 1) / LINE * LINE;
    return p;
}

/* out (+)= op(a) op(b), [m, n] with inner dimension k, at least 1; ta, tb: transposed as stored; gemm: for
 * what is too large or does not fill vectors. */
void multiply(gemm_t gemm, int ta, int tb, int64_t m, int64_t n, int64_t k, const real *a, int64_t lda,
              const real *b, int64_t ldb, int add, real *out, int64_t ldo);

/* As `multiply` of matrices that are zero above (LOWER) or below (UPPER) the diagonal, op(a) [m, m], of which
 * less is read; or of an out [m, m] of which nothing above the diagonal is wanted (WANTED), which may hold
 * anything there. */
typedef enum { WHOLE, LOWER, UPPER, WANTED } Part;
void multiply_part(Part part, gemm_t gemm, int ta, int tb, int64_t m, int64_t n, int64_t k, const real *a,
                   int64_t lda, const real *b, int64_t ldb, int add, real *out, int64_t ldo);

/* exp in float32, made to be vectorised: 2 ulp, and within -87 ... 88. */
static inline float exp_float(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float rounded = x * 1.44269504f + 12582912.0f; /* 1.5 2^23: the fraction falls off */
    const float n = rounded - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { uint32_t i; float f; } two;
    two.i = ((uint32_t)(int32_t)n + 127) << 23; /* of no sign: NaN's bits may be any */
    return p * two.f;
}

static inline real exponential(real x) { return IS_FLOAT ? exp_float((float)x) : (real)exp((double)x); }

static inline int64_t thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static inline real dot(const real *a, const real *b, int64_t n) {
    real sum = 0;
    _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

#endif
