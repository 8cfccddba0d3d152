// One row of x times a weight, on a CPU; cpu_products.py says what the arguments are. GCC's vectors: 16 floats are one
// AVX-512 register, or as many smaller ones as the processor has.

#include <stdint.h>

typedef float floats __attribute__((vector_size(64), aligned(4)));
typedef uint32_t words __attribute__((vector_size(64), aligned(1)));

static inline float sum(floats v) {
    float total = 0;
    for (int i = 0; i < 16; i++) total += v[i];
    return total;
}

// ---- Weights of 32 and 16 bits ----

void matvec_float32(const floats *weight, const floats *x, float *y, int64_t rows, int64_t columns, int64_t threads) {
    const int64_t chunks = columns / 32;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const floats *w = weight + row * chunks * 2;
        floats even = {0}, odd = {0};
        for (int64_t c = 0; c < chunks; c++) {
            even += w[2 * c] * x[2 * c];
            odd += w[2 * c + 1] * x[2 * c + 1];
        }
        y[row] = sum(even + odd);
    }
}

// A bf16 is the upper half of a float. A word holds two; x has the 16 even and then the 16 odd numbers of every 32.
void matvec_bfloat16(const words *weight, const floats *x, float *y, int64_t rows, int64_t columns, int64_t threads) {
    const int64_t chunks = columns / 32;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const words *w = weight + row * chunks;
        floats even = {0}, odd = {0};
        for (int64_t c = 0; c < chunks; c++) {
            even += (floats)(w[c] << 16) * x[2 * c];
            odd += (floats)(w[c] & 0xffff0000u) * x[2 * c + 1];
        }
        y[row] = sum(even + odd);
    }
}

// ---- Weights of four bits ----

enum { CHUNK = 128, BLOCK = 64, MOST = 2048 }; // weights in 16 words; under one scale; blocks in a row

typedef struct {
    const uint8_t *qweight;
    const float *absmax;        // the scales, or NULL: then they are
    const uint8_t *codes;       // nested_map[code] · nested_absmax, one for 256 codes, + offset
    const float *nested_map, *nested_absmax;
    double offset;
    int64_t first, rows, columns, threads; // rows from `first` on are wanted
} Weight;

// The scales of a row's blocks, in `room` if they are not held as floats.
static const float *row_scales(const Weight *w, int64_t row, float *room) {
    const int64_t blocks = w->columns / BLOCK, start = row * blocks;
    if (w->absmax) return w->absmax + start;
    for (int64_t i = 0; i < blocks; i++)
        room[i] = w->nested_map[w->codes[start + i]] * w->nested_absmax[(start + i) / 256] + (float)w->offset;
    return room;
}

// 16 words of 8 codes times the 128 floats that they meet: x[s] meets the code at bit 4·s of every word. A shuffle of
// `table` is 16 look-ups, and looks at the lowest 4 bits of each word alone.
static inline floats products(words codes, floats table, const floats *x) {
    floats one = __builtin_shuffle(table, codes) * x[0], two = __builtin_shuffle(table, codes >> 4) * x[1];
    one += __builtin_shuffle(table, codes >> 8) * x[2], two += __builtin_shuffle(table, codes >> 12) * x[3];
    one += __builtin_shuffle(table, codes >> 16) * x[4], two += __builtin_shuffle(table, codes >> 20) * x[5];
    one += __builtin_shuffle(table, codes >> 24) * x[6], two += __builtin_shuffle(table, codes >> 28) * x[7];
    return one + two;
}

void matvec_int4(const Weight *w, const floats *table, const floats *x, float *y) {
    const int64_t chunks = w->columns / CHUNK;
#pragma omp parallel for schedule(static) num_threads(w->threads)
    for (int64_t i = 0; i < w->rows; i++) {
        float room[MOST];
        const float *scales = row_scales(w, w->first + i, room);
        const words *codes = (const words *)(w->qweight + (w->first + i) * (w->columns / 2));
        floats total = {0};
        for (int64_t c = 0; c < chunks; c++) {
            const float a = scales[2 * c], b = scales[2 * c + 1];
            const floats both = {a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b}; // lane i has weights 8·i to 8·i + 7
            total += products(codes[c], *table, x + 8 * c) * both;
        }
        y[i] = sum(total);
    }
}

// bf16 is rounded to nearest, ties to even; all numbers are finite.
static inline void store(floats values, void *out, int64_t at, int64_t bfloat16) {
    if (!bfloat16) {
        *(floats *)((float *)out + at) = values;
        return;
    }
    const words bits = (words)values;
    const words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    for (int i = 0; i < 16; i++) ((uint16_t *)out)[at + i] = (uint16_t)rounded[i];
}

// 16 bytes are 32 weights, the first of two in the upper half of a byte.
void dequantize(const Weight *w, const floats *table, void *out, int64_t bfloat16) {
    const words lower = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const words upper = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#pragma omp parallel for schedule(static) num_threads(w->threads)
    for (int64_t i = 0; i < w->rows; i++) {
        float room[MOST];
        const float *scales = row_scales(w, w->first + i, room);
        const uint8_t *bytes = w->qweight + (w->first + i) * (w->columns / 2);
        for (int64_t k = 0; k < w->columns; k += 32, bytes += 16) {
            words codes;
            for (int j = 0; j < 16; j++) codes[j] = bytes[j];
            const floats first = __builtin_shuffle(*table, codes >> 4), second = __builtin_shuffle(*table, codes);
            const float scale = scales[k / BLOCK];
            store(__builtin_shuffle(first, second, lower) * scale, out, i * w->columns + k, bfloat16);
            store(__builtin_shuffle(first, second, upper) * scale, out, i * w->columns + k + 16, bfloat16);
        }
    }
}
