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
