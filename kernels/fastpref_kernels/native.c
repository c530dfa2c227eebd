/* Passes over memory for which torch needs several calls, on a CPU, in float32; compiled when first
   needed (_native.py). Matrices are contiguous, row by row.

   Loops are written for the compiler to vectorise along a row. Every sum is over a fixed cut of the
   rows, so that no bit depends on the number of threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>

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

/* Sixteen numbers, and as many of them as a register holds. Compilers keep more than that in memory,
   and take a shuffle of more apart into single numbers. */
typedef float Lanes __attribute__((vector_size(64), aligned(4)));
#if defined(__AVX512F__)
#define WIDE 16
#define TURN(v, m)                                                                             \
  __builtin_shufflevector(v, v, 0 ^ m, 1 ^ m, 2 ^ m, 3 ^ m, 4 ^ m, 5 ^ m, 6 ^ m, 7 ^ m, 8 ^ m, \
                          9 ^ m, 10 ^ m, 11 ^ m, 12 ^ m, 13 ^ m, 14 ^ m, 15 ^ m)
#elif defined(__AVX__)
#define WIDE 8
#define TURN(v, m) \
  __builtin_shufflevector(v, v, 0 ^ m, 1 ^ m, 2 ^ m, 3 ^ m, 4 ^ m, 5 ^ m, 6 ^ m, 7 ^ m)
#else
#define WIDE 4
#define TURN(v, m) __builtin_shufflevector(v, v, 0 ^ m, 1 ^ m, 2 ^ m, 3 ^ m)
#endif
#define PIECES (16 / WIDE)
typedef float Piece __attribute__((vector_size(4 * WIDE), aligned(4)));
#define AHEAD 2048 /* numbers between those in work and those asked for, in the order of memory */
/* TURN (v, m), m < WIDE: v with the place of each number xor'ed with m. */

static void products(const float *y, const float *x, long rows, long a, long b, float scale,
                     float *restrict sum) {
  for (long t = 0; t < rows; t++)
    for (long i = 0; i < a; i++) {
      float factor = scale * y[t * a + i];
      for (long j = 0; j < b; j++) sum[i * b + j] += factor * x[t * b + j];
    }
}

/* The same for a, b = 16, with sums in registers, as many as there are. */
static void products16(const float *y, const float *x, long rows, float scale,
                       float *restrict sum) {
  enum { HELD = WIDE == 16 ? 16 : WIDE / 2 };
  for (int i = 0; i < 16; i += HELD) {
    Piece own[HELD][PIECES] = {{{0}}};
    for (long t = 0; t < rows; t++)
      for (int p = 0; p < PIECES; p++) {
        Piece right = *(const Piece *)(x + t * 16 + p * WIDE);
        for (int j = 0; j < HELD; j++) own[j][p] += y[t * 16 + i + j] * right;
      }
    for (int j = 0; j < HELD; j++)
      for (int p = 0; p < PIECES; p++) *(Piece *)(sum + (i + j) * 16 + p * WIDE) += scale * own[j][p];
  }
}

static void add_products(const float *y, const float *x, long rows, long a, long b, float scale,
                         float *sum) {
  if (a == 16 && b == 16)
    products16(y, x, rows, scale, sum);
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

/* Sum of (row - mean), or of its squares; eight sums of pieces, that none waits long. */
static inline __attribute__((always_inline)) float row_sum(const float *row, long cols, float mean,
                                                           const int squares) {
  enum { SUMS = 8 };
  Piece sums[SUMS] = {{0}};
  float rest = 0.0f;
  long c = 0;
  for (; c + SUMS * WIDE <= cols; c += SUMS * WIDE)
    for (int i = 0; i < SUMS; i++) {
      if (i % PIECES == 0) __builtin_prefetch(row + c + WIDE * i + AHEAD);
      Piece own = *(const Piece *)(row + c + WIDE * i) - mean;
      sums[i] += squares ? own * own : own;
    }
  for (; c < cols; c++) rest += squares ? (row[c] - mean) * (row[c] - mean) : row[c] - mean;
  for (int half = SUMS / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  float part[WIDE];
  memcpy(part, sums, sizeof part);
  for (int half = WIDE / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) part[i] += part[i + half];
  return rest + part[0];
}

enum { ALONE, RMS, CENTRED }; /* what sum_rows makes of x */

/* sum (cols): of rows from .. to - 1 of y, times what `kind` says of x: nothing,
   x / sqrt(mean x^2 + eps), or the same of x - mean x; (rows, cols). */
static void sum_rows(const float *y, const float *x, long from, long to, long cols, int kind,
                     float eps, float *restrict sum) {
  memset(sum, 0, sizeof(float) * cols);
  if (kind == ALONE) {
    for (long t = from; t < to; t++) {
      const float *restrict row = y + t * cols;
      for (long c = 0; c < cols; c++) sum[c] += row[c];
    }
    return;
  }
  enum { ROWS = 4 }; /* whose products are added to the sums at a time */
  for (; from < to; from += ROWS) {
    const float *row[ROWS], *other[ROWS];
    float mean[ROWS], root[ROWS];
    for (int i = 0; i < ROWS; i++) {
      long t = from + i < to ? from + i : from;
      row[i] = y + t * cols, other[i] = x + t * cols;
      mean[i] = kind == CENTRED ? row_sum(other[i], cols, 0.0f, 0) / cols : 0.0f;
      root[i] = 1.0f / sqrtf(row_sum(other[i], cols, mean[i], 1) / cols + eps);
      if (t < from + i) root[i] = 0.0f;
    }
    long c = 0;
    for (; c + 16 <= cols; c += 16) {
      for (int i = 0; i < ROWS; i++) __builtin_prefetch(row[0] + ROWS * c + 16 * i + AHEAD);
      for (int p = 0; p < PIECES; p++) {
        Piece *place = (Piece *)(sum + c) + p, own = *place;
        for (int i = 0; i < ROWS; i++) {
          Piece left = ((const Piece *)(row[i] + c))[p], right = ((const Piece *)(other[i] + c))[p];
          own += left * ((right - mean[i]) * root[i]);
        }
        *place = own;
      }
    }
    for (; c < cols; c++)
      for (int i = 0; i < ROWS; i++) sum[c] += row[i][c] * ((other[i][c] - mean[i]) * root[i]);
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

/* Walsh-Hadamard transform of sixteen numbers. */
static inline void walsh16(float *v) {
  Piece own[PIECES];
  memcpy(own, v, sizeof own);
#define STEP(m)                                                    \
  for (int p = 0; m < WIDE && p < PIECES; p++) {                   \
    Piece sign;                                                    \
    for (int i = 0; i < WIDE; i++) sign[i] = i & m ? -1.0f : 1.0f; \
    own[p] = TURN(own[p], (m % WIDE)) + sign * own[p];             \
  }
  STEP(1) STEP(2) STEP(4) STEP(8)
  for (int half = 1; half < PIECES; half *= 2)
    for (int p = 0; p < PIECES; p++)
      if (!(p & half)) {
        Piece low = own[p], high = own[p ^ half];
        own[p] = low + high;
        own[p ^ half] = low - high;
      }
  memcpy(v, own, sizeof own);
}

/* What such a transform does between blocks of sixteen numbers, as many as a power of two. */
static void walsh_blocks(float *v, long blocks) {
  for (long half = 1; half < blocks; half *= 2)
    for (long i = 0; i < blocks; i++)
      for (long j = 0; j < 16 && !(i & half); j++) {
        float low = v[16 * i + j], high = v[16 * (i ^ half) + j];
        v[16 * i + j] = low + high;
        v[16 * (i ^ half) + j] = low - high;
      }
}

/* sum[t quads] += the sixteen numbers at `at + t step` times signs, each at its place xor turn, for
   `count` rows t. */
static inline void turned_sums(const float *at, long step, long count, const float *signs, int turn,
                               Lanes *sum, long quads) {
#define TURNED(m)                                                                    \
  case m:                                                                            \
    for (long t = 0; t < count; t++)                                                 \
      for (int p = 0; p < PIECES; p++) {                                             \
        long from = (p ^ (m / WIDE)) * WIDE;                                         \
        Piece own = *(const Piece *)(at + t * step + from) * *(const Piece *)(signs + from); \
        *((Piece *)(sum + t * quads) + p) += TURN(own, (m % WIDE));                  \
      }                                                                              \
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

#if defined(__has_builtin)
#if __has_builtin(__builtin_shuffle) /* not clang's */
#define AT_ONCE (WIDE == 16 ? 8 : 4) /* rows of sixteen sums in registers */

/* own[t] += sixteen numbers at x + t stride, times the sign of each, each at its place xor turn; the
   pieces that a turn exchanges are read the other way round. */
static inline __attribute__((always_inline)) void block16(const float *x, long stride,
                                                          const float *sign, int turn,
                                                          const int count, Piece own[][PIECES]) {
  typedef int32_t Places __attribute__((vector_size(4 * WIDE)));
  Places places;
  for (int i = 0; i < WIDE; i++) places[i] = i ^ (turn & (WIDE - 1));
  for (int p = 0; p < PIECES; p++) {
    long from = WIDE * p ^ (turn & (16 - WIDE));
    Places flips = (Places)__builtin_shuffle(*(const Piece *)(sign + from), places) & INT32_MIN;
    for (int t = 0; t < count; t++) {
      Piece row = __builtin_shuffle(*(const Piece *)(x + t * stride + from), places);
      own[t][p] += (Piece)((Places)row ^ flips);
    }
  }
}

/* bucket_sums for K = 16 of `count` rows, at most AT_ONCE. */
static inline __attribute__((always_inline)) void sums16(const float *x, long cols, long stride,
                                                         Signs signs, const int count, int add,
                                                         Lanes *sum) {
  Piece own[AT_ONCE][PIECES] = {{{0}}};
  if (add) memcpy(own, sum, sizeof own[0] * count);
  long c = 0;
  for (; c + 16 <= cols; c += 16) {
    for (int t = 0; t < count; t++) __builtin_prefetch(x + c * count + 16 * t + AHEAD);
    block16(x + c, stride, signs.sign + c, signs.turn[c / 16], count, own);
  }
  if (c < cols) {
    float rows[AT_ONCE * 16] = {0}, sign[16] = {0};
    memcpy(sign, signs.sign + c, sizeof(float) * (cols - c));
    for (int t = 0; t < count; t++)
      memcpy(rows + 16 * t, x + t * stride + c, sizeof(float) * (cols - c));
    block16(rows, 16, sign, signs.turn[c / 16], count, own);
  }
  memcpy(sum, own, sizeof own[0] * count);
}
#endif
#endif

/* sum (rows, quads): numbers of K buckets of x (rows, cols), added to what is there if `add`; rows at
   most TILE / quads, or 1. */
static __attribute__((noinline)) void bucket_sums(const float *x, long rows, long cols,
                                                  long stride, Signs signs, int add,
                                                  Lanes *sum) {
  long quads = signs.quads;
#ifdef AT_ONCE
  if (quads == 1) {
    for (long t = 0; t < rows; t += AT_ONCE) {
      const float *at = x + t * stride;
      switch (rows - t) {
#define SUMS16(n)                                      \
  case n:                                              \
    sums16(at, cols, stride, signs, n, add, sum + t);  \
    break;
        SUMS16(1) SUMS16(2) SUMS16(3)
#if WIDE == 16
        SUMS16(4) SUMS16(5) SUMS16(6) SUMS16(7)
#endif
        default:
          sums16(at, cols, stride, signs, AT_ONCE, add, sum + t);
      }
    }
    return;
  }
#endif
  float padded[TILE * 16];
  if (!add) memset(sum, 0, sizeof(Lanes) * rows * quads);
  for (long c = 0; c < cols; c += 16) {
    long width = cols - c < 16 ? cols - c : 16, block = c / 16 / quads, place = c / 16 % quads;
    const float *at = x + c;
    long step = stride;
    float own[16] = {0};
    memcpy(own, signs.sign + c, sizeof(float) * width);
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
    bucket_sums(x + first * stride, count, cols, stride, signs, 0, sum);
    for (long t = 0; t < count; t++) {
      Lanes *own = sum + t * quads;
      for (long q = 0; q < quads; q++) walsh16((float *)(own + q));
      walsh_blocks((float *)own, quads);
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

static Signs signs_of(const Side *side, long quads) {
  Signs signs = {(const float *)side->sign, (const int32_t *)side->turn, quads};
  return signs;
}

/* linear_sketches of one segment for K = 16. A transform of sums is the sum of transforms, so it is
   done once for the products of all rows. */
static void linear_sketches16(const Side *side, long count, long first, long end, long s,
                              long segments, long k, float scale, float *out) {
  Lanes left[TILE], right[TILE];
  for (long n = 0, next; n < count; n = next) {
    const Side *input = side + n;
    for (next = n + 1; next < count && side[next].group < 0;) next++;
    float sum[16 * 16] = {0};
    for (long from = first; from < end; from += TILE) {
      long rows = end - from < TILE ? end - from : TILE;
      for (const Side *own = input; own < side + next; own++)
        bucket_sums(own->x + from * own->stride, rows, own->cols, own->stride, signs_of(own, 1),
                    own > input + 1, own == input ? right : left);
      products16((float *)left, (float *)right, rows, 1.0f, sum);
    }
    for (int i = 0; i < 16; i++) walsh16(sum + 16 * i);
    walsh_blocks(sum, 16);
    float *own = out + (input->group * segments + s) * k * k;
    for (long i = 0; i < k; i++)
      for (long j = 0; j < k; j++) own[i * k + j] += scale * sum[i * 16 + j];
  }
}

/* out[group] (segments, k, k) += scale times the sums over a segment's rows of (projected gradients
   of an input's outputs)_t (projected input)_t^T, for each input of `count` sides. */
void linear_sketches(const Side *side, long count, const int64_t *first, long segments, long quads,
                     long k, float scale, float *out) {
#pragma omp parallel for schedule(static) if (first[segments] * count > 1024)
  for (long s = 0; s < segments; s++) {
    if (quads == 1) {
      linear_sketches16(side, count, first[s], first[s + 1], s, segments, k, scale, out);
      continue;
    }
    float left[NARROW], right[NARROW];
    for (long from = first[s], rows; from < first[s + 1]; from += rows) {
      rows = first[s + 1] - from < NARROW / k ? first[s + 1] - from : NARROW / k;
      float *sum = out;
      for (long n = 0; n < count; n++) {
        const Side *own = side + n;
        int input = own->group >= 0, more = n > 0 && own[-1].group < 0;
        if (input) sum = out + (own->group * segments + s) * k * k;
        project_rows(own->x + from * own->stride, rows, own->cols, own->stride,
                     signs_of(own, quads), k, !input && more, input ? right : left);
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
