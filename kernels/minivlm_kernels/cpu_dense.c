// Few rows of x times a weight of 32, 16 or 8 bits, and the norm between such products, on a CPU; cpu_dense.py says what the
// arguments are. GCC's vectors of one register: 16 floats with AVX-512, 8 with AVX2. A chunk is two registers of numbers.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#ifdef __AVX512F__
enum { LANES = 16, CHUNK = 2 * LANES };
#else
enum { LANES = 8, CHUNK = 2 * LANES };
#endif

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(1)));

enum { FAR = 2048 }; // prefetch distance in bytes, of weights whose bytes take longer to multiply than fp32's

static inline float sum(floats v) {
#ifdef __AVX512F__
    v += __builtin_shuffle(v, (words){8, 9, 10, 11, 12, 13, 14, 15});
#endif
    v += __builtin_shuffle(v, (words){4, 5, 6, 7});
    v += __builtin_shuffle(v, (words){2, 3});
    return v[0] + v[1];
}

// A bf16 is the upper half of a float, rounded to nearest, ties to even. A NaN that comes of bf16 stays one: its lower
// half is empty.
static inline float wide(uint16_t half) {
    union { uint32_t bits; float value; } number = {(uint32_t)half << 16};
    return number.value;
}

static inline uint16_t narrow(float value) {
    union { float value; uint32_t bits; } number = {value};
    return (uint16_t)((number.bits + 0x7fff + ((number.bits >> 16) & 1)) >> 16);
}

// A word holds two bf16: of every chunk, the even numbers are lower halves and the odd ones upper ones.
static inline floats lower(words pairs) { return (floats)(pairs << 16); }
static inline floats upper(words pairs) { return (floats)(pairs & 0xffff0000u); }

// `lines` rows of the weight times `count` rows of x, one of these 1: `size` bytes and `chunks` chunks each. All three
// numbers behind `size` are constants where this is called, so that the sums are registers.
static inline __attribute__((always_inline)) void dots(const char *weight, const floats *x, float *sums, int64_t chunks,
                                                       int64_t size, const int lines, const int count, const int half) {
    const int many = lines * count;
    floats even[4] = {{0}}, odd[4] = {{0}};
    for (int64_t c = 0; c < chunks; c++)
#pragma GCC unroll 4
        for (int i = 0; i < many; i++) {
            const void *w = weight + (lines > 1 ? i : 0) * size;
            const floats *given = x + 2 * ((count > 1 ? i : 0) * chunks + c);
            if (half && (lines > 1 || i == 0)) __builtin_prefetch((const words *)w + c + FAR / (4 * LANES), 0, 0);
            const floats first = half ? lower(((const words *)w)[c]) : ((const floats *)w)[2 * c];
            const floats second = half ? upper(((const words *)w)[c]) : ((const floats *)w)[2 * c + 1];
            even[i] += first * given[0];
            odd[i] += second * given[1];
        }
#pragma GCC unroll 4
    for (int i = 0; i < many; i++) sums[i] = sum(even[i] + odd[i]);
}

#ifdef __AVX512BF16__
// Prefetch distance in bytes. Measured on an EPYC with AVX512_BF16, rows of 8 kB: 384 to 512 are a tenth faster than
// without prefetching on one core, 5 % on two; from 640 on it is slower than without.
enum { AHEAD = 512 };

// `lines` rows of a bf16 weight times `count` rows of x, one of them 1, in bf16 as they are: an instruction adds the
// products of both numbers of a pair to a sum.
static inline __attribute__((always_inline)) void pairs(const char *weight, const char *x, float *sums, int64_t chunks,
                                                        int64_t size, const int lines, const int count) {
    const int many = lines * count, ways = 4 / many; // sums that do not wait for each other
    __m512 total[4] = {{0}, {0}, {0}, {0}};
    int64_t c = 0;
    for (; c + ways <= chunks; c += ways)
#pragma GCC unroll 4
        for (int way = 0; way < ways; way++) {
#pragma GCC unroll 4
            for (int i = 0; i < lines; i++) __builtin_prefetch(weight + i * size + 64 * (c + way) + AHEAD, 0, 0);
#pragma GCC unroll 4
            for (int i = 0; i < many; i++)
                total[ways * i + way] = _mm512_dpbf16_ps(
                    total[ways * i + way], (__m512bh)_mm512_loadu_si512(weight + (lines > 1 ? i : 0) * size + 64 * (c + way)),
                    (__m512bh)_mm512_loadu_si512(x + 64 * ((count > 1 ? i : 0) * chunks + c + way)));
        }
    for (; c < chunks; c++)
#pragma GCC unroll 4
        for (int i = 0; i < many; i++)
            total[ways * i] = _mm512_dpbf16_ps(
                total[ways * i], (__m512bh)_mm512_loadu_si512(weight + (lines > 1 ? i : 0) * size + 64 * c),
                (__m512bh)_mm512_loadu_si512(x + 64 * ((count > 1 ? i : 0) * chunks + c)));
#pragma GCC unroll 4
    for (int i = 0; i < many; i++) {
        for (int way = 1; way < ways; way++) total[ways * i] += total[ways * i + way];
        sums[i] = sum((floats)total[ways * i]);
    }
}
#endif

// As many rows of the weight as are read at once, if each is LONG bytes or more. One row after the other is memory in
// order; of rows of a kilobyte it is read up to twice as fast as several at once, of very long ones more slowly.
enum { LINES = 4, LONG = 16384 };

// The sums of lines · count products; one of these is 1. `given`: x as `dots` wants it, or as it is for `pairs`.
static inline void few(const char *weight, const void *given, float *sums, int64_t chunks, int64_t size, int64_t lines,
                       int64_t count, int64_t half) {
#ifdef __AVX512BF16__
    if (half) {
        if (lines > 1) pairs(weight, given, sums, chunks, size, LINES, 1);
        else if (count == 1) pairs(weight, given, sums, chunks, size, 1, 1);
        else if (count == 2) pairs(weight, given, sums, chunks, size, 1, 2);
        else if (count == 3) pairs(weight, given, sums, chunks, size, 1, 3);
        else pairs(weight, given, sums, chunks, size, 1, 4);
        return;
    }
#endif
#define DOTS(lines, count) \
    (half ? dots(weight, given, sums, chunks, size, lines, count, 1) : dots(weight, given, sums, chunks, size, lines, count, 0))
    if (lines > 1) DOTS(LINES, 1);
    else if (count == 1) DOTS(1, 1);
    else if (count == 2) DOTS(1, 2);
    else if (count == 3) DOTS(1, 3);
    else DOTS(1, 4);
}

// y (count, rows) = x (count, columns) times weight (rows, columns), + bias (rows) or NULL; all bf16 if `half`, or fp32.
// Returns 1 where there is no memory, else 0.
int matvec_dense(const void *weight, const void *x, const void *bias, void *y, int64_t count, int64_t rows,
                  int64_t columns, int64_t half, int64_t threads) {
    const int64_t chunks = columns / CHUNK, size = columns * (half ? 2 : 4);
    floats *split = 0; // of every chunk, even, then odd numbers
#ifndef __AVX512BF16__
    split = half ? malloc(2 * count * chunks * sizeof(floats)) : 0;
    if (half && !split) return 1;
    for (int64_t c = 0; half && c < count * chunks; c++) {
        split[2 * c] = lower(((const words *)x)[c]);
        split[2 * c + 1] = upper(((const words *)x)[c]);
    }
#endif
    const char *const given = split ? (const char *)split : x;
    const int64_t each = split ? 4 * columns : size; // bytes of a row of x
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < rows; block += LINES) { // in a core's cache when the second four rows of x meet it
        const int64_t end = block + LINES < rows ? block + LINES : rows;
        for (int64_t m = 0; m < count; m += 4) {
            const int64_t many = count - m < 4 ? count - m : 4;
            const int64_t lines = many == 1 && size >= LONG && end == block + LINES ? LINES : 1;
            for (int64_t row = block; row < end; row += lines) {
                float sums[4];
                few((const char *)weight + row * size, given + m * each, sums, chunks, size, lines, many, half);
                for (int64_t i = 0; i < lines * many; i++) {
                    const int64_t line = lines == 1 ? row : row + i, at = (lines == 1 ? m + i : m) * rows + line;
                    if (half)
                        ((uint16_t *)y)[at] = narrow(sums[i] + (bias ? wide(((const uint16_t *)bias)[line]) : 0));
                    else
                        ((float *)y)[at] = sums[i] + (bias ? ((const float *)bias)[line] : 0);
                }
            }
        }
    }
    free(split);
    return 0;
}

// LANES codes of 8 bits. GCC's own conversions between lanes of different sizes go one by one.
static inline floats numbers(const int8_t *codes) {
#ifdef __AVX512F__
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)codes)));
#else
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)codes)));
#endif
}

enum { BLOCK = 64 }; // codes of a cache line

// A row of codes times `count` rows of x.
static inline __attribute__((always_inline)) void codes_dots(const int8_t *codes, const float *x, float *sums, int64_t columns,
                                                             const int count) {
    const int ways = 4 / count; // sums that do not wait for each other
    floats total[4] = {{0}};
    for (int64_t k = 0; k < columns; k += BLOCK) {
        __builtin_prefetch(codes + k + FAR, 0, 0);
#pragma GCC unroll 8
        for (int j = 0; j < BLOCK; j += LANES) {
            const floats some = numbers(codes + k + j);
#pragma GCC unroll 4
            for (int i = 0; i < count; i++)
                total[i * ways + j / LANES % ways] += some * *(const floats *)(x + i * columns + k + j);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        for (int way = 1; way < ways; way++) total[i * ways] += total[i * ways + way];
        sums[i] = sum(total[i * ways]);
    }
}

// y (count, rows) = x (count, columns) times codes (rows, columns) · scales (rows); a row has whole blocks.
void matvec_int8(const int8_t *codes, const float *scales, const float *x, float *y, int64_t count, int64_t rows,
                 int64_t columns, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t m = 0; m < count; m += 4) {
            const int64_t many = count - m < 4 ? count - m : 4;
            const int8_t *w = codes + row * columns;
            const float *given = x + m * columns;
            float sums[4];
            if (many == 1) codes_dots(w, given, sums, columns, 1);
            else if (many == 2) codes_dots(w, given, sums, columns, 2);
            else if (many == 3) codes_dots(w, given, sums, columns, 3);
            else codes_dots(w, given, sums, columns, 4);
            for (int64_t i = 0; i < many; i++) y[(m + i) * rows + row] = sums[i] * scales[row];
        }
}

// y (rows, columns) = x / √(mean(x²) + eps) · weight (columns); in bf16 x is rounded before it meets the weight.
void rms_norm(const void *x, const void *weight, void *y, int64_t rows, int64_t columns, int64_t half, double eps) {
    for (int64_t start = 0; start < rows * columns; start += columns) {
        floats squares = {0};
        for (int64_t c = start / CHUNK; c < (start + columns) / CHUNK; c++) {
            const floats first = half ? lower(((const words *)x)[c]) : ((const floats *)x)[2 * c];
            const floats second = half ? upper(((const words *)x)[c]) : ((const floats *)x)[2 * c + 1];
            squares += first * first + second * second;
        }
        const float scale = 1 / sqrtf(sum(squares) / columns + (float)eps);
        if (half) {
            const uint16_t *given = (const uint16_t *)x + start, *w = weight;
            for (int64_t i = 0; i < columns; i++)
                ((uint16_t *)y)[start + i] = narrow(wide(narrow(wide(given[i]) * scale)) * wide(w[i]));
        } else {
            const float *given = (const float *)x + start, *w = weight;
            for (int64_t i = 0; i < columns; i++) ((float *)y)[start + i] = given[i] * scale * w[i];
        }
    }
}
