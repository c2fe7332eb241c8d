/* Max-pools over channels-last images, C a multiple of LANES, that note in one byte where the largest was. Compiled once a type by pool.py. */

#include "vectors.h"

/* x where a window's largest was at that tap, else zero. */
static ALWAYS Floats taken(Bytes found, uint8_t tap, Floats x) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return (Floats)_mm512_maskz_mov_ps(_mm_cmpeq_epi8_mask((__m128i)found, _mm_set1_epi8((char)tap)), (__m512)x);
#else
    return chosen(__builtin_convertvector(found == tap, Ints), x);
#endif
}

/* How a max-pool walks: images, pixels in and out, the side of its square window, stride and padding. */
typedef struct {
    int64_t images, height, width, C, down, across, side, stride, padding;
} Pool;

/* y = the largest of each window, and which of its side x side pixels that was, the first of equals; padding never wins. */
void pool_forward(const T *x, T *y, uint8_t *where, const Pool *p, int parts) {
#pragma omp parallel for schedule(static) num_threads(parts)
    for (int64_t line = 0; line < p->images * p->down; line++) {
        int64_t image = line / p->down, top = line % p->down * p->stride - p->padding;
        for (int64_t column = 0; column < p->across; column++) {
            int64_t left = column * p->stride - p->padding, to = (line * p->across + column) * p->C;
            for (int64_t c = 0; c < p->C; c += LANES) {
                Floats best = {0};
                Ints at = (Ints){0} - 1;
                for (int64_t i = 0; i < p->side; i++)
                    for (int64_t j = 0; j < p->side; j++) {
                        int64_t row = top + i, pixel = left + j;
                        if (row < 0 || row >= p->height || pixel < 0 || pixel >= p->width) continue;
                        Floats v = load(x + ((image * p->height + row) * p->width + pixel) * p->C + c);
                        Ints wins = (v > best) | (v != v) | (at < 0); /* a NaN stays one */
                        best = (Floats)((wins & (Ints)v) | (~wins & (Ints)best));
                        at = (wins & (int)(i * p->side + j)) | (~wins & at);
                    }
                store(y + to + c, best);
                Bytes found = __builtin_convertvector(at, Bytes);
                memcpy(where + to + c, &found, sizeof found);
            }
        }
    }
}

/* Moves on to the first and the last window, in one direction, that a pixel lies in; pixels are counted from where the padding begins. */
static inline void cover(const Pool *p, int64_t pixel, int64_t windows, int64_t *first, int64_t *last) {
    while (*first * p->stride + p->side <= pixel) ++*first;
    while (*last + 1 < windows && (*last + 1) * p->stride <= pixel) ++*last;
}

/* dx of a line of windows of which no two overlap: each gradient is read once, and all pixels of its window are written. */
static void apart_backward(const T *dy, const uint8_t *where, T *dx, const Pool *p, int64_t line) {
    int64_t C = p->C, side = p->side, wide = p->width * C, down = line % p->down, top = down * side;
    int64_t tall = top + side > p->height ? p->height - top : side, covered = p->across * side;
    dx += (line / p->down * p->height + top) * wide;
    for (int64_t j = 0; j < p->across; j++) {
        int64_t from = (line * p->across + j) * C, left = j * side, last = left + side > p->width ? p->width - left : side;
        for (int64_t c = 0; c < C; c += LANES) {
            Raw g; /* bits are moved, nothing is computed */
            Bytes found;
            memcpy(&g, dy + from + c, sizeof g);
            memcpy(&found, where + from + c, sizeof found);
            Raw tap = __builtin_convertvector(found, Raw);
            for (int64_t i = 0; i < tall; i++)
                for (int64_t t = 0; t < last; t++) {
                    Raw chosen = g & (Raw)(tap == (uint16_t)(i * side + t));
                    memcpy(dx + i * wide + (left + t) * C + c, &chosen, sizeof chosen);
                }
        }
    }
    if (covered < p->width)
        for (int64_t i = 0; i < tall; i++) memset(dx + i * wide + covered * C, 0, (p->width - covered) * C * sizeof *dx);
    if (down == p->down - 1 && top + side < p->height) memset(dx + side * wide, 0, (p->height - top - side) * wide * sizeof *dx);
}

/* dx from dy and where the largest were. */
void pool_backward(const T *dy, const uint8_t *where, T *dx, const Pool *p, int parts) {
    int past = p->images * p->height * p->width * p->C * sizeof(T) > PAST;
    if (p->stride == p->side && !p->padding) {
#pragma omp parallel for schedule(static) num_threads(parts)
        for (int64_t line = 0; line < p->images * p->down; line++) apart_backward(dy, where, dx, p, line);
        return;
    }
#pragma omp parallel num_threads(parts)
    {
#pragma omp for schedule(static)
        for (int64_t line = 0; line < p->images * p->height; line++) {
            int64_t image = line / p->height, y = line % p->height + p->padding;
            int64_t top = 0, bottom = -1, left = 0, right = -1;
            cover(p, y, p->down, &top, &bottom);
            for (int64_t column = 0; column < p->width; column++) {
                int64_t x = column + p->padding;
                cover(p, x, p->across, &left, &right);
                for (int64_t c = 0; c < p->C; c += LANES) {
                    Floats sum = {0};
                    for (int64_t i = top; i <= bottom; i++)
                        for (int64_t j = left; j <= right; j++) {
                            int64_t from = ((image * p->down + i) * p->across + j) * p->C + c;
                            Bytes found;
                            memcpy(&found, where + from, sizeof found);
                            uint8_t tap = (uint8_t)((y - i * p->stride) * p->side + x - j * p->stride);
                            sum += taken(found, tap, load(dy + from));
                        }
                    put(dx + (line * p->width + column) * p->C + c, sum, past);
                }
            }
        }
        settle();
    }
}
