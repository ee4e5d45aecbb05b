/* Gradients of sums over single-neuron experts, token by token: of x and of the weights, and for every pair the factors
   with which neuron_rows.c makes those of the rows. Every token is one thread's. */

#include "neuron.h"

static float slope(int64_t activation, float a) {
    switch (activation) {
    case GELU: return 0.5f * (1 + erff(a * 0.70710678118654752f)) + a * 0.39894228040143268f * expf(-0.5f * a * a);
    case GELU_TANH: {
        float t = tanhf(0.79788456080286536f * (a + 0.044715f * a * a * a));
        return 0.5f * (1 + t) + 0.5f * a * (1 - t * t) * 0.79788456080286536f * (1 + 0.134145f * a * a);
    }
    case RELU: return a > 0;
    case SILU: {
        float s = 1 / (1 + expf(-a));
        return s * (1 + a * (1 - s));
    }
    default: return a > 0 ? 2 * a : 0;
    }
}

/* Of one pair, from its values before the nonlinearity and <v, dy>: the factors with which its rows enter the gradients
   (in, gate: of x; out: of dy) and the gradient of its weight. */
static inline float turn_back(
    const neurons *of, float weight, const float *before, float along, float *factors) {
    if (of->parts == 1) {
        factors[0] = weight;
        return along;
    }
    float a = before[of->parts - 2], said = act(of->activation, a), back = weight * along * slope(of->activation, a);
    if (of->parts == 2) {
        factors[0] = back;
        factors[1] = weight * said;
        return said * along;
    }
    factors[0] = weight * along * said;
    factors[1] = back * before[0];
    factors[2] = weight * said * before[0];
    return said * before[0] * along;
}

INLINED void backward_block(
    const neurons *of, int type, int parts, int count, const float *x, const float *dy, float *dx, const segment *at,
    int64_t i, const segment *then, const float *saved, float *d_weights, float *factors) {
    const char *next[BLOCK];
    float along[BLOCK][2], inward[BLOCK][2];
    following(at, i, then, next);
    dots(type, count, 1, of->width, dy, at->row + i, (parts - 1) * of->width, next, along);
    for (int e = 0; e < count; e++) {
        int64_t pair = at->pair[i + e];
        float before[1][2] = {{0}}, *own = factors + pair * parts, weight = of->weights[pair];
        if (parts > 1 && weight == 0) {
            dots(type, 1, parts - 1, of->width, x, at->row + i + e, 0, at->row + i + e, before);
            say(of, of->indices[pair], before[0]);
        } else
            for (int j = 0; j < parts - 1; j++) before[0][j] = saved[pair * (parts - 1) + j];
        float d_weight = turn_back(of, weight, before[0], along[e][0], own);
        if (d_weights) d_weights[pair] = d_weight;
        for (int j = 0; j < parts - 1; j++) inward[e][j] = own[j];
    }
    if (dx && parts > 1) add(type, count, parts - 1, of->width, dx, at->row + i, 0, next, inward);
}

INLINED void backward_segment(
    const neurons *of, int type, int parts, const float *x, const float *dy, float *dx, const segment *at,
    const segment *then, const float *saved, float *d_weights, float *factors) {
    int64_t i = 0;
    for (; i + BLOCK <= at->count; i += BLOCK)
        backward_block(of, type, parts, BLOCK, x, dy, dx, at, i, then, saved, d_weights, factors);
    for (; i < at->count; i++)
        backward_block(of, type, parts, 1, x, dy, dx, at, i, then, saved, d_weights, factors);
}

static void backward_tokens(
    const neurons *of, int64_t from, int64_t to, int64_t kind, char *dx, const char *x, const char *dy,
    const float *saved, float *d_weights, float *factors) {
    int64_t end = to * of->k, width = of->width, stride = width * size_of(kind);
    float input[width], output[width], gradient[width];
    segment two[2], *at = two, *then = two + 1;
    const float *wide_x = input, *wide_dy = gradient;
    for (gather(of, from * of->k, end, d_weights != 0, at); at->from < end;) {
        gather(of, at->to, end, d_weights != 0, then);
        float *sum = !dx ? 0 : kind == FLOAT32 ? (float *)(dx + at->token * stride) : output;
        if (at->from == at->token * of->k) {
            wide_x = wide(kind, x + at->token * stride, width, input);
            wide_dy = wide(kind, dy + at->token * stride, width, gradient);
            if (sum) memset(sum, 0, sizeof(float) * width);
        }
#define CALL(type, parts) backward_segment(of, type, parts, wide_x, wide_dy, sum, at, then, saved, d_weights, factors)
        EACH_FLOAT(CALL)
#undef CALL
        if (sum && kind != FLOAT32 && at->to == (at->token + 1) * of->k)
            for (int64_t i = 0; i < width; i += LANES)
                store_some(kind, dx + at->token * stride, i, load_some(FLOAT32, sum, i, width - i), width - i);
        segment *done = at;
        at = then;
        then = done;
    }
}

/* `dx` and `d_weights` may be missing. `factors` (tokens, k, parts) are for the rows: see below. */
void mixwright_neurons_backward(
    char *dx, float *d_weights, float *factors, const char *x, const char *dy, const char *rows, const float *bias,
    const float *weights, const int64_t *indices, const float *saved, int64_t tokens, int64_t k, int64_t experts,
    int64_t parts, int64_t width, int64_t type, int64_t kind, int64_t activation) {
    neurons of = {rows, 0, bias, weights, indices, tokens, k, experts, parts, width, type, activation};
    int64_t chunk = chunk_of(&of);
#pragma omp parallel for schedule(dynamic, 1) if (tokens * k * width > SMALL)
    for (int64_t from = 0; from < tokens; from += chunk)
        backward_tokens(
            &of, from, from + chunk < tokens ? from + chunk : tokens, kind, dx, x, dy, saved, d_weights, factors);
}
