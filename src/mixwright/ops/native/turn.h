/* Needs LANES, and its vectors: `lanes` of floats, `picks` of int32. */

/* Turn 16 vectors of 16 numbers: four butterflies swap off-diagonal blocks of 8, 4, 2, 1. */
static inline __attribute__((always_inline)) void turn(lanes *rows) {
#pragma GCC unroll 4
    for (int width = LANES / 2; width; width /= 2) {
        picks low, high;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            low[i] = i & width ? LANES + i - width : i;
            high[i] = i & width ? LANES + i : i + width;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & width)) {
                lanes a = rows[i], b = rows[i + width];
                rows[i] = __builtin_shuffle(a, b, low);
                rows[i + width] = __builtin_shuffle(a, b, high);
            }
    }
}
