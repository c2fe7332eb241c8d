/* Products of all pixels, as they lie in bf16 images that are channels-last, with filters, and what else becomes of them before they
   are written. Compiled by product.py. */

#include "tiles.h"

#define TALL 64 /* pixels at a time, for which filters come from the second cache */
#define PAST ((size_t)1 << 22) /* bytes; what is larger has left the caches when it is read again */

/* y = x W + second V + shift + added, for pixels as rows; every pointer but x and y may be NULL. With `rectify` what is negative
   becomes zero, with `gate` what stands where that is not positive. Channels are multiples of 32, and there are 32 pixels or more. */
typedef struct {
    int64_t pixels, inputs, seconds, outputs;
    const T *x, *second, *added, *gate;
    const float *shift;
    T *y;
    int rectify;
} Product;

static inline __m512 widened(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }

/* Adds products of 32 pixels, which lie as they are, and tiles of pairs to the sums in registers; `ahead`: and fetches later pixels. */
static inline void add_product(const T *x, int64_t inputs, const T *pairs, int ahead) {
    for (int64_t k = 0; k < inputs; k += STEP, pairs += 2 * TILE) {
        if (ahead) fetch(x + TALL * inputs, PAIR * inputs, k / STEP, inputs / STEP);
        _tile_loadd(4, x + k, inputs * sizeof(T));
        _tile_loadd(6, pairs, 64);
        _tile_loadd(5, x + LANES * inputs + k, inputs * sizeof(T));
        _tile_loadd(7, pairs + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
}

/* 32 pixels from `at` on and 32 outputs from `o` on, but for the first `done` of the pixels; adds them, not yet rounded, to `totals`. */
static inline void finish(const Product *p, const float *sums, int64_t at, int64_t o, int64_t done, int past, double *totals) {
    const __m512 zero = _mm512_setzero_ps();
    __m512 low_shift = p->shift ? _mm512_loadu_ps(p->shift + o) : zero, high_shift = p->shift ? _mm512_loadu_ps(p->shift + o + LANES) : zero;
    __m512 low_total = zero, high_total = zero;
    for (int64_t row = done; row < PAIR; row++) {
        int64_t place = (at + row) * p->outputs + o;
        const float *sum = sums + row * LANES + row / LANES * 256;
        __m512 low = _mm512_add_ps(_mm512_load_ps(sum), low_shift), high = _mm512_add_ps(_mm512_load_ps(sum + 256), high_shift);
        if (p->added) {
            low = _mm512_add_ps(low, widened(_mm256_loadu_si256((const void *)(p->added + place))));
            high = _mm512_add_ps(high, widened(_mm256_loadu_si256((const void *)(p->added + place + LANES))));
        }
        if (p->rectify) {
            low = _mm512_max_ps(zero, low); /* a NaN stays one */
            high = _mm512_max_ps(zero, high);
        }
        if (p->gate) {
            __m512i gate = _mm512_loadu_si512(p->gate + place); /* as bits: above zero, or a NaN with a sign */
            __mmask32 open = _mm512_cmpgt_epi16_mask(gate, _mm512_setzero_si512()) | _mm512_cmpgt_epu16_mask(gate, _mm512_set1_epi16((short)0xff80));
            low = _mm512_maskz_mov_ps((__mmask16)open, low);
            high = _mm512_maskz_mov_ps((__mmask16)(open >> LANES), high);
        }
        low_total = _mm512_add_ps(low_total, low);
        high_total = _mm512_add_ps(high_total, high);
        __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        if (past)
            _mm512_stream_si512((void *)(p->y + place), halves);
        else
            _mm512_storeu_si512(p->y + place, halves);
    }
    for (int64_t i = 0; i < PAIR; i += LANES) {
        __m512 total = i ? high_total : low_total;
        double *to = totals + o + i;
        _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), _mm512_cvtps_pd(_mm512_castps512_ps256(total))));
        _mm512_storeu_pd(to + 8, _mm512_add_pd(_mm512_loadu_pd(to + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(total, 1))));
    }
}

/* Filters are outputs x inputs and outputs x seconds, or with `back` the other way round. `total` of each output is the
   sum of y before it is rounded. Returns 0, or 1 without memory. */
int product(const Product *p, const T *filters, const T *others, int back, float *total, int parts) {
    int64_t deep = p->inputs / PAIR, steps = deep + p->seconds / PAIR, wide = p->outputs / PAIR;
    int past = p->pixels * p->outputs * sizeof(T) > PAST && (uintptr_t)p->y % LINE == 0;
    T *pairs = aligned_alloc(LINE, steps * wide * 2 * TILE * sizeof(T));
    double *totals = calloc(parts * p->outputs, sizeof(double));
    int failed = !pairs || !totals;
#pragma omp parallel num_threads(parts) if (!failed)
    if (!failed) {
        _Alignas(LINE) float sums[SUMS];
        configure();
#pragma omp for schedule(static) collapse(2)
        for (int64_t o = 0; o < wide; o++)
            for (int64_t k = 0; k < steps; k++) {
                T *to = pairs + (o * steps + k) * 2 * TILE;
                if (k < deep)
                    lay_filters(filters, NULL, p->outputs, 1, p->inputs, back, 0, k * PAIR, o * PAIR, to);
                else
                    lay_filters(others, NULL, p->outputs, 1, p->seconds, back, 0, (k - deep) * PAIR, o * PAIR, to);
            }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) {
            int64_t share = rounded((p->pixels + parts - 1) / parts, PAIR), end = least((part + 1) * share, p->pixels);
            for (int64_t begin = part * share; begin < end; begin += TALL)
                for (int64_t o = 0; o < wide; o++)
                    for (int64_t from = begin; from < least(begin + TALL, end); from += PAIR) {
                        int64_t at = least(from, p->pixels - PAIR), turn = 2 * o + (from > begin); /* the last 32 begin among those that are done */
                        if (p->added) fetch(p->added + (begin + TALL) * p->outputs, TALL * p->outputs, turn, 2 * wide);
                        if (p->gate) fetch(p->gate + (begin + TALL) * p->outputs, TALL * p->outputs, turn, 2 * wide);
                        clear();
                        add_product(p->x + at * p->inputs, p->inputs, pairs + o * steps * 2 * TILE, !o);
                        if (p->second) add_product(p->second + at * p->seconds, p->seconds, pairs + (o * steps + deep) * 2 * TILE, !o);
                        keep(sums);
                        finish(p, sums, at, o * PAIR, from - at, past, totals + part * p->outputs);
                    }
        }
        _tile_release();
        _mm_sfence();
    }
    for (int64_t o = 0; !failed && o < p->outputs; o++) {
        double sum = 0;
        for (int part = 0; part < parts; part++) sum += totals[part * p->outputs + o];
        total[o] = (float)sum;
    }
    free(pairs);
    free(totals);
    return failed;
}
