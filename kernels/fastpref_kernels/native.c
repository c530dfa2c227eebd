/* Passes over memory for which torch needs several calls, on a CPU, in float32; compiled when first
   needed (_native.py). Matrices are contiguous, row by row.

   Loops are written for the compiler to vectorise along a row. Every sum is over a fixed cut of the
   rows, so that no bit depends on the number of threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define PARTS 8        /* of the rows, shared out to threads */
#define BLOCK 32       /* rows summed to one number before it is added to others */
#define SMALL (1 << 15) /* numbers that one thread has done before another has begun */

/* e^x to an ulp or two for least <= x <= 88; NaN is NaN. Cephes' expf: 2^n e^r, |r| <= ln 2 / 2.
   Added to ROUND, a float has no bits left for a fraction, and its last ones are n. */
#define ROUND 12582912.0f /* 1.5 2^23 */

static inline float exp_of(float x, float least) {
  x = x < least ? least : x;
  float turned = fmaf(x, 1.44269504088896341f, ROUND);
  float n = turned - ROUND;
  float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p * r, r, r) + 1.0f;
  uint32_t bits;
  memcpy(&bits, &turned, sizeof bits);
  bits = (bits << 23) + (127u << 23);
  float power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

/* The larger one; NaN where either is. */
static inline float larger(float a, float b) { return a > b || a != a ? a : b; }

/* out (cols): the largest of every column of z (rows, cols). part: (PARTS, cols) to work in. */
void column_maxima(const float *z, long rows, long cols, float *part, float *out) {
#pragma omp parallel for schedule(static) if (rows * cols > SMALL)
  for (long p = 0; p < PARTS; p++) {
    float *restrict most = part + p * cols;
    for (long c = 0; c < cols; c++) most[c] = -INFINITY;
    for (long i = rows * p / PARTS; i < rows * (p + 1) / PARTS; i++) {
      const float *restrict row = z + i * cols;
      for (long c = 0; c < cols; c++) most[c] = larger(row[c], most[c]);
    }
  }
  for (long c = 0; c < cols; c++) {
    float most = part[c];
    for (long p = 1; p < PARTS; p++) most = larger(part[p * cols + c], most);
    out[c] = most;
  }
}

/* Of a part of the rows, for exp_sums. part: (6, cols), sums of one or all kinds, and a block's. */
static inline __attribute__((always_inline)) void exp_part(
    float *z, long rows, long cols, const float *restrict maximum, float least, float *part,
    const long kinds) {
  float *restrict sums = part, *restrict own = part + 3 * cols;
  memset(sums, 0, sizeof(float) * kinds * cols);
  for (long first = 0; first < rows; first += BLOCK) {
    long last = first + BLOCK < rows ? first + BLOCK : rows;
    memset(own, 0, sizeof(float) * kinds * cols);
    for (long i = first; i < last; i++) {
      float *restrict row = z + i * cols;
      for (long c = 0; c < cols; c++) {
        float shifted = row[c] - maximum[c];
        float e = exp_of(shifted, least);
        row[c] = e;
        own[c] += e;
        if (kinds == 1) continue;
        own[cols + c] += e * (shifted < least ? least : shifted);
        own[2 * cols + c] += e * e;
      }
    }
    for (long c = 0; c < kinds * cols; c++) sums[c] += own[c];
  }
}

static void sum_parts(const float *part, long cols, float *out) {
  if (!out) return;
  for (long c = 0; c < cols; c++) {
    float sum = 0.0f;
    for (long p = 0; p < PARTS; p++) sum += part[p * 6 * cols + c];
    out[c] = sum;
  }
}

/* e = exp(max(z - maximum, least)) in the place of z (rows, cols), and sums over the rows, (cols)
   each: total of e, plogp of e log e, square of e^2; any may be null. part: (PARTS, 6, cols). */
void exp_sums(float *z, long rows, long cols, const float *maximum, float least, float *part,
              float *total, float *plogp, float *square) {
#pragma omp parallel for schedule(static) if (rows * cols > SMALL)
  for (long p = 0; p < PARTS; p++) {
    long first = rows * p / PARTS, count = rows * (p + 1) / PARTS - first;
    float *own = z + first * cols, *work = part + p * 6 * cols;
    if (plogp || square)
      exp_part(own, count, cols, maximum, least, work, 3);
    else
      exp_part(own, count, cols, maximum, least, work, 1);
  }
  sum_parts(part, cols, total);
  sum_parts(part + cols, cols, plogp);
  sum_parts(part + 2 * cols, cols, square);
}

/* log((1 - p) / p) of every row, from maximum and total of what is not the target, and the target's
   logit. */
void log_odds(const float *maximum, const float *total, const float *own, long rows, float *odds) {
  for (long i = 0; i < rows; i++) odds[i] = (maximum[i] - own[i]) + logf(total[i]);
}

/* log p = -log(1 + e^odds) */
void log_probs(const float *odds, long rows, float *logp) {
  for (long i = 0; i < rows; i++)
    logp[i] = -(larger(odds[i], 0.0f) + log1pf(expf(-fabsf(odds[i]))));
}

/* A head that is one tile: z (vocab, rows), logits, becomes e, with -total at the targets if
   `keep`. state (3, rows): maximum, total, log_odds. work: (PARTS 6 + 1, rows). */
void one_tile(float *z, long vocab, long rows, const int64_t *target, float least, int keep,
              float *work, float *state, float *logp) {
  float *maximum = state, *total = state + rows, *odds = state + 2 * rows;
  float *own = work, *part = work + rows;
  for (long r = 0; r < rows; r++) {
    own[r] = z[target[r] * rows + r];
    z[target[r] * rows + r] = -INFINITY;
  }
  column_maxima(z, vocab, rows, part, maximum);
  exp_sums(z, vocab, rows, maximum, least, part, total, 0, 0);
  log_odds(maximum, total, own, rows, odds);
  log_probs(odds, rows, logp);
  if (keep)
    for (long r = 0; r < rows; r++) z[target[r] * rows + r] = -total[r];
}

/* band (most, rows) += sums over `count` rows of z (., rows) of each entry times that d places on. */
static void add_band(const float *z, long count, long rows, long most, float *restrict band) {
  for (long v = 0; v + 4 <= count; v += 4) {
    const float *restrict a = z + v * rows, *restrict b = a + rows;
    const float *restrict c = b + rows, *restrict e = c + rows;
    for (long d = 0; d < most; d++) {
      float *restrict sum = band + d * rows;
      for (long r = 0; r < rows - d; r++)
        sum[r] += (a[r] * a[r + d] + b[r] * b[r + d]) + (c[r] * c[r + d] + e[r] * e[r + d]);
    }
  }
  for (long v = count / 4 * 4; v < count; v++)
    for (long d = 0; d < most; d++)
      for (long r = 0; r < rows - d; r++)
        band[d * rows + r] += z[v * rows + r] * z[v * rows + r + d];
}

/* Of groups of neighbouring columns of z (vocab, rows), first[b] .. first[b + 1] - 1 in group b, at
   most `most` in each: products (rows, most), [t][j] the sum of column t times column first + j of
   its group, and met (rows, most), that column's entry at row target[t]. work: (PARTS, 2, most,
   rows). */
void group_products(const float *z, long vocab, long rows, const int64_t *target,
                    const int64_t *first, long groups, long most, float *work, float *products,
                    float *met) {
  long size = most * rows;
#pragma omp parallel for schedule(static) if (vocab * rows > SMALL)
  for (long p = 0; p < PARTS; p++) {
    float *restrict sums = work + p * 2 * size, *restrict own = sums + size;
    memset(sums, 0, sizeof(float) * size);
    long last = vocab * (p + 1) / PARTS;
    for (long v = vocab * p / PARTS; v < last; v += BLOCK) {
      memset(own, 0, sizeof(float) * size);
      add_band(z + v * rows, last - v < BLOCK ? last - v : BLOCK, rows, most, own);
      for (long i = 0; i < size; i++) sums[i] += own[i];
    }
  }
  for (long b = 0; b < groups; b++)
    for (long t = first[b]; t < first[b + 1]; t++)
      for (long s = first[b]; s < first[b + 1]; s++) {
        long place = (s > t ? s - t : t - s) * rows + (s > t ? t : s), j = s - first[b];
        float sum = 0.0f;
        for (long p = 0; p < PARTS; p++) sum += work[p * 2 * size + place];
        products[t * most + j] = sum;
        met[t * most + j] = z[target[t] * rows + s];
      }
}

/* out (k, rows) += the K sums of z (count, rows), row v times sign[v] in bucket[v], times the
   Walsh-Hadamard matrix of K, a power of two. work: (PARTS, K, rows). */
void project_columns(const float *z, long count, long rows, const int32_t *bucket,
                     const float *sign, long size, long k, float *work, float *out) {
#pragma omp parallel for schedule(static) if (count * rows > SMALL)
  for (long p = 0; p < PARTS; p++) {
    float *restrict sums = work + p * size * rows;
    memset(sums, 0, sizeof(float) * size * rows);
    for (long v = count * p / PARTS; v < count * (p + 1) / PARTS; v++) {
      const float *restrict row = z + v * rows;
      float *restrict sum = sums + bucket[v] * rows;
      float factor = sign[v];
      for (long r = 0; r < rows; r++) sum[r] += factor * row[r];
    }
  }
  for (long p = 1; p < PARTS; p++)
    for (long i = 0; i < size * rows; i++) work[i] += work[p * size * rows + i];
  for (long half = 1; half < size; half *= 2)
    for (long b = 0; b < size; b++) {
      if (b & half) continue;
      float *restrict low = work + b * rows, *restrict high = low + half * rows;
      for (long r = 0; r < rows; r++) {
        float a = low[r], other = high[r];
        low[r] = a + other;
        high[r] = a - other;
      }
    }
  for (long i = 0; i < k * rows; i++) out[i] += work[i];
}

static float dot(const float *a, const float *b, long count) {
  float sums[16] = {0}, rest = 0.0f;
  long c = 0;
  for (; c + 16 <= count; c += 16)
    for (int i = 0; i < 16; i++) sums[i] += a[c + i] * b[c + i];
  for (; c < count; c++) rest += a[c] * b[c];
  for (int i = 0; i < 16; i++) rest += sums[i];
  return rest;
}

/* out (groups, g, g): sums over the rows t, s of two segments of a group of d_t . d_s h_t . h_s, as
   gram.py defines them, from what group_products found; phi may be null. */
void group_gram(const float *products, const float *met, const float *hidden, long dim,
                const int64_t *target, const int64_t *segment, const float *total,
                const float *miss, const float *phi, const int64_t *first, long groups, long most,
                long g, float *out) {
#pragma omp parallel for schedule(static) if (first[groups] * most * dim > SMALL)
  for (long b = 0; b < groups; b++) {
    double sums[g * g];
    memset(sums, 0, sizeof sums);
    for (long t = first[b]; t < first[b + 1]; t++)
      for (long s = t; s < first[b + 1]; s++) {
        long ts = t * most + s - first[b], st = s * most + t - first[b];
        float bent_t = phi ? phi[t] : 1.0f, bent_s = phi ? phi[s] : 1.0f;
        /* One division after the other: the product of two totals may underflow. */
        float dots = products[ts] / total[t] / total[s];
        if (target[t] == target[s])
          dots += bent_t * bent_s;
        else
          dots -= bent_t * (met[ts] / total[s]) + bent_s * (met[st] / total[t]);
        dots *= miss[t] * miss[s];
        double entry = dots * dot(hidden + t * dim, hidden + s * dim, dim);
        long i = segment[t] % g, j = segment[s] % g;
        sums[i * g + j] += entry;
        if (s > t) sums[j * g + i] += entry;
      }
    for (long i = 0; i < g * g; i++) out[b * g * g + i] = (float)sums[i];
  }
}

/* outputs (rows, k): the projected gradients d_t, from sums (k, rows) of F, and table (vocab, k);
   phi may be null. */
void head_outputs(const float *sums, const float *table, const int64_t *target, const float *total,
                  const float *miss, const float *phi, long rows, long k, float *outputs) {
  for (long t = 0; t < rows; t++) {
    float own = phi ? miss[t] * phi[t] : miss[t], others = -miss[t] / total[t];
    for (long a = 0; a < k; a++)
      outputs[t * k + a] = others * sums[a * rows + t] + own * table[target[t] * k + a];
  }
}

/* Sixteen numbers, and the same with the place of each xor'ed with m. */
typedef float Lanes __attribute__((vector_size(64), aligned(4)));
#define TURN(v, m)                                                                             \
  __builtin_shufflevector(v, v, 0 ^ m, 1 ^ m, 2 ^ m, 3 ^ m, 4 ^ m, 5 ^ m, 6 ^ m, 7 ^ m, 8 ^ m, \
                          9 ^ m, 10 ^ m, 11 ^ m, 12 ^ m, 13 ^ m, 14 ^ m, 15 ^ m)

static void products(const float *y, const float *x, long rows, long a, long b, float scale,
                     float *restrict sum) {
  for (long t = 0; t < rows; t++)
    for (long i = 0; i < a; i++) {
      float factor = scale * y[t * a + i];
      for (long j = 0; j < b; j++) sum[i * b + j] += factor * x[t * b + j];
    }
}

/* The same with the sums in registers. */
static void products16(const float *y, const float *x, long rows, float scale, Lanes *out) {
  Lanes sum[16] = {{0}};
  for (long t = 0; t < rows; t++) {
    Lanes right = *(const Lanes *)(x + t * 16);
    for (int i = 0; i < 16; i++) sum[i] += y[t * 16 + i] * right;
  }
  for (int i = 0; i < 16; i++) out[i] += scale * sum[i];
}

static void add_products(const float *y, const float *x, long rows, long a, long b, float scale,
                         float *sum) {
  if (a == 16 && b == 16)
    products16(y, x, rows, scale, (Lanes *)sum);
  else
    products(y, x, rows, a, b, scale, sum);
}

/* out (segments, a, b) += scale times the sums over a segment's rows of y_t x_t^T, of y (rows, a),
   x (rows, b); segment s has the rows first[s] .. first[s + 1] - 1. */
void segment_products(const float *y, const float *x, const int64_t *first, long segments, long a,
                      long b, float scale, float *out) {
#pragma omp parallel for schedule(static) if (first[segments] * a * b > 16 * SMALL)
  for (long s = 0; s < segments; s++)
    add_products(y + first[s] * a, x + first[s] * b, first[s + 1] - first[s], a, b, scale,
                 out + s * a * b);
}

/* Sum of (row - mean), or of its squares; four sums of sixteen numbers, that none waits long. */
static inline __attribute__((always_inline)) float row_sum(const float *row, long cols, float mean,
                                                           const int squares) {
  Lanes sums[4] = {{0}};
  float rest = 0.0f, part[4];
  long c = 0;
  for (; c + 64 <= cols; c += 64)
    for (int i = 0; i < 4; i++) {
      Lanes own = *(const Lanes *)(row + c + 16 * i) - mean;
      sums[i] += squares ? own * own : own;
    }
  for (; c < cols; c++) rest += squares ? (row[c] - mean) * (row[c] - mean) : row[c] - mean;
  Lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int i = 0; i < 4; i++) part[i] = (sum[i] + sum[i + 4]) + (sum[i + 8] + sum[i + 12]);
  return rest + ((part[0] + part[1]) + (part[2] + part[3]));
}

enum { ALONE, RMS, CENTRED }; /* what sum_rows makes of x */

/* sum (cols): of rows from .. to - 1 of y, times what `kind` says of x: nothing,
   x / sqrt(mean x^2 + eps), or the same of x - mean x; (rows, cols). */
static void sum_rows(const float *y, const float *x, long from, long to, long cols, int kind,
                     float eps, float *restrict sum) {
  memset(sum, 0, sizeof(float) * cols);
  for (long t = from; t < to; t++) {
    const float *restrict row = y + t * cols;
    if (kind == ALONE) {
      for (long c = 0; c < cols; c++) sum[c] += row[c];
      continue;
    }
    const float *restrict other = x + t * cols;
    float mean = kind == CENTRED ? row_sum(other, cols, 0.0f, 0) / cols : 0.0f;
    float root = 1.0f / sqrtf(row_sum(other, cols, mean, 1) / cols + eps);
    for (long c = 0; c < cols; c++) sum[c] += row[c] * ((other[c] - mean) * root);
  }
}

/* out (segments, cols): sum_rows of each segment, which has `each` rows for every one of first. */
void segment_sums(const float *y, const float *x, const int64_t *first, long segments, long each,
                  long cols, int kind, float eps, float *out) {
#pragma omp parallel for schedule(static) if (first[segments] * each * cols > SMALL)
  for (long s = 0; s < segments; s++)
    sum_rows(y, x, first[s] * each, first[s + 1] * each, cols, kind, eps, out + s * cols);
}

/* Eight numbers, in both precisions. */
typedef float Floats __attribute__((vector_size(32), aligned(4)));
typedef double Doubles __attribute__((vector_size(64), aligned(8)));

static double sum_of(Doubles x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

/* value, error (count): of sketches a, b (count, k, k) what sketch_estimates.py defines; k > 1.
   work: (k) sums of columns. */
void sketch_dots(const float *a, const float *b, long count, long k, double *restrict work,
                 double *value, double *error) {
  double size = (double)k;
  for (long n = 0; n < count; n++) {
    Doubles eights = {0};
    double squares = 0.0, rows = 0.0, whole = 0.0, columns = 0.0;
    memset(work, 0, sizeof(double) * k);
    for (long i = 0; i < k; i++) {
      const float *left = a + (n * k + i) * k, *right = b + (n * k + i) * k;
      Doubles row = {0};
      double sum = 0.0;
      long j = 0;
      for (; j + 8 <= k; j += 8) {
        Doubles term = __builtin_convertvector(*(const Floats *)(left + j), Doubles) *
                       __builtin_convertvector(*(const Floats *)(right + j), Doubles);
        row += term;
        eights += term * term;
        *(Doubles *)(work + j) += term;
      }
      for (; j < k; j++) {
        double term = (double)left[j] * (double)right[j];
        sum += term;
        squares += term * term;
        work[j] += term;
      }
      sum += sum_of(row);
      whole += sum;
      rows += sum * sum;
    }
    squares += sum_of(eights);
    for (long j = 0; j < k; j++) columns += work[j] * work[j];
    /* Of terms without their factor k^2, which comes in at the end. */
    double scale = size * size, center = whole * whole / scale;
    double left_over = squares - (rows + columns) / size + center;
    /* Asked the other way round NaN would be taken for 0. */
    double least = (left_over < 0.0 ? 0.0 : left_over) / ((size - 1.0) * (size - 1.0));
    double between = (rows + columns) / size - 2.0 * center;
    double variance = between / (size * (size - 1.0)) / size - least / scale;
    value[n] = whole;
    error[n] = sqrt(variance <= 0.0 ? least / scale : variance) * scale;
  }
}

/* One step of a Walsh-Hadamard transform: v[i] and v[i ^ step] to sum and difference. */
static inline Lanes walsh(Lanes v, int step) {
  Lanes sign;
  for (int i = 0; i < 16; i++) sign[i] = i & step ? -1.0f : 1.0f;
  Lanes turned =
      step == 1 ? TURN(v, 1) : step == 2 ? TURN(v, 2) : step == 4 ? TURN(v, 4) : TURN(v, 8);
  return turned + sign * v;
}

/* sum[t quads] += the sixteen numbers at `at + t step` times signs, each at its place xor turn, for
   `count` rows t. */
static inline void turned_sums(const float *at, long step, long count, Lanes signs, int turn,
                               Lanes *sum, long quads) {
#define TURNED(m)                                                    \
  case m:                                                            \
    for (long t = 0; t < count; t++) {                               \
      Lanes own = *(const Lanes *)(at + t * step) * signs;           \
      sum[t * quads] += TURN(own, m);                                \
    }                                                                \
    break;
  switch (turn) {
    TURNED(0) TURNED(1) TURNED(2) TURNED(3) TURNED(4) TURNED(5) TURNED(6) TURNED(7)
    TURNED(8) TURNED(9) TURNED(10) TURNED(11) TURNED(12) TURNED(13) TURNED(14) TURNED(15)
  }
}

#define TILE 32      /* rows, of sixteen numbers, whose sums stand in the first-level cache */
#define MOST_QUADS 1024 /* sixteens of a row's sums */

/* What a projection of projection.py is known by: s_i (cols), turn of every K columns; K / 16. */
typedef struct {
  const float *sign;
  const int32_t *turn;
  long quads;
} Signs;

#ifdef __AVX512F__
/* sum[t] += K = 16 sums of row t, of `count` of them, which are summed in registers. */
static inline __attribute__((always_inline)) void sums16(const float *x, long cols, long stride,
                                                         Signs signs, const int count,
                                                         Lanes *sum) {
  const __m512i places =
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512 own[8];
  for (int t = 0; t < count; t++) own[t] = _mm512_setzero_ps();
  for (long c = 0; c < cols; c += 16) {
    __mmask16 inside = cols - c < 16 ? (__mmask16)((1 << (cols - c)) - 1) : 0xffff;
    __m512i turned = _mm512_xor_si512(places, _mm512_set1_epi32(signs.turn[c / 16] & 15));
    __m512 sign = _mm512_maskz_loadu_ps(inside, signs.sign + c);
    for (int t = 0; t < count; t++) {
      __m512 row = _mm512_maskz_loadu_ps(inside, x + t * stride + c);
      __builtin_prefetch(x + (t + count) * stride + c); /* rows to come */
      row = _mm512_permutexvar_ps(turned, _mm512_mul_ps(row, sign));
      own[t] = _mm512_add_ps(own[t], row);
    }
  }
  for (int t = 0; t < count; t++) sum[t] = (Lanes)own[t];
}
#endif

/* sum (rows, quads): numbers of K buckets of x (rows, cols); rows at most TILE / quads, or 1. */
static void bucket_sums(const float *x, long rows, long cols, long stride, Signs signs,
                        Lanes *sum) {
  long quads = signs.quads;
#ifdef __AVX512F__
  if (quads == 1) {
    for (long t = 0; t < rows; t += 8) {
      const float *at = x + t * stride;
      switch (rows - t) {
#define SUMS16(n)                                      \
  case n:                                              \
    sums16(at, cols, stride, signs, n, sum + t);       \
    break;
        SUMS16(1) SUMS16(2) SUMS16(3) SUMS16(4) SUMS16(5) SUMS16(6) SUMS16(7)
        default:
          sums16(at, cols, stride, signs, 8, sum + t);
      }
    }
    return;
  }
#endif
  float padded[TILE * 16];
  memset(sum, 0, sizeof(Lanes) * rows * quads);
  for (long c = 0; c < cols; c += 16) {
    long width = cols - c < 16 ? cols - c : 16, block = c / 16 / quads, place = c / 16 % quads;
    const float *at = x + c;
    long step = stride;
    Lanes own = {0};
    memcpy(&own, signs.sign + c, sizeof(float) * width);
    if (width < 16) {
      memset(padded, 0, sizeof padded);
      for (long t = 0; t < rows; t++)
        memcpy(padded + 16 * t, at + t * stride, sizeof(float) * width);
      at = padded, step = 16;
    }
    int turn = signs.turn[block];
    turned_sums(at, step, rows, own, turn & 15, sum + (place ^ (turn >> 4)), quads);
  }
}

/* out (rows, k): x (rows, cols), `stride` numbers from row to row, times the signs, added to what
   is there if `add`. */
static void project_rows(const float *x, long rows, long cols, long stride, Signs signs, long k,
                         int add, float *out) {
  long quads = signs.quads, tile = TILE / quads > 1 ? TILE / quads : 1;
  Lanes sum[MOST_QUADS > TILE ? MOST_QUADS : TILE];
  for (long first = 0; first < rows; first += tile) {
    long count = rows - first < tile ? rows - first : tile;
    bucket_sums(x + first * stride, count, cols, stride, signs, sum);
    for (long t = 0; t < count; t++) {
      Lanes *own = sum + t * quads;
      for (long q = 0; q < quads; q++) own[q] = walsh(walsh(walsh(walsh(own[q], 1), 2), 4), 8);
      for (long half = 1; half < quads; half *= 2)
        for (long q = 0; q < quads; q++)
          if (!(q & half)) {
            Lanes low = own[q], high = own[q ^ half];
            own[q] = low + high;
            own[q ^ half] = low - high;
          }
      float *restrict to = out + (first + t) * k;
      const float *from = (const float *)own;
      for (long i = 0; i < k; i++) to[i] = add ? to[i] + from[i] : from[i];
    }
  }
}

/* project_rows, shared out to threads. */
void project(const float *x, long rows, long cols, long stride, const float *sign,
             const int32_t *turn, long quads, long k, float *out) {
  Signs signs = {sign, turn, quads};
#pragma omp parallel for schedule(static) if (rows * cols > 4 * SMALL)
  for (long first = 0; first < rows; first += TILE)
    project_rows(x + first * stride, rows - first < TILE ? rows - first : TILE, cols, stride,
                 signs, k, 0, out + first * k);
}

/* A matrix (rows, cols) beside a linear layer: an input, or the gradient of an output. */
typedef struct {
  const float *x;
  int64_t stride, cols, sign, turn; /* the last two are the pointers of Signs */
  int64_t group;                    /* of an input; -1: of an output of the input before it */
} Side;

#define NARROW 2048 /* numbers of a projected side that stand in the first-level cache; k at most */

/* out[group] (segments, k, k) += scale times the sums over a segment's rows of (projected gradients
   of an input's outputs)_t (projected input)_t^T, for each input of `count` sides. */
void linear_sketches(const Side *side, long count, const int64_t *first, long segments, long quads,
                     long k, float scale, float *out) {
#pragma omp parallel for schedule(static) if (first[segments] * count > 1024)
  for (long s = 0; s < segments; s++) {
    float left[NARROW], right[NARROW];
    for (long from = first[s], rows; from < first[s + 1]; from += rows) {
      rows = first[s + 1] - from < NARROW / k ? first[s + 1] - from : NARROW / k;
      float *sum = out;
      for (long n = 0; n < count; n++) {
        const Side *own = side + n;
        Signs signs = {(const float *)own->sign, (const int32_t *)own->turn, quads};
        int input = own->group >= 0, more = n > 0 && own[-1].group < 0;
        if (input) sum = out + (own->group * segments + s) * k * k;
        project_rows(own->x + from * own->stride, rows, own->cols, own->stride, signs, k,
                     !input && more, input ? right : left);
        if (n + 1 < count && own[1].group < 0) continue;
        add_products(left, right, rows, k, k, scale, sum);
      }
    }
  }
}

/* Beside a weight that is a vector (cols): what sum_rows makes its gradient of; x may be null. */
typedef struct {
  const float *y, *x;
  int64_t each, cols; /* rows (., cols), `each` of them for every token */
  int64_t kind, sign, turn, quads, group;
  double eps;
} Vector;

/* norm_sq[group] (segments) += squares of the gradients of each of `count` vectors, sketch[group]
   (segments, k) += scale times their projections. */
void vector_sketches(const Vector *vector, long count, const int64_t *first, long segments, long k,
                     float scale, float *norm_sq, float *sketch) {
#pragma omp parallel for schedule(static) if (first[segments] * count > 1024)
  for (long s = 0; s < segments; s++)
    for (const Vector *v = vector; v < vector + count; v++) {
      Signs signs = {(const float *)v->sign, (const int32_t *)v->turn, v->quads};
      long place = v->group * segments + s;
      float sum[v->cols], own[k];
      sum_rows(v->y, v->x, first[s] * v->each, first[s + 1] * v->each, v->cols, v->kind, v->eps,
               sum);
      norm_sq[place] += row_sum(sum, v->cols, 0.0f, 1);
      project_rows(sum, 1, v->cols, v->cols, signs, k, 0, own);
      for (long i = 0; i < k; i++) sketch[place * k + i] += scale * own[i];
    }
}
