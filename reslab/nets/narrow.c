/* 3x3 convolutions from 16 channels to 16, in bf16 by AVX-512's dot products; sums are in fp32.

   Images are channels-last and padded by one pixel of zeros. A pixel's channels are one vector of sums, so that a pair of channels of a
   pixel that comes in is multiplied by all filters at once. Compiled by dots.py. */

#define BF16
#include "vectors.h"
#include <stdlib.h>

#if !defined(__AVX512BF16__)
#error "the processor has no dot products of bf16"
#endif

#define PAIRS (LANES / 2)
#define ACROSS 8 /* pixels of a block, two rows of them */
#define OUTPUTS 8 /* filters whose gradients are added up at a time */
#define GROUP 8 /* images whose gradients are added up in one go; so the sums are the same whatever the threads */
#define LINE 64 /* bytes */

typedef struct {
    int64_t images, height, width, inputs, outputs; /* 16 of each */
} Conv;

static int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static ALWAYS __m512i pixel(const T *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)); }

/* Two vectors of bf16 side by side. */
static ALWAYS __m512i paired(__m512i one, __m512i other) { return _mm512_or_si512(one, _mm512_slli_epi32(other, 16)); }

/* Filters (16 x 3 x 3 x 16, fp32) as row, pair of channels that come in, column, channels that go out, pair. With `back` those of the
   gradient of the images: turned, with inputs and outputs swapped. */
static void lay_filters(const float *w, int back, T *to) {
    for (int o = 0; o < LANES; o++)
        for (int tap = 0; tap < 9; tap++) {
            T inputs[LANES];
            store(inputs, floats(w + (o * 9 + tap) * LANES));
            int at = back ? 8 - tap : tap, row = at / 3, column = at % 3;
            for (int i = 0; i < LANES; i++) {
                int in = back ? o : i, out = back ? i : o;
                to[(((row * PAIRS + in / 2) * 3 + column) * LANES + out) * 2 + in % 2] = inputs[i];
            }
        }
}

/* Two rows of ACROSS pixels of what comes out, from four of what comes in, `wide` pixels apart and one more to either side. */
static ALWAYS void block(const T *x, int64_t wide, const T *filters, T *y, int64_t width, int64_t columns, int64_t rows) {
    __m512 s[2][ACROSS];
    for (int r = 0; r < 2; r++)
        for (int c = 0; c < ACROSS; c++) s[r][c] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int row = 0; row < 4; row++) {
        const T *from = x + row * wide * LANES;
        for (int k = 0; k < PAIRS; k++) {
            __m512bh f[2][3];
#pragma GCC unroll 2
            for (int r = 0; r < 2; r++)
#pragma GCC unroll 3
                for (int c = 0; c < 3; c++)
                    if (row - r >= 0 && row - r < 3) f[r][c] = (__m512bh)_mm512_load_si512(filters + (((row - r) * PAIRS + k) * 3 + c) * 2 * LANES);
#pragma GCC unroll 10
            for (int c = 0; c < ACROSS + 2; c++) {
                int32_t pair;
                memcpy(&pair, from + c * LANES + 2 * k, sizeof pair);
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 3
                for (int tap = 0; tap < 3; tap++)
#pragma GCC unroll 2
                    for (int r = 0; r < 2; r++)
                        if (c - tap >= 0 && c - tap < ACROSS && row - r >= 0 && row - r < 3) s[r][c - tap] = _mm512_dpbf16_ps(s[r][c - tap], both, f[r][tap]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < ACROSS; c++)
            if (c < columns) store(y + (r * width + c) * LANES, (Floats)s[r][c]);
}

/* y (images x height x width x 16) of x and fp32 filters (16 x 3 x 3 x 16); with `back`, of the gradient of what came out, that of what
   went in. Returns 0, or 1 without memory. */
int convolve(const T *x, const float *w, T *y, const Conv *c, int back, int parts) {
    int failed = 0;
    int64_t wide = rounded(c->width, ACROSS) + 2, tall = rounded(c->height, 2) + 2, size = wide * tall * LANES, row = c->width * LANES;
    T *filters = aligned_alloc(LINE, 9 * LANES * LANES * sizeof(T)), *padded = calloc(parts, size * sizeof(T));
    if (!filters || !padded) failed = 1;
    if (!failed) lay_filters(w, back, filters);
#pragma omp parallel for num_threads(parts) schedule(static) if (!failed)
    for (int64_t part = 0; part < parts; part++) {
        if (failed) continue;
        T *image = padded + part * size;
        for (int64_t n = c->images * part / parts; n < c->images * (part + 1) / parts; n++) {
            for (int64_t h = 0; h < c->height; h++) memcpy(image + ((h + 1) * wide + 1) * LANES, x + (n * c->height + h) * row, row * sizeof(T));
            for (int64_t h = 0; h < c->height; h += 2)
                for (int64_t v = 0; v < c->width; v += ACROSS)
                    block(image + (h * wide + v) * LANES, wide, filters, y + (n * c->height + h) * row + v * LANES, c->width, c->width - v, c->height - h < 2 ? 1 : 2);
        }
    }
    free(filters);
    free(padded);
    return failed;
}

/* Sums over one row of dy, laid in pairs of pixels, and a row of x, of which every pixel is laid with the next, of the products of OUTPUTS
   filters and three columns. */
static ALWAYS void add_row(const T *dy, const T *x, int64_t pairs, __m512 s[3][OUTPUTS]) {
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh from[3];
#pragma GCC unroll 3
        for (int c = 0; c < 3; c++) from[c] = (__m512bh)_mm512_load_si512(x + (2 * p + c) * 2 * LANES);
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) {
            int32_t pair;
            memcpy(&pair, dy + (p * LANES + o) * 2, sizeof pair);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 3
            for (int c = 0; c < 3; c++) s[c][o] = _mm512_dpbf16_ps(s[c][o], both, from[c]);
        }
    }
}

/* A row of x: every pixel with the next, from one before the first. */
static void lay_overlapping(const T *x, int64_t width, int64_t count, T *to) {
    __m512i last = _mm512_setzero_si512();
    for (int64_t v = 0; v < count; v++) {
        __m512i next = v < width ? pixel(x + v * LANES) : _mm512_setzero_si512();
        _mm512_store_si512(to + v * 2 * LANES, paired(last, next));
        last = next;
    }
}

/* A row of dy: every other pixel with the next. */
static void lay_pairs(const T *dy, int64_t width, int64_t count, T *to) {
    for (int64_t p = 0; p < count; p++) {
        __m512i next = 2 * p + 1 < width ? pixel(dy + (2 * p + 1) * LANES) : _mm512_setzero_si512();
        _mm512_store_si512(to + p * 2 * LANES, paired(pixel(dy + 2 * p * LANES), next));
    }
}

/* Adds what one image, laid so, gives to the gradients (16 x 3 x 3 x 16). */
static void add_image(const T *dy, const T *x, int64_t height, int64_t pairs, int64_t wide, float *sums) {
    for (int row = 0; row < 3; row++)
        for (int o = 0; o < LANES; o += OUTPUTS) {
            __m512 s[3][OUTPUTS];
            float *held = sums + (o * 9 + row * 3) * LANES;
            for (int f = 0; f < OUTPUTS; f++)
                for (int column = 0; column < 3; column++) s[column][f] = _mm512_load_ps(held + (f * 9 + column) * LANES);
            for (int64_t h = row == 0; h < height - (row == 2); h++)
                add_row(dy + (h * pairs * LANES + o) * 2, x + (h + row - 1) * wide * 2 * LANES, pairs, s);
            for (int f = 0; f < OUTPUTS; f++)
                for (int column = 0; column < 3; column++) _mm512_store_ps(held + (f * 9 + column) * LANES, s[column][f]);
        }
}

/* dw (16 x 3 x 3 x 16, fp32) of x and dy. Returns 0, or 1 without memory. */
int filter_gradient(const T *x, const T *dy, float *dw, const Conv *c, int parts) {
    int failed = 0;
    int64_t pairs = (c->width + 1) / 2, wide = 2 * pairs + 1, of_x = c->height * wide * 2 * LANES, size = of_x + c->height * pairs * 2 * LANES;
    int64_t groups = (c->images + GROUP - 1) / GROUP, count = 9 * LANES * LANES;
    T *laid = aligned_alloc(LINE, parts * size * sizeof(T));
    float *sums = aligned_alloc(LINE, groups * count * sizeof(float));
    if (!laid || !sums) failed = 1;
#pragma omp parallel for num_threads(parts) schedule(static) if (!failed)
    for (int64_t part = 0; part < parts; part++) {
        if (failed) continue;
        T *twice = laid + part * size, *gradients = twice + of_x;
        int64_t begin = groups * part / parts * GROUP, end = groups * (part + 1) / parts * GROUP;
        memset(sums + begin / GROUP * count, 0, (end - begin) / GROUP * count * sizeof *sums);
        for (int64_t n = begin; n < end && n < c->images; n++) {
            for (int64_t h = 0; h < c->height; h++) {
                int64_t row = (n * c->height + h) * c->width * LANES;
                lay_overlapping(x + row, c->width, wide, twice + h * wide * 2 * LANES);
                lay_pairs(dy + row, c->width, pairs, gradients + h * pairs * 2 * LANES);
            }
            add_image(gradients, twice, c->height, pairs, wide, sums + n / GROUP * count);
        }
    }
    if (!failed) {
        memset(dw, 0, count * sizeof *dw);
        for (int64_t g = 0; g < groups; g++)
            for (int64_t i = 0; i < count; i++) dw[i] += sums[g * count + i];
    }
    free(laid);
    free(sums);
    return failed;
}
