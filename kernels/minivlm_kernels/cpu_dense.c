// Few rows of x times a weight of 32 or 16 bits, and the norm between such products, on a CPU; cpu_dense.py says what the
// arguments are. GCC's vectors: 16 floats are one AVX-512 register, or as many smaller ones as the processor has.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(64), aligned(4)));
typedef uint32_t words __attribute__((vector_size(64), aligned(1)));

static inline float sum(floats v) {
    v += __builtin_shuffle(v, (words){8, 9, 10, 11, 12, 13, 14, 15});
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

// A word holds two bf16: of every 32 numbers, the 16 even ones are lower halves and the 16 odd ones upper ones.
static inline floats lower(words pairs) { return (floats)(pairs << 16); }
static inline floats upper(words pairs) { return (floats)(pairs & 0xffff0000u); }

// So many rows (`lines`) of the weight times so many of x (`count`), `size` bytes and `chunks` vectors of 32 numbers each.
// All four numbers behind `chunks` are constants where this is called, so that the sums are registers.
static inline __attribute__((always_inline)) void dots(const char *weight, const floats *x, float *sums, int64_t chunks,
                                                       int64_t size, const int lines, const int count, const int half) {
    floats even[4] = {{0}}, odd[4] = {{0}};
    for (int64_t c = 0; c < chunks; c++)
        for (int line = 0; line < lines; line++) {
            const void *w = weight + line * size;
            const floats first = half ? lower(((const words *)w)[c]) : ((const floats *)w)[2 * c];
            const floats second = half ? upper(((const words *)w)[c]) : ((const floats *)w)[2 * c + 1];
            for (int m = 0; m < count; m++) {
                even[line * count + m] += first * x[2 * (m * chunks + c)];
                odd[line * count + m] += second * x[2 * (m * chunks + c) + 1];
            }
        }
    for (int i = 0; i < lines * count; i++) sums[i] = sum(even[i] + odd[i]);
}

#ifdef __AVX512BF16__
// One row of a bf16 weight times `count` rows of x, in bf16 as they are: an instruction adds the products of both numbers
// of a pair to a sum. One row after the other is memory in order, which is read up to twice as fast as four rows at once;
// elsewhere x, widened to fp32, would then be read more often than the weight.
static inline __attribute__((always_inline)) void pairs(const char *weight, const char *x, float *sums, int64_t chunks,
                                                        const int count) {
    const int ways = 4 / count; // sums that do not wait for each other
    __m512 total[4] = {{0}, {0}, {0}, {0}};
    int64_t c = 0;
    for (; c + ways <= chunks; c += ways)
#pragma GCC unroll 4
        for (int way = 0; way < ways; way++)
#pragma GCC unroll 4
            for (int m = 0; m < count; m++)
                total[ways * m + way] = _mm512_dpbf16_ps(
                    total[ways * m + way], (__m512bh)_mm512_loadu_si512(weight + 64 * (c + way)),
                    (__m512bh)_mm512_loadu_si512(x + 64 * (m * chunks + c + way)));
    for (; c < chunks; c++)
#pragma GCC unroll 4
        for (int m = 0; m < count; m++)
            total[ways * m] = _mm512_dpbf16_ps(total[ways * m], (__m512bh)_mm512_loadu_si512(weight + 64 * c),
                                               (__m512bh)_mm512_loadu_si512(x + 64 * (m * chunks + c)));
#pragma GCC unroll 4
    for (int m = 0; m < count; m++) {
        for (int way = 1; way < ways; way++) total[ways * m] += total[ways * m + way];
        sums[m] = sum((floats)total[ways * m]);
    }
}

static int matvec_pairs(const char *weight, const char *x, const uint16_t *bias, uint16_t *y, int64_t count,
                        int64_t rows, int64_t columns, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t m = 0; m < count; m += 4) {
            const int64_t many = count - m < 4 ? count - m : 4, chunks = columns / 32;
            const char *w = weight + 2 * row * columns, *some = x + 2 * m * columns;
            float sums[4];
            switch (many) {
            case 1: pairs(w, some, sums, chunks, 1); break;
            case 2: pairs(w, some, sums, chunks, 2); break;
            case 3: pairs(w, some, sums, chunks, 3); break;
            default: pairs(w, some, sums, chunks, 4);
            }
            for (int64_t i = 0; i < many; i++) y[(m + i) * rows + row] = narrow(sums[i] + (bias ? wide(bias[row]) : 0));
        }
    return 0;
}
#endif

#define DOTS(lines, count) \
    (half ? dots(w, four, sums, chunks, size, lines, count, 1) : dots(w, four, sums, chunks, size, lines, count, 0))

// y (count, rows) = x (count, columns) times weight (rows, columns), + bias (rows) or NULL; all bf16 if `half`, or fp32.
// Four rows of the weight at once are read faster than one after the other. They are in the cache of a core when the
// second four rows of x meet them. Returns 1 where there is no memory, else 0.
int matvec_dense(const void *weight, const void *x, const void *bias, void *y, int64_t count, int64_t rows,
                  int64_t columns, int64_t half, int64_t threads) {
#ifdef __AVX512BF16__
    if (half) return matvec_pairs(weight, x, bias, y, count, rows, columns, threads);
#endif
    const int64_t chunks = columns / 32, size = columns * (half ? 2 : 4);
    floats *split = half ? malloc(2 * count * chunks * sizeof(floats)) : 0; // of every 32 numbers, even, then odd ones
    if (half && !split) return 1;
    for (int64_t c = 0; half && c < count * chunks; c++) {
        split[2 * c] = lower(((const words *)x)[c]);
        split[2 * c + 1] = upper(((const words *)x)[c]);
    }
    const floats *const given = half ? split : x;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < rows; block += 4) {
        const int64_t end = block + 4 < rows ? block + 4 : rows;
        for (int64_t m = 0; m < count; m += 4) {
            const int64_t many = count - m < 4 ? count - m : 4, lines = many == 1 && end == block + 4 ? 4 : 1;
            const floats *four = given + 2 * m * chunks;
            for (int64_t row = block; row < end; row += lines) {
                const char *w = (const char *)weight + row * size;
                float sums[4] = {0};
                switch (many) {
                case 1: lines == 4 ? DOTS(4, 1) : DOTS(1, 1); break;
                case 2: DOTS(1, 2); break;
                case 3: DOTS(1, 3); break;
                default: DOTS(1, 4);
                }
                for (int64_t i = 0; i < lines * many; i++) { // of lines and many, one at least is 1
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

// y (rows, columns) = x / √(mean(x²) + eps) · weight (columns); in bf16 x is rounded before it meets the weight.
void rms_norm(const void *x, const void *weight, void *y, int64_t rows, int64_t columns, int64_t half, double eps) {
    for (int64_t start = 0; start < rows * columns; start += columns) {
        floats squares = {0};
        for (int64_t c = start / 32; c < (start + columns) / 32; c++) {
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
