/* Softmax over a vocabulary: whole rows of logits, or blocks of columns that stay in the cache. */

#include "common.h"

static inline void times(float *x, long n, float factor) {
  if (factor != 1.0f)
    for (long i = 0; i < n; i++) x[i] *= factor;
}

/* y = e^z, z = x − shift; their sum, and Σ e^z z in `dot`: a term that vanishes adds nothing to it, also where z is −∞. */
static inline float exp_row(const float *x, float *y, long n, float shift, float *dot) {
  long whole = n / W * W;
  vec sums = zero(), dots = zero();
  for (long i = 0; i < whole; i += W) {
    vec z = load(x + i) - shift, e = vexp(z);
    store(y + i, e);
    sums += e;
    dots += e * choose(e > zero(), z, zero());
  }
  float sum = sum_of(sums);
  *dot = sum_of(dots);
  for (long i = whole; i < n; i++) {
    float z = x[i] - shift, e = expf(z);
    y[i] = e;
    sum += e;
    *dot += e > 0 ? e * z : 0;
  }
  return sum;
}

/* Rows of logits (R, V), times `factor`: log p[target], the entropy in nats where `entropy` is given, and where `slope`
   is given p − onehot(target), written to (R, V). One row at a time: it stays in the cache between its passes.
   Returns 1, and leaves its row alone, where a target is not in the vocabulary. */
int score(float *logit, const int64_t *target, float factor, float *logp, float *entropy, float *slope, long R, long V) {
  int failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed)
  for (long row = 0; row < R; row++) {
    if (target[row] < 0 || target[row] >= V) {
      failed = 1;
      continue;
    }
    float *x = logit + row * V, *y = slope ? slope + row * V : x, dot;
    times(x, V, factor);
    float top = largest(x, V), at = x[target[row]], sum = exp_row(x, y, V, top, &dot), log_sum = logf(sum);
    logp[row] = at - top - log_sum;
    if (entropy) entropy[row] = log_sum - dot / sum;
    if (slope) {
      times(y, V, 1.0f / sum);
      y[target[row]] = expm1f(logp[row]);
    }
  }
  return failed;
}

/* One block of columns, (R, C) from column `first` of the vocabulary on, taken in after those before it. Of each row,
   `kept` (4, R) holds the largest logit so far, top, then Σ e^(x − top), Σ e^(x − top) (x − top) and the target's x.
   Leaves e^(x − top) in the block, 0 at the target, and in `shrink` what sums made before are to be multiplied by. */
void fold(float *logit, const int64_t *target, float factor, float *kept, float *shrink, long first, long R, long C) {
#pragma omp parallel for schedule(static)
  for (long row = 0; row < R; row++) {
    float *x = logit + row * C, *top = kept + row, *sum = top + R, *dot = sum + R, *at = dot + R, more;
    long place = target[row] - first;
    int here = place >= 0 && place < C;
    times(x, C, factor);
    float new_top = largest(x, C);
    if (*top > new_top) new_top = *top;
    float shift = new_top == -INFINITY ? 0 : new_top, gap = *sum > 0 ? *top - shift : 0, less = expf(gap);
    if (here) *at = x[place];
    float fresh = exp_row(x, x, C, shift, &more);
    if (here) x[place] = 0;
    *sum *= less; /* before it meets the gap, which may be as large as a number can be */
    *dot = *dot * less + *sum * gap + more;
    *sum += fresh;
    *top = new_top;
    shrink[row] = less;
  }
}

/* The same block again once the whole rows are known: p − onehot(target) in place of the logits. `lse` is the logarithm
   of a row's sum of exponentials. */
void unfold(float *logit, const int64_t *target, float factor, const float *lse, const float *logp, long first, long R,
            long C) {
#pragma omp parallel for schedule(static)
  for (long row = 0; row < R; row++) {
    float *x = logit + row * C, unused;
    long place = target[row] - first;
    times(x, C, factor);
    exp_row(x, x, C, lse[row], &unused);
    if (place >= 0 && place < C) x[place] = expm1f(logp[row]);
  }
}
