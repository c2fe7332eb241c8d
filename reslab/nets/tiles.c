/* Convolutions by matrix tiles, from bf16 images that are channels-last.

   Factors are laid out here, for as much as the caches hold, with zeros for what is outside of an image. A convolution's
   terms are channels, its rows pixels, its pairs filters; for the gradient of the filters the terms are pixels, the rows
   channels of dy, the pairs those of x. Compiled by tiles.py. */

#include "tiles.h"
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TERMS 512 /* pixels at a time for the filters' gradient: 32 channels of them stay in the first cache, all channels in the second */
#define FEW (1 << 18) /* sums that the second cache holds beside all else, so that they may come more often */
#define PIXELS 256 /* at a time for a convolution, whose sums stay in the second cache */
#define DEPTH 18 /* times 32 channels at a time: those of 32 filters stay in the first */

/* How a convolution walks: images, pixels and channels in and out, the side of its square filters, stride and padding. */
typedef struct {
    int64_t images, height, width, inputs, down, across, outputs, side, stride, padding;
} Conv;

/* Asks the kernel for tiles, once a process. Returns 0, or not where it has none. */
int tiles_allow(void) { return (int)syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */); }

/* Each part's share of the pixels, and how many of these at a time, at most `most`: as even as tiles allow. */
static void divide(int64_t pixels, int64_t parts, int64_t most, int64_t *share, int64_t *block) {
    *share = rounded((pixels + parts - 1) / parts, STEP);
    int64_t blocks = (*share + most - 1) / most;
    *block = rounded((*share + blocks - 1) / blocks, STEP);
}

/* A tile of dy: of 32 pixels, or as many as there are, 16 rows of a channel each. */
static inline void lay_rows(const T *dy, int64_t channels, int64_t pixels, __mmask16 mask, T *to) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) {
        __m256i even = _mm256_maskz_loadu_epi16(2 * i < pixels ? mask : 0, dy + 2 * i * channels);
        __m256i odd = _mm256_maskz_loadu_epi16(2 * i + 1 < pixels ? mask : 0, dy + (2 * i + 1) * channels);
        r[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    }
    transpose(r);
    for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * STEP, r[i]);
}

/* Two tiles: of 32 pixels a row of 32 channels each. */
static inline void lay_pixels(const T *const *pixel, int64_t channel, __mmask32 mask, T *to) {
    for (int i = 0; i < 32; i++) _mm512_store_si512(to + i * STEP, _mm512_maskz_loadu_epi16(mask, pixel[i] + channel));
}

/* Adds products of two tiles by two over all steps to their sums, and fetches the next ones. Rows pass the first cache by, where
   pairs are to stay. */
static inline void multiply(const T *rows, const T *pairs, int64_t steps, float *sums, int begin) {
    if (begin) {
        clear();
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    }
    int64_t lines = SUMS * sizeof(float) / LINE, ahead = (lines + steps - 1) / steps;
    for (int64_t k = 0; k < steps; k++) {
        for (int64_t i = 0; i < ahead; i++) _mm_prefetch((const char *)(sums + SUMS) + (k * ahead + i) * LINE, _MM_HINT_T0);
        _tile_stream_loadd(4, rows + 2 * k * TILE, 64);
        _tile_loadd(6, pairs + 2 * k * TILE, 64);
        _tile_stream_loadd(5, rows + (2 * k + 1) * TILE, 64);
        _tile_loadd(7, pairs + (2 * k + 1) * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    keep(sums);
}

/* For pixels of what comes out, where each one's window of x begins: its first pixel, by number, and that one's row and column. */
typedef struct {
    int64_t pixel[TERMS], row[TERMS], column[TERMS];
} Windows;

/* Those of `count` pixels from `begin` on; from `end` on they are outside of every image. */
static void find(const Conv *c, int64_t begin, int64_t end, int64_t count, Windows *w) {
    int64_t image = begin / (c->down * c->across), line = begin / c->across % c->down, column = begin % c->across;
    for (int64_t p = 0; p < count; p++) {
        int64_t y = line * c->stride - c->padding, z = column * c->stride - c->padding;
        w->pixel[p] = (image * c->height + y) * c->width + z;
        w->row[p] = p < end - begin ? y : -c->side;
        w->column[p] = z;
        if (++column < c->across) continue;
        column = 0;
        if (++line < c->down) continue;
        line = 0;
        image++;
    }
}

/* The pixels of x that a tap of the filters meets in `count` windows; `nothing` outside of the images. */
static void meet(const T *x, const T *nothing, const Conv *c, int64_t tap, const Windows *w, int64_t count, const T **pixel) {
    int64_t below = tap / c->side, right = tap % c->side, on = (below * c->width + right) * c->inputs;
    for (int64_t p = 0; p < count; p++) {
        int64_t y = w->row[p] + below, z = w->column[p] + right, inside = (y >= 0) & (y < c->height) & (z >= 0) & (z < c->width);
        pixel[p] = inside ? x + w->pixel[p] * c->inputs + on : nothing;
    }
}

/* y (images x down x across x outputs) of x (images x height x width x inputs) and filters (outputs x side x side x inputs); with
   `back` and stride 1, y is the gradient of images of which x is that of the output, and filters are inputs x side x side x outputs.
   Returns 0, or 1 without memory. */
int convolve(const T *x, const T *w, T *y, const Conv *c, int back, int parts) {
    int failed = 0;
    int64_t pixels = c->images * c->down * c->across, wide = rounded(c->outputs, PAIR) / PAIR, deep = rounded(c->inputs, PAIR) / PAIR;
    int64_t steps = c->side * c->side * deep, chunks = (steps + DEPTH - 1) / DEPTH, depth = (steps + chunks - 1) / chunks, share, block;
    divide(pixels, parts, PIXELS, &share, &block);
    size_t sums_size = (PIXELS * wide * PAIR + SUMS) * sizeof(float), own = sums_size + PIXELS * depth * PAIR * sizeof(T);
    T *filters = aligned_alloc(LINE, steps * wide * 2 * TILE * sizeof(T)), *nothing = calloc((deep + wide) * PAIR, sizeof(T));
    char *all = aligned_alloc(LINE, parts * own);
    if (!filters || !nothing || !all) failed = 1;
#pragma omp parallel num_threads(parts) if (!failed)
    if (!failed) {
        const T *pixel[PIXELS];
        Windows windows;
        configure();
#pragma omp for schedule(static) collapse(2)
        for (int64_t step = 0; step < steps; step++)
            for (int64_t o = 0; o < wide; o++) {
                int64_t begin = step / depth * depth, here = least(depth, steps - begin);
                T *to = filters + (begin * wide + o * here + step - begin) * 2 * TILE;
                lay_filters(w, nothing, c->outputs, c->side * c->side, c->inputs, back, step / deep, step % deep * PAIR, o * PAIR, to);
            }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) {
            float *sums = (float *)(all + part * own);
            T *rows = (T *)(all + part * own + sums_size);
            int64_t to = least((part + 1) * share, pixels);
            for (int64_t begin = part * share; begin < to; begin += block) {
                int64_t end = least(begin + block, to), tall = rounded(end - begin, STEP) / STEP, known = -1;
                find(c, begin, end, tall * STEP, &windows);
                for (int64_t from = 0; from < steps; from += depth) {
                    int64_t here = least(depth, steps - from);
                    for (int64_t k = 0; k < here; k++) {
                        int64_t tap = (from + k) / deep, i = (from + k) % deep * PAIR;
                        if (tap != known) meet(x, nothing, c, known = tap, &windows, tall * STEP, pixel);
                        for (int64_t p = 0; p < tall; p++) lay_pixels(pixel + p * STEP, i, both(c->inputs - i), rows + (p * here + k) * 2 * TILE);
                    }
                    for (int64_t o = 0; o < wide; o++)
                        for (int64_t p = 0; p < tall; p++)
                            multiply(rows + p * here * 2 * TILE, filters + (from * wide + o * here) * 2 * TILE, here, sums + (o * tall + p) * SUMS, !from);
                }
                for (int64_t p = 0; p < end - begin; p++)
                    for (int64_t o = 0; o < wide; o++) {
                        const float *sum = sums + (o * tall + p / STEP) * SUMS + p % STEP * LANES + p % STEP / LANES * 256;
                        __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sum + 256), _mm512_load_ps(sum));
                        _mm512_mask_storeu_epi16(y + (begin + p) * c->outputs + o * PAIR, both(c->outputs - o * PAIR), halves);
                    }
            }
        }
        _tile_release();
    }
    free(filters);
    free(nothing);
    free(all);
    return failed;
}

/* dw (outputs x side x side x inputs, fp32) of x (images x height x width x inputs) and dy (images x down x across x outputs).
   Each thread adds up its share of the pixels, and the shares are added in one order whatever the timing. Returns 0, or 1 without memory. */
int filter_gradient(const T *x, const T *dy, float *dw, const Conv *c, int parts) {
    int failed = 0;
    int64_t pixels = c->images * c->down * c->across, taps = c->side * c->side, spread = c->stride * c->stride;
    int64_t wide = rounded(c->outputs, PAIR) / PAIR, deep = rounded(c->inputs, PAIR) / PAIR, size = taps * deep * wide * SUMS;
    int64_t room = (wide + (taps == 1 ? deep : 1)) * PAIR * TERMS, share, block;
    divide(pixels, parts, taps > 1 && size < FEW ? TERMS / 2 : TERMS, &share, &block);
    float *all = aligned_alloc(LINE, (parts * size + SUMS) * sizeof(float)); /* what is fetched ahead may be past the last */
    T *laid = aligned_alloc(LINE, parts * room * sizeof(T)), *nothing = calloc(deep * PAIR, sizeof(T));
    if (!all || !laid || !nothing) failed = 1;
#pragma omp parallel num_threads(parts) if (!failed)
    if (!failed) {
        int part = omp_get_thread_num(), count = omp_get_num_threads();
        const T *pixel[TERMS];
        Windows windows;
        T *rows = laid + part * room, *pairs = rows + wide * PAIR * TERMS;
        configure();
        for (int p = part; p < parts; p += count) { /* each part's, should there be fewer threads */
            int64_t from = least(p * share, pixels), to = least(from + share, pixels);
            float *own = all + p * size;
            if (from == to) memset(own, 0, size * sizeof *own);
            for (int64_t begin = from; begin < to; begin += block) {
                int64_t end = least(begin + block, to), steps = rounded(end - begin, STEP) / STEP;
                float *sums = own;
                find(c, begin, end, steps * STEP, &windows);
                if (taps == 1) meet(x, nothing, c, 0, &windows, steps * STEP, pixel);
                for (int64_t k = 0; k < steps; k++) {
                    for (int64_t o = 0; o < 2 * wide; o++) {
                        fetch(dy + (begin + (k + 1) * STEP) * c->outputs, STEP * c->outputs, o, 2 * wide);
                        lay_rows(dy + (begin + k * STEP) * c->outputs + o * LANES, c->outputs, end - begin - k * STEP, first(c->outputs - o * LANES),
                                 rows + ((o / 2 * steps + k) * 2 + o % 2) * TILE);
                    }
                    for (int64_t i = 0; i < deep; i++) {
                        fetch(x + (begin + (k + 1) * STEP) * spread * c->inputs, STEP * spread * c->inputs, i, deep);
                        if (taps == 1) lay_pairs(pixel + k * STEP, i * PAIR, both(c->inputs - i * PAIR), pairs + 2 * (i * steps + k) * TILE);
                    }
                }
                for (int64_t tap = 0; tap < taps; tap++) {
                    if (taps > 1) meet(x, nothing, c, tap, &windows, steps * STEP, pixel);
                    for (int64_t i = 0; i < deep; i++) {
                        for (int64_t k = 0; taps > 1 && k < steps; k++)
                            lay_pairs(pixel + k * STEP, i * PAIR, both(c->inputs - i * PAIR), pairs + 2 * k * TILE);
                        const T *here = taps == 1 ? pairs + 2 * i * steps * TILE : pairs;
                        for (int64_t o = 0; o < wide; o++, sums += SUMS) multiply(rows + o * steps * 2 * TILE, here, steps, sums, begin == from);
                    }
                }
            }
        }
        _tile_release();
#pragma omp barrier
#pragma omp for schedule(static) collapse(2)
        for (int64_t o = 0; o < c->outputs; o++)
            for (int64_t tap = 0; tap < taps; tap++)
                for (int64_t i = 0; i < c->inputs; i += LANES) {
                    int64_t at = ((tap * deep + i / PAIR) * wide + o / PAIR) * SUMS + (o / LANES % 2 * 2 + i / LANES % 2) * 256 + o % LANES * LANES;
                    __m512 sum = _mm512_load_ps(all + at);
                    for (int p = 1; p < parts; p++) sum = _mm512_add_ps(sum, _mm512_load_ps(all + p * size + at));
                    _mm512_mask_storeu_ps(dw + (o * taps + tap) * c->inputs + i, first(c->inputs - i), sum);
                }
    }
    free(all);
    free(laid);
    free(nothing);
    return failed;
}
