/* The machine's own limit for rows in random order: read each once and add it to one sum in the nearest cache. Rows are
   read one after another or four at a time, and those `ahead` places further on are asked for: the best of all counts. */

#include <stdint.h>

typedef float lanes __attribute__((vector_size(64), aligned(4), may_alias));

void gather_one(float *sum, const float *rows, const int64_t *ids, int64_t count, int64_t width, int64_t ahead) {
    for (int64_t n = 0; n < count; n++) {
        const float *row = rows + ids[n] * width, *next = rows + ids[n + ahead < count ? n + ahead : n] * width;
        for (int64_t i = 0; i + 16 <= width; i += 16) {
            if (ahead) __builtin_prefetch(next + i);
            *(lanes *)(sum + i) += *(const lanes *)(row + i);
        }
    }
}

void gather_four(float *sum, const float *rows, const int64_t *ids, int64_t count, int64_t width, int64_t ahead) {
    for (int64_t n = 0; n + 4 <= count; n += 4) {
        const float *row[4], *next[4];
        for (int r = 0; r < 4; r++) {
            row[r] = rows + ids[n + r] * width;
            next[r] = rows + ids[n + r + ahead < count ? n + r + ahead : n + r] * width;
        }
        for (int64_t i = 0; i + 16 <= width; i += 16) {
            lanes all = *(lanes *)(sum + i);
            for (int r = 0; r < 4; r++) {
                if (ahead) __builtin_prefetch(next[r] + i);
                all += *(const lanes *)(row[r] + i);
            }
            *(lanes *)(sum + i) = all;
        }
    }
}
