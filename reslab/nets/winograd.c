/* 3x3 convolutions by Winograd's algorithm, F(4x4, 3x3), in bf16 by AVX-512's dot products; sums and transforms are in fp32.

   Images are channels-last and padded by one pixel of zeros. A tile is 6x6 pixels of what goes in, four apart, and 4x4 of what comes
   out. At the points channels lie in panels, the last filled up with zeros. Which points polynomials are evaluated at, and why, is in
   winograd.py. Compiled by dots.py. */

#define BF16
#include "vectors.h"
#include <stdlib.h>

#if !defined(__AVX512BF16__)
#error "the processor has no dot products of bf16"
#endif

#define POINTS 36
#define PANEL 32 /* channels that lie together, and sums in a row of a block */
#define ROWS 12 /* of a block in registers, for a convolution */
#define OUTPUTS 8 /* of a block in registers, for the filters' gradient; they divide a panel */
#define LINE 64 /* bytes; points lie one more than their numbers take from each other, so that they do not compete for the same places in a cache */

/* Points, their powers, and what the polynomials that are 1 at one and 0 at the others are divided by. */
#define A 0.75f
#define B 1.5f
#define A2 (A * A)
#define B2 (B * B)
#define A3 (A2 * A)
#define B3 (B2 * B)
#define DA (1 / (2 * A2 * (A2 - B2)))
#define DB (1 / (2 * B2 * (B2 - A2)))

typedef struct {
    int64_t images, height, width, inputs, outputs;
} Conv;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static uint32_t first(int64_t lanes) { return lanes >= PANEL ? UINT32_MAX : lanes > 0 ? ((uint32_t)1 << lanes) - 1 : 0; }

static int64_t count_tiles(const Conv *c) { return c->images * ((c->height + 3) / 4) * ((c->width + 3) / 4); }

/* Of a row: six pixels to six points, their products to four pixels, four gradients to six points; filters there and back. */
static ALWAYS void of_pixels(const Floats *d, int by, Floats *to, int on) {
    Floats even = (d[4 * by] - B2 * d[2 * by]) * DA, odd = (d[3 * by] - B2 * d[by]) * (A * DA);
    Floats even_b = (d[4 * by] - A2 * d[2 * by]) * DB, odd_b = (d[3 * by] - A2 * d[by]) * (B * DB);
    to[0] = d[0] - (A2 + B2) / (A2 * B2) * d[2 * by] + 1 / (A2 * B2) * d[4 * by];
    to[on] = even + odd;
    to[2 * on] = even - odd;
    to[3 * on] = even_b + odd_b;
    to[4 * on] = even_b - odd_b;
    to[5 * on] = A2 * B2 * d[by] - (A2 + B2) * d[3 * by] + d[5 * by];
}

static ALWAYS void to_pixels(const Floats *p, int by, Floats *to, int on) {
    Floats sum = p[by] + p[2 * by], off = p[by] - p[2 * by], sum_b = p[3 * by] + p[4 * by], off_b = p[3 * by] - p[4 * by];
    to[0] = p[0] + sum + sum_b;
    to[on] = A * off + B * off_b;
    to[2 * on] = A2 * sum + B2 * sum_b;
    to[3 * on] = A3 * off + B3 * off_b + p[5 * by];
}

static ALWAYS void of_gradients(const Floats *g, int by, Floats *to, int on) {
    Floats even = g[0] + A2 * g[2 * by], odd = A * g[by] + A3 * g[3 * by];
    Floats even_b = g[0] + B2 * g[2 * by], odd_b = B * g[by] + B3 * g[3 * by];
    to[0] = g[0];
    to[on] = even + odd;
    to[2 * on] = even - odd;
    to[3 * on] = even_b + odd_b;
    to[4 * on] = even_b - odd_b;
    to[5 * on] = g[3 * by];
}

static ALWAYS void of_filters(const Floats *w, int by, Floats *to, int on) {
    Floats even = w[0] + A2 * w[2 * by], even_b = w[0] + B2 * w[2 * by];
    to[0] = w[0];
    to[on] = even + A * w[by];
    to[2 * on] = even - A * w[by];
    to[3 * on] = even_b + B * w[by];
    to[4 * on] = even_b - B * w[by];
    to[5 * on] = w[2 * by];
}

static ALWAYS void to_filters(const Floats *p, int by, Floats *to, int on) {
    Floats sum = p[by] + p[2 * by], sum_b = p[3 * by] + p[4 * by];
    to[0] = p[0] + sum + sum_b;
    to[on] = A * (p[by] - p[2 * by]) + B * (p[3 * by] - p[4 * by]);
    to[2 * on] = A2 * sum + B2 * sum_b + p[5 * by];
}

/* Where the `side` x `side` pixels of a tile begin, `before` rows and columns before its own four; `nothing` outside of the images. */
static ALWAYS void cut(const T *x, const T *nothing, const Conv *c, int64_t channels, int64_t tile, int64_t tiles, int side, int before, const T **pixel) {
    int64_t across = (c->width + 3) / 4, down = (c->height + 3) / 4, image = tile / (down * across);
    int64_t top = tile / across % down * 4 - before, left = tile % across * 4 - before;
    int64_t first = (image * c->height + top) * c->width + left;
    for (int i = 0; i < side; i++)
        for (int j = 0; j < side; j++) {
            int inside = (tile < tiles) & (top + i >= 0) & (top + i < c->height) & (left + j >= 0) & (left + j < c->width);
            pixel[i * side + j] = inside ? x + (first + i * c->width + j) * channels : nothing;
        }
}

/* Of a row of x or of dy. */
static ALWAYS void of_row(int of_dy, const Floats *from, int by, Floats *to, int on) {
    if (of_dy)
        of_gradients(from, by, to, on);
    else
        of_pixels(from, by, to, on);
}

/* The even and the odd channels of a panel; or any two vectors that are to be put in turns. */
typedef struct {
    Floats even, odd;
} Panel;

static ALWAYS Panel split(__m512i channels) {
    return (Panel){(Floats)_mm512_slli_epi32(channels, 16), (Floats)_mm512_and_si512(channels, _mm512_set1_epi32((int)0xffff0000))};
}

/* Rounded to bf16: the even channels, then the odd ones. */
static ALWAYS __m512i rounded_panel(Panel p) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)p.odd, (__m512)p.even); }

/* The rows of a tile, a panel of x or of dy; what is left are its columns. */
static ALWAYS void rows_of(int of_dy, const T *const *pixel, int64_t channel, __mmask32 lanes, Floats *even, Floats *odd) {
    int side = of_dy ? 4 : 6;
    for (int i = 0; i < side; i++) {
        Floats row[2][6];
        for (int j = 0; j < side; j++) {
            Panel p = split(_mm512_maskz_loadu_epi16(lanes, pixel[i * side + j] + channel));
            row[0][j] = p.even;
            row[1][j] = p.odd;
        }
        of_row(of_dy, row[0], 1, even + i * 6, 1);
        of_row(of_dy, row[1], 1, odd + i * 6, 1);
    }
}

/* Sums over pairs of products: `rows` rows of a times a panel of b. Row r's pair k is at a + r * down + k * on, a panel's at b + k * 64. */
static ALWAYS void multiply(const T *a, int64_t down, int64_t on, const T *b, int64_t pairs, float *sums, int rows, int begin) {
    __m512 s[ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) s[r][v] = begin ? _mm512_setzero_ps() : _mm512_load_ps(sums + r * PANEL + v * LANES);
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh left = (__m512bh)_mm512_load_si512(b + k * 2 * PANEL), right = (__m512bh)_mm512_load_si512(b + k * 2 * PANEL + PANEL);
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, a + r * down + k * on, sizeof pair);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            s[r][0] = _mm512_dpbf16_ps(s[r][0], both, left);
            s[r][1] = _mm512_dpbf16_ps(s[r][1], both, right);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) _mm512_store_ps(sums + r * PANEL + v * LANES, s[r][v]);
}

/* What follows what, of a rounded panel: its channels in order; and of two of them, channel by channel, the first sixteen and the others. */
static const uint16_t IN_ORDER[PANEL] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
static const uint16_t SIDE_BY_SIDE[2][PANEL] = {
    {0, 32, 16, 48, 1, 33, 17, 49, 2, 34, 18, 50, 3, 35, 19, 51, 4, 36, 20, 52, 5, 37, 21, 53, 6, 38, 22, 54, 7, 39, 23, 55},
    {8, 40, 24, 56, 9, 41, 25, 57, 10, 42, 26, 58, 11, 43, 27, 59, 12, 44, 28, 60, 13, 45, 29, 61, 14, 46, 30, 62, 15, 47, 31, 63},
};

/* A tile of x at the points, `apart` from each other. */
static ALWAYS void lay_tile(const T *const *pixel, int64_t channels, T *to, int64_t apart) {
    __m512i order = _mm512_loadu_si512(IN_ORDER);
    for (int64_t i = 0; i < channels; i += PANEL) {
        Floats even[POINTS], odd[POINTS], left[6], right[6];
        rows_of(0, pixel, i, first(channels - i), even, odd);
        for (int n = 0; n < 6; n++) {
            of_pixels(even + n, 6, left, 1);
            of_pixels(odd + n, 6, right, 1);
            for (int m = 0; m < 6; m++) {
                __m512i panel = rounded_panel((Panel){left[m], right[m]});
                _mm512_store_si512(to + (m * 6 + n) * apart + i, _mm512_permutexvar_epi16(order, panel));
            }
        }
    }
}

/* Two tiles of x or of dy at the points, side by side, in panels of which each point has `tall` rows of pairs. */
static ALWAYS void lay_pair(int of_dy, const T *x, const T *nothing, const Conv *c, int64_t channels, int64_t tile, int64_t tiles, T *to, int64_t tall) {
    const T *pixel[2][POINTS];
    __m512i first_half = _mm512_loadu_si512(SIDE_BY_SIDE[0]), second_half = _mm512_loadu_si512(SIDE_BY_SIDE[1]);
    int64_t wide = rounded(channels, PANEL);
    int side = of_dy ? 4 : 6, before = of_dy ? 0 : 1;
    for (int t = 0; t < 2; t++) cut(x, nothing, c, channels, tile + t, tiles, side, before, pixel[t]);
    for (int64_t i = 0; i < wide; i += PANEL) {
        Floats even[2][POINTS], odd[2][POINTS];
        for (int t = 0; t < 2; t++) rows_of(of_dy, pixel[t], i, first(channels - i), even[t], odd[t]);
        for (int n = 0; n < 6; n++) {
            __m512i column[2][6];
            for (int t = 0; t < 2; t++) {
                Floats left[6], right[6];
                of_row(of_dy, even[t] + n, 6, left, 1);
                of_row(of_dy, odd[t] + n, 6, right, 1);
                for (int m = 0; m < 6; m++) column[t][m] = rounded_panel((Panel){left[m], right[m]});
            }
            for (int m = 0; m < 6; m++) {
                T *panel = to + ((m * 6 + n) * wide + i) * tall * 2 + (m * 6 + n) * PANEL;
                _mm512_store_si512(panel, _mm512_permutex2var_epi16(column[0][m], first_half, column[1][m]));
                _mm512_store_si512(panel + PANEL, _mm512_permutex2var_epi16(column[0][m], second_half, column[1][m]));
            }
        }
    }
}

/* Sums at the points, `apart` from each other, to a panel of a tile of y; of pixels that are NULL nothing is written. */
static ALWAYS void write_tile(const float *sums, int64_t apart, const T *const *pixel, int64_t channel, __mmask32 lanes) {
    Floats half[2][24], column[2][4];
    for (int v = 0; v < 2; v++)
        for (int n = 0; n < 6; n++) {
            Floats row[6];
            for (int m = 0; m < 6; m++) row[m] = floats(sums + (n * 6 + m) * apart + v * LANES);
            to_pixels(row, 1, half[v] + n * 4, 1);
        }
    for (int n = 0; n < 4; n++) {
        for (int v = 0; v < 2; v++) to_pixels(half[v] + n, 4, column[v], 1);
        for (int m = 0; m < 4; m++)
            if (pixel[m * 4 + n]) _mm512_mask_storeu_epi16((T *)pixel[m * 4 + n] + channel, lanes, (__m512i)_mm512_cvtne2ps_pbh((__m512)column[1][m], (__m512)column[0][m]));
    }
}

/* Sixteen inputs of two filters side by side. */
static ALWAYS __m512i paired(Floats one, Floats other) { return _mm512_permutexvar_epi16(_mm512_loadu_si512(IN_ORDER), rounded_panel((Panel){one, other})); }

/* Sixteen inputs of one filter (3 x 3 x inputs) at the points; with `back` its taps come in reverse. */
static ALWAYS void at_points(const float *w, int64_t inputs, int back, __mmask16 lanes, Floats *to) {
    Floats taps[9], half[18];
    for (int tap = 0; tap < 9; tap++) taps[back ? 8 - tap : tap] = (Floats)_mm512_maskz_loadu_ps(lanes, w + tap * inputs);
    for (int n = 0; n < 3; n++) of_filters(taps + n * 3, 1, half + n * 6, 1);
    for (int n = 0; n < 6; n++) of_filters(half + n, 6, to + n, 6);
}

/* Filters `o` and the next of (outputs x 3 x 3 x inputs) at the points, in panels of outputs, each with pairs of inputs. With `back`
   filters of the gradient of the images: inputs and outputs are swapped. */
static void lay_filters(const float *w, T *to, const Conv *c, int back, int64_t o) {
    int64_t deep = rounded(c->inputs, PANEL), wide = rounded(c->outputs, PANEL);
    for (int64_t i = 0; i < deep; i += LANES) {
        Floats one[POINTS], other[POINTS];
        at_points(w + o * 9 * c->inputs + i, c->inputs, back, o < c->outputs ? first(c->inputs - i) : 0, one);
        at_points(w + (o + 1) * 9 * c->inputs + i, c->inputs, back, o + 1 < c->outputs ? first(c->inputs - i) : 0, other);
        for (int64_t p = 0; p < POINTS; p++) {
            if (back) {
                _mm512_store_si512(to + (p * deep + i / PANEL * PANEL) * wide + o * PANEL + i % PANEL * 2, paired(one[p], other[p]));
                continue;
            }
            uint32_t pairs[LANES]; /* of inputs: eight of one filter, eight of the next */
            store((T *)pairs, one[p]);
            store((T *)(pairs + LANES / 2), other[p]);
            T *row = to + (p * wide + o / PANEL * PANEL) * deep + i * PANEL + o % PANEL * 2;
            for (int64_t k = 0; k < LANES; k++) memcpy(row + k % 8 * 2 * PANEL + k / 8 * 2, pairs + k, sizeof *pairs);
        }
    }
}

/* y (images x height x width x outputs) of x and fp32 filters (outputs x 3 x 3 x inputs); with `back`, of the gradient of what came out,
   that of what went in, and `inputs` and `outputs` are still those of the filters. `most` tiles go through at a time. Returns 0, or 1 without memory. */
int convolve(const T *x, const float *w, T *y, const Conv *c, int back, int64_t most, int parts) {
    int failed = 0;
    int64_t inputs = back ? c->outputs : c->inputs, outputs = back ? c->inputs : c->outputs, tiles = count_tiles(c), tall = rounded(most, ROWS);
    int64_t deep = rounded(inputs, PANEL), wide = rounded(outputs, PANEL), apart = tall * deep + PANEL, aside = tall * PANEL + LANES, size = POINTS * (apart + 2 * aside);
    T *filters = aligned_alloc(LINE, POINTS * deep * wide * sizeof(T)), *nothing = calloc(deep, sizeof(T));
    T *all = aligned_alloc(LINE, parts * size * sizeof(T));
    if (!filters || !nothing || !all) failed = 1;
#pragma omp parallel num_threads(parts) if (!failed)
    if (!failed) {
#pragma omp for schedule(static)
        for (int64_t o = 0; o < rounded(c->outputs, PANEL); o += 2) lay_filters(w, filters, c, back, o);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) {
            T *points = all + part * size;
            float *sums = (float *)(points + POINTS * apart);
            const T *pixel[POINTS];
            int64_t end = tiles * (part + 1) / parts;
            for (int64_t begin = tiles * part / parts; begin < end; begin += most) {
                int64_t count = least(most, end - begin);
                for (int64_t t = 0; t < count; t++) {
                    cut(x, nothing, c, inputs, begin + t, tiles, 6, 1, pixel);
                    lay_tile(pixel, inputs, points + t * deep, apart);
                }
                for (int64_t o = 0; o < outputs; o += PANEL) {
                    for (int64_t p = 0; p < POINTS; p++)
                        for (int64_t r = 0; r < count; r += ROWS) /* rows past the last tile hold whatever was there, and are not read */
                            multiply(points + p * apart + r * deep, deep, 2, filters + (p * wide + o) * deep, deep / 2, sums + p * aside + r * PANEL, ROWS, 1);
                    for (int64_t t = 0; t < count; t++) {
                        cut(y, NULL, c, outputs, begin + t, tiles, 4, 0, pixel);
                        write_tile(sums + t * PANEL, aside, pixel, o, first(outputs - o));
                    }
                }
            }
        }
    }
    free(filters);
    free(nothing);
    free(all);
    return failed;
}

/* Sums at the points to sixteen inputs of one filter's gradient. */
static ALWAYS void write_filter(const float *sums, int64_t apart, float *dw, int64_t inputs, __mmask16 lanes) {
    Floats half[18], row[6], column[3];
    for (int n = 0; n < 6; n++) {
        for (int m = 0; m < 6; m++) row[m] = floats(sums + (n * 6 + m) * apart);
        to_filters(row, 1, half + n * 3, 1);
    }
    for (int n = 0; n < 3; n++) {
        to_filters(half + n, 3, column, 1);
        for (int m = 0; m < 3; m++) _mm512_mask_storeu_ps(dw + (m * 3 + n) * inputs, lanes, (__m512)column[m]);
    }
}

/* dw (outputs x 3 x 3 x inputs, fp32) of x and dy. `most` tiles, an even number, go through at a time. Returns 0, or 1 without memory. */
int filter_gradient(const T *x, const T *dy, float *dw, const Conv *c, int64_t most, int parts) {
    int failed = 0;
    int64_t deep = rounded(c->inputs, PANEL), wide = rounded(c->outputs, PANEL), tiles = count_tiles(c), tall = most / 2;
    float *sums = aligned_alloc(LINE, POINTS * deep * wide * sizeof(float)); /* in panels of inputs, each with all outputs */
    T *laid = aligned_alloc(LINE, POINTS * (most * (deep + wide) + 2 * PANEL) * sizeof(T)), *nothing = calloc(deep > wide ? deep : wide, sizeof(T));
    if (!sums || !laid || !nothing) failed = 1;
#pragma omp parallel num_threads(parts) if (!failed)
    if (!failed) {
        T *of_x = laid, *of_dy = laid + POINTS * (most * deep + PANEL);
        for (int64_t begin = 0; begin < tiles; begin += most) {
            int64_t pairs = (least(most, tiles - begin) + 1) / 2;
#pragma omp for schedule(static)
            for (int64_t k = 0; k < pairs; k++) {
                lay_pair(0, x, nothing, c, c->inputs, begin + 2 * k, tiles, of_x + k * 2 * PANEL, tall);
                lay_pair(1, dy, nothing, c, c->outputs, begin + 2 * k, tiles, of_dy + k * 2 * PANEL, tall);
            }
#pragma omp for schedule(static) collapse(2)
            for (int64_t p = 0; p < POINTS; p++)
                for (int64_t i = 0; i < deep; i += PANEL)
                    for (int64_t o = 0; o < wide; o += OUTPUTS) {
                        const T *rows = of_dy + (p * wide + o / PANEL * PANEL) * most + p * PANEL + o % PANEL * 2;
                        multiply(rows, 2, 2 * PANEL, of_x + (p * deep + i) * most + p * PANEL, pairs, sums + (p * deep + i) * wide + o * PANEL, OUTPUTS, !begin);
                    }
        }
#pragma omp for schedule(static)
        for (int64_t o = 0; o < c->outputs; o++)
            for (int64_t i = 0; i < c->inputs; i += LANES)
                write_filter(sums + i / PANEL * PANEL * wide + o * PANEL + i % PANEL, deep * wide, dw + o * 9 * c->inputs + i, c->inputs, first(c->inputs - i));
    }
    free(sums);
    free(laid);
    free(nothing);
    return failed;
}
