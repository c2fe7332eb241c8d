/* Batch norm, the skip addition and ReLU as one pass over memory, forward and back.

   Images are channels-last: `rows` = N x H x W pixels of C channels each, C a multiple of LANES; a caller with fewer lays
   several pixels side by side (`fold`). Sums of many rows go on in fp64. What lies between the two passes of batch norm is
   one barrier. Compiled once a type by fused.py. */

#include "vectors.h"
#include <math.h>
#include <omp.h>
#include <stdlib.h>

#define WIDE 4 /* vectors of channels that go through registers together */
#define TALL 16 /* rows at a time, which stay in the first cache between two groups of channels */
#define BLOCK 256 /* rows whose sums are added up in fp32 */
#define SEEN 16 /* rows by which it is known about what to add up */

static inline Floats relu(Floats x) { return chosen(~(x < 0), x); } /* a NaN stays one */

static inline Ints passes(Floats y) { return ~(y <= 0); } /* where the gradient of a ReLU that gave y, or got it, goes through; a NaN lets it, as in torch */

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
    if (kind == RECTIFIED) g = chosen(passes(d * floats(p->scale + c) + floats(p->shift + c)), load(p->dy + at));
    if (kind == JOINED) {
        Floats both = load(p->dy + at);
        if (p->other) both += load(p->other + at);
        g = chosen(passes(load(p->y + at)), both);
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

/* About what a row is: the mean of a few, far from the corners of images, of what is finite. Sums are taken about it, so
   that a large mean costs no digits, and one odd pixel few. */
static void around(const T *x, int64_t rows, int64_t C, float *middle) {
    memset(middle, 0, C * sizeof *middle);
    for (int k = 0; k < SEEN; k++)
        for (int64_t c = 0; c < C; c += LANES) {
            Floats v = load(x + (2 * k + 1) * rows / (2 * SEEN) * C + c);
            float row[LANES];
            memcpy(row, &v, sizeof v);
            for (int i = 0; i < LANES; i++) {
                float step = (row[i] - middle[c + i]) / (k + 1);
                if (isfinite(step)) middle[c + i] += step;
            }
        }
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
    around(x, rows, C, middle);
    for (int64_t c = 0; c < C; c++) middle[c] = middle[c % channels];
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
                    if (rectify && !d_added) g = chosen(passes((in - floats(middle + c)) * floats(scale + c) + floats(shift + c)), g);
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

/* g = dy + other where y is positive and zero elsewhere, and each channel's sum of g before it is rounded. `other` may be NULL;
   without y, nothing is written and the sum is that of dy. dy, other, y, g: rows x C. Returns 0, or 1 without memory. */
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
                            v = chosen(passes(load(y + at + c)), v);
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
