// Few rows of x times a weight of four bits, on a CPU; cpu_int4.py says what the arguments are and how a weight lies in memory.
// GCC's vectors of one register: 16 floats with AVX-512, 8 with AVX2, which takes 16 lanes in two parts.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
enum { PARTS = 16 / LANES };
enum { AHEAD = 1024 }; // prefetch distance in bytes: hardware prefetching stops at the end of a page
enum { LIMBS = 3 };    // pieces of seven bits into which `cut` splits a number of x

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(1)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1)));

#define INLINE static inline __attribute__((always_inline))

// GCC's own conversions between lanes of different sizes go one by one.
#ifdef __AVX512F__
INLINE floats of_bytes(const void *at) { return (floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(at))); }
INLINE words of_halves(const void *at) { return (words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(at)); }
INLINE floats of_fp16(const void *at) { return (floats)_mm512_cvtph_ps(_mm256_loadu_si256(at)); }
#else
INLINE floats of_bytes(const void *at) { return (floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(at))); }
INLINE words of_halves(const void *at) { return (words)_mm256_cvtepu16_epi32(_mm_loadu_si128(at)); }
INLINE floats of_fp16(const void *at) { return (floats)_mm256_cvtph_ps(_mm_loadu_si128(at)); }
#endif

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
    const uint8_t *nested_bytes;            // the map as four tables: all first bytes, all second ones, …
    float offset;
    int64_t tiles, columns, group, kind, zeros, last_nested, high_first, threads; // `zeros`, `high_first`: 0 or 1
} Weight;

typedef struct {
    const uint8_t *scales, *zeros, *codes;
    int64_t number, first; // its first scale's number in the order of the format
} Tile;

// The map as four tables, at `bytes`.
static void split_map(Weight *w, uint8_t *bytes) {
    for (int i = 0; w->kind == NESTED && i < 1024; i++) bytes[i % 4 * 256 + i / 4] = ((const uint8_t *)w->nested_map)[i];
    w->nested_bytes = bytes;
}

static inline Tile tile_at(const Weight *w, int64_t number) {
    const int64_t count = 16 * w->columns / w->group, each = w->kind == FLOAT32 ? 4 : w->kind == NESTED ? 1 : 2;
    const uint8_t *scales = w->stream + number * (count * (each + w->zeros) + 8 * w->columns);
    return (Tile){scales, scales + count * each, scales + count * (each + w->zeros), number, number * count};
}

enum { GROUPS = 4 }; // of nested scales looked up at once

typedef struct {
    float values[16 * GROUPS], absmax[16]; // nested: the two factors, kept from group to group
} Nested;

// The second factor of a group. It changes at multiples of 256, which can only be multiples of the largest power of two that
// divides 256 and the number of groups, for that is how far outputs are apart.
static __attribute__((noinline)) void read_absmax(const Weight *w, const Tile *tile, int64_t group, Nested *nested) {
    for (int i = 0; i < 16; i++) {
        const int64_t block = (tile->first + i * (w->columns / w->group) + group) / 256;
        nested->absmax[i] = w->nested_absmax[block < w->last_nested ? block : w->last_nested];
    }
}

#ifdef __AVX512F__
// The first factor of GROUPS groups. Bytes after the last scale are codes.
static __attribute__((noinline)) void read_nested(const Weight *w, const Tile *tile, int64_t group, Nested *nested) {
    const uint8_t *held = tile->scales + 16 * group;
#ifdef __AVX512VBMI__ // an instruction looks up 64 bytes in 128: a table for each byte of the numbers, in two halves
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); // undone by unpacking
    const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(held));
    const __mmask64 upper = _mm512_movepi8_mask(bytes);
    __m512i found[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i *table = (const __m512i *)(w->nested_bytes + 256 * i);
        found[i] = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), bytes, _mm512_loadu_si512(table + 1));
        found[i] = _mm512_mask_blend_epi8(
            upper, found[i], _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 2), bytes, _mm512_loadu_si512(table + 3)));
    }
    const __m512i low = _mm512_unpacklo_epi8(found[0], found[1]), low_next = _mm512_unpackhi_epi8(found[0], found[1]);
    const __m512i high = _mm512_unpacklo_epi8(found[2], found[3]), high_next = _mm512_unpackhi_epi8(found[2], found[3]);
    _mm512_storeu_si512(nested->values, _mm512_unpacklo_epi16(low, high));
    _mm512_storeu_si512(nested->values + 16, _mm512_unpackhi_epi16(low, high));
    _mm512_storeu_si512(nested->values + 32, _mm512_unpacklo_epi16(low_next, high_next));
    _mm512_storeu_si512(nested->values + 48, _mm512_unpackhi_epi16(low_next, high_next));
#else
    for (int i = 0; i < 16 * GROUPS; i++) {
        nested->values[i] = w->nested_map[held[i]];
        __asm__(""); // keeps the loop as it is: a gather is slower on many processors
    }
#endif
}
#endif

// Scales of one group, from lane `at` on, groups asked for in order.
INLINE floats scales_of(const Weight *w, const Tile *tile, int64_t group, int at, Nested *nested) {
    const int64_t place = 16 * group + at, both = w->columns / w->group | 256;
    if (w->kind == FLOAT32) return *(const floats *)(tile->scales + 4 * place);
    if (w->kind == BFLOAT16) return (floats)(of_halves(tile->scales + 2 * place) << 16);
    if (w->kind == FLOAT16) return of_fp16(tile->scales + 2 * place);
#ifdef __AVX512F__
    if (group % GROUPS == 0) read_nested(w, tile, group, nested);
#endif
    if (group % (both & -both) == 0) read_absmax(w, tile, group, nested);
#ifdef __AVX512F__
    floats products = *(const floats *)(nested->values + 16 * (group % GROUPS) + at);
#else
    floats products;
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i++) products[i] = w->nested_map[tile->scales[place + i]];
#endif
    products *= *(const floats *)(nested->absmax + at);
    __asm__("" : "+x"(products)); // rounded before the sum, as elsewhere: not to become one operation
    return products + w->offset;
}

// 8 - zero: values are (table[code] + 8 - zero) * scale, table[code] being code - 8 where there are zeros.
INLINE floats shifts_of(const Tile *tile, int64_t group, int at) {
    return 8 - of_bytes(tile->zeros + 16 * group + at);
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
    Nested nested[TILES];
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
#pragma GCC unroll 2
        for (int t = 0; t < TILES; t++) {
            const floats scales = scales_of(w, tiles + t, g, at, nested + t);
            const floats shifts = w->zeros ? shifts_of(tiles + t, g, at) : (floats){0};
#pragma GCC unroll 8
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

#ifndef __AVX512F__
// The same for tables of bf16 numbers: a shuffle looks up 32 bytes, so that two give 32 values, which become the upper
// halves of floats in pairs. A lane is then half of one output, and two neighbours are added at a group's end.
// x: the eight inputs of a word as pairs of lanes meet them, (0, 4), (2, 6), (1, 5), (3, 7).
INLINE void tile_product_bytes(const Weight *w, const Tile *tile, const float *x, const float *sums, float *y,
                               const int rows) {
    const int64_t groups = w->columns / w->group;
    const __m256i four = _mm256_set1_epi8(15), high = _mm256_set1_epi32(0xffff0000);
    __m128i first = _mm_setzero_si128(), second = first; // the bytes of the table's numbers
    for (int i = 0; i < 16; i++) {
        ((uint8_t *)&first)[i] = ((const uint8_t *)(w->table + i))[2];
        ((uint8_t *)&second)[i] = ((const uint8_t *)(w->table + i))[3];
    }
    const __m256i lower = _mm256_broadcastsi128_si256(first), upper = _mm256_broadcastsi128_si256(second);
    floats total[4];
    __m256 part[8];
    Nested nested;
    for (int i = 0; i < 2 * rows; i++) total[i] = (floats){0};
    for (int64_t g = 0; g < groups; g++) {
#pragma GCC unroll 8
        for (int i = 0; i < 4 * rows; i++) part[i] = _mm256_setzero_ps();
        for (int64_t k = g * w->group; k < (g + 1) * w->group; k += 8)
#pragma GCC unroll 4
            for (int part_of = 0; part_of < 4; part_of++) { // the lower and the upper codes of 8 outputs, and of 8 others
                const int half = part_of / 2, odd = part_of % 2;
                const __m256i eight = _mm256_loadu_si256((const void *)(tile->codes + 8 * k + 32 * half));
                const __m256i codes = _mm256_and_si256(odd ? _mm256_srli_epi16(eight, 4) : eight, four);
                const __m256i one = _mm256_shuffle_epi8(lower, codes), two = _mm256_shuffle_epi8(upper, codes);
                const __m256i pairs[2] = {_mm256_unpacklo_epi8(one, two), _mm256_unpackhi_epi8(one, two)};
#pragma GCC unroll 2
                for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
                    for (int p = 0; p < 2; p++) {
                        const double *given = (const double *)(x + i * w->columns + k + 4 * odd);
                        __m256 *sum = part + 4 * i + 2 * half + p;
                        *sum = _mm256_fmadd_ps((__m256)_mm256_slli_epi32(pairs[p], 16), (__m256)_mm256_broadcast_sd(given), *sum);
                        *sum = _mm256_fmadd_ps((__m256)_mm256_and_si256(pairs[p], high), (__m256)_mm256_broadcast_sd(given + 1), *sum);
                    }
            }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const floats scales = scales_of(w, tile, g, 8 * half, &nested);
            const floats shifts = w->zeros ? shifts_of(tile, g, 8 * half) : (floats){0};
#pragma GCC unroll 2
            for (int i = 0; i < rows; i++) {
                const floats sum = (floats)_mm256_hadd_ps(part[4 * i + 2 * half], part[4 * i + 2 * half + 1]);
                total[2 * i + half] += (sum + shifts * sums[i * groups + g]) * scales;
            }
        }
    }
    for (int i = 0; i < 2 * rows; i++)
        *(floats *)(y + (i / 2 * w->tiles + tile->number) * 16 + 8 * (i % 2)) = total[i];
}
#endif

// Whether all are finite and bf16 numbers.
static int in_bf16(const float *numbers, int64_t count) {
    uint32_t others = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = ((const uint32_t *)numbers)[i];
        others |= (bits & 0xffff) | ((bits & 0x7f800000) == 0x7f800000);
    }
    return !others;
}

// The same in integers, for codes that are whole numbers and x in bf16, split into LIMBS of seven bits: an instruction
// multiplies codes of four or two inputs with limbs and adds the products. A lane is one output; its sums hold the two lower
// limbs together of up to LONGEST inputs: 15 · 64 · (128 + 1) each.
// limbs: for every eight inputs, four of even and four of odd numbers, the highest limbs first.
// steps (groups): the value of the lowest bit.  sums (groups): of x.
enum { LONGEST = 16384 };

#if defined(__AVX512VNNI__)
#define WHOLE 1
INLINE void tile_product_whole(const Weight *w, const Tile *tiles, const int32_t *limbs, const float *steps,
                               const float *sums, float *y) {
    const int64_t groups = w->columns / w->group;
    const __m512i four = _mm512_set1_epi8(15);
    floats total[TILES] = {{0}};
    Nested nested[TILES];
    for (int64_t g = 0; g < groups; g++) {
        __m512i sum[TILES][2][LIMBS]; // of even and of odd numbers, which do not wait for each other
        for (int i = 0; i < 2 * LIMBS * TILES; i++) sum[i / (2 * LIMBS)][i / LIMBS % 2][i % LIMBS] = _mm512_setzero_si512();
        for (int64_t eights = g * w->group / 8; eights < (g + 1) * w->group / 8; eights++)
#pragma GCC unroll 2
            for (int t = 0; t < TILES; t++) {
                const char *codes = (const char *)tiles[t].codes + 64 * eights;
                const __m512i eight = _mm512_loadu_si512(codes), even = _mm512_and_si512(eight, four);
                const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(eight, 4), four);
                _mm_prefetch(codes + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 3
                for (int i = 0; i < LIMBS; i++) {
                    const int32_t *given = limbs + 2 * (LIMBS * eights + i);
                    sum[t][0][i] = _mm512_dpbusd_epi32(sum[t][0][i], even, _mm512_set1_epi32(given[0]));
                    sum[t][1][i] = _mm512_dpbusd_epi32(sum[t][1][i], odd, _mm512_set1_epi32(given[1]));
                }
            }
#pragma GCC unroll 2
        for (int t = 0; t < TILES; t++) {
            const floats scales = scales_of(w, tiles + t, g, 0, nested + t), shifts = shifts_of(tiles + t, g, 0) - 8;
            __m512i whole[LIMBS];
            for (int i = 0; i < LIMBS; i++) whole[i] = _mm512_add_epi32(sum[t][0][i], sum[t][1][i]);
            const __m512i low = _mm512_add_epi32(_mm512_slli_epi32(whole[1], 7), whole[2]);
            const floats products = (floats)_mm512_cvtepi32_ps(whole[0]) * 16384 + (floats)_mm512_cvtepi32_ps(low);
            total[t] += (products * steps[g] + shifts * sums[g]) * scales;
        }
    }
    for (int t = 0; t < TILES; t++) *(floats *)(y + tiles[t].number * 16) = total[t];
}
#elif !defined(__AVX512F__)
#define WHOLE 1
// Sums of 16 bits for up to SHORT inputs, of which eight add 2 · 2 · 15 · 64 = 3,840 at most, then of 32.
enum { SHORT = 64 };

INLINE void tile_product_whole(const Weight *w, const Tile *tile, const int32_t *limbs, const float *steps,
                               const float *sums, float *y) {
    const int64_t groups = w->columns / w->group, some = w->group % SHORT ? 32 : SHORT;
    const __m256i four = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    floats total[2] = {{0}};
    Nested nested;
    for (int64_t g = 0; g < groups; g++) {
        __m256i sum[2][LIMBS];
        for (int i = 0; i < 2 * LIMBS; i++) sum[i / LIMBS][i % LIMBS] = _mm256_setzero_si256();
        for (int64_t start = g * w->group; start < (g + 1) * w->group; start += some) {
            __m256i part[2][LIMBS];
            for (int i = 0; i < 2 * LIMBS; i++) part[i / LIMBS][i % LIMBS] = _mm256_setzero_si256();
            for (int64_t eights = start / 8; eights < (start + some) / 8; eights++) {
                const __m256i *codes = (const __m256i *)tile->codes + 2 * eights;
                _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
                __m256i even[2], odd[2];
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    const __m256i eight = _mm256_loadu_si256(codes + half);
                    even[half] = _mm256_and_si256(eight, four);
                    odd[half] = _mm256_and_si256(_mm256_srli_epi16(eight, 4), four);
                }
#pragma GCC unroll 3
                for (int i = 0; i < LIMBS; i++) {
                    const int32_t *given = limbs + 2 * (LIMBS * eights + i);
                    const __m256i first = _mm256_set1_epi32(given[0]), second = _mm256_set1_epi32(given[1]);
#pragma GCC unroll 2
                    for (int half = 0; half < 2; half++) {
                        part[half][i] = _mm256_add_epi16(part[half][i], _mm256_maddubs_epi16(even[half], first));
                        part[half][i] = _mm256_add_epi16(part[half][i], _mm256_maddubs_epi16(odd[half], second));
                    }
                }
            }
            for (int i = 0; i < 2 * LIMBS; i++)
                sum[i / LIMBS][i % LIMBS] =
                    _mm256_add_epi32(sum[i / LIMBS][i % LIMBS], _mm256_madd_epi16(part[i / LIMBS][i % LIMBS], ones));
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const floats scales = scales_of(w, tile, g, 8 * half, &nested);
            const floats shifts = shifts_of(tile, g, 8 * half) - 8;
            const __m256i low = _mm256_add_epi32(_mm256_slli_epi32(sum[half][1], 7), sum[half][2]);
            const floats products = (floats)_mm256_cvtepi32_ps(sum[half][0]) * 16384 + (floats)_mm256_cvtepi32_ps(low);
            total[half] += (products * steps[g] + shifts * sums[g]) * scales;
        }
    }
    for (int half = 0; half < 2; half++) *(floats *)(y + tile->number * 16 + 8 * half) = total[half];
}
#else // not written for AVX-512 without VNNI, and never called there
#define WHOLE 0
INLINE void tile_product_whole(const Weight *w, const Tile *tiles, const int32_t *limbs, const float *steps,
                               const float *sums, float *y) {}
#endif

// The lowest bytes of eight numbers, those of even ones first.
INLINE void store_bytes(__m256i numbers, int8_t *out) {
    const __m256i order = _mm256_setr_epi8(0, 8, -1, -1, 4, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                           -1, -1, 0, 8, -1, -1, 4, 12, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i apart = _mm256_shuffle_epi8(numbers, order);
    _mm_storel_epi64((void *)out, _mm_or_si128(_mm256_castsi256_si128(apart), _mm256_extracti128_si256(apart, 1)));
}

INLINE float total_of(__m256 v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

// A row as whole multiples of a power of two, one power for each group, so that the group's largest number has
// 7 · LIMBS - 1 bits; bf16 numbers down to 2^-12 of it are exact. Returns whether the rest of the row loses less than
// fp32's rounding of the row (2^-24 of its norm).
static int cut(const Weight *w, const float *x, int8_t *limbs, float *steps, float *sums) {
    double lost = 0, whole = 0; // sums of squares
    for (int64_t g = 0; g < w->columns / w->group; g++) {
        uint32_t most = 0; // the bits of absolute values are in order
        for (int64_t k = g * w->group; k < (g + 1) * w->group; k++) {
            const uint32_t size = ((const uint32_t *)x)[k] & 0x7fffffff;
            most = size > most ? size : most;
        }
        const int exponent = (int)(most >> 23) - 127 - (7 * LIMBS - 2), power = exponent < -126 ? -126 : exponent;
        const float inverse = ldexpf(1, -power);
        __m256 squares = {0}, errors = {0}, sum = {0};
        steps[g] = ldexpf(1, power);
        for (int64_t k = g * w->group; k < (g + 1) * w->group; k += 8) {
            const __m256 eight = _mm256_loadu_ps(x + k), scaled = eight * inverse;
            __m256i number = _mm256_cvtps_epi32(scaled);
            const __m256 error = scaled - _mm256_cvtepi32_ps(number);
            sum += eight;
            squares += scaled * scaled;
            errors += error * error;
            for (int i = LIMBS - 1; i > 0; i--) {
                const __m256i above = _mm256_srai_epi32(_mm256_add_epi32(number, _mm256_set1_epi32(64)), 7);
                store_bytes(_mm256_sub_epi32(number, _mm256_slli_epi32(above, 7)), limbs + LIMBS * k + 8 * i);
                number = above;
            }
            store_bytes(number, limbs + LIMBS * k);
        }
        sums[g] = total_of(sum);
        whole += ldexp(total_of(squares), 2 * power);
        lost += ldexp(total_of(errors), 2 * power);
    }
    return lost <= whole * 0x1p-48;
}

#ifdef __AVX512BF16__
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
    Nested nested[4];
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
#pragma GCC unroll 4
        for (int t = 0; t < many; t++) {
            const floats scales = scales_of(w, tiles + t, g, 0, nested + t);
            const floats shifts = w->zeros ? shifts_of(tiles + t, g, 0) : (floats){0};
#pragma GCC unroll 8
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

// 2: `product_bf16` can be called; 1: `product` is faster for a table of bf16 numbers; 0: neither.
int bf16_tables(void) {
#if defined(__AVX512BF16__)
    return 2;
#elif !defined(__AVX512F__)
    return 1;
#else
    return 0;
#endif
}

// As `product`, with x and the table in bf16.
int product_bf16(Weight *w, const uint16_t *x, const uint16_t *codes, float *y, int64_t rows, int64_t inputs) {
#ifdef __AVX512BF16__
    const int64_t columns = w->columns, groups = columns / w->group;
    uint32_t *pairs = malloc(rows * (columns / 2 * sizeof *pairs + groups * sizeof(float)));
    float *sums = (float *)(pairs + rows * columns / 2);
    if (!pairs) return 1;
    memset(sums, 0, rows * groups * sizeof *sums);
    uint8_t bytes[1024];
    split_map(w, bytes);
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

// Rows of x that are not cut. pairs: x is in the order that `tile_product_bytes` wants.
INLINE void tiles_product(const Weight *w, const Tile *tiles, const float *x, const float *sums, float *y, int64_t rows,
                          const int pairs) {
    const int64_t columns = w->columns, groups = columns / w->group;
#ifndef __AVX512F__
    if (pairs) {
        for (int64_t i = 0; i < rows; i += 2) { // so many sums as there are registers
            float *out = y + i * 16 * w->tiles;
            if (i + 1 < rows) tile_product_bytes(w, tiles, x + i * columns, sums + i * groups, out, 2);
            else tile_product_bytes(w, tiles, x + i * columns, sums + i * groups, out, 1);
        }
        return;
    }
#endif
    for (int at = 0; at < 16; at += LANES)
        FOR_ROWS(rows, tile_product(w, tiles, at, x + FROM * columns, sums + FROM * groups, y + FROM * 16 * w->tiles, ROWS))
}

// x: (rows, inputs).  y: (rows, 16 * tiles).  Returns 1 where there is no memory, else 0.
int product(Weight *w, const float *x, float *y, int64_t rows, int64_t inputs) {
    const int64_t columns = w->columns, groups = columns / w->group;
    const int pairs = LANES == 8 && in_bf16(w->table, 16), whole_codes = WHOLE && w->zeros && w->group % 32 == 0;
    float *ordered = malloc(rows * ((columns + 2 * groups) * sizeof(float) + LIMBS * columns + 1));
    float *sums = ordered + rows * columns, *steps = sums + rows * groups;
    int8_t *limbs = (int8_t *)(steps + rows * groups), *whole = limbs + LIMBS * rows * columns; // whole[i]: is row i cut
    if (!ordered) return 1;
    uint8_t bytes[1024];
    split_map(w, bytes);
    for (int64_t i = 0; i < rows; i++) { // filled up to whole groups, in the order of the codes in a word
        float *row = ordered + i * columns, *its = sums + i * groups;
        memcpy(row, x + i * inputs, inputs * sizeof *row);
        memset(row + inputs, 0, (columns - inputs) * sizeof *row);
        for (int64_t k = 0; w->high_first && k < columns; k += 2) {
            const float first = row[k];
            row[k] = row[k + 1];
            row[k + 1] = first;
        }
        whole[i] = whole_codes && w->group <= LONGEST && in_bf16(row, columns)
                   && cut(w, row, limbs + LIMBS * i * columns, steps + i * groups, its);
        if (whole[i]) continue;
        memset(its, 0, groups * sizeof *its);
        for (int64_t k = 0; w->zeros && k < columns; k++) its[k / w->group] += row[k];
        for (float *eight = row; pairs && eight < row + columns; eight += 8) {
            const float given[8] = {eight[0], eight[4], eight[2], eight[6], eight[1], eight[5], eight[3], eight[7]};
            memcpy(eight, given, sizeof given);
        }
    }
#pragma omp parallel for schedule(static) num_threads(w->threads)
    for (int64_t number = 0; number < w->tiles; number += TILES) {
        const Tile tiles[2] = {tile_at(w, number), tile_at(w, number + 1 < w->tiles ? number + 1 : number)};
        for (int64_t i = 0, end; i < rows; i = end) {
            const float *its = sums + i * groups;
            float *out = y + i * 16 * w->tiles;
            for (end = i + 1; !whole[i] && end < rows && !whole[end];) end++;
            if (whole[i])
                tile_product_whole(w, tiles, (int32_t *)(limbs + LIMBS * i * columns), steps + i * groups, its, out);
            else
                tiles_product(w, tiles, ordered + i * columns, its, out, end - i, pairs);
        }
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
void dequantize(Weight *w, int64_t first, int64_t last, void *out, int64_t bf16) {
    uint8_t bytes[1024];
    split_map(w, bytes);
#pragma omp parallel for schedule(static) num_threads(w->threads)
    for (int64_t number = first; number < last; number++) {
        const Tile tile = tile_at(w, number);
        floats table[PARTS];
        for (int p = 0; p < PARTS; p++) table[p] = ((const floats *)w->table)[p];
        for (int at = 0; at < 16; at += LANES) {
            Nested nested;
            for (int64_t g = 0; g < w->columns / w->group; g++) {
                const floats scales = scales_of(w, &tile, g, at, &nested);
                const floats shifts = w->zeros ? shifts_of(&tile, g, at) : (floats){0};
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
