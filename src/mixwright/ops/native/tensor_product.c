/* A_cj = sum_s w_cs (l1_sj x l2_sj) x (r1_sj x r2_sj), cut to a width, float32, and its gradients: `build` of
   ops/tensor_product.py in one call.

   Leaves are (terms, rank, radix), or with `own` (choices, terms, rank, radix); a missing l2 or r2 is NULL with radix 1.
   Every row of a factor is made from its own rows of the leaves, so rows run in parallel, no two threads write to one
   place, and the result does not depend on their number. Compiled by ops/kernels.py; GNU C for its vector types. */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define ROWS 4
#define SMALL (1 << 20)

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t picks __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef struct {
    const float *weights, *l1, *l2, *r1, *r2;
    int64_t choices, terms, rank, n1, n2, m1, m2, width, own;
} product;

static inline lanes load(const float *from) {
    lanes value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void store(float *to, lanes value) { memcpy(to, &value, sizeof value); }

static inline int64_t blocks(int64_t width) { return (width + LANES - 1) / LANES; }

/* Where term s of row j begins in a leaf. */
static inline int64_t place(const product *of, int64_t c, int64_t s, int64_t j, int64_t radix) {
    return (((of->own ? c * of->terms : 0) + s) * of->rank + j) * radix;
}

/* left[p][s], the first leaf slowest. */
static void left_half(const product *of, int64_t c, int64_t j, float *left) {
    for (int64_t s = 0; s < of->terms; s++) {
        const float *one = of->l1 + place(of, c, s, j, of->n1);
        const float *two = of->l2 ? of->l2 + place(of, c, s, j, of->n2) : 0;
        float *to = left + s;
        for (int64_t a = 0; a < of->n1; a++)
            for (int64_t b = 0; b < of->n2; b++, to += of->terms) *to = two ? one[a] * two[b] : one[a];
    }
}

/* right[s][q], rows padded with zeros to whole vectors. */
static void right_half(const product *of, int64_t c, int64_t j, float *right) {
    int64_t columns = of->m1 * of->m2, padded = LANES * blocks(columns);
    for (int64_t s = 0; s < of->terms; s++) {
        const float *one = of->r1 + place(of, c, s, j, of->m1);
        const float *two = of->r2 ? of->r2 + place(of, c, s, j, of->m2) : 0;
        float *to = right + s * padded;
        if (two) {
            for (int64_t a = 0; a < of->m1; a++, to += of->m2)
                for (int64_t b = 0; b < of->m2; b++) to[b] = one[a] * two[b];
        } else {
            memcpy(to, one, sizeof(float) * columns);
            to += columns;
        }
        memset(to, 0, sizeof(float) * (padded - columns));
    }
}

/* `count` vectors of `rows` rows that are `columns` apart: sum_s left[s] right[s]. A row may spill into the next one,
   which is written after it. */
static inline __attribute__((always_inline)) void vectors(
    int rows, int count, float *out, int64_t columns, const float *left, const float *right, int64_t terms,
    int64_t padded) {
    lanes sums[2][4];
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < count; k++) sums[i][k] = (lanes){0};
    for (int64_t s = 0; s < terms; s++)
        for (int k = 0; k < count; k++) {
            lanes factor = load(right + s * padded + k * LANES);
            for (int i = 0; i < rows; i++) sums[i][k] += left[i * terms + s] * factor;
        }
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < count; k++) store(out + i * columns + k * LANES, sums[i][k]);
}

static void one_row(float *out, const float *left, const float *right, int64_t terms, int64_t padded) {
    for (int64_t from = 0; from < padded; from += 4 * LANES) {
        int64_t rest = (padded - from) / LANES;
#define CASE(n) case n: vectors(1, n, out + from, 0, left, right + from, terms, padded); break;
        switch (rest < 4 ? rest : 4) { CASE(4) CASE(3) CASE(2) CASE(1) }
#undef CASE
    }
}

static void two_rows(
    float *out, int64_t columns, const float *left, const float *right, int64_t terms, int64_t padded) {
#define CASE(n) case n: vectors(2, n, out, columns, left, right, terms, padded); break;
    switch (padded / LANES) { CASE(4) CASE(3) CASE(2) CASE(1) }
#undef CASE
}

static void build_row(const product *of, int64_t c, int64_t j, float *out) {
    int64_t rows = of->n1 * of->n2, columns = of->m1 * of->m2, padded = LANES * blocks(columns), terms = of->terms;
    float left[rows * terms];
    float right[terms * padded] __attribute__((aligned(64))), last[padded] __attribute__((aligned(64)));
    left_half(of, c, j, left);
    right_half(of, c, j, right);
    for (int64_t p = 0; p < rows; p++)
        for (int64_t s = 0; s < terms; s++) left[p * terms + s] *= of->weights[c * terms + s];
    for (int64_t p = 0; p < rows && p * columns < of->width; p++) {
        int64_t left_over = of->width - p * columns;
        if (padded <= 4 * LANES && left_over >= columns + padded) {
            two_rows(out + p * columns, columns, left + p * terms, right, terms, padded);
            p++;
            continue;
        }
        float *to = left_over >= padded ? out + p * columns : last;
        one_row(to, left + p * terms, right, terms, padded);
        if (to == last) memcpy(out + p * columns, last, sizeof(float) * (left_over < columns ? left_over : columns));
    }
}

void mixwright_build(
    float *out, const float *weights, const float *l1, const float *l2, const float *r1, const float *r2,
    int64_t choices, int64_t terms, int64_t rank, int64_t n1, int64_t n2, int64_t m1, int64_t m2, int64_t width,
    int64_t own) {
    product of = {weights, l1, l2, r1, r2, choices, terms, rank, n1, n2, m1, m2, width, own};
#pragma omp parallel for collapse(2) if (choices * rank * width * terms > SMALL)
    for (int64_t c = 0; c < choices; c++)
        for (int64_t j = 0; j < rank; j++) build_row(&of, c, j, out + (c * rank + j) * width);
}

/* The sums over the lanes of 16 vectors: halves are added crosswise, four times. */
static inline lanes totals(lanes *sums) {
#pragma GCC unroll 4
    for (int width = 1; width < LANES; width *= 2) {
        picks even, odd;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            even[i] = i & width ? LANES + i - width : i;
            odd[i] = i & width ? LANES + i : i + width;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i += 2 * width)
            sums[i] = __builtin_shuffle(sums[i], sums[i + width], even) + __builtin_shuffle(sums[i], sums[i + width], odd);
    }
    return sums[0];
}

/* Gradients of the two leaves of the left half from d_left[p][s]. */
static void split_left(
    const product *of, int64_t c, int64_t j, const float *d_left, float *d_one, float *d_two) {
    int64_t terms = of->terms, n1 = of->n1, n2 = of->n2;
    float one[n1 * terms], two[n2 * terms], to_one[n1 * terms], to_two[n2 * terms];
    if (!of->l2) {
        for (int64_t s = 0; s < terms; s++)
            for (int64_t a = 0; a < n1; a++) d_one[place(of, c, s, j, n1) + a] += d_left[a * terms + s];
        return;
    }
    memset(to_one, 0, sizeof to_one);
    memset(to_two, 0, sizeof to_two);
    for (int64_t s = 0; s < terms; s++) {
        for (int64_t a = 0; a < n1; a++) one[a * terms + s] = of->l1[place(of, c, s, j, n1) + a];
        for (int64_t b = 0; b < n2; b++) two[b * terms + s] = of->l2[place(of, c, s, j, n2) + b];
    }
    for (int64_t a = 0; a < n1; a++)
        for (int64_t b = 0; b < n2; b++, d_left += terms)
            for (int64_t s = 0; s < terms; s++) {
                to_one[a * terms + s] += d_left[s] * two[b * terms + s];
                to_two[b * terms + s] += d_left[s] * one[a * terms + s];
            }
    for (int64_t s = 0; s < terms; s++) {
        for (int64_t a = 0; a < n1; a++) d_one[place(of, c, s, j, n1) + a] += to_one[a * terms + s];
        for (int64_t b = 0; b < n2; b++) d_two[place(of, c, s, j, n2) + b] += to_two[b * terms + s];
    }
}

/* Gradients of the two leaves of the right half from d_right[s]. */
static void split_right(
    const product *of, int64_t c, int64_t j, const float *d_right, int64_t padded, float *d_one, float *d_two) {
    for (int64_t s = 0; s < of->terms; s++, d_right += padded) {
        int64_t first = place(of, c, s, j, of->m1), second = place(of, c, s, j, of->m2);
        const float *from = d_right;
        for (int64_t a = 0; a < of->m1; a++, from += of->m2) {
            if (!of->r2) {
                d_one[first + a] += *from;
                continue;
            }
            float sum = 0, strength = of->r1[first + a];
            for (int64_t b = 0; b < of->m2; b++) {
                sum += from[b] * of->r2[second + b];
                d_two[second + b] += from[b] * strength;
            }
            d_one[first + a] += sum;
        }
    }
}

static void clear(const product *of, int64_t c, int64_t j, float *leaf, int64_t radix) {
    if (leaf)
        for (int64_t s = 0; s < of->terms; s++) memset(leaf + place(of, c, s, j, radix), 0, sizeof(float) * radix);
}

/* Row p of the gradient in whole vectors, zeros beyond its end. */
static inline void gradient_row(const product *of, const float *gradient, int64_t p, float *to) {
    int64_t columns = of->m1 * of->m2, padded = LANES * blocks(columns), rest = of->width - p * columns;
    rest = rest < 0 ? 0 : rest < columns ? rest : columns;
    memcpy(to, gradient + p * columns, sizeof(float) * rest);
    memset(to + rest, 0, sizeof(float) * (padded - rest));
}

/* For `count` vectors of ROWS rows g: sums += g right[s], d_right[s] += left g. */
static inline __attribute__((always_inline)) void contract_vectors(
    int count, const float *g, int64_t padded, const float *left, const float *right, int64_t terms, lanes *sums,
    float *d_right) {
    lanes rows[ROWS][4];
    for (int i = 0; i < ROWS; i++)
        for (int k = 0; k < count; k++) rows[i][k] = load(g + i * padded + k * LANES);
    for (int64_t s = 0; s < terms; s++) {
        lanes sum[ROWS];
        for (int i = 0; i < ROWS; i++) sum[i] = sums[i * terms + s];
        for (int k = 0; k < count; k++) {
            float *target = d_right + s * padded + k * LANES;
            lanes factor = load(right + s * padded + k * LANES), change = load(target);
            for (int i = 0; i < ROWS; i++) {
                sum[i] += rows[i][k] * factor;
                change += left[i * terms + s] * rows[i][k];
            }
            store(target, change);
        }
        for (int i = 0; i < ROWS; i++) sums[i * terms + s] = sum[i];
    }
}

/* d_left[p][s] = <g_p, right_s>, d_right[s] = sum_p left[p][s] g_p; left and d_left have room for ROWS more rows. */
static void contract(
    const product *of, const float *gradient, const float *left, const float *right, float *d_left, float *d_right) {
    int64_t columns = of->m1 * of->m2, padded = LANES * blocks(columns), terms = of->terms, rows = of->n1 * of->n2;
    int64_t groups = blocks(ROWS * terms);
    lanes sums[LANES * groups] __attribute__((aligned(64)));
    float g[ROWS * padded] __attribute__((aligned(64)));
    for (int64_t p = 0; p < rows; p += ROWS) {
        for (int64_t i = 0; i < ROWS; i++) gradient_row(of, gradient, p + i, g + i * padded);
        memset(sums, 0, sizeof sums);
        for (int64_t from = 0; from < padded; from += 4 * LANES) {
            int64_t rest = (padded - from) / LANES;
#define CASE(n) \
    case n: contract_vectors(n, g + from, padded, left + p * terms, right + from, terms, sums, d_right + from); break;
            switch (rest < 4 ? rest : 4) { CASE(4) CASE(3) CASE(2) CASE(1) }
#undef CASE
        }
        for (int64_t i = 0; i < groups; i++) {
            lanes sum = totals(sums + i * LANES);
            int64_t rest = ROWS * terms - i * LANES;
            memcpy(d_left + p * terms + i * LANES, &sum, sizeof(float) * (rest < LANES ? rest : LANES));
        }
    }
}

static void backward_row(
    const product *of, int64_t c, int64_t j, const float *gradient, float *d_weights, float *const *d_leaves) {
    int64_t rows = of->n1 * of->n2, padded = LANES * blocks(of->m1 * of->m2), terms = of->terms;
    float left[(rows + ROWS) * terms], d_left[(rows + ROWS) * terms];
    float right[terms * padded] __attribute__((aligned(64))), d_right[terms * padded] __attribute__((aligned(64)));
    left_half(of, c, j, left);
    memset(left + rows * terms, 0, sizeof(float) * ROWS * terms);
    right_half(of, c, j, right);
    memset(d_right, 0, sizeof d_right);
    contract(of, gradient, left, right, d_left, d_right);
    const float *weights = of->weights + c * terms;
    for (int64_t s = 0; s < terms; s++) d_weights[s] = 0;
    for (int64_t p = 0; p < rows; p++)
        for (int64_t s = 0; s < terms; s++) {
            d_weights[s] += d_left[p * terms + s] * left[p * terms + s];
            d_left[p * terms + s] *= weights[s];
        }
    for (int64_t s = 0; s < terms; s++)
        for (int64_t q = 0; q < padded; q++) d_right[s * padded + q] *= weights[s];
    split_left(of, c, j, d_left, d_leaves[0], d_leaves[1]);
    split_right(of, c, j, d_right, padded, d_leaves[2], d_leaves[3]);
}

/* Gradients of everything from that of the result, (choices, rank, width). `partial` (rank, choices, terms) is scratch. */
void mixwright_build_backward(
    const float *gradient, float *d_weights, float *d_l1, float *d_l2, float *d_r1, float *d_r2, float *partial,
    const float *weights, const float *l1, const float *l2, const float *r1, const float *r2, int64_t choices,
    int64_t terms, int64_t rank, int64_t n1, int64_t n2, int64_t m1, int64_t m2, int64_t width, int64_t own) {
    product of = {weights, l1, l2, r1, r2, choices, terms, rank, n1, n2, m1, m2, width, own};
    float *const d_leaves[4] = {d_l1, d_l2, d_r1, d_r2};
    const int64_t radices[4] = {n1, n2, m1, m2};
#pragma omp parallel for if (choices * rank * width * terms > SMALL)
    for (int64_t j = 0; j < rank; j++)
        for (int64_t c = 0; c < choices; c++) {
            if (own || !c)
                for (int leaf = 0; leaf < 4; leaf++) clear(&of, c, j, d_leaves[leaf], radices[leaf]);
            backward_row(
                &of, c, j, gradient + (c * rank + j) * width, partial + (j * choices + c) * terms, d_leaves);
        }
    memset(d_weights, 0, sizeof(float) * choices * terms);
    for (int64_t j = 0; j < rank; j++)
        for (int64_t i = 0; i < choices * terms; i++) d_weights[i] += partial[j * choices * terms + i];
}
