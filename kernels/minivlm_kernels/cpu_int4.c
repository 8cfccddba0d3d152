// Few rows of x times a weight of four bits, on a CPU; cpu_int4.py says what the arguments are and how a weight lies in memory.
// GCC's vectors of one register: 16 floats with AVX-512, 8 with AVX2, which takes 16 lanes in two parts.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
enum { PARTS = 16 / LANES };

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(1)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1)));

#define INLINE static inline __attribute__((always_inline))

// BODY for rows FROM to FROM + ROWS - 1 of x, until all are done. ROWS is a constant: sums of several rows stay in
// registers only if their number is known.
#define FOR_ROWS(rows, BODY)                                                                                       \
    for (int64_t FROM = 0, left = rows; left; FROM = rows - left)                                                  \
        if (left >= 8) { enum { ROWS = 8 }; BODY; left -= 8; }                                                     \
        else if (left >= 4) { enum { ROWS = 4 }; BODY; left -= 4; }                                                \
        else if (left >= 2) { enum { ROWS = 2 }; BODY; left -= 2; }                                                \
        else { enum { ROWS = 1 }; BODY; left -= 1; }

enum { FLOAT32, BFLOAT16, FLOAT16, NESTED }; // what a scale is

typedef struct {
    const uint8_t *stream;                  // tiles of 16 outputs: scales, zeros, codes
    const float *table;                     // 16 values
    const float *nested_map, *nested_absmax; // a nested scale: nested_map[byte] · nested_absmax, one for 256, + offset
    float offset;
    int64_t tiles, columns, group, kind, zeros, last_nested, high_first, threads; // `zeros`, `high_first`: 0 or 1
} Weight;

typedef struct {
    const uint8_t *scales, *zeros, *codes;
    int64_t number, first; // its first scale's number in the order of the format
} Tile;

static inline Tile tile_at(const Weight *w, int64_t number) {
    const int64_t count = 16 * w->columns / w->group, each = w->kind == FLOAT32 ? 4 : w->kind == NESTED ? 1 : 2;
    const uint8_t *scales = w->stream + number * (count * (each + w->zeros) + 8 * w->columns);
    return (Tile){scales, scales + count * each, scales + count * (each + w->zeros), number, number * count};
}

// The two factors of a group's nested scales, from lane `at` on. One by one: a gather is slower on many processors.
INLINE void read_nested(const Weight *w, const Tile *tile, int64_t group, int at, float *values, float *absmax) {
    const int64_t groups = w->columns / w->group;
    const uint8_t *held = tile->scales + 16 * group + at;
    for (int i = 0; i < LANES; i++) {
        values[i] = w->nested_map[held[i]];
        __asm__(""); // keeps the loop as it is
    }
    if (group % (groups & -groups)) return; // where no multiple of 256 can be, for outputs are `groups` scales apart
    for (int i = 0; i < LANES; i++) {
        const int64_t block = (tile->first + (at + i) * groups + group) / 256;
        absmax[i] = w->nested_absmax[block < w->last_nested ? block : w->last_nested];
    }
}

// Scales of one group, from lane `at` on. absmax: room that is kept from group to group.
INLINE floats scales_of(const Weight *w, const Tile *tile, int64_t group, int at, float *absmax) {
    const int64_t place = 16 * group + at;
    if (w->kind == FLOAT32) return *(const floats *)(tile->scales + 4 * place);
    if (w->kind == NESTED) {
        float values[LANES];
        read_nested(w, tile, group, at, values, absmax);
        floats products = *(const floats *)values * *(const floats *)absmax;
        __asm__("" : "+x"(products)); // rounded before the sum, as elsewhere: not to become one operation
        return products + w->offset;
    }
    const words half = __builtin_convertvector(*(const halves *)(tile->scales + 2 * place), words);
    if (w->kind == BFLOAT16) return (floats)(half << 16);
    return (floats)((half & 0x8000) << 16 | (half & 0x7fff) << 13) * 0x1p112f; // exponents count from -15 and -127
}

// 8 - zero: values are (table[code] + 8 - zero) * scale, table[code] being code - 8 where there are zeros.
INLINE floats shifts_of(const Weight *w, const Tile *tile, int64_t group, int at) {
    if (!w->zeros) return (floats){0};
    return 8 - __builtin_convertvector(*(const bytes *)(tile->zeros + 16 * group + at), floats);
}

// The lowest 4 bits of each word say which of 16 values it becomes.
INLINE floats look_up(const floats *table, words codes) {
#ifdef __AVX512F__
    return __builtin_shuffle(table[0], codes);
#else
    return __builtin_shuffle(table[0], table[1], codes);
#endif
}

// Tiles at once: two keep more reads under way, and share what is read of x; AVX2 has no registers for their sums.
enum { TILES = LANES / 8 };

// Outputs from lane `at` on. One lane is one output: no sum over lanes is needed, and x is the same for all of them.
INLINE void tile_product(const Weight *w, const Tile *tiles, int at, const float *x, const float *sums, float *y,
                         const int rows) {
    const int count = TILES * rows, ways = count < 4 ? 4 / count : 1; // sums that do not wait for each other
    const int64_t groups = w->columns / w->group;
    floats table[PARTS], total[count], part[count * ways];
    float absmax[TILES][LANES];
    for (int p = 0; p < PARTS; p++) table[p] = ((const floats *)w->table)[p];
    for (int i = 0; i < count; i++) total[i] = (floats){0};
    for (int64_t g = 0; g < groups; g++) {
        for (int i = 0; i < count * ways; i++) part[i] = (floats){0};
        for (int64_t k = g * w->group; k < (g + 1) * w->group; k += 8) {
            words eight[TILES]; // codes of each output
            for (int t = 0; t < TILES; t++) eight[t] = *(const words *)(tiles[t].codes + 8 * k + 4 * at);
#pragma GCC unroll 8
            for (int s = 0; s < 8; s++)
                for (int t = 0; t < TILES; t++) {
                    const floats values = look_up(table, eight[t] >> 4 * s);
                    for (int i = 0; i < rows; i++)
                        part[(t * rows + i) * ways + s % ways] += values * x[i * w->columns + k + s];
                }
        }
        for (int t = 0; t < TILES; t++) {
            const floats scales = scales_of(w, tiles + t, g, at, absmax[t]), shifts = shifts_of(w, tiles + t, g, at);
            for (int i = 0; i < rows; i++) {
                floats *sum = part + (t * rows + i) * ways;
                for (int j = 1; j < ways; j++) sum[0] += sum[j];
                total[t * rows + i] += (sum[0] + shifts * sums[i * groups + g]) * scales;
            }
        }
    }
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < rows; i++) *(floats *)(y + (i * w->tiles + tiles[t].number) * 16 + at) = total[t * rows + i];
}

#ifdef __AVX512BF16__
enum { AHEAD = 1024 }; // bytes: a processor's own prefetching ends with a page

// The same with x in bf16: one instruction looks up 32 codes, and one multiplies and adds them in pairs. The table is in
// bf16 too, which is exact for whole numbers; products are exact, and sums are in fp32.
// A word of 16 bits holds four codes. Shifted to its end, bit 4 belongs to the next code: the table is there twice.
// x: four pairs for every eight inputs, the codes' order in the lower and the upper half of a word of 32 bits.
INLINE void tile_product_bf16(const Weight *w, const Tile *tiles, const uint32_t *x, const float *sums, float *y,
                              const __m512i table, const int many, const int rows) {
    const int count = many * rows, ways = count < 8 ? 8 / count : 1; // sums that do not wait for each other
    const int64_t groups = w->columns / w->group;
    floats total[16]; // of a constant size, so that they become registers
    __m512 part[16];
    float absmax[4][LANES];
    for (int i = 0; i < count; i++) total[i] = (floats){0};
    for (int64_t g = 0; g < groups; g++) {
        for (int i = 0; i < count * ways; i++) part[i] = _mm512_setzero_ps();
        for (int64_t k = g * w->group; k < (g + 1) * w->group; k += 8) {
            __m512i eight[4];
            for (int t = 0; t < many; t++) {
                eight[t] = _mm512_loadu_si512(tiles[t].codes + 8 * k);
                _mm_prefetch(tiles[t].codes + 8 * k + AHEAD, _MM_HINT_T0);
            }
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++)
                for (int t = 0; t < many; t++) {
                    const __m512i values = _mm512_permutexvar_epi16(_mm512_srli_epi16(eight[t], 4 * s), table);
#pragma GCC unroll 8
                    for (int i = 0; i < rows; i++) {
                        __m512 *sum = part + (t * rows + i) * ways + s % ways;
                        const __m512i pair = _mm512_set1_epi32((int)x[(i * w->columns + k) / 2 + s]);
                        *sum = _mm512_dpbf16_ps(*sum, (__m512bh)values, (__m512bh)pair);
                    }
                }
        }
        for (int t = 0; t < many; t++) {
            const floats scales = scales_of(w, tiles + t, g, 0, absmax[t]), shifts = shifts_of(w, tiles + t, g, 0);
            for (int i = 0; i < rows; i++) {
                __m512 *sum = part + (t * rows + i) * ways;
                for (int j = 1; j < ways; j++) sum[0] += sum[j];
                total[t * rows + i] += ((floats)sum[0] + shifts * sums[i * groups + g]) * scales;
            }
        }
    }
    for (int t = 0; t < many; t++)
        for (int i = 0; i < rows; i++) *(floats *)(y + (i * w->tiles + tiles[t].number) * 16) = total[t * rows + i];
}
#endif

// Whether `product_bf16` can be called.
int has_bf16(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

// As `product`, with x and the table in bf16.
int product_bf16(const Weight *w, const uint16_t *x, const uint16_t *codes, float *y, int64_t rows, int64_t inputs) {
#ifdef __AVX512BF16__
    const int64_t columns = w->columns, groups = columns / w->group;
    uint32_t *pairs = malloc(rows * (columns / 2 * sizeof *pairs + groups * sizeof(float)));
    float *sums = (float *)(pairs + rows * columns / 2);
    if (!pairs) return 1;
    memset(sums, 0, rows * groups * sizeof *sums);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < columns; k += 8)
            for (int64_t s = 0; s < 4; s++) {
                const int64_t low = (k + s) ^ w->high_first, high = (k + 4 + s) ^ w->high_first;
                const uint32_t first = low < inputs ? x[i * inputs + low] : 0, last = high < inputs ? x[i * inputs + high] : 0;
                pairs[(i * columns + k) / 2 + s] = first | last << 16;
                if (w->zeros) {
                    const union { uint32_t bits; float value; } a = {first << 16}, b = {last << 16};
                    sums[i * groups + k / w->group] += a.value + b.value;
                }
            }
    const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const void *)codes));
#pragma omp parallel for schedule(static) num_threads(w->threads)
    for (int64_t number = 0; number < w->tiles; number += 4) { // four streams are read faster than one
        Tile tiles[4];
        for (int t = 0; t < 4; t++) tiles[t] = tile_at(w, number + t < w->tiles ? number + t : w->tiles - 1);
        FOR_ROWS(rows, {
            const uint32_t *some = pairs + FROM * columns / 2;
            float *out = y + FROM * 16 * w->tiles;
            if (ROWS < 4) tile_product_bf16(w, tiles, some, sums + FROM * groups, out, table, 4, ROWS);
            else // so many sums as there are registers
                for (int t = 0; t < 4; t += 2)
                    tile_product_bf16(w, tiles + t, some, sums + FROM * groups, out, table, 2, ROWS);
        })
    }
    free(pairs);
    return 0;
#else
    return 2;
#endif
}

// x: (rows, inputs).  y: (rows, 16 * tiles).  Returns 1 where there is no memory, else 0.
int product(const Weight *w, const float *x, float *y, int64_t rows, int64_t inputs) {
    const int64_t columns = w->columns, groups = columns / w->group;
    float *ordered = malloc(rows * (columns + groups) * sizeof(float)), *sums = ordered + rows * columns;
    if (!ordered) return 1;
    for (int64_t i = 0; i < rows; i++) // filled up to whole groups, in the order in which codes come out of a word
        for (int64_t k = 0; k < columns; k++) ordered[i * columns + (k ^ w->high_first)] = k < inputs ? x[i * inputs + k] : 0;
    for (int64_t i = 0; i < rows * groups; i++) {
        sums[i] = 0;
        for (int64_t k = 0; w->zeros && k < w->group; k++) sums[i] += ordered[i * w->group + k];
    }
#pragma omp parallel for schedule(static) num_threads(w->threads)
    for (int64_t number = 0; number < w->tiles; number += TILES) {
        const Tile tiles[2] = {tile_at(w, number), tile_at(w, number + 1 < w->tiles ? number + 1 : number)};
        for (int at = 0; at < 16; at += LANES)
            FOR_ROWS(rows, tile_product(w, tiles, at, ordered + FROM * columns, sums + FROM * groups,
                                        y + FROM * 16 * w->tiles, ROWS))
    }
    free(ordered);
    return 0;
}

// bf16 is rounded to nearest, ties to even; all numbers are finite.
INLINE void store(floats values, void *out, int64_t at, int bf16) {
    const words bits = (words)values, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    if (bf16) *(halves *)((uint16_t *)out + at) = __builtin_convertvector(rounded, halves);
    else *(floats *)((float *)out + at) = values;
}

// Tiles first to last - 1, transposed: out is (columns, 16 * (last - first)), as a tile holds them.
void dequantize(const Weight *w, int64_t first, int64_t last, void *out, int64_t bf16) {
#pragma omp parallel for schedule(static) num_threads(w->threads)
    for (int64_t number = first; number < last; number++) {
        const Tile tile = tile_at(w, number);
        floats table[PARTS];
        for (int p = 0; p < PARTS; p++) table[p] = ((const floats *)w->table)[p];
        for (int at = 0; at < 16; at += LANES) {
            float absmax[LANES];
            for (int64_t g = 0; g < w->columns / w->group; g++) {
                const floats scales = scales_of(w, &tile, g, at, absmax), shifts = shifts_of(w, &tile, g, at);
                for (int64_t k = g * w->group; k < (g + 1) * w->group; k++) {
                    const words eight = *(const words *)(tile.codes + 64 * (k / 8) + 4 * at);
                    const floats values = look_up(table, eight >> 4 * ((k ^ w->high_first) % 8));
                    store((values + shifts) * scales, out, (k * (last - first) + number - first) * 16 + at, bf16);
                }
            }
        }
    }
}

// Blocks of 64 numbers: absmax and, for each number, how many of 15 middles lie below number / absmax; `order` says which
// code that is. Two codes are a byte, the first in its upper half. As integers, the bits of absolute values are in order,
// infinity and NaN on top, so that absmax tells of those.
void quantize(const float *numbers, const float *middles, const uint8_t *order, uint8_t *out, float *absmax, int64_t blocks,
              int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < blocks; b++) {
        const float *block = numbers + 64 * b;
        words largest = {0};
        for (int k = 0; k < 64; k += LANES) {
            const words size = *(const words *)(block + k) & 0x7fffffff, above = (words)(size > largest);
            largest = (size & above) | (largest & ~above);
        }
        uint32_t most = 0;
        for (int i = 0; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
        memcpy(absmax + b, &most, sizeof most);
        const float inverse = 1 / (absmax[b] > 1e-38f ? absmax[b] : 1e-38f);
        uint8_t codes[64];
        for (int k = 0; k < 64; k += LANES) {
            const floats normed = *(const floats *)(block + k) * inverse;
            words below = {0};
            for (int i = 0; i < 15; i++) below -= (words)(normed > middles[i]);
            *(bytes *)(codes + k) = __builtin_convertvector(below, bytes);
        }
        for (int i = 0; i < 32; i++) out[32 * b + i] = (uint8_t)(order[codes[2 * i]] << 4 | order[codes[2 * i + 1]]);
    }
}
