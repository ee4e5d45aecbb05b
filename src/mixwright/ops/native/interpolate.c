/* The passes over masks of ops/interpolate.py and ops/hard_concrete.py: one number of the logits for each weight.

   Each reads every logit once and keeps nothing of their size. Weights are shared out among threads in chunks; what is
   summed over weights is handed back chunk by chunk, so that no result depends on the number of threads. Compiled by
   ops/kernels.py; GNU C. */

#include <stdint.h>
#include <string.h>

#include "rows.h"

#define BLOCK 512
#define MOST_EPISODES 8 /* as in ops/mask_kernels.py */
#define DEAD -1.598596848532247f
#define LEAST 5.9604644775390625e-8f
#define MOST 0.999999940395355224609375f

INLINED lanes either(integers chosen, lanes one, lanes other) {
    return (lanes)((chosen & (integers)one) | (~chosen & (integers)other));
}

INLINED lanes between(lanes value, float low, float high) {
    value = either(value < low, low - (lanes){0}, value);
    return either(value > high, high - (lanes){0}, value);
}

/* 1 / (1 + exp(-x)): the exponent by its integer part and a polynomial in the rest (Cephes' expf), |x| up to 87. */
INLINED lanes sigmoid(lanes x) {
    lanes y = between(-x, -87.0f, 87.0f);
    lanes turns = y * 1.44269504088896341f + 12582912.0f; /* rounds to the nearest integer, in the low bits */
    integers whole = (integers)turns - 0x4B400000;
    turns -= 12582912.0f;
    y = y - turns * 0.693359375f + turns * 2.12194440e-4f;
    lanes p = 1.9875691500e-4f * y + 1.3981999507e-3f;
    p = p * y + 8.3334519073e-3f;
    p = p * y + 4.1665795894e-2f;
    p = p * y + 1.6666665459e-1f;
    p = p * y + 5.0000001201e-1f;
    p = p * y * y + y + 1.0f;
    lanes power = (lanes)((integers)p + (whole << 23));
    return 1.0f / (1.0f + either(x == x, power, x));
}

/* z, and exactly 0 and 1 at the ends, as `mask` has it. */
INLINED lanes masked(lanes logits) {
    lanes z = between(sigmoid(1.5f * logits) * 1.2f - 0.1f, LEAST, MOST);
    z = either(logits <= DEAD, (lanes){0}, z);
    return either(logits >= -DEAD, 1.0f - (lanes){0}, z);
}

INLINED lanes slope(lanes z, float at_ends) {
    lanes inside = (z + 0.1f) * (1.1f - z) * 1.25f;
    return either((z == 0.0f) | (z == 1.0f), at_ends - (lanes){0}, inside);
}

INLINED lanes some(const float *from, int64_t left) { return load_some(FLOAT32, from, 0, left); }
INLINED void put(float *to, lanes value, int64_t left) { store_some(FLOAT32, to, 0, value, left); }
INLINED int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* out_e = base + c_e delta, c_e = sum_m weights_em z_m, for up to MOST_EPISODES at once: z is made once for all of them.
   base's own bits where that adds nothing. */
void mixwright_interpolate(
    float *const *outs, const float *base, const float *delta, const float *logits, const float *weights,
    int64_t episodes, int64_t experts, int64_t units
) {
    #pragma omp parallel for schedule(static) if (units > 8 * BLOCK)
    for (int64_t start = 0; start < units; start += BLOCK) {
        int64_t count = least(BLOCK, units - start);
        lanes c[MOST_EPISODES][BLOCK / LANES], z[BLOCK / LANES];
        memset(c, 0, episodes * sizeof c[0]);
        for (int64_t m = 0; m < experts; m++) {
            int64_t acting = 0;
            for (int64_t e = 0; e < episodes; e++) acting += weights[e * experts + m] != 0;
            if (!acting) continue;
            const float *row = logits + m * units + start;
            for (int64_t i = 0; i < count; i += LANES) z[i / LANES] = masked(some(row + i, count - i));
            for (int64_t e = 0; e < episodes; e++) {
                float weight = weights[e * experts + m];
                if (weight == 0) continue;
                for (int64_t i = 0; i < count; i += LANES) c[e][i / LANES] += weight * z[i / LANES];
            }
        }
        for (int64_t e = 0; e < episodes; e++)
            for (int64_t i = 0; i < count; i += LANES) {
                lanes was = some(base + start + i, count - i), by = c[e][i / LANES];
                lanes step = by * some(delta + start + i, count - i);
                put(outs[e] + start + i, either((step == 0.0f) | (by == 0.0f), was, was + step), count - i);
            }
    }
}

/* The same where every mask is 0 or 1: bit m of `codes` says whether expert m acts, `sums` has c for each byte. */
void mixwright_interpolate_members(
    float *out, const float *base, const float *delta, const uint8_t *codes, const float *sums, int64_t units
) {
    #pragma omp parallel for schedule(static) if (units > 8 * BLOCK)
    for (int64_t start = 0; start < units; start += BLOCK) {
        int64_t count = least(BLOCK, units - start);
        float c[BLOCK];
        for (int64_t i = 0; i < count; i++) c[i] = sums[codes[start + i]];
        for (int64_t i = 0; i < count; i += LANES) {
            lanes was = some(base + start + i, count - i), by = some(c + i, count - i);
            lanes step = by * some(delta + start + i, count - i);
            put(out + start + i, either((step == 0.0f) | (by == 0.0f), was, was + step), count - i);
        }
    }
}

/* Gradients from g_e, those of the outs, summed over episodes; NULL is not asked for. `to_weights` (chunks, episodes,
   experts): sums over each chunk. */
void mixwright_interpolate_backward(
    float *to_delta, float *to_logits, double *to_weights, const float *const *gs, const float *delta,
    const float *logits, const float *weights, int64_t episodes, int64_t experts, int64_t units, int64_t chunk,
    float regrowth
) {
    int64_t chunks = (units + chunk - 1) / chunk;
    #pragma omp parallel for schedule(static) if (chunks > 1)
    for (int64_t part = 0; part < chunks; part++) {
        double *sums = to_weights + part * episodes * experts;
        for (int64_t i = 0; i < episodes * experts; i++) sums[i] = 0;
        int64_t end = least(units, (part + 1) * chunk);
        for (int64_t start = part * chunk; start < end; start += BLOCK) {
            int64_t count = least(BLOCK, end - start);
            lanes c[MOST_EPISODES][BLOCK / LANES], t[MOST_EPISODES][BLOCK / LANES];
            lanes z[BLOCK / LANES], product[BLOCK / LANES];
            memset(c, 0, episodes * sizeof c[0]);
            for (int64_t e = 0; e < episodes; e++)
                for (int64_t i = 0; i < count; i += LANES)
                    t[e][i / LANES] = some(gs[e] + start + i, count - i) * some(delta + start + i, count - i);
            for (int64_t m = 0; m < experts; m++) {
                const float *row = logits + m * units + start;
                for (int64_t i = 0; i < count; i += LANES) z[i / LANES] = masked(some(row + i, count - i));
                memset(product, 0, sizeof product);
                for (int64_t e = 0; e < episodes; e++) {
                    float weight = weights[e * experts + m];
                    lanes sum = {0};
                    for (int64_t i = 0; i < count; i += LANES) {
                        c[e][i / LANES] += weight * z[i / LANES];
                        product[i / LANES] += weight * t[e][i / LANES];
                        sum += z[i / LANES] * t[e][i / LANES];
                    }
                    sums[e * experts + m] += total(sum);
                }
                if (to_logits)
                    for (int64_t i = 0; i < count; i += LANES)
                        put(to_logits + m * units + start + i,
                            slope(z[i / LANES], regrowth) * product[i / LANES], count - i);
            }
            if (to_delta)
                for (int64_t i = 0; i < count; i += LANES) {
                    lanes sum = {0};
                    for (int64_t e = 0; e < episodes; e++) sum += c[e][i / LANES] * some(gs[e] + start + i, count - i);
                    put(to_delta + start + i, sum, count - i);
                }
        }
    }
}

/* For each chunk and expert: how many masks are not 0, and the sum of sigmoid(L - DEAD) if it is asked for. */
void mixwright_mask_sums(
    double *expected, int64_t *counts, const float *logits, int64_t experts, int64_t units, int64_t chunk
) {
    int64_t chunks = (units + chunk - 1) / chunk;
    #pragma omp parallel for collapse(2) schedule(static) if (chunks * experts > 1)
    for (int64_t part = 0; part < chunks; part++) {
        for (int64_t m = 0; m < experts; m++) {
            int64_t start = part * chunk, end = least(units, start + chunk), count = 0;
            const float *row = logits + m * units;
            double sum = 0;
            for (int64_t at = start; at < end; at += BLOCK) {
                int64_t here = least(BLOCK, end - at), i = 0;
                integers alive = {0};
                lanes s = {0};
                for (; i + LANES <= here; i += LANES) {
                    lanes logit = *(const lanes *)(row + at + i);
                    alive -= logit > DEAD;
                    if (expected) s += sigmoid(logit - DEAD);
                }
                for (int lane = 0; lane < LANES; lane++) count += alive[lane];
                if (i < here) {
                    lanes logit = some(row + at + i, here - i), one = expected ? sigmoid(logit - DEAD) : logit;
                    for (int lane = 0; lane < here - i; lane++) {
                        count += logit[lane] > DEAD;
                        sum += expected ? one[lane] : 0;
                    }
                }
                sum += total(s);
            }
            counts[part * experts + m] = count;
            if (expected) expected[part * experts + m] = sum;
        }
    }
}

/* to_logits = slopes_m sigmoid'(L - DEAD). */
void mixwright_expected_l0_backward(
    float *to_logits, const float *logits, const float *slopes, int64_t experts, int64_t units
) {
    #pragma omp parallel for collapse(2) schedule(static) if (experts * units > 8 * BLOCK)
    for (int64_t m = 0; m < experts; m++)
        for (int64_t start = 0; start < units; start += BLOCK) {
            int64_t count = least(BLOCK, units - start), at = m * units + start;
            for (int64_t i = 0; i < count; i += LANES) {
                lanes s = sigmoid(some(logits + at + i, count - i) - DEAD);
                put(to_logits + at + i, slopes[m] * s * (1.0f - s), count - i);
            }
        }
}
