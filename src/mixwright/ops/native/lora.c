/* out_t += sum_k w_tk s_e B_e A_e x_t for chosen experts e, float32: `add_grouped` of ops/accumulate.py in one call.

   Each chosen expert's factors are read once. The products with A run in parallel over experts, those with B over
   columns of the output, so that no two threads write to one place and the result does not depend on their number.
   Only experts with a weight other than zero are read. Compiled by ops/kernels.py; GNU C for its vector types. */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define ROWS 6
#define RANKS 4
#define DEPTH 1024
#define COLUMNS 256

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t picks __attribute__((vector_size(4 * LANES)));

#include "turn.h"

static inline lanes load(const float *from) {
    lanes value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void store(float *to, lanes value) { memcpy(to, &value, sizeof value); }

static inline float total(lanes value) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += value[i];
    return sum;
}

/* hidden[i][j] += dot(x[i], a[j]) over `width` entries, for `rows` tokens and `ranks` rows of A. */
static inline __attribute__((always_inline)) void dots(
    int rows, int ranks, const float *const *x, int64_t from, int64_t width, const float *a, int64_t d_in, float *hidden,
    int64_t rank) {
    lanes sums[ROWS][RANKS];
    for (int row = 0; row < rows; row++)
        for (int j = 0; j < ranks; j++) sums[row][j] = (lanes){0};
    int64_t i = from, end = from + width;
    for (; i + LANES <= end; i += LANES) {
        lanes factors[RANKS];
        for (int j = 0; j < ranks; j++) factors[j] = load(a + j * d_in + i);
        for (int row = 0; row < rows; row++) {
            lanes input = load(x[row] + i);
            for (int j = 0; j < ranks; j++) sums[row][j] += input * factors[j];
        }
    }
    for (int row = 0; row < rows; row++)
        for (int j = 0; j < ranks; j++) {
            float sum = total(sums[row][j]);
            for (int64_t rest = i; rest < end; rest++) sum += x[row][rest] * a[j * d_in + rest];
            hidden[row * rank + j] += sum;
        }
}

static void down_rows(
    int rows, const float *const *x, int64_t from, int64_t width, const float *a, int64_t d_in, float *hidden,
    int64_t rank) {
    int64_t j = 0;
    for (; j + RANKS <= rank; j += RANKS) {
        const float *factor = a + j * d_in;
        float *target = hidden + j;
#define CASE(n) case n: dots(n, RANKS, x, from, width, factor, d_in, target, rank); break;
        switch (rows) { CASE(6) CASE(5) CASE(4) CASE(3) CASE(2) CASE(1) }
#undef CASE
    }
    for (; j < rank; j++)
        for (int row = 0; row < rows; row++)
            dots(1, 1, x + row, from, width, a + j * d_in, d_in, hidden + row * rank + j, rank);
}

/* One expert's hidden values for its tokens; blocks of the input stay in the nearest cache while A passes by. */
static void down_expert(
    const float *x, const int64_t *token, const float *strength, int64_t count, const float *a, int64_t d_in,
    float *hidden, int64_t rank) {
    memset(hidden, 0, sizeof(float) * count * rank);
    for (int64_t from = 0; from < d_in; from += DEPTH) {
        int64_t width = d_in - from < DEPTH ? d_in - from : DEPTH;
        for (int64_t i = 0; i < count; i += ROWS) {
            int rows = count - i < ROWS ? (int)(count - i) : ROWS;
            const float *inputs[ROWS];
            for (int row = 0; row < rows; row++) inputs[row] = x + token[i + row] * d_in;
            down_rows(rows, inputs, from, width, a, d_in, hidden + i * rank, rank);
        }
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < rank; j++) hidden[i * rank + j] *= strength[i];
}

/* turned[r] = the LANES columns' r-th entries; rows of `up` are `rank` apart and hold `ranks` entries from here on. */
static inline void turn_up(const float *up, int64_t rank, int ranks, int columns, lanes turned[LANES]) {
    if (ranks < LANES || columns < LANES) {
        memset(turned, 0, sizeof(lanes) * LANES);
        for (int column = 0; column < columns; column++)
            for (int r = 0; r < ranks; r++) turned[r][column] = up[column * rank + r];
        return;
    }
    for (int column = 0; column < LANES; column++) turned[column] = load(up + column * rank);
    turn(turned);
}

static inline __attribute__((always_inline)) void up_rows(
    int rows, float *const *out, const float *hidden, int64_t rank, int ranks, const lanes turned[LANES]) {
    lanes sums[ROWS];
    for (int row = 0; row < rows; row++) sums[row] = load(out[row]);
    for (int r = 0; r < ranks; r++)
        for (int row = 0; row < rows; row++) sums[row] += hidden[row * rank + r] * turned[r];
    for (int row = 0; row < rows; row++) store(out[row], sums[row]);
}

static void up_tail(float *out, const float *hidden, int ranks, int columns, const lanes turned[LANES]) {
    for (int column = 0; column < columns; column++) {
        float sum = out[column];
        for (int r = 0; r < ranks; r++) sum += hidden[r] * turned[r][column];
        out[column] = sum;
    }
}

static void up_block(
    float *out, int64_t d_out, int64_t column, int columns, const float *up, int64_t rank, const int64_t *token,
    const float *hidden, int64_t count) {
    for (int64_t r = 0; r < rank; r += LANES) {
        int ranks = rank - r < LANES ? (int)(rank - r) : LANES;
        lanes turned[LANES];
        turn_up(up + column * rank + r, rank, ranks, columns, turned);
        for (int64_t i = 0; i < count;) {
            int rows = columns < LANES ? 1 : count - i < ROWS ? (int)(count - i) : ROWS;
            float *targets[ROWS];
            for (int row = 0; row < rows; row++) targets[row] = out + token[i + row] * d_out + column;
            const float *weights = hidden + i * rank + r;
            i += rows;
            if (columns < LANES) {
                up_tail(targets[0], weights, ranks, columns, turned);
                continue;
            }
            if (ranks < LANES) {
                for (int row = 0; row < rows; row++)
                    up_rows(1, targets + row, weights + row * rank, rank, ranks, turned);
                continue;
            }
#define CASE(n) case n: up_rows(n, targets, weights, rank, LANES, turned); break;
            switch (rows) { CASE(6) CASE(5) CASE(4) CASE(3) CASE(2) CASE(1) }
#undef CASE
        }
    }
}

/* `places` holds 2 * experts + 1 + tokens * k integers, `values` tokens * k * (rank + 1) floats; both are scratch.
   Returns 0, or 1 for an index outside of the pool, in which case nothing was written to `out`. */
int mixwright_add_lora(
    float *out, const float *x, const float *down, const float *up, const float *scale, const float *weights,
    const int64_t *indices, int64_t tokens, int64_t k, int64_t experts, int64_t rank, int64_t d_in, int64_t d_out,
    int64_t *places, float *values) {
    int64_t *start = places, *chosen = start + experts + 1, *token = chosen + experts;
    float *strength = values, *hidden = values + tokens * k;
    memset(start, 0, sizeof(int64_t) * (experts + 1));
    for (int64_t i = 0; i < tokens * k; i++) {
        if (indices[i] < 0 || indices[i] >= experts) return 1;
        start[indices[i] + 1] += weights[i] != 0;
    }
    int64_t groups = 0;
    for (int64_t expert = 0; expert < experts; expert++) {
        if (start[expert + 1]) chosen[groups++] = expert;
        start[expert + 1] += start[expert];
    }
    /* Filling moves each start to its end, which is the next one's start. */
    for (int64_t i = 0; i < tokens * k; i++)
        if (weights[i] != 0) {
            int64_t place = start[indices[i]]++;
            token[place] = i / k;
            strength[place] = weights[i] * scale[indices[i]];
        }
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t group = 0; group < groups; group++) {
            int64_t expert = chosen[group], first = group ? start[chosen[group - 1]] : 0, end = start[expert];
            down_expert(
                x, token + first, strength + first, end - first, down + expert * rank * d_in, d_in, hidden + first * rank,
                rank);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t from = 0; from < d_out; from += COLUMNS) {
            int64_t to = from + COLUMNS < d_out ? from + COLUMNS : d_out;
            for (int64_t group = 0; group < groups; group++) {
                int64_t expert = chosen[group], first = group ? start[chosen[group - 1]] : 0;
                for (int64_t column = from; column < to; column += LANES)
                    up_block(
                        out, d_out, column, to - column < LANES ? (int)(to - column) : LANES, up + expert * d_out * rank,
                        rank, token + first, hidden + first * rank, start[expert] - first);
            }
        }
    }
    return 0;
}
