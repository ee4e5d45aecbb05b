/* The k best sums a_i + b_j of two rows of half-scores, ties to the lowest id i n2 + j: `product_key_top_k` of
   ops/product_key.py, one pass over each row and a look at the few pairs that can win.

   Of the sorted halves only pairs of ranks p q <= k can win (the staircase). A sum that ties with the last place but
   lies outside of it is the one exception: rounding may give it a lower id, and `settle` looks for it. Rows are shared
   out among threads whole. Compiled by ops/kernels.py; AVX-512 where there is such, plain C elsewhere. */

#include "row_top.h"

#define SMALL (1 << 15)
#define TOKENS 4

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t picks __attribute__((vector_size(4 * LANES)));

#include "turn.h"

/* What is alike for every row of a call. */
typedef struct {
    int64_t n1, n2, k, k1, k2, pairs, corners;
    int32_t *p, *q, *corner_p, *corner_q;
} stairs;

/* One thread's room. */
typedef struct {
    float *a, *b, *sums;
    int32_t *i, *j, *chosen;
    candidates row;
} room;

/* The places of the row that tie with the last sum, wherever they lie: those with the lowest ids. */
static void settle(
    const stairs *of, const float *first, const float *second, const float *bias1, const float *bias2, float most,
    const float *sums, int64_t *ids) {
    float last = sums[of->k - 1];
    int64_t c = 0;
    while (sums[c] > last) c++;
    for (int64_t i = 0; i < of->n1 && c < of->k; i++) {
        float value = at(first, bias1, i);
        if (!(value + most >= last)) continue;
        for (int64_t j = 0; j < of->n2 && c < of->k; j++)
            if (value + at(second, bias2, j) == last) ids[c++] = i * of->n2 + j;
    }
}

static void combine(
    const stairs *of, const float *first, const float *second, const float *bias1, const float *bias2, float *scores,
    int64_t *ids, const room *own) {
    float rest1 = top(first, bias1, of->n1, of->k1, own->a, own->i, &own->row);
    float rest2 = top(second, bias2, of->n2, of->k2, own->b, own->j, &own->row);
    float *sums = own->sums, *best = own->sums + of->pairs + LANES;
    int tied = 0;
#ifdef __AVX512F__
    if (of->k <= LANES) {
        __m512 a = _mm512_loadu_ps(own->a), b = _mm512_loadu_ps(own->b);
        for (int64_t c = 0; c < of->pairs; c += LANES)
            _mm512_storeu_ps(sums + c, _mm512_add_ps(_mm512_permutexvar_ps(_mm512_loadu_si512(of->p + c), a),
                                                     _mm512_permutexvar_ps(_mm512_loadu_si512(of->q + c), b)));
    } else
#endif
        for (int64_t c = 0; c < of->pairs; c++) sums[c] = own->a[of->p[c]] + own->b[of->q[c]];
    float next = top(sums, 0, of->pairs, of->k, best, own->chosen, &own->row);
    for (int64_t c = 0; c < of->k; c++) {
        int32_t pair = own->chosen[c];
        ids[c] = (int64_t)own->i[of->p[pair]] * of->n2 + own->j[of->q[pair]];
        tied |= c && best[c] == best[c - 1];
    }
    float last = best[of->k - 1];
    tied |= of->k < of->pairs && next == last;
    if (tied) { /* pairs of the staircase are not in the order of their ids */
        for (int64_t c = 0; c < of->pairs; c++)
            own->row.entries[c] = (entry){sums[c] == sums[c] ? sums[c] : -INFINITY,
                                      (int64_t)own->i[of->p[c]] * of->n2 + own->j[of->q[c]]};
        qsort(own->row.entries, of->pairs, sizeof(entry), before);
        for (int64_t c = 0; c < of->k; c++) best[c] = own->row.entries[c].value, ids[c] = own->row.entries[c].place;
    }
    int outside = (of->k2 < of->n2 && own->a[0] + rest2 >= last) || (of->k1 < of->n1 && rest1 + own->b[0] >= last);
    for (int64_t c = 0; c < of->corners; c++)
        outside |= own->a[of->corner_p[c]] + own->b[of->corner_q[c]] >= last;
    if (outside) settle(of, first, second, bias1, bias2, own->b[0], best, ids);
    for (int64_t c = 0; c < of->k; c++) {
        int64_t i = ids[c] / of->n2, j = ids[c] - i * of->n2;
        scores[c] = !(bias1 || bias2) ? best[c] : best[c] == -INFINITY ? best[c] : first[i] + second[j];
    }
}

/* Rank pairs that can win, and the nearest ones that can't: of these the least ranks, within the ranks that are kept. */
static int plan(stairs *of) {
    int64_t room_for = 0;
    of->k1 = of->k < of->n1 ? of->k : of->n1, of->k2 = of->k < of->n2 ? of->k : of->n2;
    for (int64_t p = 0; p < of->k1; p++) room_for += of->k / (p + 1) < of->n2 ? of->k / (p + 1) : of->n2;
    of->pairs = room_for, of->corners = 0;
    int32_t *held = calloc(2 * (room_for + LANES) + 2 * of->k1, sizeof *held);
    if (!held) return 1;
    of->p = held, of->q = of->p + room_for + LANES, of->corner_p = of->q + room_for + LANES;
    of->corner_q = of->corner_p + of->k1;
    int64_t c = 0;
    for (int64_t p = 0; p < of->k1; p++) {
        int64_t width = of->k / (p + 1) < of->n2 ? of->k / (p + 1) : of->n2;
        for (int64_t q = 0; q < width; q++, c++) of->p[c] = (int32_t)p, of->q[c] = (int32_t)q;
        if (width < of->k2 && (!of->corners || of->corner_q[of->corners - 1] > width))
            of->corner_p[of->corners] = (int32_t)p, of->corner_q[of->corners++] = (int32_t)width;
    }
    return 0;
}

static int furnish(room *own, const stairs *of) {
    int64_t longest = of->n1 > of->n2 ? of->n1 : of->n2;
    longest = (longest > of->pairs ? longest : of->pairs) + SET;
    int64_t kept = of->k + RANKED;
    own->a = malloc(sizeof(float) * (3 * kept + of->pairs + SET));
    own->i = malloc(sizeof(int32_t) * (3 * kept + longest));
    own->row.entries = malloc(sizeof(entry) * longest);
    if (!own->a || !own->i || !own->row.entries) return 1;
    own->b = own->a + kept, own->sums = own->b + kept;
    own->j = own->i + kept, own->chosen = own->j + kept, own->row.found = own->chosen + kept;
    return 0;
}

/* For each of `rows` rows, `stride` numbers apart: the k best of first (n1) and second (n2). Results of a row are
   `step` numbers after those of the row before. A bias is one row for all, or NULL, or every row its own where
   `biases` says how many there are, in turn. Returns 1 where there is no memory. */
int mixwright_product_key(
    float *scores, int64_t *ids, const float *first, const float *second, const float *bias1, const float *bias2,
    int64_t rows, int64_t stride1, int64_t stride2, int64_t step, int64_t biases1, int64_t biases2, int64_t n1,
    int64_t n2, int64_t k) {
    stairs of = {.n1 = n1, .n2 = n2, .k = k};
    if (plan(&of)) return 1;
    int failed = 0;
#pragma omp parallel if (rows * (n1 + n2) > SMALL)
    {
        room own = {0};
        int lost = furnish(&own, &of);
        if (lost) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            if (!lost)
                combine(
                    &of, first + r * stride1, second + r * stride2, bias1 ? bias1 + r % biases1 * n1 : 0,
                    bias2 ? bias2 + r % biases2 * n2 : 0, scores + r * step, ids + r * step, &own);
        free(own.a), free(own.i), free(own.row.entries);
    }
    free(of.p);
    return failed;
}

/* Scores of all keys for `tokens` = 1, 2 or 4 queries, of which `some` are wanted, `stride` apart: every key is read once,
   and sixteen sums are added up together. */
static inline __attribute__((always_inline)) void score(
    int tokens, int64_t some, float *out, const float *queries, int64_t stride, const float *keys, int64_t n,
    int64_t half) {
    int together = LANES / tokens;
    for (int64_t i = 0; i < n; i += together) {
        const float *key[LANES], *query[4];
        lanes sums[LANES];
        int64_t c = 0;
        for (int k = 0; k < together; k++) key[k] = keys + (i + k < n ? i + k : n - 1) * half;
        for (int t = 0; t < tokens; t++) query[t] = queries + (t < some ? t : some - 1) * stride;
        for (int s = 0; s < LANES; s++) sums[s] = (lanes){0};
        for (; c + LANES <= half; c += LANES) {
            loose q[4];
            for (int t = 0; t < tokens; t++) q[t] = *(const loose *)(query[t] + c);
            for (int k = 0; k < together; k++) {
                loose v = *(const loose *)(key[k] + c);
                for (int t = 0; t < tokens; t++) sums[t * together + k] += v * q[t];
            }
        }
        turn(sums);
        for (int width = LANES / 2; width; width /= 2)
            for (int s = 0; s < width; s++) sums[s] += sums[s + width];
        for (; c < half; c++)
            for (int s = 0; s < LANES; s++) sums[0][s] += key[s % together][c] * query[s / together][c];
        for (int t = 0; t < some; t++)
            for (int k = 0; k < together && i + k < n; k++) out[t * n + i + k] = sums[0][t * together + k];
    }
}

static void score_some(
    int64_t some, float *out, const float *queries, int64_t stride, const float *keys, int64_t n, int64_t half) {
    switch (some) {
        case 1: score(1, some, out, queries, stride, keys, n, half); break;
        case 2: score(2, some, out, queries, stride, keys, n, half); break;
        default: score(4, some, out, queries, stride, keys, n, half);
    }
}

/* Scores and choice for a few tokens at once: queries are (tokens, heads, 2, half), keys (n, half) for every one of
   `key_heads`, `apart` numbers from the next. `halves` has room for the scores of `held` tokens of each head, of the
   first half and then of the second; where that is all of them they are kept. `held` is a multiple of 4. Threads take
   whole heads. Returns 1 where there is no memory. */
int mixwright_route_few(
    float *scores, int64_t *ids, float *halves, const float *queries, const float *first, const float *second,
    const float *bias1, const float *bias2, int64_t tokens, int64_t heads, int64_t key_heads, int64_t apart1,
    int64_t apart2, int64_t held, int64_t n1, int64_t n2, int64_t half, int64_t k) {
    stairs of = {.n1 = n1, .n2 = n2, .k = k};
    if (plan(&of)) return 1;
    int failed = 0;
#pragma omp parallel if (tokens * heads * (n1 + n2) > SMALL)
    {
        room own = {0};
        int lost = furnish(&own, &of);
        if (lost) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t t = 0; t < tokens && !lost; t += TOKENS) {
                int64_t some = tokens - t < TOKENS ? tokens - t : TOKENS, key = key_heads > 1 ? h : 0;
                int64_t place = h * held + (held > TOKENS ? t : 0);
                float *a = halves + place * n1, *b = halves + heads * held * n1 + place * n2;
                const float *q = queries + (t * heads + h) * 2 * half;
                score_some(some, a, q, 2 * heads * half, first + key * apart1, n1, half);
                score_some(some, b, q + half, 2 * heads * half, second + key * apart2, n2, half);
                for (int64_t s = 0; s < some; s++)
                    combine(
                        &of, a + s * n1, b + s * n2, bias1 ? bias1 + key * n1 : 0, bias2 ? bias2 + key * n2 : 0,
                        scores + ((t + s) * heads + h) * k, ids + ((t + s) * heads + h) * k, &own);
            }
        free(own.a), free(own.i), free(own.row.entries);
    }
    free(of.p);
    return failed;
}
