/* s = <q, c_i> + <q', c'_j> of retrieved ids i n2 + j, float32, and its gradients: ops/selected_scores.py in one call.

   Only retrieved sub-keys are read or written. A gradient of the sub-keys is owned by one thread for a whole head and
   half, or, where heads share their sub-keys, for some columns: each number is summed over tokens, heads and places in
   this order, whatever the number of threads. Compiled by ops/kernels.py; GNU C for its vector types. */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define SMALL (1 << 15)

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

static inline float total(lanes v) {
    float s[LANES];
    __builtin_memcpy(s, &v, sizeof s);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) s[i] += s[i + step];
    return s[0];
}

static inline float dot(const float *x, const float *y, int64_t count) {
    lanes even = {0}, odd = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        even += *(const lanes *)(x + i) * *(const lanes *)(y + i);
        odd += *(const lanes *)(x + i + LANES) * *(const lanes *)(y + i + LANES);
    }
    float sum = total(even + odd);
    for (; i < count; i++) sum += x[i] * y[i];
    return sum;
}

static inline void add(float *to, float factor, const float *from, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) *(lanes *)(to + i) += factor * *(const lanes *)(from + i);
    for (; i < count; i++) to[i] += factor * from[i];
}

/* scores and ids are (tokens, heads, k), queries (tokens, heads, 2, half), keys (key_heads, n, half). */
void mixwright_selected(
    float *scores, const int64_t *ids, const float *queries, const float *first, const float *second, int64_t tokens,
    int64_t heads, int64_t k, int64_t key_heads, int64_t n1, int64_t n2, int64_t half) {
#pragma omp parallel for if (tokens * heads * k > SMALL / 16)
    for (int64_t r = 0; r < tokens * heads; r++) {
        int64_t own = key_heads > 1 ? r % heads : 0;
        const float *q = queries + r * 2 * half, *c1 = first + own * n1 * half, *c2 = second + own * n2 * half;
        for (int64_t c = r * k; c < (r + 1) * k; c++)
            scores[c] = dot(q, c1 + ids[c] / n2 * half, half) + dot(q + half, c2 + ids[c] % n2 * half, half);
    }
}

/* d_queries is written, d_first and d_second are added to; any of them may be NULL. */
void mixwright_selected_backward(
    float *d_queries, float *d_first, float *d_second, const float *d_scores, const int64_t *ids,
    const float *queries, const float *first, const float *second, int64_t tokens, int64_t heads, int64_t k,
    int64_t key_heads, int64_t n1, int64_t n2, int64_t half) {
    int64_t columns = key_heads > 1 ? half : 64, blocks = (half + columns - 1) / columns;
#pragma omp parallel if (tokens * heads * k > SMALL / 16)
    {
        if (d_queries) {
#pragma omp for schedule(static) nowait
            for (int64_t r = 0; r < tokens * heads; r++) {
                int64_t own = key_heads > 1 ? r % heads : 0;
                const float *c1 = first + own * n1 * half, *c2 = second + own * n2 * half;
                float *to = d_queries + r * 2 * half;
                memset(to, 0, sizeof(float) * 2 * half);
                for (int64_t c = r * k; c < (r + 1) * k; c++) {
                    if (!d_scores[c]) continue;
                    add(to, d_scores[c], c1 + ids[c] / n2 * half, half);
                    add(to + half, d_scores[c], c2 + ids[c] % n2 * half, half);
                }
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < key_heads * 2 * blocks; unit++) {
            int64_t own = unit / (2 * blocks), side = unit / blocks % 2, from = unit % blocks * columns;
            int64_t width = half - from < columns ? half - from : columns;
            float *to = side ? d_second : d_first;
            if (!to) continue;
            to += own * (side ? n2 : n1) * half + from;
            for (int64_t r = key_heads > 1 ? own : 0; r < tokens * heads; r += key_heads > 1 ? heads : 1) {
                const float *q = queries + (2 * r + side) * half + from;
                for (int64_t c = r * k; c < (r + 1) * k; c++)
                    if (d_scores[c]) add(to + (side ? ids[c] % n2 : ids[c] / n2) * half, d_scores[c], q, width);
            }
        }
    }
}
