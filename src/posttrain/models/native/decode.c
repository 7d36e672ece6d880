/* A step of the sampler, in float32: one token for each of S answers.

   An answer's keys are those of its prompt, (P, h, L, E), and its own, one a step, in blocks of columns (S, h, B, E). */

#include "common.h"

#define HIDDEN -3e38f

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

static inline void add_scaled(float *to, const float *from, float x, long E) {
  long e = 0;
  for (; e + W <= E; e += W) store(to + e, load(to + e) + x * load(from + e));
  for (; e < E; e++) to[e] += x * from[e];
}

/* Keys [first, last) of `k`, rows of E, against every query of the group; scores start at `at`. */
static void score_keys(const float *q, long group, const float *k, long first, long last, long E, float *s, long room,
                       long at) {
  for (long j = first; j < last; j++)
    for (long g = 0; g < group; g++) s[g * room + at + j - first] = dot(q + g * E, k + j * E, E);
}

static void add_values(float *out, long group, const float *v, long first, long last, long E, const float *p, long room,
                       long at) {
  for (long j = first; j < last; j++)
    for (long g = 0; g < group; g++) add_scaled(out + g * E, v + j * E, p[g * room + at + j - first], E);
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
  long whole = F / W * W;
#pragma omp parallel for schedule(static)
  for (long s = 0; s < S; s++) {
    const float *g = joined + s * 2 * F, *u = g + F;
    for (long i = 0; i < whole; i += W) gate_vec(g + i, u + i, h + s * F + i);
    if (whole < F) {
      float rest[3][W] = {{0}};
      size_t bytes = (F - whole) * sizeof(float);
      memcpy(rest[0], g + whole, bytes), memcpy(rest[1], u + whole, bytes);
      gate_vec(rest[0], rest[1], rest[2]);
      memcpy(h + s * F + whole, rest[2], bytes);
    }
  }
}
