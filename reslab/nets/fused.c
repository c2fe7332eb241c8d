/* Batch norm, the skip addition and ReLU as one pass over memory, forward and back, and max-pools that note where in one byte.

   Images are channels-last: `rows` = N x H x W pixels of C channels each, C a multiple of LANES; a caller with fewer lays
   several pixels side by side (`fold`). T is the type in memory; all arithmetic is in fp32, and sums of many rows go on
   in fp64. What lies between the two passes of batch norm is one barrier. Compiled once a type by fused.py. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define LANES 16
#define WIDE 4 /* vectors of channels that go through registers together */
#define TALL 16 /* rows at a time, which stay in the first cache between two groups of channels */
#define PAST ((size_t)1 << 22) /* bytes; what is larger has left the caches when it is read again */
#define BLOCK 256 /* rows whose sums are added up in fp32 */
#define AHEAD (2048 / sizeof(T)) /* how far ahead a loop asks for what it will read */
#define ALWAYS inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

#if defined(BF16)
typedef uint16_t T;
typedef Halves Raw; /* as many Ts as bits */

static inline Floats load(const T *p) {
    Halves h;
    memcpy(&h, p, sizeof h);
    return (Floats)(__builtin_convertvector(h, Bits) << 16);
}

static inline void store(T *p, Floats x) {
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh((__m512)x);
    memcpy(p, &h, sizeof h);
#else
    Bits bits = (Bits)x, rounded = bits + 0x7fff + ((bits >> 16) & 1); /* to the nearest, of two to the even */
    Bits nan = (Bits)((bits & 0x7fffffff) > 0x7f800000);
    Halves h = __builtin_convertvector((nan & 0x7fc00000) >> 16 | (~nan & rounded) >> 16, Halves);
    memcpy(p, &h, sizeof h);
#endif
}
#else
typedef float T;
typedef Bits Raw; /* as many Ts as bits */

static inline Floats load(const T *p) {
    Floats x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void store(T *p, Floats x) { memcpy(p, &x, sizeof x); }
#endif

/* A store that passes the caches by, if `past` is set and the processor can. */
static ALWAYS void put(T *p, Floats x, int past) {
#if defined(BF16) && defined(__AVX512BF16__)
    if (past) {
        _mm256_stream_si256((void *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
        return;
    }
#elif !defined(BF16) && defined(__AVX512F__)
    if (past) {
        _mm512_stream_ps(p, (__m512)x);
        return;
    }
#endif
    store(p, x);
}

/* Before others read what was put past the caches. */
static inline void settle(void) {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

static inline Floats floats(const float *p) {
    Floats x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* Asks for what a loop reads AHEAD of here; NULL is never read. A prefetch past the end of an array does nothing. */
static ALWAYS void ask(const T *p) {
    if (p) __builtin_prefetch(p + AHEAD);
}

static inline Floats chosen(Ints where, Floats x) { return (Floats)(where & (Ints)x); } /* x or zero */

static inline Floats relu(Floats x) { return chosen(~(x < 0), x); } /* a NaN stays one */

static int64_t share(int64_t rows, int part, int parts) { return rows * part / parts; }

/* What is added up over the rows of a channel, in pairs. */
enum { MOMENTS, LINEAR, RECTIFIED, JOINED };

/* What the sums are taken of. `middle` is what x is measured from; of the others each kind takes what it needs. */
typedef struct {
    const T *x, *dy, *other, *y;
    T *d_added;
    const float *middle, *scale, *shift;
} Pixels;

static ALWAYS void add(int kind, const Pixels *p, int64_t at, int64_t c, Floats *first, Floats *second) {
    Floats in = load(p->x + at), d = in - floats(p->middle + c), g = d;
    if (kind == LINEAR) g = load(p->dy + at);
    if (kind == RECTIFIED) g = chosen(d * floats(p->scale + c) + floats(p->shift + c) > 0, load(p->dy + at));
    if (kind == JOINED) {
        Floats both = load(p->dy + at);
        if (p->other) both += load(p->other + at);
        g = chosen(load(p->y + at) > 0, both);
        store(p->d_added + at, g);
    }
    *first += g;
    *second += g * d;
}

static ALWAYS void group(int kind, int width, const Pixels *p, int64_t begin, int64_t end, int64_t C, int64_t c, float *near) {
    Floats first[WIDE], second[WIDE];
    for (int v = 0; v < width; v++) {
        first[v] = floats(near + c + v * LANES);
        second[v] = floats(near + C + c + v * LANES);
    }
    for (int64_t row = begin; row < end; row++)
        for (int v = 0; v < width; v++) {
            int64_t at = row * C + c + v * LANES;
            __builtin_prefetch(p->x + at + TALL * C);
            if (kind != MOMENTS) __builtin_prefetch(p->dy + at + TALL * C);
            if (kind == JOINED) __builtin_prefetch(p->y + at + TALL * C);
            if (kind == JOINED && p->other) __builtin_prefetch(p->other + at + TALL * C);
            add(kind, p, at, c + v * LANES, first + v, second + v);
        }
    for (int v = 0; v < width; v++) {
        memcpy(near + c + v * LANES, first + v, sizeof *first);
        memcpy(near + C + c + v * LANES, second + v, sizeof *second);
    }
}

/* Adds both sums over rows from `begin` to `end` to `totals`, C of the one and then C of the other. */
static ALWAYS void sum(int kind, const Pixels *p, int64_t begin, int64_t end, int64_t C, float *near, double *totals) {
    for (int64_t block = begin; block < end; block += BLOCK) {
        int64_t until = block + BLOCK < end ? block + BLOCK : end;
        memset(near, 0, 2 * C * sizeof *near);
        for (int64_t tile = block; tile < until; tile += TALL) {
            int64_t last = tile + TALL < until ? tile + TALL : until, c = 0;
            for (; c + WIDE * LANES <= C; c += WIDE * LANES) group(kind, WIDE, p, tile, last, C, c, near);
            for (; c < C; c += LANES) group(kind, 1, p, tile, last, C, c, near);
        }
        for (int64_t c = 0; c < 2 * C; c++) totals[c] += near[c];
    }
}

/* A channel's sum over all parts and all pixels of a row, in one order whatever the timing. */
static double whole(const double *totals, int parts, int64_t C, int64_t channels, int64_t c) {
    double sum = 0;
    for (int p = 0; p < parts; p++)
        for (int64_t f = c; f < C; f += channels) sum += totals[p * 2 * C + f];
    return sum;
}

/* y = relu(norm(x) + added), `added` may be NULL. Leaves mean and 1 / standard deviation, and moves the running
   statistics. x, added, y: rows x C; everything else: channels = C / fold. Returns 0, or 1 without memory. */
int norm_forward(const T *x, const T *added, T *y, int64_t rows, int64_t C, int64_t fold, const float *weight, const float *bias, float eps,
                 float momentum, float *running_mean, float *running_var, float *mean, float *invstd, int rectify, int parts) {
    int failed = 0, past = rows * C * sizeof(T) > PAST;
    int64_t channels = C / fold;
    double *sums = calloc(parts * 2 * C, sizeof(double));
    float *factors = malloc(3 * C * sizeof(float)), *scale = factors, *shift = factors + C, *middle = factors + 2 * C;
    if (!sums || !factors) {
        free(sums);
        free(factors);
        return 1;
    }
    for (int64_t c = 0; c < C; c += LANES) { /* sums are taken about the first pixel, so that a large mean costs no digits */
        Floats v = load(x + c);
        memcpy(middle + c, &v, sizeof v);
    }
    for (int64_t c = 0; c < C; c++) middle[c] = isfinite(middle[c % channels]) ? middle[c % channels] : 0;
#pragma omp parallel num_threads(parts)
    {
        int part = omp_get_thread_num(), count = omp_get_num_threads();
        int64_t begin = share(rows, part, count), end = share(rows, part + 1, count);
        float *near = malloc(2 * C * sizeof(float));
        double *own = sums + part * 2 * C;
        if (near)
            sum(MOMENTS, &(Pixels){.x = x, .middle = middle}, begin, end, C, near, own);
        else
            failed = 1;
        free(near);
#pragma omp barrier
#pragma omp single
        {
            double n = (double)rows * fold;
            for (int64_t c = 0; c < channels; c++) {
                double total = whole(sums, count, C, channels, c), squares = whole(sums + C, count, C, channels, c);
                double from = total / n, var = squares / n - from * from;
                var = var < 0 ? 0 : var;
                mean[c] = (float)(middle[c] + from);
                invstd[c] = (float)(1 / sqrt(var + eps));
                running_mean[c] += momentum * (mean[c] - running_mean[c]);
                running_var[c] += momentum * ((float)(var * n / (n - 1)) - running_var[c]);
            }
            for (int64_t c = 0; c < C; c++) {
                scale[c] = weight[c % channels] * invstd[c % channels];
                shift[c] = bias[c % channels];
                middle[c] = mean[c % channels];
            }
        }
        for (int64_t row = begin; row < end; row++) {
            const T *from = x + row * C, *plus = added ? added + row * C : NULL;
            T *to = y + row * C;
            for (int64_t c = 0; c < C; c += LANES) {
                ask(from + c);
                ask(plus ? plus + c : NULL);
                Floats v = (load(from + c) - floats(middle + c)) * floats(scale + c) + floats(shift + c);
                if (plus) v += load(plus + c);
                put(to + c, rectify ? relu(v) : v, past);
            }
        }
        settle();
    }
    free(sums);
    free(factors);
    return failed;
}

/* From dy the gradients of x, of what was added (d_added; NULL if nothing was), of weight and bias. y is read only where
   something was added; else what ReLU let through is told by x. Where something was added, a second gradient may be added to
   dy: `other`, else NULL. dx may be NULL. Returns 0, or 1 without memory. */
int norm_backward(const T *dy, const T *other, const T *x, const T *y, T *dx, T *d_added, int64_t rows, int64_t C, int64_t fold, const float *weight,
                  const float *bias, const float *mean, const float *invstd, float *d_weight, float *d_bias, int rectify, int parts) {
    int failed = 0, past = rows * C * sizeof(T) > PAST;
    int64_t channels = C / fold;
    double *sums = calloc(parts * 2 * C, sizeof(double));
    float *factors = malloc(5 * C * sizeof(float)), *scale = factors, *shift = factors + C, *middle = factors + 2 * C, *level = factors + 3 * C,
          *slope = factors + 4 * C;
    if (!sums || !factors) {
        free(sums);
        free(factors);
        return 1;
    }
    for (int64_t c = 0; c < C; c++) {
        middle[c] = mean[c % channels];
        scale[c] = weight[c % channels] * invstd[c % channels];
        shift[c] = bias[c % channels];
    }
#pragma omp parallel num_threads(parts)
    {
        int part = omp_get_thread_num(), count = omp_get_num_threads();
        int64_t begin = share(rows, part, count), end = share(rows, part + 1, count);
        float *near = malloc(2 * C * sizeof(float));
        double *own = sums + part * 2 * C;
        Pixels p = {x, dy, other, y, d_added, middle, scale, shift};
        if (!near)
            failed = 1;
        else if (!rectify)
            sum(LINEAR, &p, begin, end, C, near, own);
        else if (d_added)
            sum(JOINED, &p, begin, end, C, near, own);
        else
            sum(RECTIFIED, &p, begin, end, C, near, own);
        free(near);
#pragma omp barrier
#pragma omp single
        {
            double n = (double)rows * fold;
            for (int64_t c = 0; c < channels; c++) {
                double total = whole(sums, count, C, channels, c), along = whole(sums + C, count, C, channels, c);
                d_bias[c] = (float)total;
                d_weight[c] = (float)(along * invstd[c]);
                for (int64_t f = c; f < C; f += channels) {
                    level[f] = (float)(total / n);
                    slope[f] = (float)(along * invstd[c] * invstd[c] / n);
                }
            }
        }
        if (dx)
            for (int64_t row = begin; row < end; row++) {
                const T *from = x + row * C, *by = (d_added ? d_added : dy) + row * C;
                T *to = dx + row * C;
                for (int64_t c = 0; c < C; c += LANES) {
                    ask(from + c);
                    ask(by + c);
                    Floats in = load(from + c), g = load(by + c);
                    if (rectify && !d_added) g = chosen((in - floats(middle + c)) * floats(scale + c) + floats(shift + c) > 0, g);
                    Floats out = floats(scale + c) * (g - floats(level + c) - (in - floats(middle + c)) * floats(slope + c));
                    put(to + c, out, past);
                }
            }
        settle();
    }
    free(sums);
    free(factors);
    return failed;
}

/* g = dy + other where y is positive and zero elsewhere, and each channel's sum of g. `other` may be NULL; without y, nothing is
   written and the sum is that of dy. dy, other, y, g: rows x C. Returns 0, or 1 without memory. */
int gated(const T *dy, const T *other, const T *y, T *g, int64_t rows, int64_t C, float *total, int parts) {
    int past = rows * C * sizeof(T) > PAST;
    double *sums = calloc(parts * 2 * C, sizeof(double));
    float *all = malloc(parts * C * sizeof(float));
    if (sums && all) {
#pragma omp parallel num_threads(parts)
        {
            int part = omp_get_thread_num(), count = omp_get_num_threads();
            int64_t begin = share(rows, part, count), end = share(rows, part + 1, count);
            float *near = all + part * C;
            for (int64_t block = begin; block < end; block += BLOCK) {
                int64_t until = block + BLOCK < end ? block + BLOCK : end;
                memset(near, 0, C * sizeof *near);
                for (int64_t at = block * C; at < until * C; at += C)
                    for (int64_t c = 0; c < C; c += LANES) {
                        ask(dy + at + c);
                        Floats v = load(dy + at + c);
                        if (y) {
                            ask(y + at + c);
                            ask(other ? other + at + c : NULL);
                            if (other) v += load(other + at + c);
                            v = chosen(load(y + at + c) > 0, v);
                            put(g + at + c, v, past);
                        }
                        v += floats(near + c);
                        memcpy(near + c, &v, sizeof v);
                    }
                for (int64_t c = 0; c < C; c++) sums[part * 2 * C + c] += near[c];
            }
            settle();
        }
        for (int64_t c = 0; c < C; c++) total[c] = (float)whole(sums, parts, C, C, c);
    }
    int failed = !sums || !all;
    free(sums);
    free(all);
    return failed;
}

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
