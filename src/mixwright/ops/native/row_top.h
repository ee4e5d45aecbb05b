/* The k best of one row of float32 scores, in order, ties to the lowest place.

   A row is read once for the maxima of 64 lanes. The k-th best of those bounds the k-th best value from below, so what
   reaches it, usually k and a few, is all that has to be sorted. k above 16 takes several sets of lanes and the least
   of their bounds. Without AVX-512 a plain insertion does it. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define SET (4 * LANES)
#define SETS 4
#define RANKED (2 * SET)

typedef struct {
    float value;
    int64_t place;
} entry;

/* Room for the candidates of a row. */
typedef struct {
    int32_t *found;
    entry *entries;
} candidates;

static int before(const void *one, const void *other) {
    const entry *x = one, *y = other;
    if (x->value != y->value) return x->value > y->value ? -1 : 1;
    return (x->place > y->place) - (x->place < y->place);
}

static inline float at(const float *row, const float *bias, int64_t i) { return bias ? row[i] + bias[i] : row[i]; }

/* The k best by sorting `count` candidates, in `found` or all in order. Returns the best that was left out. */
static float by_sorting(
    const float *row, const float *bias, const int32_t *found, int64_t count, int64_t k, float *best, int32_t *places,
    entry *entries) {
    for (int64_t c = 0; c < count; c++) {
        int64_t place = found ? found[c] : c;
        float value = at(row, bias, place);
        entries[c] = (entry){value == value ? value : -INFINITY, place};
    }
    qsort(entries, count, sizeof *entries, before);
    for (int64_t c = 0; c < k; c++) best[c] = entries[c].value, places[c] = (int32_t)entries[c].place;
    return k < count ? entries[k].value : -INFINITY;
}

/* The k best in one pass, each put in its place. Returns the best that was left out. */
static float by_insertion(
    const float *row, const float *bias, int64_t n, int64_t k, float *best, int32_t *places) {
    float rest = -INFINITY;
    int64_t held = 0;
    for (int64_t i = 0; i < n; i++) {
        float value = at(row, bias, i);
        if (value != value) value = -INFINITY;
        if (held == k) {
            float left = value > best[k - 1] ? best[k - 1] : value;
            rest = left > rest ? left : rest;
            if (left == value) continue;
        }
        int64_t c = held < k ? held++ : k - 1;
        for (; c && value > best[c - 1]; c--) best[c] = best[c - 1], places[c] = places[c - 1];
        best[c] = value, places[c] = (int32_t)i;
    }
    return rest;
}

#ifdef __AVX512F__

static inline __m512 load(const float *row, const float *bias, int64_t i, int64_t n) {
    __mmask16 here = n - i >= LANES ? 0xffff : n > i ? (__mmask16)((1u << (n - i)) - 1) : 0;
    __m512 least = _mm512_set1_ps(-INFINITY), value = _mm512_mask_loadu_ps(least, here, row + i);
    return bias ? _mm512_mask_add_ps(least, here, value, _mm512_maskz_loadu_ps(here, bias + i)) : value;
}

/* One stage of a bitonic network: lanes exchange with lane ^ `with`; those in `low` keep the smaller. */
static inline __m512 exchange(__m512 v, int with, __mmask16 low) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 other = _mm512_permutexvar_ps(_mm512_xor_si512(lane, _mm512_set1_epi32(with)), v);
    return _mm512_mask_min_ps(_mm512_max_ps(v, other), low, v, other);
}

/* A bitonic vector in descending order. */
static inline __m512 settled(__m512 v) {
    v = exchange(v, 8, 0xff00), v = exchange(v, 4, 0xf0f0), v = exchange(v, 2, 0xcccc);
    return exchange(v, 1, 0xaaaa);
}

static inline __m512 sorted(__m512 v) {
    v = exchange(v, 1, 0x6666);
    v = exchange(v, 2, 0x3c3c), v = exchange(v, 1, 0x5a5a);
    v = exchange(v, 4, 0x0ff0), v = exchange(v, 2, 0x33cc), v = exchange(v, 1, 0x55aa);
    return settled(v);
}

/* The larger half of two descending vectors, bitonic. */
static inline __m512 larger(__m512 v, __m512 w) {
    const __m512i back = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_max_ps(v, _mm512_permutexvar_ps(back, w));
}

/* The k-th largest of 64 lanes, k <= 16. */
static inline float kth(const __m512 *v, int64_t k) {
    __m512 one = settled(larger(sorted(v[0]), sorted(v[1]))), other = settled(larger(sorted(v[2]), sorted(v[3])));
    float all[LANES];
    _mm512_storeu_ps(all, settled(larger(one, other)));
    return all[k - 1];
}

/* A bound below the k-th best. */
static float bound(const float *row, const float *bias, int64_t n, int64_t k) {
    int64_t sets = (k + LANES - 1) / LANES;
    __m512 most[SETS * 4];
    for (int64_t v = 0; v < 4 * sets; v++) most[v] = load(row, bias, v * LANES, n);
    int64_t i = sets * SET;
    if (sets == 1 && !bias) {
        __m512 m0 = most[0], m1 = most[1], m2 = most[2], m3 = most[3];
        for (; i + SET <= n; i += SET) {
            m0 = _mm512_max_ps(_mm512_loadu_ps(row + i), m0);
            m1 = _mm512_max_ps(_mm512_loadu_ps(row + i + 16), m1);
            m2 = _mm512_max_ps(_mm512_loadu_ps(row + i + 32), m2);
            m3 = _mm512_max_ps(_mm512_loadu_ps(row + i + 48), m3);
        }
        most[0] = m0, most[1] = m1, most[2] = m2, most[3] = m3;
    }
    for (int64_t v = 0; i < n; i += LANES, v = v + 1 == 4 * sets ? 0 : v + 1)
        most[v] = _mm512_max_ps(load(row, bias, i, n), most[v]);
    float least = INFINITY;
    for (int64_t s = 0, rest = k; s < sets; s++, rest -= LANES) {
        float own = kth(most + 4 * s, rest < LANES ? rest : LANES);
        least = own < least ? own : least;
    }
    return least;
}

/* Where the values are that reach `least`, in order; how many. */
static int64_t reaching(const float *row, const float *bias, int64_t n, float least, int32_t *found) {
    const __m512 limit = _mm512_set1_ps(least);
    __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t count = 0, i = 0;
    if (!bias)
        for (; i + LANES <= n; i += LANES, place = _mm512_add_epi32(place, _mm512_set1_epi32(LANES))) {
            __mmask16 here = _mm512_cmp_ps_mask(_mm512_loadu_ps(row + i), limit, _CMP_GE_OQ);
            _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(here, place));
            count += __builtin_popcount(here);
        }
    for (; i < n; i += LANES, place = _mm512_add_epi32(place, _mm512_set1_epi32(LANES))) {
        __mmask16 here = _mm512_cmp_ps_mask(load(row, bias, i, n), limit, _CMP_GE_OQ);
        if (n - i < LANES) here &= (__mmask16)((1u << (n - i)) - 1);
        _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(here, place));
        count += __builtin_popcount(here);
    }
    return count;
}

/* Candidates each written to its rank; equals keep their order. */
static inline __attribute__((always_inline)) void by_rank(
    int64_t parts, const float *row, const float *bias, const int32_t *found, int64_t count, float *best,
    int32_t *places) {
    float held[RANKED];
    __m512 all[RANKED / LANES];
    for (int64_t c = 0; c < count; c++) held[c] = at(row, bias, found[c]);
    for (int64_t c = count; c < parts * LANES; c++) held[c] = -INFINITY;
    for (int64_t part = 0; part < parts; part++) all[part] = _mm512_loadu_ps(held + part * LANES);
    for (int64_t part = 0; part < parts; part++)
        for (int64_t c = part * LANES; c < (part + 1) * LANES && c < count; c++) {
            __m512 value = _mm512_set1_ps(held[c]);
            uint32_t earlier = _mm512_cmp_ps_mask(all[part], value, _CMP_EQ_OQ) & ((1u << c % LANES) - 1);
            int rank = __builtin_popcount(earlier);
            for (int64_t p = 0; p < parts; p++)
                rank += __builtin_popcount(p < part ? _mm512_cmp_ps_mask(all[p], value, _CMP_GE_OQ)
                                                    : _mm512_cmp_ps_mask(all[p], value, _CMP_GT_OQ));
            best[rank] = held[c], places[rank] = found[c];
        }
}

/* Of candidates that reach `least`, those above it and as many of the others as make k, the earliest, if so few are
   above; how many are left. */
static int64_t thinned(
    const float *row, const float *bias, float least, int64_t k, int32_t *found, int64_t count) {
    int64_t above = 0, kept = 0;
    for (int64_t c = 0; c < count; c++) above += at(row, bias, found[c]) > least;
    if (above >= k) return count;
    for (int64_t c = 0, equal = k - above; c < count; c++)
        if (at(row, bias, found[c]) > least || equal-- > 0) found[kept++] = found[c];
    return kept;
}

#endif

/* The k best of a row in order, equals by place. Returns a bound above all that were left out. `best` and `places`
   have room for RANKED more than k. */
static float top(
    const float *row, const float *bias, int64_t n, int64_t k, float *best, int32_t *places, const candidates *own) {
#ifdef __AVX512F__
    int64_t sets = (k + LANES - 1) / LANES;
    if (sets <= SETS && k < n) {
        float least = bound(row, bias, n, k), below = nextafterf(least, -INFINITY);
        int64_t count = reaching(row, bias, n, least, own->found);
        if (count > RANKED) {
            int64_t all = count;
            count = thinned(row, bias, least, k, own->found, count);
            if (count < all) below = least;
        }
        if (count >= k && count <= RANKED) {
            switch ((count + LANES - 1) / LANES) {
#define CASE(n) case n: by_rank(n, row, bias, own->found, count, best, places); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
            }
            return count > k ? best[k] : below;
        }
        if (count >= k) {
            float rest = by_sorting(row, bias, own->found, count, k, best, places, own->entries);
            return rest > below ? rest : below;
        }
    }
#endif
    if (k <= 64) return by_insertion(row, bias, n, k, best, places);
    return by_sorting(row, bias, 0, n, k, best, places, own->entries);
}
