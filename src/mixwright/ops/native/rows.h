/* Rows of numbers of several types as vectors of LANES floats. */

/* What counts is unrolled by hand: -O3 takes four times as long to compile and makes nothing faster. */
#pragma GCC optimize("O2")

#define LANES 16
#define LINE 64
#define INLINED static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int16_t shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t bfloat16;

enum { FLOAT32, BFLOAT16, INT8 };

INLINED int64_t size_of(int64_t type) { return type == FLOAT32 ? 4 : type == BFLOAT16 ? 2 : 1; }

INLINED lanes load(int64_t type, const void *row, int64_t i) {
    if (type == FLOAT32) return *(const lanes *)((const float *)row + i);
    if (type == BFLOAT16)
        return (lanes)(__builtin_convertvector(*(const halves *)((const bfloat16 *)row + i), words) << 16);
    shorts wider = __builtin_convertvector(*(const bytes *)((const int8_t *)row + i), shorts);
    return __builtin_convertvector(__builtin_convertvector(wider, integers), lanes);
}

/* The same near the end of a row: lanes past the `left` numbers that are there are zero. */
INLINED lanes load_some(int64_t type, const void *row, int64_t i, int64_t left) {
    if (left >= LANES) return load(type, row, i);
    char some[4 * LANES] = {0};
    memcpy(some, (const char *)row + i * size_of(type), left * size_of(type));
    return load(type, some, 0);
}

/* Of bfloat16 the nearest, ties to even; what is no number stays none. */
INLINED void store_some(int64_t type, void *row, int64_t i, lanes value, int64_t left) {
    if (left > LANES) left = LANES;
    if (type == FLOAT32) {
        float *to = (float *)row + i;
        if (left == LANES) *(lanes *)to = value;
        else memcpy(to, &value, sizeof(float) * left);
        return;
    }
    words bits = (words)value, none = (words)(value != value);
    bits = ((bits + 0x7fff + (bits >> 16 & 1)) & ~none) | (none & 0x7fc00000);
    halves found = __builtin_convertvector(bits >> 16, halves);
    if (left == LANES) *(halves *)((bfloat16 *)row + i) = found;
    else memcpy((bfloat16 *)row + i, &found, sizeof(bfloat16) * left);
}

INLINED float total(lanes value) {
    float sum[LANES];
    memcpy(sum, &value, sizeof sum);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) sum[i] += sum[i + width];
    return sum[0];
}

/* `width` floats of a row, in `buffer` where they have to be made. */
INLINED const float *wide(int64_t type, const void *row, int64_t width, float *buffer) {
    if (type == FLOAT32) return row;
    for (int64_t i = 0; i < width; i += LANES)
        store_some(FLOAT32, buffer, i, load_some(type, row, i, width - i), width - i);
    return buffer;
}
