/* Sums over single-neuron experts, y_t = sum_k w_tk act(<u_k, x_t>) v_k: `neurons_reference` of ops/neuron.py.

   Rows (experts, parts, width) are float32, bfloat16, or int8 with a float32 scale for each row part; all sums are
   float32. What is kept of a (token, expert) pair is its value before the nonlinearity, never its rows. Every token is
   one thread's, so that the number of threads changes no bit. Compiled by ops/kernels.py; GNU C for its vector types. */

#include "neuron.h"

INLINED void forward_block(
    const neurons *of, int type, int parts, int count, const float *x, float *y, const segment *at, int64_t i,
    const segment *then, float *saved) {
    const char *next[BLOCK];
    float before[BLOCK][2], hidden[BLOCK][2];
    following(at, i, then, next);
    if (parts > 1) dots(type, count, parts - 1, of->width, x, at->row + i, 0, next, before);
    for (int e = 0; e < count; e++) {
        int64_t pair = at->pair[i + e], expert = of->indices[pair];
        hidden[e][0] = of->weights[pair] * say(of, expert, before[e]);
        if (of->scales) hidden[e][0] *= of->scales[expert * parts + parts - 1];
        for (int j = 0; saved && j < parts - 1; j++) saved[pair * (parts - 1) + j] = before[e][j];
    }
    add(type, count, 1, of->width, y, at->row + i, (parts - 1) * of->width, next, hidden);
}

INLINED void forward_segment(
    const neurons *of, int type, int parts, const float *x, float *y, const segment *at, const segment *then,
    float *saved) {
    int64_t i = 0;
    for (; i + BLOCK <= at->count; i += BLOCK) forward_block(of, type, parts, BLOCK, x, y, at, i, then, saved);
    for (; i < at->count; i++) forward_block(of, type, parts, 1, x, y, at, i, then, saved);
}

static void forward_tokens(
    const neurons *of, int64_t from, int64_t to, int64_t kind, char *out, const char *x, float *saved) {
    int64_t end = to * of->k, width = of->width, stride = width * size_of(kind);
    float input[width], output[width];
    segment two[2], *at = two, *then = two + 1;
    const float *wide_x = input;
    for (gather(of, from * of->k, end, 0, at); at->from < end;) {
        gather(of, at->to, end, 0, then);
        float *y = kind == FLOAT32 ? (float *)(out + at->token * stride) : output;
        if (at->from == at->token * of->k) {
            wide_x = wide(kind, x + at->token * stride, width, input);
            memset(y, 0, sizeof(float) * width);
        }
#define CALL(type, parts) forward_segment(of, type, parts, wide_x, y, at, then, saved)
        EACH(CALL)
#undef CALL
        if (kind != FLOAT32 && at->to == (at->token + 1) * of->k)
            for (int64_t i = 0; i < width; i += LANES)
                store_some(kind, out + at->token * stride, i, load_some(FLOAT32, y, i, width - i), width - i);
        segment *done = at;
        at = then;
        then = done;
    }
}

static int outside(const neurons *of) {
    for (int64_t pair = 0; pair < of->tokens * of->k; pair++)
        if ((uint64_t)of->indices[pair] >= (uint64_t)of->experts) return 1;
    return 0;
}

/* `kind`: the type of x and out. `saved`, of (tokens, k, parts - 1), may be missing, `scales` and `bias` too. Returns 0,
   or 1 for an index outside of the table, in which case nothing was written. */
int mixwright_neurons(
    char *out, const char *x, const char *rows, const float *scales, const float *bias, const float *weights,
    const int64_t *indices, float *saved, int64_t tokens, int64_t k, int64_t experts, int64_t parts, int64_t width,
    int64_t type, int64_t kind, int64_t activation) {
    neurons of = {rows, scales, bias, weights, indices, tokens, k, experts, parts, width, type, activation};
    if (outside(&of)) return 1;
    int64_t chunk = chunk_of(&of);
#pragma omp parallel for schedule(dynamic, 1) if (tokens * k * width > SMALL)
    for (int64_t from = 0; from < tokens; from += chunk)
        forward_tokens(&of, from, from + chunk < tokens ? from + chunk : tokens, kind, out, x, saved);
    return 0;
}
