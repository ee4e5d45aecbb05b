/* Gradients of the rows of single-neuron experts, row by row: each is one thread's sum over the pairs that name it, in
   their order. x and dy are read from the caches, and every row that acts is written once. */

#include <stdint.h>
#include <string.h>

#include "rows.h"

#define BLOCK 4
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

/* to[j] (+)= sum over `count` pairs of factor[e][j] from[e]: a token's x or dy, for the parts it is the gradient of. */
INLINED void collect(
    int count, int parts, int first, int64_t width, const float *const *from, const float (*factor)[2],
    float *const *to) {
    for (int64_t i = 0; i < width; i += LANES) {
        lanes sum[2];
        for (int j = 0; j < parts; j++) sum[j] = first ? (lanes){0} : load_some(FLOAT32, to[j], i, width - i);
        for (int e = 0; e < count; e++) {
            lanes input = load_some(FLOAT32, from[e], i, width - i);
            for (int j = 0; j < parts; j++) sum[j] += factor[e][j] * input;
        }
        for (int j = 0; j < parts; j++) store_some(FLOAT32, to[j], i, sum[j], width - i);
    }
}

/* `parts` parts of one expert's gradient, of which `factors` has one for each pair from place `skip` on. */
INLINED void reduce(
    int parts, const uint64_t *pairs, int64_t count, int64_t k, int64_t width, const float *x, const float *factors,
    int64_t all, int64_t skip, float *const *to) {
    for (int64_t p = 0, next; p < count; p = next) {
        const float *from[BLOCK];
        float factor[BLOCK][2];
        next = count - p < BLOCK ? p + 1 : p + BLOCK;
        for (int64_t e = 0; p + e < next; e++) {
            int64_t pair = (int64_t)(pairs[p + e] & 0xffffffff);
            from[e] = x + pair / k * width;
            for (int j = 0; j < parts; j++) factor[e][j] = factors[pair * all + skip + j];
        }
        if (next == p + BLOCK) {
            if (p) collect(BLOCK, parts, 0, width, from, factor, to);
            else collect(BLOCK, parts, 1, width, from, factor, to);
        } else if (p) collect(1, parts, 0, width, from, factor, to);
        else collect(1, parts, 1, width, from, factor, to);
    }
}

static void reduce_row(
    int64_t type, int64_t parts, const uint64_t *pairs, int64_t count, int64_t k, int64_t width, const float *x,
    const float *dy, const float *factors, void *row) {
    float whole[type == FLOAT32 ? 1 : parts * width], *start = type == FLOAT32 ? row : whole;
    float *to[3] = {start, start + width, start + 2 * width};
    if (parts == 2) reduce(1, pairs, count, k, width, x, factors, parts, 0, to);
    if (parts == 3) reduce(2, pairs, count, k, width, x, factors, parts, 0, to);
    reduce(1, pairs, count, k, width, dy, factors, parts, parts - 1, to + parts - 1);
    for (int64_t i = 0; type != FLOAT32 && i < parts * width; i += LANES)
        store_some(type, row, i, load_some(FLOAT32, whole, i, parts * width - i), parts * width - i);
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
        if (d_rows) reduce_row(type, parts, pairs, count, k, width, x, dy, factors, row);
        for (int64_t j = 0; d_bias && j < inputs; j++) {
            float sum = 0;
            for (int64_t p = 0; p < count; p++) sum += factors[(pairs[p] & 0xffffffff) * parts + j];
            d_bias[ids[one] * inputs + j] = sum;
        }
    }
}
