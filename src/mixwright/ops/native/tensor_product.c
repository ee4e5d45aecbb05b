/* A_cj = sum_s w_cs (l1_sj x l2_sj) x (r1_sj x r2_sj), cut to a width, float32, and its gradients: `build` of
   ops/tensor_product.py in one call.

   Leaves are (terms, rank, radix), or with `own` (choices, terms, rank, radix); a missing l2 or r2 is NULL with radix 1.
   Every row of a factor is made from its own rows of the leaves, and all in the same way: a vector holds one number of
   LANES rows. Sixteen rows of the left half at a time are multiplied with the right half and turned into the result.
   Threads share out whole groups of rows, so that the result does not depend on their number. Compiled by
   ops/kernels.py; GNU C for its vector types. */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define TILE 4
#define SMALL (1 << 21)

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
typedef int32_t picks __attribute__((vector_size(4 * LANES)));

#include "turn.h"

typedef struct {
    const float *weights, *leaf[4];
    int64_t choices, terms, rank, radix[4], width, own;
} product;

static inline int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

/* to[i] = the i-th numbers of `rows` rows that are `stride` apart; lanes without a row are zero. */
static void gather(const float *from, int64_t stride, int rows, int64_t count, lanes *to) {
    int64_t i = 0;
    if (rows == LANES)
        for (; i + LANES <= count; i += LANES) {
            lanes block[LANES];
            for (int k = 0; k < LANES; k++) memcpy(block + k, from + k * stride + i, sizeof(lanes));
            turn(block);
            memcpy(to + i, block, sizeof block);
        }
    if (i == count) return;
    memset(to + i, 0, sizeof(lanes) * (count - i));
    for (int k = 0; k < rows; k++)
        for (int64_t rest = i; rest < count; rest++) ((float *)(to + rest))[k] = from[k * stride + rest];
}

/* The inverse. */
static void scatter(const lanes *from, float *to, int64_t stride, int rows, int64_t count) {
    int64_t i = 0;
    if (rows == LANES)
        for (; i + LANES <= count; i += LANES) {
            lanes block[LANES];
            memcpy(block, from + i, sizeof block);
            turn(block);
            for (int k = 0; k < LANES; k++) memcpy(to + k * stride + i, block + k, sizeof(lanes));
        }
    for (int k = 0; k < rows; k++)
        for (int64_t rest = i; rest < count; rest++) to[k * stride + rest] = ((const float *)(from + rest))[k];
}

/* Where term s of row j begins in a leaf. */
static inline int64_t place(const product *of, int leaf, int64_t c, int64_t s, int64_t j) {
    return (((of->own ? c * of->terms : 0) + s) * of->rank + j) * of->radix[leaf];
}

static void gather_leaf(const product *of, int leaf, int64_t c, int64_t j, int rows, lanes *to) {
    for (int64_t s = 0; of->leaf[leaf] && s < of->terms; s++, to += of->radix[leaf])
        gather(of->leaf[leaf] + place(of, leaf, c, s, j), of->radix[leaf], rows, of->radix[leaf], to);
}

/* half[p][s] = one[s][a] two[s][b] with p = (a, b), for `all` terms and `count` p; zeros where there is nothing. */
static void multiply(
    const lanes *one, const lanes *two, int64_t terms, int64_t n1, int64_t n2, lanes *half, int64_t all,
    int64_t count) {
    if (all > terms) memset(half, 0, sizeof(lanes) * all * count);
    memset(half + n1 * n2 * all, 0, sizeof(lanes) * all * (count - n1 * n2));
    for (int64_t a = 0; a < n1; a++)
        for (int64_t b = 0; b < n2; b++, half += all)
            for (int64_t s = 0; s < terms; s++) half[s] = two ? one[s * n1 + a] * two[s * n2 + b] : one[s * n1 + a];
}

/* Gradients of the two leaves of a half, added to what is there. */
static void split(
    const lanes *d_half, int64_t all, const lanes *one, const lanes *two, int64_t terms, int64_t n1, int64_t n2,
    lanes *d_one, lanes *d_two) {
    for (int64_t a = 0; a < n1; a++)
        for (int64_t b = 0; b < n2; b++, d_half += all)
            for (int64_t s = 0; s < terms; s++) {
                d_one[s * n1 + a] += two ? d_half[s] * two[s * n2 + b] : d_half[s];
                if (two) d_two[s * n2 + b] += d_half[s] * one[s * n1 + a];
            }
}

/* out[i][k] (+)= sum over n of x[i][n] y[k][n], for TILE rows of x and `columns` of y. */
static inline __attribute__((always_inline)) void tile(
    int columns, int add, int64_t count, const lanes *x, int64_t x_row, int64_t x_step, const lanes *y, int64_t y_row,
    int64_t y_step, lanes *out, int64_t out_row, int64_t out_column) {
    lanes sums[TILE][TILE];
    for (int i = 0; i < TILE; i++)
        for (int k = 0; k < columns; k++) sums[i][k] = add ? out[i * out_row + k * out_column] : (lanes){0};
    for (int64_t n = 0; n < count; n++)
        for (int k = 0; k < columns; k++) {
            lanes factor = y[k * y_row + n * y_step];
            for (int i = 0; i < TILE; i++) sums[i][k] += x[i * x_row + n * x_step] * factor;
        }
    for (int i = 0; i < TILE; i++)
        for (int k = 0; k < columns; k++) out[i * out_row + k * out_column] = sums[i][k];
}

/* The same for any number of columns, a few at a time. */
static void tiles(
    int64_t columns, int add, int64_t count, const lanes *x, int64_t x_row, int64_t x_step, const lanes *y,
    int64_t y_row, int64_t y_step, lanes *out, int64_t out_row, int64_t out_column) {
    for (; columns > 0; columns -= TILE, y += TILE * y_row, out += TILE * out_column)
#define CASE(n) case n: tile(n, add, count, x, x_row, x_step, y, y_row, y_step, out, out_row, out_column); break;
        switch (columns < TILE ? columns : TILE) { CASE(4) CASE(3) CASE(2) CASE(1) }
#undef CASE
}

static void build_rows(const product *of, int64_t c, int64_t j, float *out) {
    int rows = of->rank - j < LANES ? (int)(of->rank - j) : LANES;
    const int64_t *q = of->radix;
    int64_t terms = of->terms, columns = q[2] * q[3], count = padded(q[0] * q[1], LANES);
    lanes one[terms * q[0]], two[terms * q[1]], three[terms * q[2]], four[terms * q[3]];
    lanes *const leaves[4] = {one, two, three, four};
    lanes left[count * terms], right[columns * terms], result[LANES * columns];
    for (int leaf = 0; leaf < 4; leaf++) gather_leaf(of, leaf, c, j, rows, leaves[leaf]);
    for (int64_t s = 0; s < terms; s++)
        for (int64_t a = 0; a < q[0]; a++) one[s * q[0] + a] *= of->weights[c * terms + s];
    multiply(one, of->leaf[1] ? two : 0, terms, q[0], q[1], left, terms, count);
    multiply(three, of->leaf[3] ? four : 0, terms, q[2], q[3], right, terms, columns);
    for (int64_t p = 0; p < count && p * columns < of->width; p += LANES) {
        int64_t rest = of->width - p * columns, here = rest < LANES * columns ? rest : LANES * columns;
        for (int64_t i = 0; i * columns < here; i += TILE)
            tiles(columns, 0, terms, left + (p + i) * terms, terms, 1, right, terms, 1, result + i * columns, columns, 1);
        scatter(result, out + p * columns, of->width, rows, here);
    }
}

void mixwright_build(
    float *out, const float *weights, const float *l1, const float *l2, const float *r1, const float *r2,
    int64_t choices, int64_t terms, int64_t rank, int64_t n1, int64_t n2, int64_t m1, int64_t m2, int64_t width,
    int64_t own) {
    product of = {weights, {l1, l2, r1, r2}, choices, terms, rank, {n1, n2, m1, m2}, width, own};
#pragma omp parallel for collapse(2) if (choices * rank * width * terms > SMALL)
    for (int64_t c = 0; c < choices; c++)
        for (int64_t j = 0; j < rank; j += LANES) build_rows(&of, c, j, out + (c * rank + j) * width);
}

static void backward_rows(
    const product *of, int64_t j, const float *gradient, float *const *d_leaf, float *d_weights) {
    int rows = of->rank - j < LANES ? (int)(of->rank - j) : LANES;
    const int64_t *q = of->radix;
    int64_t terms = of->terms, all = padded(terms, TILE), columns = q[2] * q[3], count = padded(q[0] * q[1], LANES);
    lanes one[terms * q[0]], two[terms * q[1]], three[terms * q[2]], four[terms * q[3]];
    lanes d_one[terms * q[0]], d_two[terms * q[1]], d_three[terms * q[2]], d_four[terms * q[3]];
    lanes left[count * all], right[columns * all], d_left[count * all], d_right[columns * all], g[LANES * columns];
    lanes *const leaves[4] = {one, two, three, four}, *const d_leaves[4] = {d_one, d_two, d_three, d_four};
    for (int64_t c = 0; c < of->choices; c++) {
        if (of->own || !c) {
            for (int leaf = 0; leaf < 4; leaf++) {
                gather_leaf(of, leaf, c, j, rows, leaves[leaf]);
                memset(d_leaves[leaf], 0, sizeof(lanes) * terms * q[leaf]);
            }
            multiply(one, of->leaf[1] ? two : 0, terms, q[0], q[1], left, all, count);
            multiply(three, of->leaf[3] ? four : 0, terms, q[2], q[3], right, all, columns);
        }
        memset(d_left, 0, sizeof d_left);
        memset(d_right, 0, sizeof d_right);
        for (int64_t p = 0; p < count && p * columns < of->width; p += LANES) {
            int64_t rest = of->width - p * columns, here = rest < LANES * columns ? rest : LANES * columns;
            int64_t deep = padded((here + columns - 1) / columns, TILE);
            gather(gradient + (c * of->rank + j) * of->width + p * columns, of->width, rows, here, g);
            memset(g + here, 0, sizeof(lanes) * (deep * columns - here));
            for (int64_t s = 0; s < all; s += TILE) {
                /* d_left[p][s] = sum_q right[q][s] g[p][q], d_right[q][s] += sum_p left[p][s] g[p][q] */
                tiles(deep, 0, columns, right + s, 1, all, g, columns, 1, d_left + p * all + s, 1, all);
                tiles(columns, 1, deep, left + p * all + s, 1, all, g, 1, columns, d_right + s, 1, all);
            }
        }
        for (int64_t s = 0; s < terms; s++) {
            float weight = of->weights[c * terms + s], total = 0;
            lanes sum = {0};
            for (int64_t p = 0; p < count; p++) {
                sum += d_left[p * all + s] * left[p * all + s];
                d_left[p * all + s] *= weight;
            }
            for (int64_t p = 0; p < columns; p++) d_right[p * all + s] *= weight;
            for (int k = 0; k < rows; k++) total += sum[k];
            d_weights[c * terms + s] = total;
        }
        split(d_left, all, one, of->leaf[1] ? two : 0, terms, q[0], q[1], d_one, d_two);
        split(d_right, all, three, of->leaf[3] ? four : 0, terms, q[2], q[3], d_three, d_four);
        if (of->own || c == of->choices - 1)
            for (int leaf = 0; leaf < 4; leaf++)
                for (int64_t s = 0; d_leaf[leaf] && s < terms; s++)
                    scatter(
                        d_leaves[leaf] + s * q[leaf], d_leaf[leaf] + place(of, leaf, c, s, j), q[leaf], rows, q[leaf]);
    }
}

/* Gradients of everything from that of the result, (choices, rank, width); those of the weights are added to what is
   there, group of rows by group of rows. */
void mixwright_build_backward(
    const float *gradient, float *d_weights, float *d_l1, float *d_l2, float *d_r1, float *d_r2, const float *weights,
    const float *l1, const float *l2, const float *r1, const float *r2, int64_t choices, int64_t terms, int64_t rank,
    int64_t n1, int64_t n2, int64_t m1, int64_t m2, int64_t width, int64_t own) {
    product of = {weights, {l1, l2, r1, r2}, choices, terms, rank, {n1, n2, m1, m2}, width, own};
    float *const d_leaf[4] = {d_l1, d_l2, d_r1, d_r2};
    int64_t groups = (rank + LANES - 1) / LANES, count = choices * terms;
    float sums[groups * count];
#pragma omp parallel for if (count * rank * width > SMALL)
    for (int64_t group = 0; group < groups; group++)
        backward_rows(&of, group * LANES, gradient, d_leaf, sums + group * count);
    for (int64_t i = 0; i < groups * count; i++) d_weights[i % count] += sums[i];
}
