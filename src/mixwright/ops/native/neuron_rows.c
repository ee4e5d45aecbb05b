/* Gradients of the rows of single-neuron experts, row by row: each is one thread's sum over the pairs that name it, in
   their order. x and dy are read from the caches, and every row that acts is written once. */

#include <stdint.h>
#include <string.h>

#include "rows.h"

#define TILE 4
#define SMALL (1 << 17)

/* Pairs that act in the order of their experts, those of one expert in their own: `sorted` has expert << 32 | pair,
   `ids` the experts that occur, `starts` where each begins and where the last one ends. All are as long as there are
   pairs, `starts` longer by one; `sorted` twice as long. Returns the number of experts. */
int64_t mixwright_sort_pairs(
    uint64_t *sorted, int64_t *ids, int64_t *starts, const int64_t *indices, const float *weights, int64_t pairs,
    int64_t experts) {
    uint64_t *from = sorted, *to = sorted + pairs;
    int64_t count = 0, unique = 0, digits = 1;
    while (digits < 32 && experts > (int64_t)1 << digits) digits++;
    int passes = (int)((digits + 10) / 11), bits = (int)((digits + passes - 1) / passes);
    for (int64_t pair = 0; pair < pairs; pair++)
        if (weights[pair] != 0) from[count++] = (uint64_t)indices[pair] << 32 | (uint64_t)pair;
    for (int pass = 0; pass < passes; pass++) {
        int shift = 32 + pass * bits;
        uint64_t mask = ((uint64_t)1 << bits) - 1, *swap = from;
        int64_t place[1 << 11] = {0};
        for (int64_t i = 0; i < count; i++) place[from[i] >> shift & mask]++;
        for (int64_t digit = 0, sum = 0; digit < 1 << bits; digit++) {
            int64_t here = place[digit];
            place[digit] = sum;
            sum += here;
        }
        for (int64_t i = 0; i < count; i++) to[place[from[i] >> shift & mask]++] = from[i];
        from = to;
        to = swap;
    }
    if (from != sorted) memcpy(sorted, from, sizeof *sorted * count);
    for (int64_t i = 0; i < count; i++)
        if (!i || sorted[i] >> 32 != sorted[i - 1] >> 32) {
            ids[unique] = (int64_t)(sorted[i] >> 32);
            starts[unique++] = i;
        }
    starts[unique] = count;
    return unique;
}

/* Columns from `i` on of one expert's gradient: the in and gate rows from x, the out row from dy. */
INLINED void reduce(
    int type, int parts, int tiles, int64_t left, const uint64_t *pairs, int64_t count, int64_t k,
    int64_t width, int64_t i, const float *x, const float *dy, const float *factors, char *row) {
    lanes sum[3][TILE];
    for (int j = 0; j < parts; j++)
        for (int t = 0; t < tiles; t++) sum[j][t] = (lanes){0};
    for (int64_t p = 0; p < count; p++) {
        int64_t pair = (int64_t)(pairs[p] & 0xffffffff), place = pair / k * width + i;
        const float *factor = factors + pair * parts;
        for (int t = 0; t < tiles; t++) {
            if (parts > 1) {
                lanes input = load_some(FLOAT32, x, place + t * LANES, left);
                for (int j = 0; j < parts - 1; j++) sum[j][t] += factor[j] * input;
            }
            sum[parts - 1][t] += factor[parts - 1] * load_some(FLOAT32, dy, place + t * LANES, left);
        }
    }
    for (int j = 0; j < parts; j++)
        for (int t = 0; t < tiles; t++)
            store_some(type, row, j * width + i + t * LANES, sum[j][t], left);
}

INLINED void reduce_row(
    int type, int parts, const uint64_t *pairs, int64_t count, int64_t k, int64_t width, const float *x,
    const float *dy, const float *factors, char *row) {
    int64_t i = 0;
    for (; i + TILE * LANES <= width; i += TILE * LANES)
        reduce(type, parts, TILE, LANES, pairs, count, k, width, i, x, dy, factors, row);
    for (; i < width; i += LANES)
        reduce(type, parts, 1, width - i, pairs, count, k, width, i, x, dy, factors, row);
}

/* Gradients of the rows that act, each from the pairs that name it: to `d_rows` (unique, parts, width) or with `dense`
   to their places in (experts, parts, width); and of the biases (experts, parts - 1), if there. Other places stay. */
void mixwright_neurons_rows(
    char *d_rows, float *d_bias, const uint64_t *sorted, const int64_t *ids, const int64_t *starts, const float *x,
    const float *dy, const float *factors, int64_t unique, int64_t k, int64_t parts, int64_t width, int64_t type,
    int64_t dense) {
    int64_t bytes = parts * width * size_of(type), inputs = parts - 1;
#pragma omp parallel for schedule(dynamic, 64) if (unique * width > SMALL)
    for (int64_t one = 0; one < unique; one++) {
        const uint64_t *pairs = sorted + starts[one];
        int64_t count = starts[one + 1] - starts[one];
        char *row = d_rows + (dense ? ids[one] : one) * bytes;
#define CASE(type, parts) \
    case type * 3 + parts: reduce_row(type, parts, pairs, count, k, width, x, dy, factors, row); break;
        if (d_rows)
            switch (type * 3 + parts) {
                CASE(FLOAT32, 1) CASE(FLOAT32, 2) CASE(FLOAT32, 3)
                CASE(BFLOAT16, 1) CASE(BFLOAT16, 2) CASE(BFLOAT16, 3)
            }
#undef CASE
        for (int64_t j = 0; d_bias && j < inputs; j++) {
            float sum = 0;
            for (int64_t p = 0; p < count; p++) sum += factors[(pairs[p] & 0xffffffff) * parts + j];
            d_bias[ids[one] * inputs + j] = sum;
        }
    }
}
