/* A step of the sampler, in float32: one token for each of S answers.

   An answer's keys are those of its prompt, (P, h, L, E), and its own, one a step, in blocks of columns (S, h, B, E). */

#include "common.h"
#include "gemm.h"

#define HIDDEN -INFINITY

typedef struct {
  float *k, *v;
  long n; /* columns */
} Block;

typedef struct {
  long heads, kv, size, prompts; /* H, h, E, L */
  long columns, n_blocks, window; /* columns before this step; window 0: none */
  float scale;
} Shape;

/* From joined projections (S, H + 2h, E) with pairs side by side: queries and keys normed where `weight` (H + h, E) is
   given, their pairs turned by `turn` (S, E), cosine and sine of each pair; values as they are. */
void decode_heads(const float *joined, const float *weight, float eps, const float *turn, float *q, float *k, float *v,
                  long S, long heads, long kv, long E) {
#pragma omp parallel for schedule(static)
  for (long s = 0; s < S; s++)
    for (long n = 0; n < heads + 2 * kv; n++) {
      const float *x = joined + (s * (heads + 2 * kv) + n) * E, *t = turn + s * E;
      if (n >= heads + kv) {
        memcpy(v + (s * kv + n - heads - kv) * E, x, E * sizeof(float));
        continue;
      }
      float *y = n < heads ? q + (s * heads + n) * E : k + (s * kv + n - heads) * E;
      float sum = 0;
      if (weight) {
#pragma omp simd reduction(+ : sum)
        for (long e = 0; e < E; e++) sum += x[e] * x[e];
      }
      float r = weight ? 1.0f / sqrtf(sum / E + eps) : 1.0f;
#pragma omp simd
      for (long e = 0; e < E; e += 2) {
        float a = x[e] * r, b = x[e + 1] * r;
        if (weight) a *= weight[n * E + e], b *= weight[n * E + e + 1];
        y[e] = a * t[e] - b * t[e + 1];
        y[e + 1] = a * t[e + 1] + b * t[e];
      }
    }
}

static inline float dot(const float *a, const float *b, long E) {
  vec sum = zero();
  long e = 0;
  for (; e + W <= E; e += W) sum += load(a + e) * load(b + e);
  float found = sum_of(sum);
  for (; e < E; e++) found += a[e] * b[e];
  return found;
}

/* Keys [first, last) of `k`, rows of E, against every query of the group; scores start at `at`. */
static void score_keys(const float *q, long group, const float *k, long first, long last, long E, float *s, long room,
                       long at) {
  for (long j = first; j < last; j++)
    for (long g = 0; g < group; g++) s[g * room + at + j - first] = dot(q + g * E, k + j * E, E);
}

/* Up to four vectors of a value at a time: their sums stay in registers over all keys. */
static inline __attribute__((always_inline)) void add_vectors(int n, float *out, const float *v, long keys, long E,
                                                              const float *p) {
  vec sum[4];
  for (int i = 0; i < n; i++) sum[i] = load(out + i * W);
  for (long j = 0; j < keys; j++)
    for (int i = 0; i < n; i++) sum[i] += p[j] * load(v + j * E + i * W);
  for (int i = 0; i < n; i++) store(out + i * W, sum[i]);
}

static void add_values(float *out, long group, const float *v, long first, long last, long E, const float *p, long room,
                       long at) {
  for (long g = 0; g < group; g++) {
    const float *pg = p + g * room + at, *from = v + first * E;
    float *to = out + g * E;
    long e = 0;
    for (; e + 4 * W <= E; e += 4 * W) add_vectors(4, to + e, from + e, last - first, E, pg);
    for (; e + 3 * W <= E; e += 3 * W) add_vectors(3, to + e, from + e, last - first, E, pg);
    for (; e + W <= E; e += W) add_vectors(1, to + e, from + e, last - first, E, pg);
    for (long j = 0; j < last - first; j++)
      for (long i = e; i < E; i++) to[i] += pg[j] * from[j * E + i];
  }
}

static long most(long a, long b) { return a > b ? a : b; }

/* Attention of one answer and key head; `columns` counts this step's, which is written already. */
static void attend_one(const Shape *z, const float *q, float *out, const float *pk, const float *pv, long length, long begun,
                       const Block *blocks, long unit, float *scaled, float *s, long room) {
  long E = z->size, group = z->heads / z->kv, columns = z->columns + 1;
  long depth = length + z->columns - begun, hidden = z->window ? most(0, depth + 1 - z->window) : 0;
  long first = hidden < length ? hidden : length, own = begun + most(0, hidden - length), n = 0;
  for (long i = 0; i < group * E; i++) scaled[i] = q[i] * z->scale;
  score_keys(scaled, group, pk, first, length, E, s, room, 0);
  n = length - first;
  for (long b = 0, start = 0; b < z->n_blocks; start += blocks[b++].n) {
    long from = most(own - start, 0), to = columns - start < blocks[b].n ? columns - start : blocks[b].n;
    if (from >= to) continue;
    score_keys(scaled, group, blocks[b].k + unit * blocks[b].n * E, from, to, E, s, room, n);
    n += to - from;
  }
  long padded = (n + W - 1) / W * W;
  float inverse[group];
  for (long g = 0; g < group; g++) {
    float *row = s + g * room;
    for (long j = n; j < padded; j++) row[j] = HIDDEN;
    inverse[g] = 1.0f / row_exp(row, padded, row_max(row, padded));
  }
  memset(out, 0, group * E * sizeof(float));
  add_values(out, group, pv, first, length, E, s, room, 0);
  n = length - first;
  for (long b = 0, start = 0; b < z->n_blocks; start += blocks[b++].n) {
    long from = most(own - start, 0), to = columns - start < blocks[b].n ? columns - start : blocks[b].n;
    if (from >= to) continue;
    add_values(out, group, blocks[b].v + unit * blocks[b].n * E, from, to, E, s, room, n);
    n += to - from;
  }
  for (long g = 0; g < group; g++)
    for (long e = 0; e < E; e++) out[g * E + e] *= inverse[g];
}

/* Writes this step's keys and values into their column, then attends. `group`, `begun`: of each answer; `length`: of
   each prompt. Returns 1 where there was no memory. */
int decode_attend(const float *q, const float *k, const float *v, float *out, const float *prompt_k, const float *prompt_v,
                  const int64_t *group, const int64_t *begun, const int64_t *length, const Block *blocks, long n_blocks,
                  long S, long heads, long kv, long E, long prompts, long columns, long window, float scale) {
  Shape z = {heads, kv, E, prompts, columns, n_blocks, window, scale};
  long share = heads / kv, room = (prompts + columns + 1 + W - 1) / W * W, column = columns;
  for (long b = 0; b < n_blocks - 1; b++) column -= blocks[b].n;
  Block last = blocks[n_blocks - 1];
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    float *mine = aligned((share * room + share * E + W) * sizeof(float));
    failed = mine == NULL;
#pragma omp for schedule(dynamic, 4)
    for (long unit = 0; unit < S * kv; unit++) {
      if (!mine) continue;
      long s = unit / kv, head = unit % kv, at = (group[s] * kv + head) * prompts * E;
      memcpy(last.k + (unit * last.n + column) * E, k + unit * E, E * sizeof(float));
      memcpy(last.v + (unit * last.n + column) * E, v + unit * E, E * sizeof(float));
      attend_one(&z, q + unit * share * E, out + unit * share * E, prompt_k + at, prompt_v + at, length[group[s]], begun[s],
                 blocks, unit, mine + share * room, mine, room);
    }
    free(mine);
  }
  return failed;
}

/* silu(g) u of joined rows (S, 2F): (S, F). */
void decode_gate(const float *joined, float *h, long S, long F) {
#pragma omp parallel for schedule(static)
  for (long s = 0; s < S; s++) gate_row(joined + s * 2 * F, joined + s * 2 * F + F, h + s * F, F);
}

/* y (S, N) = x W + b, or y += x W where `onto`; W (K, N), N a multiple of W floats. */
void decode_product(const float *x, const float *weight, const float *bias, float *y, long S, long K, long N, long onto) {
#pragma omp parallel for schedule(static)
  for (long j = 0; j < N; j += 2 * W) {
    long n = N - j < 2 * W ? N - j : 2 * W;
    gemm(S, n, K, x, K, 1, weight + j, N, y + j, N, onto);
    if (bias)
      for (long s = 0; s < S; s++)
        for (long i = j; i < j + n; i++) y[s * N + i] += bias[i];
  }
}

#define SPAN 64 /* of the vocabulary, whose sums are searched first */

/* exp(x − top) of n floats, n at most SPAN; their sum. */
static inline float exps(const float *x, long n, float top, float *to) {
  long vectors = n / W * W;
  vec sums = zero();
  for (long i = 0; i < vectors; i += W) {
    vec y = vexp(load(x + i) - top);
    store(to + i, y);
    sums += y;
  }
  float sum = sum_of(sums);
  for (long i = vectors; i < n; i++) sum += to[i] = expf(x[i] - top);
  return sum;
}

/* One token for each row of logits (S, V): the first at which the running sum of probabilities passes `at` of all, and
   its log-probability. A row that is not a number gives the last token and NaN. */
int decode_draw(const float *logit, const double *at, int64_t *token, float *logp, long S, long V) {
  long spans = (V + SPAN - 1) / SPAN;
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    double *until = aligned(spans * sizeof(double));
    failed = until == NULL;
#pragma omp for schedule(static)
    for (long s = 0; s < S; s++) {
      if (!until) continue;
      const float *x = logit + s * V;
      float top = largest(x, V), y[SPAN];
      double total = 0;
      for (long b = 0; b < spans; b++) {
        long first = b * SPAN;
        until[b] = total += exps(x + first, V - first < SPAN ? V - first : SPAN, top, y);
      }
      double wanted = at[s] * total;
      long b = 0;
      while (b < spans - 1 && !(until[b] > wanted)) b++;
      /* A span's sum, taken in another order, may be a little less: what is found must be one that can be drawn. */
      long first = b * SPAN, n = V - first < SPAN ? V - first : SPAN, found = V - 1;
      double rest = wanted - (b ? until[b - 1] : 0), sum = 0;
      exps(x + first, n, top, y);
      for (long i = 0; i < n; i++) {
        if (y[i] > 0) found = first + i;
        sum += y[i];
        if (sum > rest) break;
      }
      token[s] = found;
      logp[s] = x[found] - top - (float)log(total);
    }
    free(until);
  }
  return failed;
}
