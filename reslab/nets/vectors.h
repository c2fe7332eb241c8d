/* Vectors of sixteen channels for the kernels of nets: T is the type in memory, bf16 with BF16 defined, else fp32; all arithmetic is in fp32. */

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define LANES 16
#define PAST ((size_t)1 << 22) /* bytes; what is larger has left the caches when it is read again */
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
