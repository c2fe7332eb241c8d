/* The gradient of a convolution's filters by a processor's matrix tiles (AMX), from bf16 images that are channels-last.

   dw[o][tap][i] is the sum over pixels of dy[pixel][o] x[pixel moved by tap][i]. A product of tiles adds 32 pixels to 16 x 16
   of these; dy's tile has a row for each of 16 channels, x's a row for each pair of pixels. Both are laid out here, for as
   many pixels as the caches hold, with zeros for what is outside of an image. Each thread adds up its share of the pixels in
   fp32, and the shares are added in one order whatever the timing. Compiled by tiles.py. */

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LANES 16 /* rows of a tile, and floats in one */
#define STEP 32 /* pixels in a tile */
#define PAIR 32 /* channels of two tiles, which go through registers together */
#define TILE 512 /* bf16 in a tile */
#define SUMS 1024 /* floats in two by two */
#define MOST 256 /* pixels at a time: twice 32 channels of them stay in the first cache, all channels in the second */
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

/* Two tiles of x: of 32 channels 16 rows of a pair of pixels each. */
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

/* Adds the products of 32 rows of dy and 32 channels of x over all steps to their sums, and fetches the next ones. */
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
        _tile_loadd(4, rows + 2 * k * TILE, 64);
        _tile_loadd(6, pairs + 2 * k * TILE, 64);
        _tile_loadd(5, rows + (2 * k + 1) * TILE, 64);
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

/* Where the pixels of x are that a tap of the filters meets from `begin` on; `nothing` outside of the images and from `end` on. */
static void find(const T *x, const T *nothing, const Conv *c, int64_t tap, int64_t begin, int64_t end, int64_t count, const T **pixel) {
    int64_t image = begin / (c->down * c->across), line = begin / c->across % c->down, column = begin % c->across;
    int64_t right = tap % c->side - c->padding, below = tap / c->side - c->padding;
    for (int64_t p = 0; p < count; p++) {
        int64_t y = line * c->stride + below, z = column * c->stride + right;
        int inside = p < end - begin && y >= 0 && y < c->height && z >= 0 && z < c->width;
        pixel[p] = inside ? x + ((image * c->height + y) * c->width + z) * c->inputs : nothing;
        if (++column < c->across) continue;
        column = 0;
        if (++line < c->down) continue;
        line = 0;
        image++;
    }
}

/* dw (outputs x side x side x inputs, fp32) of x (images x height x width x inputs) and dy (images x down x across x outputs).
   Returns 0, or 1 without memory. */
int filter_gradient(const T *x, const T *dy, float *dw, const Conv *c, int parts) {
    int failed = 0;
    int64_t pixels = c->images * c->down * c->across, taps = c->side * c->side;
    int64_t wide = rounded(c->outputs, PAIR) / PAIR, deep = rounded(c->inputs, PAIR) / PAIR, size = taps * deep * wide * SUMS;
    int64_t share = rounded((pixels + parts - 1) / parts, STEP), blocks = (share + MOST - 1) / MOST, block = rounded((share + blocks - 1) / blocks, STEP);
    float *all = aligned_alloc(LINE, (parts * size + SUMS) * sizeof(float)); /* what is fetched ahead may be past the last */
    T *laid = aligned_alloc(LINE, parts * (wide + 1) * PAIR * MOST * sizeof(T)), *nothing = calloc(deep * PAIR, sizeof(T));
    if (!all || !laid || !nothing) failed = 1;
#pragma omp parallel num_threads(parts) if (!failed)
    if (!failed) {
        int part = omp_get_thread_num(), count = omp_get_num_threads();
        const T *pixel[MOST];
        T *rows = laid + part * (wide + 1) * PAIR * MOST, *pairs = rows + wide * PAIR * MOST;
        configure();
        for (int p = part; p < parts; p += count) { /* each part's, should there be fewer threads */
            int64_t from = least(p * share, pixels), to = least(from + share, pixels);
            float *own = all + p * size;
            if (from == to) memset(own, 0, size * sizeof *own);
            for (int64_t begin = from; begin < to; begin += block) {
                int64_t end = least(begin + block, to), steps = rounded(end - begin, STEP) / STEP;
                float *sums = own;
                for (int64_t o = 0; o < 2 * wide; o++)
                    for (int64_t k = 0; k < steps; k++)
                        lay_rows(dy + (begin + k * STEP) * c->outputs + o * LANES, c->outputs, end - begin - k * STEP, first(c->outputs - o * LANES),
                                 rows + ((o / 2 * steps + k) * 2 + o % 2) * TILE);
                for (int64_t tap = 0; tap < taps; tap++) {
                    find(x, nothing, c, tap, begin, end, steps * STEP, pixel);
                    for (int64_t i = 0; i < deep; i++) {
                        int64_t left = c->inputs - i * PAIR;
                        __mmask32 mask = first(left) | (__mmask32)first(left - LANES) << LANES;
                        for (int64_t k = 0; k < steps; k++) lay_pairs(pixel + k * STEP, i * PAIR, mask, pairs + 2 * k * TILE);
                        for (int64_t o = 0; o < wide; o++, sums += SUMS) multiply(rows + o * steps * 2 * TILE, pairs, steps, sums, begin == from);
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
