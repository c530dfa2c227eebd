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

/* out[group[n]] (segments, a, b) += scale times the sums over a segment's rows of y_t x_t^T, for
   each of `count` pairs of matrices y (rows, a), x (rows, b); segment s has the rows first[s] ..
   first[s + 1] - 1. */
void segment_products(const float *const *y, const float *const *x, const int64_t *group,
                      long count, const int64_t *first, long segments, long a, long b, float scale,
                      float *out) {
#pragma omp parallel for schedule(static) if (count * first[segments] * a * b > 16 * SMALL)
  for (long s = 0; s < segments; s++)
    for (long n = 0; n < count; n++) {
      const float *left = y[n] + first[s] * a, *right = x[n] + first[s] * b;
      float *sum = out + (group[n] * segments + s) * a * b;
      long rows = first[s + 1] - first[s];
      if (a == 16 && b == 16)
        products16(left, right, rows, scale, (Lanes *)sum);
      else
        products(left, right, rows, a, b, scale, sum);
    }
}

/* Sum of (row - mean), or of its squares. */
static float row_sum(const float *row, long cols, float mean, int squares) {
  Lanes sum = {0};
  float rest = 0.0f;
  long c = 0;
  for (; c + 16 <= cols; c += 16) {
    Lanes own = *(const Lanes *)(row + c) - mean;
    sum += squares ? own * own : own;
  }
  for (; c < cols; c++) rest += squares ? (row[c] - mean) * (row[c] - mean) : row[c] - mean;
  for (int i = 0; i < 16; i++) rest += sum[i];
  return rest;
}

enum { ALONE, TIMES, RMS, CENTRED }; /* what segment_sums makes of x */

/* out (segments, cols): sums over a segment's rows of y, times what `kind` says of x: nothing, x,
   x / sqrt(mean x^2 + eps), or the same of x - mean x; (rows, cols). A segment has `each` rows for
   every one of first. */
void segment_sums(const float *y, const float *x, const int64_t *first, long segments, long each,
                  long cols, int kind, float eps, float *out) {
#pragma omp parallel for schedule(static) if (first[segments] * each * cols > SMALL)
  for (long s = 0; s < segments; s++) {
    float *restrict sum = out + s * cols;
    memset(sum, 0, sizeof(float) * cols);
    for (long t = first[s] * each; t < first[s + 1] * each; t++) {
      const float *restrict row = y + t * cols;
      if (kind == ALONE) {
        for (long c = 0; c < cols; c++) sum[c] += row[c];
        continue;
      }
      const float *restrict other = x + t * cols;
      float mean = kind == CENTRED ? row_sum(other, cols, 0.0f, 0) / cols : 0.0f;
      float root = kind == TIMES ? 1.0f : 1.0f / sqrtf(row_sum(other, cols, mean, 1) / cols + eps);
      for (long c = 0; c < cols; c++) sum[c] += row[c] * ((other[c] - mean) * root);
    }
  }
}

/* value, error (count): of sketches a, b (count, k, k) what sketch_estimates.py defines; k > 1.
   work: (k) sums of columns. */
void sketch_dots(const float *a, const float *b, long count, long k, double *work, double *value,
                 double *error) {
  double size = (double)k;
  for (long n = 0; n < count; n++) {
    const float *left = a + n * k * k, *right = b + n * k * k;
    double squares = 0.0, rows = 0.0, whole = 0.0, columns = 0.0;
    memset(work, 0, sizeof(double) * k);
    for (long i = 0; i < k; i++) {
      double row = 0.0;
      for (long j = 0; j < k; j++) {
        double term = (double)left[i * k + j] * (double)right[i * k + j];
        row += term;
        squares += term * term;
        work[j] += term;
      }
      whole += row;
      rows += row * row;
    }
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

/* out (rows, k): x (rows, cols), `stride` numbers from row to row, times the signs of
   projection.py, added to what is there if `add`. quads: K / 16, at most MOST_QUADS; sign (cols):
   s_i; turn: of every K columns. */
void project(const float *x, long rows, long cols, long stride, const float *sign,
             const int32_t *turn, long quads, long k, int add, float *out) {
  long tile = TILE / quads > 1 ? TILE / quads : 1;
#pragma omp parallel for schedule(static) if (rows * cols > 4 * SMALL)
  for (long first = 0; first < rows; first += tile) {
    long count = rows - first < tile ? rows - first : tile;
    Lanes sum[MOST_QUADS > TILE ? MOST_QUADS : TILE];
    float padded[TILE * 16];
    memset(sum, 0, sizeof(Lanes) * tile * quads);
    for (long c = 0; c < cols; c += 16) {
      long width = cols - c < 16 ? cols - c : 16, block = c / 16 / quads, place = c / 16 % quads;
      const float *at = x + first * stride + c;
      long step = stride;
      Lanes signs = {0};
      memcpy(&signs, sign + c, sizeof(float) * width);
      if (width < 16) {
        memset(padded, 0, sizeof padded);
        for (long t = 0; t < count; t++)
          memcpy(padded + 16 * t, at + t * stride, sizeof(float) * width);
        at = padded, step = 16;
      }
      Lanes *own = sum + (place ^ (turn[block] >> 4));
      turned_sums(at, step, count, signs, turn[block] & 15, own, quads);
    }
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
