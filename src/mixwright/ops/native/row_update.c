/* The optimiser rules of ops/row_update.py in one pass over the rows that `ids` name (all of them where it is NULL).

   Rows are float32, or bfloat16 (`half`) with stochastic rounding by a hash of (key, place), as in
   ops/stochastic_rounding.py; their state is float32. `ids` are unique, so rows are shared out among threads and the
   result does not depend on their number. Compiled by ops/kernels.py; GNU C. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 256
#define TERMS 10

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t noise(uint32_t place, uint32_t key) {
    uint32_t mixed = place ^ key;
    mixed = (mixed ^ mixed >> 16) * 0x85EBCA6Bu;
    mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35u;
    return (mixed >> 16) ^ (mixed & 0xFFFFu);
}

/* Floats from a row's entries `from` .. `from + count` of a table. */
static inline void read_row(float *restrict to, const void *rows, int half, int64_t from, int count) {
    if (!half) {
        memcpy(to, (const float *)rows + from, sizeof(float) * count);
        return;
    }
    const uint16_t *restrict entries = (const uint16_t *)rows + from;
    for (int i = 0; i < count; i++) to[i] = float_of((uint32_t)entries[i] << 16);
}

static inline void write_row(void *rows, int half, int64_t from, const float *restrict values, int count, uint32_t key) {
    if (!half) {
        memcpy((float *)rows + from, values, sizeof(float) * count);
        return;
    }
    uint16_t *restrict entries = (uint16_t *)rows + from;
    for (int i = 0; i < count; i++) {
        uint64_t place = (uint64_t)(from + i);
        uint32_t bits = bits_of(values[i]), high = (uint32_t)(place >> 32);
        uint32_t carried = bits + noise((uint32_t)place, key + high * 0x9E3779B1u);
        int finite = (bits & 0x7F800000u) != 0x7F800000u;
        uint32_t nan = (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x00400000u : 0;
        entries[i] = (uint16_t)((finite ? carried : bits | nan) >> 16);
    }
}

static inline void ahead(const void *place, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)place + at, 1);
}

/* Rows among `ids` whose `last` step is before `step`, each once, with that step; they are marked as caught up.
   Returns how many, or -1 for an id outside of the table. Frozen rows are only marked. */
int64_t mixwright_lagging_rows(
    const int64_t *ids, int32_t *last, int64_t count, int64_t experts, int64_t step, const uint8_t *frozen,
    int64_t *found, int64_t *starts) {
    int64_t lagging = 0;
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= experts) return -1;
    for (int64_t i = 0; i < count; i++) {
        int64_t id = ids[i];
        if (i + 16 < count) __builtin_prefetch(last + ids[i + 16], 1);
        if (last[id] >= step) continue;
        if (!frozen || !frozen[id]) {
            found[lagging] = id;
            starts[lagging++] = last[id];
        }
        last[id] = (int32_t)step;
    }
    return lagging;
}

typedef struct {
    float keep, rest1, beta2, rest2, size, root, eps;
} adamw; /* rest1 = 1 - beta1, rest2 = 1 - beta2, which float32 would not give */

static void adamw_block(
    float *restrict p, float *restrict m, float *restrict v, const float *restrict g, int n, adamw rule) {
    float inverse = 1 / rule.root;
    for (int k = 0; k < n; k++) {
        m[k] += rule.rest1 * (g[k] - m[k]);
        v[k] = rule.beta2 * v[k] + rule.rest2 * g[k] * g[k];
        p[k] = rule.keep * p[k] - rule.size * m[k] / (sqrtf(v[k]) * inverse + rule.eps);
    }
}

static void roots(float *restrict root, const float *restrict v, int n) {
    for (int k = 0; k < n; k++) root[k] = sqrtf(v[k]);
}

void mixwright_adamw_rows(
    void *rows, float *first, float *second, const int64_t *ids, const float *gradient, int64_t count, int64_t width,
    int64_t half, float keep, float rest1, float beta2, float rest2, float size, float root, float eps, int64_t key) {
    adamw rule = {keep, rest1, beta2, rest2, size, root, eps};
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        int64_t row = (ids ? ids[i] : i) * width;
        if (ids && i + 1 < count) {
            int64_t next = ids[i + 1] * width;
            ahead((char *)rows + next * (half ? 2 : 4), width * (half ? 2 : 4));
            ahead(first + next, width * 4);
            ahead(second + next, width * 4);
        }
        for (int64_t from = 0; from < width; from += BLOCK) {
            int n = width - from < BLOCK ? (int)(width - from) : BLOCK;
            float p[BLOCK];
            read_row(p, rows, half, row + from, n);
            adamw_block(p, first + row + from, second + row + from, gradient + i * width + from, n, rule);
            write_row(rows, half, row + from, p, n, (uint32_t)key);
        }
    }
}

/* move += sum_n sums[n] y^n / (root + scaled), y = scaled / (root + scaled). */
static inline void add_segment(
    float *restrict move, const float *restrict root, int n, float scaled, const float *restrict sums) {
    for (int k = 0; k < n; k++) {
        float inverse = 1 / (root[k] + scaled), ratio = scaled * inverse, total = sums[TERMS - 1];
        for (int term = TERMS - 2; term >= 0; term--) total = total * ratio + sums[term];
        move[k] += inverse * total;
    }
}

/* Whether no root is below `least` where it counts. */
static int all_above(const float *restrict root, const float *restrict m, int n, float least) {
    int below = 0;
    for (int k = 0; k < n; k++) below |= (root[k] < least) & (m[k] != 0);
    return !below;
}

/* The same for all steps at once, where scaled is small beside every root that counts. */
static void near_move(
    float *restrict move, const float *restrict root, int n, float scaled, const float *restrict sums) {
    for (int k = 0; k < n; k++) {
        float inverse = 1 / (root[k] + scaled), ratio = scaled * inverse;
        move[k] = inverse * (sums[0] + ratio * (sums[1] + ratio * sums[2]));
    }
}

void mixwright_replay_rows(
    void *rows, float *first, float *second, const int64_t *ids, const int64_t *which, int64_t count, int64_t width,
    int64_t half, const float *kept, const float *first_kept, const float *second_kept, const float *middles,
    const float *sums, const float *near, int64_t segments, float eps, int64_t key) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        int64_t row = ids[i] * width, start = which[i];
        const float *own = sums + start * segments * TERMS;
        if (i + 1 < count) {
            int64_t next = ids[i + 1] * width;
            ahead((char *)rows + next * (half ? 2 : 4), width * (half ? 2 : 4));
            ahead(first + next, width * 4);
            ahead(second + next, width * 4);
        }
        for (int64_t from = 0; from < width; from += BLOCK) {
            int n = width - from < BLOCK ? (int)(width - from) : BLOCK;
            float p[BLOCK], root[BLOCK], move[BLOCK];
            float *restrict m = first + row + from, *restrict v = second + row + from;
            read_row(p, rows, half, row + from, n);
            roots(root, v, n);
            if (all_above(root, m, n, 1000 * eps * near[start * 4])) {
                near_move(move, root, n, eps * near[start * 4], near + start * 4 + 1);
            } else {
                memset(move, 0, sizeof move);
                for (int64_t segment = 0; segment < segments; segment++)
                    if (own[segment * TERMS] != 0)
                        add_segment(move, root, n, eps * middles[start * segments + segment], own + segment * TERMS);
            }
            for (int k = 0; k < n; k++) {
                p[k] = kept[start] * p[k] - m[k] * move[k];
                m[k] *= first_kept[start];
                v[k] *= second_kept[start];
            }
            write_row(rows, half, row + from, p, n, (uint32_t)key);
        }
    }
}

void mixwright_adagrad_rows(
    void *rows, float *sums, const int64_t *ids, const float *gradient, int64_t count, int64_t parts, int64_t width,
    int64_t half, float lr, float eps, float keep, int64_t key) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        int64_t row = ids ? ids[i] : i;
        if (ids && i + 1 < count)
            ahead((char *)rows + ids[i + 1] * parts * width * (half ? 2 : 4), parts * width * (half ? 2 : 4));
        for (int64_t part = 0; part < parts; part++) {
            const float *restrict g = gradient + (i * parts + part) * width;
            float squares[16] = {0}, total = 0;
            int64_t k = 0;
            for (; k + 16 <= width; k += 16)
                for (int lane = 0; lane < 16; lane++) squares[lane] += g[k + lane] * g[k + lane];
            for (; k < width; k++) squares[0] += g[k] * g[k];
            for (int lane = 0; lane < 16; lane++) total += squares[lane];
            float *sum = sums + row * parts + part;
            *sum += total / width;
            float size = lr / (sqrtf(*sum) + eps);
            for (int64_t from = 0; from < width; from += BLOCK) {
                int n = width - from < BLOCK ? (int)(width - from) : BLOCK;
                float p[BLOCK];
                int64_t place = (row * parts + part) * width + from;
                read_row(p, rows, half, place, n);
                for (int j = 0; j < n; j++) p[j] = keep * p[j] - size * g[from + j];
                write_row(rows, half, place, p, n, (uint32_t)key);
            }
        }
    }
}

void mixwright_decay_rows(
    void *rows, const int64_t *ids, const float *factors, int64_t count, int64_t width, int64_t half, int64_t key) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        int64_t row = ids[i] * width;
        for (int64_t from = 0; from < width; from += BLOCK) {
            int n = width - from < BLOCK ? (int)(width - from) : BLOCK;
            float p[BLOCK];
            read_row(p, rows, half, row + from, n);
            for (int k = 0; k < n; k++) p[k] *= factors[i];
            write_row(rows, half, row + from, p, n, (uint32_t)key);
        }
    }
}
