/* Products of matrices that fit the cache, one thread. */

/* C (M, N) = or += A (M, K) B (K, N): A[i, k] at i·sa + k·sk, B and C by rows, N a multiple of W. */
static inline __attribute__((always_inline)) void micro(
    int mr, int nr, long K, const float *a, long sa, long sk, const float *b, long ldb, float *c, long ldc, int add) {
  vec acc[6][2];
  for (int i = 0; i < mr; i++)
    for (int j = 0; j < nr; j++) acc[i][j] = add ? load(c + i * ldc + j * W) : zero();
  for (long k = 0; k < K; k++) {
    vec b0 = load(b + k * ldb), b1 = nr > 1 ? load(b + k * ldb + W) : zero();
#pragma GCC unroll 6
    for (int i = 0; i < mr; i++) {
      float x = a[i * sa + k * sk];
      acc[i][0] += x * b0;
      if (nr > 1) acc[i][1] += x * b1;
    }
  }
  for (int i = 0; i < mr; i++)
    for (int j = 0; j < nr; j++) store(c + i * ldc + j * W, acc[i][j]);
}

#define CASE(n)                                             \
  case n:                                                   \
    if (two) micro(n, 2, K, x, sa, sk, b + j, ldb, y, ldc, add); \
    else micro(n, 1, K, x, sa, sk, b + j, ldb, y, ldc, add);     \
    break

static void gemm(long M, long N, long K, const float *a, long sa, long sk, const float *b, long ldb, float *c, long ldc,
                 int add) {
  for (long j = 0; j < N;) {
    int two = N - j >= 2 * W;
    for (long i = 0; i < M; i += 6) {
      const float *x = a + i * sa;
      float *y = c + i * ldc + j;
      switch (M - i < 6 ? M - i : 6) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
      }
    }
    j += two ? 2 * W : W;
  }
}
