/* Convolutions by a processor's matrix tiles (AMX), from bf16 images that are channels-last, with sums in fp32.

   A product of tiles adds 32 terms to each of 16 x 16 sums: one factor has a row of 32 terms for each of 16 of something
   (`rows`), the other a row for each pair of terms (`pairs`). Both are laid out here, for as much as the caches hold, with
   zeros for what is outside of an image. A convolution's terms are channels, its rows pixels, its pairs filters; for the
   gradient of the filters the terms are pixels, the rows channels of dy, the pairs those of x. Compiled by tiles.py. */

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LANES 16 /* rows of a tile, and floats in one */
#define STEP 32 /* terms in a tile */
#define PAIR 32 /* channels of two tiles, which go through registers together */
#define TILE 512 /* bf16 in a tile */
#define SUMS 1024 /* floats in two by two */
#define TERMS 512 /* pixels at a time for the filters' gradient: 32 channels of them stay in the first cache, all channels in the second */
#define FEW (1 << 18) /* sums that the second cache holds beside all else, so that they may come more often */
#define PIXELS 256 /* at a time for a convolution, whose sums stay in the second cache */
#define DEPTH 18 /* times 32 channels at a time: those of 32 filters stay in the first */
#define TALL 64 /* pixels at a time for a product, whose filters come from the second cache */
#define PAST ((size_t)1 << 22) /* bytes; what is larger passes the caches by */
#define LINE 64 /* bytes */

typedef uint16_t T; /* bf16, as bits */

/* How a convolution walks: images, pixels and channels in and out, the side of its square filters, stride and padding. */
typedef struct {
    int64_t images, height, width, inputs, down, across, outputs, side, stride, padding;
} Conv;

/* Asks the kernel for tiles, once a process. Returns 0, or not where it has none. */
int tiles_allow(void) { return (int)syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */); }

static void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } layout = {.palette = 1};
    for (int i = 0; i < 8; i++) layout.bytes[i] = 64, layout.rows[i] = 16;
    _tile_loadconfig(&layout);
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static __mmask16 first(int64_t lanes) { return lanes >= LANES ? 0xffff : lanes > 0 ? (1 << lanes) - 1 : 0; }

static __mmask32 both(int64_t lanes) { return first(lanes) | (__mmask32)first(lanes - LANES) << LANES; }

/* Each part's share of the pixels, and how many of these at a time, at most `most`: as even as tiles allow. */
static void divide(int64_t pixels, int64_t parts, int64_t most, int64_t *share, int64_t *block) {
    *share = rounded((pixels + parts - 1) / parts, STEP);
    int64_t blocks = (*share + most - 1) / most;
    *block = rounded((*share + blocks - 1) / blocks, STEP);
}

/* Asks for the part of `count` values from `from` on that is the turn of `number`, one of `of`, while something else is computed. */
static inline void fetch(const T *from, int64_t count, int64_t number, int64_t of) {
    for (int64_t i = count * number / of; i < count * (number + 1) / of; i += LINE / sizeof(T)) _mm_prefetch((const char *)(from + i), _MM_HINT_T1);
}

/* Swaps rows and columns. */
static inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = i; j < i + 4; j++) {
            t[j] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
            t[j + 4] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
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

/* Two tiles: of 32 channels 16 rows of a pair of pixels each. */
static inline void lay_pairs(const T *const *pixel, int64_t channel, __mmask32 mask, T *to) {
    __m512i low, high; /* where the lower and upper 16 channels of two pixels go */
    low = _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47));
    high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int i = 0; i < 16; i++) {
        __m512i even = _mm512_maskz_loadu_epi16(mask, pixel[2 * i] + channel), odd = _mm512_maskz_loadu_epi16(mask, pixel[2 * i + 1] + channel);
        _mm512_store_si512(to + i * STEP, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_store_si512(to + TILE + i * STEP, _mm512_permutex2var_epi16(even, high, odd));
    }
}

/* Two tiles: of 32 pixels a row of 32 channels each. */
static inline void lay_pixels(const T *const *pixel, int64_t channel, __mmask32 mask, T *to) {
    for (int i = 0; i < 32; i++) _mm512_store_si512(to + i * STEP, _mm512_maskz_loadu_epi16(mask, pixel[i] + channel));
}

/* Two tiles of filters (outputs x taps x inputs): of 32 outputs from `o` on 16 rows of a pair of inputs each. With `back` those of
   the gradient of the images, for which filters are inputs x taps x outputs and taps come in reverse. */
static void lay_filters(const T *w, const T *nothing, const Conv *c, int back, int64_t tap, int64_t i, int64_t o, T *to) {
    int64_t taps = c->side * c->side;
    if (back) {
        const T *row[PAIR];
        for (int64_t k = 0; k < PAIR; k++) row[k] = i + k < c->inputs ? w + ((i + k) * taps + taps - 1 - tap) * c->outputs : nothing;
        lay_pairs(row, o, both(c->outputs - o), to);
        return;
    }
    for (int64_t half = 0; half < PAIR; half += LANES) {
        __m512i r[16];
        for (int64_t k = 0; k < 16; k++)
            r[k] = _mm512_maskz_loadu_epi16(o + half + k < c->outputs ? both(c->inputs - i) : 0, w + ((o + half + k) * taps + tap) * c->inputs + i);
        transpose(r);
        for (int64_t k = 0; k < 16; k++) _mm512_store_si512(to + (half + k) * STEP, r[k]);
    }
}

/* Adds products of two tiles by two over all steps to their sums, and fetches the next ones. Rows pass the first cache by, where
   pairs are to stay. */
static inline void multiply(const T *rows, const T *pairs, int64_t steps, float *sums, int begin) {
    if (begin) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
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
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
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
                lay_filters(w, nothing, c, back, step / deep, step % deep * PAIR, o * PAIR, filters + (begin * wide + o * here + step - begin) * 2 * TILE);
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

/* 32 pixels from `at` on and 32 outputs from `o` on, but for the first `done` of the pixels; adds what was written to `totals`. */
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
            __mmask32 open = _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(p->gate + place), _mm512_setzero_si512());
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
    if (!totals) return;
    for (int64_t i = 0; i < PAIR; i += LANES) {
        __m512 total = i ? high_total : low_total;
        double *to = totals + o + i;
        _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), _mm512_cvtps_pd(_mm512_castps512_ps256(total))));
        _mm512_storeu_pd(to + 8, _mm512_add_pd(_mm512_loadu_pd(to + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(total, 1))));
    }
}

/* Filters are outputs x inputs and outputs x seconds, or with `back` the other way round. `total` of each output, or NULL, is the
   sum of y. Returns 0, or 1 without memory. */
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
                Conv c = {.inputs = k < deep ? p->inputs : p->seconds, .outputs = p->outputs, .side = 1};
                lay_filters(k < deep ? filters : others, NULL, &c, back, 0, (k < deep ? k : k - deep) * PAIR, o * PAIR, pairs + (o * steps + k) * 2 * TILE);
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
                        _tile_zero(0);
                        _tile_zero(1);
                        _tile_zero(2);
                        _tile_zero(3);
                        add_product(p->x + at * p->inputs, p->inputs, pairs + o * steps * 2 * TILE, !o);
                        if (p->second) add_product(p->second + at * p->seconds, p->seconds, pairs + (o * steps + deep) * 2 * TILE, !o);
                        _tile_stored(0, sums, 64);
                        _tile_stored(1, sums + 256, 64);
                        _tile_stored(2, sums + 512, 64);
                        _tile_stored(3, sums + 768, 64);
                        finish(p, sums, at, o * PAIR, from - at, past, total ? totals + part * p->outputs : NULL);
                    }
        }
        _tile_release();
        _mm_sfence();
    }
    for (int64_t o = 0; total && !failed && o < p->outputs; o++) {
        double sum = 0;
        for (int part = 0; part < parts; part++) sum += totals[part * p->outputs + o];
        total[o] = (float)sum;
    }
    free(pairs);
    free(totals);
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
                meet(x, nothing, c, 0, &windows, steps * STEP, pixel);
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
                        for (int64_t k = 0; taps > 1 && k < steps; k++) lay_pairs(pixel + k * STEP, i * PAIR, both(c->inputs - i * PAIR), pairs + 2 * k * TILE);
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
