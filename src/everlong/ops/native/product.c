/* Matrix products of the sizes that the kernels have: small enough for a thread's cache, where BLAS
 * spends up to half its time on laying out its operands.
 *
 * A tile of the output, some rows by two vectors of columns, is summed up in registers: a row of b is
 * loaded as vectors, an entry of a is the same for a whole vector. b transposed is laid out first, two
 * vectors of its columns at a time; a is read as it stands, transposed or not. */

#include "common.h"

#if defined(__AVX512F__)
#define BYTES 64 /* of a vector */
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#if defined(__AVX512F__) || defined(__aarch64__) /* machines with 32 registers */
#define ROWS 8
#else
#define ROWS 6
#endif
#define LANES (BYTES / (int64_t)sizeof(real))
#define DEPTH 256      /* of a sum at a time: two vectors of columns so long stay in the nearest cache */
#define LARGEST 131072 /* numbers of an output that leaves room for its operands in a thread's cache */
#define INLINE static inline __attribute__((always_inline))

typedef real vec __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));

/* out [rows, n vectors] (+)= a b, with a[i, p] at a[i ai + p ap]. */
INLINE void tile(int rows, int n, int64_t k, const real *a, int64_t ai, int64_t ap, const real *b, int64_t ldb,
                 int add, real *out, int64_t ldo) {
    vec sum[ROWS][2];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < n; j++) sum[i][j] = add ? *(vec *)(out + i * ldo + j * LANES) : (vec){0};
    for (int64_t p = 0; p < k; p++) {
        vec row[2];
        for (int j = 0; j < n; j++) row[j] = *(const vec *)(b + p * ldb + j * LANES);
        for (int i = 0; i < rows; i++) {
            const real x = a[i * ai + p * ap];
            for (int j = 0; j < n; j++) sum[i][j] += x * row[j];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < n; j++) *(vec *)(out + i * ldo + j * LANES) = sum[i][j];
}

/* A tile of some of the rows, from row i of out, whose sum goes over the entries first ... first + k - 1 of
 * an operand's dimension; columns: those to the left of this tile's. */
INLINE void part_tile(Part part, int rows, int n, int64_t i, int64_t first, int64_t columns, int64_t k,
                      const real *a, int64_t ai, int64_t ap, const real *b, int64_t ldb, int add, real *out,
                      int64_t ldo) {
    const int64_t end = i + rows - first, begin = i - first > 0 ? i - first : 0; /* of the diagonal's entries */
    if (part == LOWER && end < k) k = end;
    if (part == UPPER) a += begin * ap, b += begin * ldb, k -= begin;
    if (k <= 0 && add) return;
    if (part == WANTED && columns >= i + rows) return;
    if (part == WANTED && columns + LANES >= i + rows) n = 1;
    if (n == 1) tile(rows, 1, k, a + i * ai, ai, ap, b, ldb, add, out + i * ldo, ldo);
    else tile(rows, 2, k, a + i * ai, ai, ap, b, ldb, add, out + i * ldo, ldo);
}

/* As `part_tile`, of all rows. */
INLINE void panel(Part part, int n, int64_t m, int64_t first, int64_t columns, int64_t k, const real *a, int64_t ai,
                  int64_t ap, const real *b, int64_t ldb, int add, real *out, int64_t ldo) {
    int64_t i = 0;
    for (; i + ROWS <= m; i += ROWS)
        part_tile(part, ROWS, n, i, first, columns, k, a, ai, ap, b, ldb, add, out, ldo);
    for (; i + 2 <= m; i += 2) part_tile(part, 2, n, i, first, columns, k, a, ai, ap, b, ldb, add, out, ldo);
    if (i < m) part_tile(part, 1, n, i, first, columns, k, a, ai, ap, b, ldb, add, out, ldo);
}

/* out [k, LANES] = x [LANES, k] transposed. */
static void turn(int64_t k, const real *x, int64_t ldx, real *out, int64_t ldo) {
    int64_t p = 0;
#if defined(__GNUC__) && !defined(__clang__)
    __typeof__((vec){0} < (vec){0}) low, high; /* interleave the first halves of two vectors, the second */
    for (int i = 0; i < LANES; i++) low[i] = i / 2 + i % 2 * LANES, high[i] = low[i] + LANES / 2;
    for (; p + LANES <= k; p += LANES) {
        vec now[LANES], next[LANES];
        for (int i = 0; i < LANES; i++) now[i] = *(const vec *)(x + i * ldx + p);
        for (int step = 1; step < LANES; step *= 2) {
            for (int i = 0; i < LANES / 2; i++) {
                next[2 * i] = __builtin_shuffle(now[i], now[i + LANES / 2], low);
                next[2 * i + 1] = __builtin_shuffle(now[i], now[i + LANES / 2], high);
            }
            for (int i = 0; i < LANES; i++) now[i] = next[i];
        }
        for (int i = 0; i < LANES; i++) *(vec *)(out + (p + i) * ldo) = now[i];
    }
#endif
    for (; p < k; p++)
        for (int i = 0; i < LANES; i++) out[p * ldo + i] = x[i * ldx + p];
}

/* The sum over entries first ... first + k - 1. */
static void small(Part part, int ta, int tb, int64_t m, int64_t n, int64_t first, int64_t k, const real *a,
                  int64_t lda, const real *b, int64_t ldb, int add, real *out, int64_t ldo) {
    real turned[2 * DEPTH * LANES];
    a += first * (ta ? lda : 1), b += first * (tb ? 1 : ldb);
    for (int64_t j = 0; j < n; j += 2 * LANES) {
        const int64_t vectors = n - j < 2 * LANES ? 1 : 2;
        const real *columns = b + j;
        int64_t ld = ldb;
        if (tb) {
            for (int64_t i = 0; i < vectors; i++)
                turn(k, b + (j + i * LANES) * ldb, ldb, turned + i * LANES, 2 * LANES);
            columns = turned, ld = 2 * LANES;
        }
        if (vectors == 1) panel(part, 1, m, first, j, k, a, ta ? 1 : lda, ta ? lda : 1, columns, ld, add, out + j, ldo);
        else if (ta) panel(part, 2, m, first, j, k, a, 1, lda, columns, ld, add, out + j, ldo);
        else panel(part, 2, m, first, j, k, a, lda, 1, columns, ld, add, out + j, ldo);
    }
}

static void blas(gemm_t gemm, int ta, int tb, int64_t m, int64_t n, int64_t k, const real *a, int64_t lda,
                 const real *b, int64_t ldb, int add, real *out, int64_t ldo) {
    const int im = (int)m, in = (int)n, ik = (int)k, ia = (int)lda, ib = (int)ldb, io = (int)ldo;
    const real one = 1, kept = (real)add;
    gemm(tb ? "T" : "N", ta ? "T" : "N", &in, &im, &ik, &one, b, &ib, a, &ia, &kept, out, &io);
}

void multiply_part(Part part, gemm_t gemm, int ta, int tb, int64_t m, int64_t n, int64_t k, const real *a,
                   int64_t lda, const real *b, int64_t ldb, int add, real *out, int64_t ldo) {
    const int64_t whole = m * n <= LARGEST ? n / LANES * LANES : 0; /* columns in whole vectors */
    for (int64_t p = 0; p < k && whole; p += DEPTH)
        small(part, ta, tb, m, whole, p, k - p < DEPTH ? k - p : DEPTH, a, lda, b, ldb, add || p, out, ldo);
    if (whole < n)
        blas(gemm, ta, tb, m, n - whole, k, a, lda, b + whole * (tb ? ldb : 1), ldb, add, out + whole, ldo);
}

void multiply(gemm_t gemm, int ta, int tb, int64_t m, int64_t n, int64_t k, const real *a, int64_t lda,
              const real *b, int64_t ldb, int add, real *out, int64_t ldo) {
    multiply_part(WHOLE, gemm, ta, tb, m, n, k, a, lda, b, ldb, add, out, ldo);
}
