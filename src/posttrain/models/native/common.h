/* Vectors of as many floats as the processor's registers hold, in GNU C (gcc and clang). */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX__)
#define W 8
#else
#define W 4
#endif

typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef float loose __attribute__((vector_size(W * 4), aligned(4), may_alias));

static inline vec load(const float *p) { return *(const loose *)p; }
static inline void store(float *p, vec x) { *(loose *)p = x; }
static inline vec zero(void) { return (vec){0}; }

/* a where the mask is set, else b */
static inline vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

static inline void *aligned(size_t bytes) {
  void *p = NULL;
  return posix_memalign(&p, 64, bytes) ? NULL : p;
}

/* exp(x) within 2 units in the last place for x ≤ 0, 0 below −87; a NaN stays one. x = n ln 2 + r, |r| ≤ ln 2 / 2;
   polynomial as in Cephes' expf. */
static inline vec vexp(vec x) {
  vec low = zero() - 87.0f;
  ivec under = x < low;
  x = choose(under, low, x);
  vec shifted = x * 1.44269504088896341f + 12582912.0f; /* 1.5 · 2^23: rounds to a whole number */
  vec n = shifted - 12582912.0f;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  ivec power = ((ivec)shifted - (ivec)(zero() + 12582912.0f) + 127) << 23; /* the bits of 2^n */
  return choose(under, zero(), y * (vec)power);
}

static inline float top_of(vec x) {
  float m = x[0];
  for (int i = 1; i < W; i++) m = x[i] > m ? x[i] : m;
  return m;
}

/* By halves: elements one at a time would take longer than the products they sum. */
static inline float sum_of(vec x) {
  float part[W], sum = 0;
  store(part, x);
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < W; i++) sum += part[i];
  return sum;
}

/* Over n floats, a multiple of W. */
static inline float row_max(const float *s, long n) {
  vec m = load(s);
  for (long j = W; j < n; j += W) {
    vec x = load(s + j);
    m = choose(x > m, x, m);
  }
  return top_of(m);
}

/* Over n floats, at least one. */
static inline float largest(const float *s, long n) {
  long whole = n / W * W;
  float top = whole ? row_max(s, whole) : s[0];
  for (long i = whole; i < n; i++) top = s[i] > top ? s[i] : top;
  return top;
}

/* s ← exp(s − shift); their sum. */
static inline float row_exp(float *s, long n, float shift) {
  vec sum = zero();
  for (long j = 0; j < n; j += W) {
    vec y = vexp(load(s + j) - shift);
    store(s + j, y);
    sum += y;
  }
  return sum_of(sum);
}

/* σ(x), without overflow on either side; a NaN stays one. */
static inline vec sigmoid(vec x) {
  vec e = vexp(choose(x < zero(), x, -x)), one = zero() + 1.0f;
  return choose(x < zero(), e, one) / (one + e);
}

/* h = silu(g) u, silu(x) = x σ(x). */
static inline void gate_vec(const float *g, const float *u, float *h) {
  vec x = load(g);
  store(h, x * sigmoid(x) * load(u));
}

/* The same over n floats: whole vectors, and a rest that is copied out and in. */
static inline void gate_row(const float *g, const float *u, float *h, long n) {
  long whole = n / W * W;
  size_t bytes = (n - whole) * sizeof(float);
  for (long i = 0; i < whole; i += W) gate_vec(g + i, u + i, h + i);
  if (bytes) {
    float rest[3][W] = {{0}};
    memcpy(rest[0], g + whole, bytes), memcpy(rest[1], u + whole, bytes);
    gate_vec(rest[0], rest[1], rest[2]);
    memcpy(h + whole, rest[2], bytes);
  }
}
