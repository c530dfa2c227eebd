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

static inline float larger(float a, float b) { return a > b ? a : b; }

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

/* A head that is one tile: z (vocab, rows), logits, becomes e, with -total at the targets if `keep`.
   state (3, rows): maximum, total, log_odds. work: (PARTS 6 + 1, rows). */
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

/* out (count, segments, a, b): of each of `count` pairs of matrices y (rows, a), x (rows, b) the sum
   over a segment's rows of y_t x_t^T; segment s has the rows first[s] .. first[s + 1] - 1. */
void segment_products(const float *const *y, const float *const *x, long count, const int64_t *first,
                      long segments, long a, long b, float *out) {
#pragma omp parallel for schedule(static) if (count * first[segments] * a * b > 16 * SMALL)
  for (long n = 0; n < count * segments; n++) {
    const float *left = y[n / segments], *right = x[n / segments];
    long begin = first[n % segments], end = first[n % segments + 1];
    float *restrict sum = out + n * a * b;
    memset(sum, 0, sizeof(float) * a * b);
    for (long t = begin; t < end; t++)
      for (long i = 0; i < a; i++) {
        float factor = left[t * a + i];
        for (long j = 0; j < b; j++) sum[i * b + j] += factor * right[t * b + j];
      }
  }
}

/* out (segments, cols): sums over a segment's rows of y, times x where it is not null, (rows, cols);
   a segment has `each` rows for every one of first. */
void segment_sums(const float *y, const float *x, const int64_t *first, long segments, long each,
                  long cols, float *out) {
#pragma omp parallel for schedule(static) if (first[segments] * each * cols > SMALL)
  for (long s = 0; s < segments; s++) {
    float *restrict sum = out + s * cols;
    memset(sum, 0, sizeof(float) * cols);
    for (long t = first[s] * each; t < first[s + 1] * each; t++) {
      const float *restrict row = y + t * cols;
      if (x) {
        const float *restrict other = x + t * cols;
        for (long c = 0; c < cols; c++) sum[c] += row[c] * other[c];
      } else {
        for (long c = 0; c < cols; c++) sum[c] += row[c];
      }
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
    /* Sums so far; of means they are these over k and k^2, of terms scaled by k^2 these times it. */
    double scale = size * size, center = whole * whole / scale;
    double left_over = squares - (rows + columns) / size + center;
    double least = (left_over > 0.0 ? left_over : 0.0) / ((size - 1.0) * (size - 1.0));
    double between = (rows + columns) / size - 2.0 * center; /* k times the sums of squares of means */
    double variance = between / (size * (size - 1.0)) / size - least / scale;
    value[n] = whole;
    error[n] = sqrt(variance > 0.0 ? variance : least / scale) * scale;
  }
}

/* Sixteen numbers, and the same with the place of each xor'ed with m. */
typedef float Lanes __attribute__((vector_size(64), aligned(4)));
#define TURN(v, m)                                                                             \
  __builtin_shufflevector(v, v, 0 ^ m, 1 ^ m, 2 ^ m, 3 ^ m, 4 ^ m, 5 ^ m, 6 ^ m, 7 ^ m, 8 ^ m, \
                          9 ^ m, 10 ^ m, 11 ^ m, 12 ^ m, 13 ^ m, 14 ^ m, 15 ^ m)
#define TILE 32 /* rows whose sums stand in the first-level cache */

/* (-1)^(number of ones in place & step): the signs of one step of a Walsh-Hadamard transform. */
static inline Lanes walsh(Lanes v, int step) {
  Lanes sign;
  for (int i = 0; i < 16; i++) sign[i] = i & step ? -1.0f : 1.0f;
  Lanes turned = step == 1 ? TURN(v, 1) : step == 2 ? TURN(v, 2) : step == 4 ? TURN(v, 4) : TURN(v, 8);
  return turned + sign * v;
}

/* out (rows, 16): x (rows, cols), `stride` numbers from row to row, times the signs of projection.py
   for k = 16, added to what is there if `add`. sign (cols): its s_i; turn: of every 16 columns. */
void project16(const float *x, long rows, long cols, long stride, const float *sign,
               const uint8_t *turn, int add, float *out) {
  long blocks = cols / 16, rest = cols % 16;
#pragma omp parallel for schedule(static) if (rows * cols > 4 * SMALL)
  for (long first = 0; first < rows; first += TILE) {
    long count = rows - first < TILE ? rows - first : TILE;
    Lanes sum[TILE];
    float padded[TILE * 16];
    memset(sum, 0, sizeof sum);
    for (long b = 0; b < blocks + (rest > 0); b++) {
      Lanes signs = {0};
      const float *at = x + first * stride + 16 * b;
      long step = stride;
      if (b == blocks) {
        memset(padded, 0, sizeof padded);
        for (long t = 0; t < count; t++) memcpy(padded + 16 * t, at + t * stride, sizeof(float) * rest);
        at = padded, step = 16;
      }
      memcpy(&signs, sign + 16 * b, sizeof(float) * (b < blocks ? 16 : rest));
#define TURNED(m)                                                           \
  case m:                                                                   \
    for (long t = 0; t < count; t++) {                                      \
      Lanes own = *(const Lanes *)(at + t * step) * signs;                  \
      sum[t] += TURN(own, m);                                               \
    }                                                                       \
    break;
      switch (turn[b]) {
        TURNED(0) TURNED(1) TURNED(2) TURNED(3) TURNED(4) TURNED(5) TURNED(6) TURNED(7)
        TURNED(8) TURNED(9) TURNED(10) TURNED(11) TURNED(12) TURNED(13) TURNED(14) TURNED(15)
      }
    }
    for (long t = 0; t < count; t++) {
      Lanes found = walsh(walsh(walsh(walsh(sum[t], 1), 2), 4), 8), before = {0};
      float *place = out + (first + t) * 16;
      if (add) memcpy(&before, place, sizeof before);
      found += before;
      memcpy(place, &found, sizeof found);
    }
  }
}
