/* What stands between a layer's matrix products, in float32, each in one pass over memory.

   Axes: T tokens, D width, n heads of size E. Sums over tokens are kept per thread and added in the order of threads. */

#include "common.h"

#include <omp.h>

/* y = x · r ⊙ w, r = (mean x² + eps)^−½ over the last axis. */
static float norm_row(const float *x, const float *w, float *y, long D, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (long i = 0; i < D; i++) sum += x[i] * x[i];
  float r = 1.0f / sqrtf(sum / D + eps);
#pragma omp simd
  for (long i = 0; i < D; i++) y[i] = x[i] * r * w[i];
  return r;
}

/* dx = r (g ⊙ w − x̂ mean(g ⊙ w ⊙ x̂)) [+ more];  dw += g ⊙ x̂;  x̂ = x · r. `dx` may be `g`. */
static void norm_row_backward(const float *g, const float *x, float r, const float *w, const float *more, float *dx,
                              float *dw, long D) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (long i = 0; i < D; i++) dot += g[i] * w[i] * x[i];
  float share = dot * r * r / D;
  if (dw) {
#pragma omp simd
    for (long i = 0; i < D; i++) dw[i] += g[i] * x[i] * r;
  }
  if (more) {
#pragma omp simd
    for (long i = 0; i < D; i++) dx[i] = r * (g[i] * w[i] - x[i] * share) + more[i];
  } else {
#pragma omp simd
    for (long i = 0; i < D; i++) dx[i] = r * (g[i] * w[i] - x[i] * share);
  }
}

void norm(const float *x, const float *w, float *y, float *r, long T, long D, float eps) {
#pragma omp parallel for schedule(static)
  for (long t = 0; t < T; t++) r[t] = norm_row(x + t * D, w, y + t * D, D, eps);
}

/* `sums`: (threads, D) zeros, or NULL where the weight needs no gradient; `dw` is where they are added. */
static void add_sums(const float *sums, long threads, float *dw, long D) {
  for (long i = 0; i < D; i++) {
    float sum = 0;
    for (long t = 0; t < threads; t++) sum += sums[t * D + i];
    dw[i] = sum;
  }
}

/* `dw` NULL: no gradient of the weight. Returns 1 where there was no memory. */
int norm_backward(const float *g, const float *x, const float *r, const float *w, const float *more, float *dx, float *dw,
                  long T, long D) {
  long threads = omp_get_max_threads();
  float *sums = dw ? calloc(threads * D, sizeof(float)) : NULL;
  if (dw && !sums) return 1;
#pragma omp parallel
  {
    float *mine = sums ? sums + omp_get_thread_num() * D : NULL;
#pragma omp for schedule(static)
    for (long t = 0; t < T; t++)
      norm_row_backward(g + t * D, x + t * D, r[t], w, more ? more + t * D : NULL, dx + t * D, mine, D);
  }
  if (sums) add_sums(sums, threads, dw, D);
  free(sums);
  return 0;
}

/* Pairs (i, i + E/2) turned by a token's angle; `cos` and `sin` are (T, E). `y` may be `x`. */
static void turn_head(const float *x, const float *cos, const float *sin, float *y, long E) {
  long half = E / 2;
#pragma omp simd
  for (long i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    y[i] = a * cos[i] - b * sin[i];
    y[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

static void turn_back(const float *g, const float *cos, const float *sin, float *d, long E) {
  long half = E / 2;
#pragma omp simd
  for (long i = 0; i < half; i++) {
    float a = g[i], b = g[i + half];
    d[i] = a * cos[i] + b * sin[i + half];
    d[i + half] = b * cos[i + half] - a * sin[i];
  }
}

/* Heads (T, n, E), normed where `w` is given, then turned. */
void turn(const float *x, const float *w, float eps, const float *cos, const float *sin, float *y, float *r, long T, long n,
          long E) {
#pragma omp parallel for schedule(static)
  for (long t = 0; t < T; t++)
    for (long h = 0; h < n; h++) {
      long at = (t * n + h) * E;
      if (w) r[t * n + h] = norm_row(x + at, w, y + at, E, eps);
      turn_head(w ? y + at : x + at, cos + t * E, sin + t * E, y + at, E);
    }
}

int turn_backward(const float *g, const float *x, const float *w, const float *r, const float *cos, const float *sin,
                  float *dx, float *dw, long T, long n, long E) {
  long threads = omp_get_max_threads();
  float *sums = dw ? calloc(threads * E, sizeof(float)) : NULL;
  if (dw && !sums) return 1;
#pragma omp parallel
  {
    float *mine = sums ? sums + omp_get_thread_num() * E : NULL;
#pragma omp for schedule(static)
    for (long t = 0; t < T; t++)
      for (long h = 0; h < n; h++) {
        long at = (t * n + h) * E;
        turn_back(g + at, cos + t * E, sin + t * E, dx + at, E);
        if (w) norm_row_backward(dx + at, x + at, r[t * n + h], w, NULL, dx + at, mine, E);
      }
  }
  if (sums) add_sums(sums, threads, dw, E);
  free(sums);
  return 0;
}

void gate(const float *g, const float *u, float *h, long n) {
  long whole = n / W * W;
#pragma omp parallel for schedule(static)
  for (long i = 0; i < whole; i += W) gate_vec(g + i, u + i, h + i);
  gate_row(g + whole, u + whole, h + whole, n - whole);
}

/* h = silu(g) u again, du = dh silu(g), and dh ← dg = dh u σ(g) (1 + g (1 − σ(g))). */
static inline void gate_vec_backward(float *dh, const float *g, const float *u, float *h, float *du) {
  vec x = load(g), y = load(u), d = load(dh), s = sigmoid(x), silu = x * s, one = zero() + 1.0f;
  store(h, silu * y);
  store(du, d * silu);
  store(dh, d * y * s * (one + x * (one - s)));
}

void gate_backward(float *dh, const float *g, const float *u, float *h, float *du, long n) {
  long whole = n / W * W;
#pragma omp parallel for schedule(static)
  for (long i = 0; i < whole; i += W) gate_vec_backward(dh + i, g + i, u + i, h + i, du + i);
  if (whole < n) {
    float rest[5][W] = {{0}};
    size_t bytes = (n - whole) * sizeof(float);
    memcpy(rest[0], dh + whole, bytes), memcpy(rest[1], g + whole, bytes), memcpy(rest[2], u + whole, bytes);
    gate_vec_backward(rest[0], rest[1], rest[2], rest[3], rest[4]);
    memcpy(dh + whole, rest[0], bytes), memcpy(h + whole, rest[3], bytes), memcpy(du + whole, rest[4], bytes);
  }
}
