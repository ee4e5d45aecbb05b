/* What the passes over tokens share: the pairs of a token, products with their rows, the nonlinearity.

   The time is that of reading rows in random order from memory: the next experts' rows are asked for while the present
   ones are multiplied, BLOCK of them at a time. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "rows.h"

#define BLOCK 4
#define SEGMENT 128
#define CHUNK 16
#define SMALL (1 << 17)

enum { GELU, GELU_TANH, RELU, SILU, RELU_SQUARED };

typedef struct {
    const char *rows;
    const float *scales, *bias, *weights;
    const int64_t *indices;
    int64_t tokens, k, experts, parts, width, type, activation;
} neurons;

/* Pairs `from` to `to`, all of one token, and those of them that act. */
typedef struct {
    int64_t token, from, to, count, pair[SEGMENT];
    const char *row[SEGMENT];
} segment;

static inline float act(int64_t activation, float a) {
    switch (activation) {
    case GELU: return 0.5f * a * (1 + erff(a * 0.70710678118654752f));
    case GELU_TANH: return 0.5f * a * (1 + tanhf(0.79788456080286536f * (a + 0.044715f * a * a * a)));
    case RELU: return a > 0 || a != a ? a : 0;
    case SILU: return a / (1 + expf(-a));
    default: return a > 0 || a != a ? a * a : 0;
    }
}

/* The pairs from `from` on that act, at most SEGMENT and none of the next token; with `all` the others too. */
static void gather(const neurons *of, int64_t from, int64_t end, int all, segment *to) {
    int64_t bytes = of->parts * of->width * size_of(of->type);
    to->token = from / of->k;
    to->from = to->to = from;
    to->count = 0;
    int64_t last = from < end ? (to->token + 1) * of->k : from;
    for (; to->to < last && to->count < SEGMENT; to->to++)
        if (all || of->weights[to->to] != 0) {
            to->row[to->count] = of->rows + of->indices[to->to] * bytes;
            to->pair[to->count++] = to->to;
        }
}

/* The rows that come after those from `i` on: in this segment, or else the first of the next one. */
static inline void following(const segment *at, int64_t i, const segment *then, const char **next) {
    for (int e = 0; e < BLOCK; e++) {
        int64_t place = i + BLOCK + e;
        const segment *from = place < at->count ? at : then;
        place -= from == at ? 0 : at->count;
        next[e] = place >= 0 && place < from->count ? from->row[place] : at->row[i];
    }
}

/* sums[e][j] = <part j of row e, x>; the same parts of the next rows are asked for. */
INLINED void dots(
    int type, int count, int parts, int64_t width, const float *x, const char *const *row, int64_t skip,
    const char *const *next, float (*sums)[2]) {
    const int64_t size = size_of(type), step = LINE / size;
    lanes sum[BLOCK][2];
    int64_t i = 0;
    for (int e = 0; e < count; e++)
        for (int j = 0; j < parts; j++) sum[e][j] = (lanes){0};
    for (; i + step <= width; i += step) {
        for (int e = 0; e < count; e++)
            for (int j = 0; j < parts; j++) __builtin_prefetch(next[e] + (skip + j * width + i) * size);
        for (int s = 0; s < step; s += LANES) {
            lanes input = load(FLOAT32, x, i + s);
            for (int e = 0; e < count; e++)
                for (int j = 0; j < parts; j++) sum[e][j] += input * load(type, row[e], skip + j * width + i + s);
        }
    }
    for (; i < width; i += LANES) {
        lanes input = load_some(FLOAT32, x, i, width - i);
        for (int e = 0; e < count; e++)
            for (int j = 0; j < parts; j++)
                sum[e][j] += input * load_some(type, row[e], skip + j * width + i, width - i);
    }
    for (int e = 0; e < count; e++)
        for (int j = 0; j < parts; j++) sums[e][j] = total(sum[e][j]);
}

/* y += sum over e and j of factors[e][j] part j of row e. */
INLINED void add(
    int type, int count, int parts, int64_t width, float *y, const char *const *row, int64_t skip,
    const char *const *next, float (*factors)[2]) {
    const int64_t size = size_of(type), step = LINE / size;
    int64_t i = 0;
    for (; i + step <= width; i += step) {
        for (int e = 0; e < count; e++)
            for (int j = 0; j < parts; j++) __builtin_prefetch(next[e] + (skip + j * width + i) * size);
        for (int s = 0; s < step; s += LANES) {
            lanes sum = load(FLOAT32, y, i + s);
            for (int e = 0; e < count; e++)
                for (int j = 0; j < parts; j++) sum += factors[e][j] * load(type, row[e], skip + j * width + i + s);
            *(lanes *)(y + i + s) = sum;
        }
    }
    for (; i < width; i += LANES) {
        lanes sum = load_some(FLOAT32, y, i, width - i);
        for (int e = 0; e < count; e++)
            for (int j = 0; j < parts; j++)
                sum += factors[e][j] * load_some(type, row[e], skip + j * width + i, width - i);
        store_some(FLOAT32, y, i, sum, width - i);
    }
}

/* Values before the nonlinearity from dots, and what a pair says. */
static inline float say(const neurons *of, int64_t expert, float *before) {
    int64_t inputs = of->parts - 1;
    for (int64_t j = 0; j < inputs; j++) {
        if (of->scales) before[j] *= of->scales[expert * of->parts + j];
        if (of->bias) before[j] += of->bias[expert * inputs + j];
    }
    return !inputs ? 1 : inputs == 1 ? act(of->activation, before[0]) : act(of->activation, before[1]) * before[0];
}

/* A function of each type and number of parts. */
#define EACH_FLOAT(call) \
    switch (of->type * 3 + of->parts) { \
    case 1: call(FLOAT32, 1); break; \
    case 2: call(FLOAT32, 2); break; \
    case 3: call(FLOAT32, 3); break; \
    case 4: call(BFLOAT16, 1); break; \
    case 5: call(BFLOAT16, 2); break; \
    case 6: call(BFLOAT16, 3); break; \
    }
#define EACH(call) \
    EACH_FLOAT(call) \
    switch (of->type * 3 + of->parts) { \
    case 7: call(INT8, 1); break; \
    case 8: call(INT8, 2); break; \
    case 9: call(INT8, 3); break; \
    }

static inline int64_t chunk_of(const neurons *of) { return of->tokens >= 8 * CHUNK ? CHUNK : 1; }
