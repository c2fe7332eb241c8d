/* A processor's matrix tiles (AMX): sums in fp32 of products of bf16.

   A product of tiles adds 32 terms to each of 16 x 16 sums: one factor has a row of 32 terms for each of 16 of something
   (`rows`), the other a row for each pair of terms (`pairs`). */

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>

#define LANES 16 /* rows of a tile, and floats in one */
#define STEP 32 /* terms in a tile */
#define PAIR 32 /* channels of two tiles, which go through registers together */
#define TILE 512 /* bf16 in a tile */
#define SUMS 1024 /* floats in two by two */
#define LINE 64 /* bytes */

typedef uint16_t T; /* bf16, as bits */

static void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } layout = {.palette = 1};
    for (int i = 0; i < 8; i++) layout.bytes[i] = 64, layout.rows[i] = 16;
    __asm__ volatile("" ::"m"(layout)); /* of its 64 bytes GCC 12 takes eight for read, and may leave the others unwritten */
    _tile_loadconfig(&layout);
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static __mmask16 first(int64_t lanes) { return lanes >= LANES ? 0xffff : lanes > 0 ? (1 << lanes) - 1 : 0; }

static __mmask32 both(int64_t lanes) { return first(lanes) | (__mmask32)first(lanes - LANES) << LANES; }

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

/* Two tiles of filters (outputs x taps x inputs): of 32 outputs from `o` on 16 rows of a pair of inputs each. With `back` those of
   the gradient of the images, for which filters are inputs x taps x outputs and taps come in reverse. */
static void lay_filters(const T *w, const T *nothing, int64_t outputs, int64_t taps, int64_t inputs, int back, int64_t tap, int64_t i, int64_t o, T *to) {
    if (back) {
        const T *row[PAIR];
        for (int64_t k = 0; k < PAIR; k++) row[k] = i + k < inputs ? w + ((i + k) * taps + taps - 1 - tap) * outputs : nothing;
        lay_pairs(row, o, both(outputs - o), to);
        return;
    }
    for (int64_t half = 0; half < PAIR; half += LANES) {
        __m512i r[16];
        for (int64_t k = 0; k < 16; k++)
            r[k] = _mm512_maskz_loadu_epi16(o + half + k < outputs ? both(inputs - i) : 0, w + ((o + half + k) * taps + tap) * inputs + i);
        transpose(r);
        for (int64_t k = 0; k < 16; k++) _mm512_store_si512(to + (half + k) * STEP, r[k]);
    }
}

/* The sums of two tiles by two, in registers. */
static inline void clear(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline void keep(float *sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}
