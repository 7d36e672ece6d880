/* Attention of a forest's rows, in float32: each segment sees its prompt (the prefix) and, causally, itself.

   Tokens are read where they stand: q (T, H, E), k and v (T, h, E), nothing is padded or gathered. A task is one key/value
   head of a family: a prompt, if it is shared, and all rows that see it, so that no two threads write to the same keys. */

#include "common.h"
#include "gemm.h"

#define QB 24 /* queries of a block */
#define HIDDEN -INFINITY /* so that a query whose scores are all −inf gives NaN, not what it may not see */

typedef struct {
  long start, length, prefix_start, prefix;
} Row;

typedef struct {
  long heads, kv, size, window; /* window 0: none */
  float scale;
} Shape;

static long up(long n) { return (n + W - 1) / W * W; }

static long token(const Row *r, long key) {
  return key < r->prefix ? r->prefix_start + key : r->start + key - r->prefix;
}

/* Rows (n, E) of one head, padded to Ep with zeros; and the same transposed, (E, Np). */
static void take(const Row *r, const float *x, long stride, long size, float *rows, float *columns) {
  long n = r->prefix + r->length, np = up(n), ep = up(size);
  for (long j = 0; j < n; j++) {
    const float *from = x + token(r, j) * stride;
    if (rows) {
      memcpy(rows + j * ep, from, size * sizeof(float));
      for (long e = size; e < ep; e++) rows[j * ep + e] = 0;
    }
    if (columns)
      for (long e = 0; e < size; e++) columns[e * np + j] = from[e];
  }
  if (columns)
    for (long e = 0; e < size; e++)
      for (long j = n; j < np; j++) columns[e * np + j] = 0;
}

/* Queries [first, first + m) of a row, times `scale`: (m, Ep). */
static void take_queries(const Row *r, const float *x, long stride, long size, long first, long m, float scale, float *to) {
  long ep = up(size);
  for (long i = 0; i < m; i++) {
    const float *from = x + (r->start + first + i) * stride;
    for (long e = 0; e < size; e++) to[i * ep + e] = from[e] * scale;
    for (long e = size; e < ep; e++) to[i * ep + e] = 0;
  }
}

/* What query i of a block may not see is pushed below everything. */
static void hide(float *s, long np, long last, long window) {
  for (long j = last + 1; j < np; j++) s[j] = HIDDEN;
  if (window)
    for (long j = 0; j < last + 1 - window; j++) s[j] = HIDDEN;
}

static void forward_row(const Row *r, const Shape *z, long kv, const float *q, const float *k, const float *v, float *o,
                        float *lse, float *room) {
  long n = r->prefix + r->length, np = up(n), ep = up(z->size), group = z->heads / z->kv;
  float *kt = room, *vr = kt + z->size * np, *qb = vr + n * ep, *s = qb + QB * ep, *ob = s + QB * np;
  take(r, k + kv * z->size, z->kv * z->size, z->size, NULL, kt);
  take(r, v + kv * z->size, z->kv * z->size, z->size, vr, NULL);
  for (long head = kv * group; head < (kv + 1) * group; head++)
    for (long first = 0; first < r->length; first += QB) {
      long m = r->length - first < QB ? r->length - first : QB;
      long seen = r->prefix + first + m, sp = up(seen);
      take_queries(r, q + head * z->size, z->heads * z->size, z->size, first, m, z->scale, qb);
      gemm(m, sp, z->size, qb, ep, 1, kt, np, s, sp, 0);
      float inverse[QB];
      for (long i = 0; i < m; i++) {
        float *si = s + i * sp;
        hide(si, sp, r->prefix + first + i, z->window);
        float top = row_max(si, sp), sum = row_exp(si, sp, top);
        inverse[i] = 1.0f / sum;
        lse[(r->start + first + i) * z->heads + head] = top + logf(sum);
      }
      gemm(m, ep, seen, s, sp, 1, vr, ep, ob, ep, 0);
      for (long i = 0; i < m; i++) {
        float *to = o + ((r->start + first + i) * z->heads + head) * z->size;
        for (long e = 0; e < z->size; e++) to[e] = ob[i * ep + e] * inverse[i];
      }
    }
}

static void backward_row(const Row *r, const Shape *z, long kv, const float *q, const float *k, const float *v,
                         const float *o, const float *lse, const float *g, float *dq, float *dk, float *dv, float *room) {
  long n = r->prefix + r->length, np = up(n), ep = up(z->size), group = z->heads / z->kv, size = z->size;
  float *kt = room, *vt = kt + size * np, *kr = vt + size * np, *dkr = kr + n * ep, *dvr = dkr + n * ep;
  float *qb = dvr + n * ep, *gb = qb + QB * ep, *p = gb + QB * ep, *ds = p + QB * np, *out = ds + QB * np;
  take(r, k + kv * size, z->kv * size, size, kr, kt);
  take(r, v + kv * size, z->kv * size, size, NULL, vt);
  memset(dkr, 0, 2 * n * ep * sizeof(float));
  for (long head = kv * group; head < (kv + 1) * group; head++)
    for (long first = 0; first < r->length; first += QB) {
      long m = r->length - first < QB ? r->length - first : QB;
      long seen = r->prefix + first + m, sp = up(seen);
      take_queries(r, q + head * size, z->heads * size, size, first, m, z->scale, qb);
      take_queries(r, g + head * size, z->heads * size, size, first, m, 1.0f, gb);
      gemm(m, sp, size, qb, ep, 1, kt, np, p, sp, 0);
      gemm(m, sp, size, gb, ep, 1, vt, np, ds, sp, 0);
      for (long i = 0; i < m; i++) {
        long at = (r->start + first + i) * z->heads + head;
        float delta = 0;
        const float *oi = o + at * size, *gi = gb + i * ep;
#pragma omp simd reduction(+ : delta)
        for (long e = 0; e < size; e++) delta += oi[e] * gi[e];
        hide(p + i * sp, sp, r->prefix + first + i, z->window);
        row_exp(p + i * sp, sp, lse[at]);
        float *pi = p + i * sp, *di = ds + i * sp;
        for (long j = 0; j < sp; j += W) store(di + j, load(pi + j) * (load(di + j) - delta));
      }
      gemm(seen, ep, m, p, 1, sp, gb, ep, dvr, ep, 1);
      gemm(seen, ep, m, ds, 1, sp, qb, ep, dkr, ep, 1);
      gemm(m, ep, seen, ds, sp, 1, kr, ep, out, ep, 0);
      for (long i = 0; i < m; i++) {
        float *to = dq + ((r->start + first + i) * z->heads + head) * size;
        for (long e = 0; e < size; e++) to[e] = out[i * ep + e] * z->scale;
      }
    }
  for (long j = 0; j < n; j++) {
    long at = (token(r, j) * z->kv + kv) * size;
    for (long e = 0; e < size; e++) dk[at + e] += dkr[j * ep + e], dv[at + e] += dvr[j * ep + e];
  }
}

static size_t room_of(const Row *rows, long n_rows, long size) {
  long most = 0, ep = up(size);
  for (long i = 0; i < n_rows; i++)
    if (rows[i].prefix + rows[i].length > most) most = rows[i].prefix + rows[i].length;
  return (2 * size * up(most) + 3 * most * ep + 2 * QB * up(most) + 3 * QB * ep + 2 * W) * sizeof(float);
}

/* families: n_families + 1 offsets into `rows`. Returns 0, or 1 where there was no memory. */
int attend(const float *q, const float *k, const float *v, float *o, float *lse, const Row *rows, long n_rows, long heads,
           long kv, long size, float scale, long window) {
  Shape z = {heads, kv, size, window, scale};
  size_t bytes = room_of(rows, n_rows, size);
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    float *room = aligned(bytes);
    failed = room == NULL;
#pragma omp for schedule(dynamic)
    for (long task = 0; task < n_rows * kv; task++)
      if (room) forward_row(rows + task / kv, &z, task % kv, q, k, v, o, lse, room);
    free(room);
  }
  return failed;
}

int attend_backward(const float *q, const float *k, const float *v, const float *o, const float *lse, const float *g,
                    float *dq, float *dk, float *dv, const Row *rows, long n_rows, const long *families, long n_families,
                    long heads, long kv, long size, float scale, long window) {
  Shape z = {heads, kv, size, window, scale};
  size_t bytes = room_of(rows, n_rows, size);
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    float *room = aligned(bytes);
    failed = room == NULL;
#pragma omp for schedule(dynamic)
    for (long task = 0; task < n_families * kv; task++)
      if (room)
        for (long i = families[task / kv]; i < families[task / kv + 1]; i++)
          backward_row(rows + i, &z, task % kv, q, k, v, o, lse, g, dq, dk, dv, room);
    free(room);
  }
  return failed;
}
