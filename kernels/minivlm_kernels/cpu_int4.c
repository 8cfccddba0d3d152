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
enum { AHEAD = 2048 }; // prefetch distance in bytes: hardware prefetching stops at the end of a page

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
    const uint8_t *stream;                  // tiles of 16 outputs, whose groups are scales, zeros, codes
    const float *table;                     // 16 values
    const float *nested_map, *nested_absmax; // a nested scale: nested_map[byte] · nested_absmax, one for 256, + offset
    const uint8_t *nested_bytes;            // the map as four tables: all first bytes, all second ones, …
    float offset;
    int64_t tiles, columns, group, kind, zeros, last_nested, high_first, threads; // `zeros`, `high_first`: 0 or 1
} Weight;

typedef struct {
    const uint8_t *groups;        // the first of them
    int64_t zeros, codes, bytes;  // of a group: where they begin, and its size
    int64_t number, first;        // its first scale's number in the order of the format
} Tile;

// The map as four tables, at `bytes`.
static void split_map(Weight *w, uint8_t *bytes) {
    for (int i = 0; w->kind == NESTED && i < 1024; i++) bytes[i % 4 * 256 + i / 4] = ((const uint8_t *)w->nested_map)[i];
    w->nested_bytes = bytes;
}

static inline Tile tile_at(const Weight *w, int64_t number) {
    const int64_t groups = w->columns / w->group, each = w->kind == FLOAT32 ? 4 : w->kind == NESTED ? 1 : 2;
    const int64_t zeros = 16 * each, codes = zeros + 16 * w->zeros, bytes = codes + 8 * w->group;
    return (Tile){w->stream + number * groups * bytes, zeros, codes, bytes, number, 16 * number * groups};
}

INLINE const uint8_t *codes_of(const Tile *tile, int64_t group) { return tile->groups + group * tile->bytes + tile->codes; }

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
// The first factor of GROUPS groups; after the last group, of that one again.
static __attribute__((noinline)) void read_nested(const Weight *w, const Tile *tile, int64_t group, Nested *nested) {
    const int64_t last = w->columns / w->group - 1;
    const uint8_t *held[GROUPS];
    for (int64_t i = 0; i < GROUPS; i++) held[i] = tile->groups + (group + i < last ? group + i : last) * tile->bytes;
#ifdef __AVX512VBMI__ // an instruction looks up 64 bytes in 128: a table for each byte of the numbers, in two halves
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); // undone by unpacking
    __m512i bytes = _mm512_castsi128_si512(_mm_loadu_si128((const void *)held[0]));
    bytes = _mm512_inserti32x4(bytes, _mm_loadu_si128((const void *)held[1]), 1);
    bytes = _mm512_inserti32x4(bytes, _mm_loadu_si128((const void *)held[2]), 2);
    bytes = _mm512_inserti32x4(bytes, _mm_loadu_si128((const void *)held[3]), 3);
    bytes = _mm512_permutexvar_epi32(order, bytes);
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
        nested->values[i] = w->nested_map[held[i / 16][i % 16]];
        __asm__(""); // keeps the loop as it is: a gather is slower on many processors
    }
#endif
}
#endif

// Scales of one group, from lane `at` on, groups asked for in order.
INLINE floats scales_of(const Weight *w, const Tile *tile, int64_t group, int at, Nested *nested) {
    const uint8_t *held = tile->groups + group * tile->bytes;
    const int64_t both = w->columns / w->group | 256;
    if (w->kind == FLOAT32) return *(const floats *)(held + 4 * at);
    if (w->kind == BFLOAT16) return (floats)(of_halves(held + 2 * at) << 16);
    if (w->kind == FLOAT16) return of_fp16(held + 2 * at);
#ifdef __AVX512F__
    if (group % GROUPS == 0) read_nested(w, tile, group, nested);
#endif
    if (group % (both & -both) == 0) read_absmax(w, tile, group, nested);
#ifdef __AVX512F__
    floats products = *(const floats *)(nested->values + 16 * (group % GROUPS) + at);
#else
    floats products;
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i++) products[i] = w->nested_map[held[at + i]];
#endif
    products *= *(const floats *)(nested->absmax + at);
    __asm__("" : "+x"(products)); // rounded before the sum, as elsewhere: not to become one operation
    return products + w->offset;
}

// 8 - zero: values are (table[code] + 8 - zero) * scale, table[code] being code - 8 where there are zeros.
INLINE floats shifts_of(const Tile *tile, int64_t group, int at) {
    return 8 - of_bytes(tile->groups + group * tile->bytes + tile->zeros + at);
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
        for (int64_t k = 0; k < w->group; k += 8) {
            words eight[TILES]; // codes of each output
            for (int t = 0; t < TILES; t++) eight[t] = *(const words *)(codes_of(tiles + t, g) + 8 * k + 4 * at);
#pragma GCC unroll 8
            for (int s = 0; s < 8; s++)
                for (int t = 0; t < TILES; t++) {
                    const floats values = look_up(table, eight[t] >> 4 * s);
                    for (int i = 0; i < rows; i++)
                        part[(t * rows + i) * ways + s % ways] += values * x[i * w->columns + g * w->group + k + s];
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

// The same in whole numbers, for tables whose values are multiples of a unit: int4's of 1, FP4's of 1 / 192, NF4's in bf16 of
// 2^-11. A number of x becomes a whole number of 16 bits, a limb; one instruction multiplies 16 or 32 of them and adds the
// products in pairs. If that leaves something of more than a few numbers of a group, they get a second limb. What is left
// then is multiplied in fp32, so that nothing of x is lost.
enum { FEW = 8 };                      // one number in so many
enum { SHORTEST = 14, LONGEST = 15 };  // bits of a limb: fewer would leave too much for fp32
enum { MOST = 512 };                   // inputs of a group: sums of masked codes stay below 2^31
enum { SHARED = LANES == 16 ? 4 : 2 }; // limbs for which a code is decoded once: their sums are registers

typedef struct {
    float values[16], unit;
    int16_t whole[16]; // values / unit
    int bits;          // of a limb, so that sums over a group stay below 2^31; 0: there is no unit
    int masked;        // the whole numbers are the codes, and values are 8 less
} Table;

typedef struct {
    float step; // the value of the lowest bit of a first limb times the table's unit
    int32_t limbs, end; // how many; where the group's part of `rest` ends
    int32_t sums[2]; // of each limb
} Group;

typedef struct {
    float value;
    int32_t place; // in its group
} Rest;

typedef struct {
    float *x, *sums;   // (columns,), in the order of the codes in a word; (groups,): sums of x
    int16_t *limbs[2]; // (columns,), in the order in which `decode` gives the codes
    Group *groups;
    Rest *rest; // what limbs leave
    int whole;  // else there are only x and sums
} Row;

#ifdef __AVX512F__
enum { MASKED = 0 }; // whether a mask gives the numbers 0 to 15, and not the table
typedef __m512i wholes;

INLINE wholes read_wholes(const void *at) { return _mm512_loadu_si512(at); }
INLINE wholes all_of(int32_t number) { return _mm512_set1_epi32(number); }

INLINE wholes dot(wholes sum, wholes a, wholes b) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

INLINE void read_table(const Table *table, wholes *held) {
    held[0] = _mm512_broadcast_i64x4(_mm256_loadu_si256((const void *)table->whole));
}

// Codes s and s + 4 of each output. Shifted to the end of 16 bits, bit 4 belongs to the next code: the table is there twice.
INLINE void decode(wholes eight, const wholes *table, wholes *values, const int masked) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++) values[s] = _mm512_permutexvar_epi16(_mm512_srli_epi16(eight, 4 * s), table[0]);
}

INLINE wholes given(const int16_t *x, int s, const int masked) { return _mm512_set1_epi32(((const int32_t *)x)[s]); }

INLINE floats joined(const wholes *sums, const int masked) {
    return (floats)_mm512_cvtepi32_ps(_mm512_add_epi32(sums[0], sums[1]));
}
#else
enum { MASKED = 1 };
typedef __m256i wholes;

INLINE wholes read_wholes(const void *at) { return _mm256_loadu_si256(at); }
INLINE wholes all_of(int32_t number) { return _mm256_set1_epi32(number); }

INLINE wholes dot(wholes sum, wholes a, wholes b) {
#ifdef __AVXVNNI__
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

// The lower bytes, and the upper ones.
INLINE void read_table(const Table *table, wholes *held) {
    const __m256i whole = _mm256_loadu_si256((const void *)table->whole), lower = _mm256_set1_epi16(255);
    const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(whole, lower), _mm256_srli_epi16(whole, 8));
    held[0] = _mm256_permute4x64_epi64(bytes, 0x88);
    held[1] = _mm256_permute4x64_epi64(bytes, 0xdd);
}

// Of each 16 bytes of codes, which are four outputs. A lane is two numbers, of the codes (input of output):
//     masked        0 and 4 of all outputs; 1 and 5, times 16; 2 and 6; 3 and 7, times 16
//     by the table  0, 2 of the first | 4, 6 of the first | 0, 2 of the second | 4, 6 of the second; the same of the third and
//                   the fourth; then 1, 3 and 5, 7 of all these
INLINE void decode(wholes eight, const wholes *table, wholes *values, const int masked) {
    if (masked) {
        const wholes low = _mm256_set1_epi16(15), high = _mm256_set1_epi16(240), upper = _mm256_srli_epi16(eight, 8);
        values[0] = _mm256_and_si256(eight, low);
        values[1] = _mm256_and_si256(eight, high);
        values[2] = _mm256_and_si256(upper, low);
        values[3] = _mm256_and_si256(upper, high);
        return;
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
        const wholes codes = _mm256_and_si256(odd ? _mm256_srli_epi16(eight, 4) : eight, _mm256_set1_epi8(15));
        const wholes lower = _mm256_shuffle_epi8(table[0], codes), upper = _mm256_shuffle_epi8(table[1], codes);
        values[2 * odd] = _mm256_unpacklo_epi8(lower, upper);
        values[2 * odd + 1] = _mm256_unpackhi_epi8(lower, upper);
    }
}

INLINE wholes given(const int16_t *x, int s, const int masked) {
    return masked ? _mm256_set1_epi32(((const int32_t *)x)[s]) : _mm256_set1_epi64x(((const int64_t *)x)[s / 2]);
}

INLINE floats joined(const wholes *sums, const int masked) {
    const __m256i odd = masked ? _mm256_srai_epi32(sums[1], 4) : sums[1];
    return (floats)_mm256_cvtepi32_ps(masked ? _mm256_add_epi32(sums[0], odd) : _mm256_hadd_epi32(sums[0], odd));
}
#endif

// A group of two registers of outputs, whose codes are `apart` bytes apart, times `count` limbs.  products: (count, 2).
// starts: −8 times the sum of each limb, which makes masked codes the table's values.
INLINE void limbs_product(const uint8_t *codes, int64_t apart, const wholes *table, const int16_t *const *limbs, int64_t group,
                          const int32_t *starts, floats *products, const int count, const int masked) {
    wholes sums[SHARED][2][2]; // of even and odd s, which do not wait for each other
    for (int i = 0; i < count; i++)
        for (int u = 0; u < 2; u++) {
            sums[i][u][0] = masked ? all_of(starts[i]) : all_of(0);
            sums[i][u][1] = all_of(0);
        }
    for (int64_t k = 0; k < group; k += 8)
#pragma GCC unroll 2
        for (int u = 0; u < 2; u++) {
            const uint8_t *eight = codes + 8 * k + u * apart;
            wholes values[4];
            if (u < TILES) _mm_prefetch(eight + AHEAD, _MM_HINT_T0);
            decode(read_wholes(eight), table, values, masked);
#pragma GCC unroll 4
            for (int i = 0; i < count; i++)
#pragma GCC unroll 4
                for (int s = 0; s < 4; s++)
                    sums[i][u][s % 2] = dot(sums[i][u][s % 2], values[s], given(limbs[i] + k, s, masked));
        }
    for (int i = 0; i < 2 * count; i++) products[i] = joined(sums[i / 2][i % 2], masked);
}

// Group g times all limbs of `count` rows.
INLINE void group_product(const Weight *w, const uint8_t *codes, int64_t apart, const wholes *table, const Row *rows, int64_t g,
                          floats *products, const int count, const int masked) {
    const int16_t *limbs[2 * SHARED];
    int32_t starts[2 * SHARED];
    int all = 0, at = 0;
    for (int i = 0; i < count; i++)
        for (int j = 0; j < rows[i].groups[g].limbs; j++) {
            starts[all] = -8 * rows[i].groups[g].sums[j];
            limbs[all++] = rows[i].limbs[j] + g * w->group;
        }
    do { // so many as share a code, and those that remain
#define LIMBS(number) limbs_product(codes, apart, table, limbs + at, w->group, starts + at, products + 2 * at, number, masked)
        if (SHARED > 3 && all - at > 3) LIMBS(4);
        else if (SHARED > 2 && all - at > 2) LIMBS(3);
        else if (all - at > 1) LIMBS(2);
        else LIMBS(1);
#undef LIMBS
    } while ((at += SHARED) < all);
}

// Sums of two registers of outputs, and what limbs have left of a group: numbers `next` of the row's rest to the group's last.
INLINE void add_rest(const uint8_t *codes, int64_t apart, const floats *values, const Row *row, int32_t end, int32_t *next,
                     floats *sums) {
    for (; *next < end; ++*next) {
        const Rest left = row->rest[*next];
        for (int u = 0; u < 2; u++) {
            const words eight = *(const words *)(codes + u * apart + 64 * (left.place / 8));
            sums[u] += look_up(values, eight >> 4 * (left.place % 8)) * left.value;
        }
    }
}

// rows: `count` of them, SHARED at most.
INLINE void tile_product_whole(const Weight *w, const Tile *tiles, const Table *table, const Row *rows, float *y,
                               const int count, const int masked) {
    const int64_t groups = w->columns / w->group, apart = LANES == 16 ? tiles[1].groups - tiles[0].groups : 32;
    const float below = ldexpf(1, -table->bits); // a second limb's lowest bit beside the first's
    wholes held[2];
    floats values[PARTS], total[2 * SHARED] = {{0}};
    Nested nested[TILES];
    int32_t next[SHARED] = {0}; // of each row's rest
    read_table(table, held);
    for (int p = 0; p < PARTS; p++) values[p] = ((const floats *)table->values)[p];
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *codes = codes_of(tiles, g);
        floats products[4 * SHARED], *product = products, scales[2], shifts[2];
        group_product(w, codes, apart, held, rows, g, products, count, masked);
        for (int u = 0; u < 2; u++) {
            const Tile *tile = tiles + u / PARTS;
            scales[u] = scales_of(w, tile, g, u % PARTS * LANES, nested + u / PARTS);
            shifts[u] = w->zeros ? shifts_of(tile, g, u % PARTS * LANES) : (floats){0};
        }
        for (int i = 0; i < count; i++) {
            const Group group = rows[i].groups[g];
            floats sums[2] = {product[0], product[1]};
            for (int u = 0; group.limbs == 2 && u < 2; u++) sums[u] += product[2 + u] * below;
            for (int u = 0; u < 2; u++) sums[u] *= group.step;
            add_rest(codes, apart, values, rows + i, group.end, next + i, sums);
            for (int u = 0; u < 2; u++) total[2 * i + u] += (sums[u] + shifts[u] * rows[i].sums[g]) * scales[u];
            product += 2 * group.limbs;
        }
    }
    for (int i = 0; i < count; i++)
        for (int u = 0; u < 2; u++)
            *(floats *)(y + (i * w->tiles + tiles[u / PARTS].number) * 16 + u % PARTS * LANES) = total[2 * i + u];
}

// Whether the table's values are multiples of `unit`, but for three roundings to fp32: of a value, the unit and a product.
static int in_units(Table *table, float unit) {
    table->unit = unit;
    for (int i = 0; i < 16; i++) {
        const float number = rintf(table->values[i] / unit);
        if (!(fabsf(number) <= INT16_MAX)) return 0;
        if (fabsf(table->values[i] - number * unit) > fabsf(table->values[i]) * 0x1p-22f) return 0;
        table->whole[i] = (int16_t)number;
    }
    return 1;
}

static float in_bf16(float value) { // finite ones: to nearest, ties to even
    union { float value; uint32_t bits; } number = {value};
    number.bits = (number.bits + 0x7fff + (number.bits >> 16 & 1)) & 0xffff0000;
    return number.value;
}

// half: values are rounded to bf16 if they have no unit as they are.
static Table read_values(const Weight *w, int half) {
    Table table = {.masked = MASKED && w->zeros};
    float least = 1, most = 0;
    memcpy(table.values, w->table, sizeof table.values);
    for (int i = 0; i < 16; i++)
        if (table.values[i]) least = fminf(least, fabsf(table.values[i]));
    int found = in_units(&table, least);
    for (int i = 0; i < 16; i++) {
        if (half && !found) table.values[i] = in_bf16(table.values[i]);
        most = fmaxf(most, fabsf(table.values[i]));
    }
    if (least < 0x1p-40f || w->group > MOST) return table; // the step of so small a unit may be denormal
    found = found || (half && in_units(&table, ldexpf(1, ilogbf(most) - 11)));
    int bits = LONGEST;
    while (!table.masked && rintf(most / table.unit) * w->group * ldexpf(1, bits) > 0x1p31f) bits--;
    table.bits = found && bits >= SHORTEST ? bits : 0;
    return table;
}

// Eight numbers rounded to limbs, in the order in which `decode` gives the codes. Returns what is left of them.
INLINE __m256 store_limbs(__m256 x, const Table *table, int16_t *out, __m256i *sum) {
    const __m128i pairs = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m128i fours = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const int32_t most = (1 << table->bits) - 1;
    __m256i whole = _mm256_cvtps_epi32(x);
    whole = _mm256_max_epi32(_mm256_min_epi32(whole, _mm256_set1_epi32(most)), _mm256_set1_epi32(-most));
    const __m128i eight = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storeu_si128((void *)out, _mm_shuffle_epi8(eight, LANES == 16 || table->masked ? pairs : fours));
    *sum = _mm256_add_epi32(*sum, whole);
    return x - _mm256_cvtepi32_ps(whole);
}

// A group as one limb or two, whose lowest bit is `step`, and the rest.
static Group cut_group(const float *x, int64_t inputs, const Table *table, float step, int limbs, int16_t *const *out, Rest *rest,
                       int32_t count) {
    const float inverse = 1 / step, above = (float)(1 << table->bits), below = limbs == 2 ? step / above : step;
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t k = 0; k < inputs; k += 8) {
        __m256 left = store_limbs(_mm256_loadu_ps(x + k) * inverse, table, out[0] + k, sums);
        if (limbs == 2) left = store_limbs(left * above, table, out[1] + k, sums + 1);
        for (int some = _mm256_movemask_ps(left != 0); some; some &= some - 1) {
            const int i = __builtin_ctz(some);
            rest[count++] = (Rest){left[i] * below, (int32_t)k + i};
        }
    }
    Group group = {step * table->unit, limbs, count, {0, 0}};
    for (int i = 0; i < 16; i++) group.sums[i / 8] += ((__v8si)sums[i / 8])[i % 8];
    return group;
}

// A row as whole multiples of a power of two, one power for each group. Returns whether all is finite and no group so small
// that what is left of it is denormal.
static int cut(const Weight *w, const Table *table, Row *row) {
    int32_t count = 0;
    for (int64_t g = 0; g < w->columns / w->group; g++) {
        const float *x = row->x + g * w->group;
        int16_t *const limbs[2] = {row->limbs[0] + g * w->group, row->limbs[1] + g * w->group};
        uint32_t most = 0; // the bits of absolute values are in order
        for (int64_t k = 0; k < w->group; k++) {
            const uint32_t size = ((const uint32_t *)x)[k] & 0x7fffffff;
            most = size > most ? size : most;
        }
        const int exponent = most ? (int)(most >> 23) - 127 : 0;
        if (exponent < -60 || exponent > 127) return 0;
        const float step = ldexpf(1, exponent + 1 - table->bits);
        Group *group = row->groups + g;
        *group = cut_group(x, w->group, table, step, 1, limbs, row->rest, count);
        if (group->end - count > w->group / FEW) *group = cut_group(x, w->group, table, step, 2, limbs, row->rest, count);
        count = group->end;
    }
    return 1;
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
        for (int64_t k = 0; k < w->group; k += 8) {
            __m512i eight[4];
            for (int t = 0; t < many; t++) {
                eight[t] = _mm512_loadu_si512(codes_of(tiles + t, g) + 8 * k);
                _mm_prefetch(codes_of(tiles + t, g) + 8 * k + AHEAD, _MM_HINT_T0);
            }
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++)
                for (int t = 0; t < many; t++) {
                    const __m512i values = _mm512_permutexvar_epi16(_mm512_srli_epi16(eight[t], 4 * s), table);
#pragma GCC unroll 8
                    for (int i = 0; i < rows; i++) {
                        __m512 *sum = part + (t * rows + i) * ways + s % ways;
                        const __m512i pair = _mm512_set1_epi32((int)x[(i * w->columns + g * w->group + k) / 2 + s]);
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

// Whether `product_bf16` can be called.
int multiplies_bf16(void) {
#ifdef __AVX512BF16__
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

// x (inputs,), filled up to whole groups.
static void read_row(const Weight *w, const float *x, int64_t inputs, Row *row) {
    memcpy(row->x, x, inputs * sizeof *x);
    memset(row->x + inputs, 0, (w->columns - inputs) * sizeof *x);
    for (int64_t k = 0; w->high_first && k < w->columns; k += 2) {
        const float first = row->x[k];
        row->x[k] = row->x[k + 1];
        row->x[k + 1] = first;
    }
    for (int64_t g = 0; g < w->columns / w->group; g++) {
        __m256 v = {0};
        for (int64_t k = 0; w->zeros && k < w->group; k += 8) v += _mm256_loadu_ps(row->x + g * w->group + k);
        row->sums[g] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    }
}

// Rows that are alike: `count` whole ones, SHARED at most, or others.
INLINE void tiles_product(const Weight *w, const Tile *tiles, const Table *table, const Row *rows, float *y, int64_t count,
                          const int masked) {
    if (rows[0].whole && count == 1) tile_product_whole(w, tiles, table, rows, y, 1, masked); // known, so that sums are registers
    else if (rows[0].whole) tile_product_whole(w, tiles, table, rows, y, (int)count, masked);
    else
        for (int at = 0; at < 16; at += LANES)
            FOR_ROWS(count, tile_product(w, tiles, at, rows[FROM].x, rows[FROM].sums, y + FROM * 16 * w->tiles, ROWS))
}

// x: (rows, inputs).  y: (rows, 16 * tiles).  half: x is in bf16.  Returns 1 where there is no memory, else 0.
int product(Weight *w, const float *x, float *y, int64_t rows, int64_t inputs, int64_t half) {
    const int64_t columns = w->columns, groups = columns / w->group;
    const int64_t per_input = 2 * sizeof(float) + sizeof(Rest), per_group = sizeof(float) + sizeof(Group);
    const Table table = read_values(w, (int)half);
    Row *each = malloc(rows * (sizeof *each + columns * per_input + groups * per_group));
    if (!each) return 1;
    float *ordered = (float *)(each + rows), *their = ordered + rows * columns; // those of all rows one after another
    int16_t *limbs = (int16_t *)(their + rows * groups);
    Rest *rest = (Rest *)(limbs + 2 * rows * columns);
    Group *held = (Group *)(rest + rows * columns);
    uint8_t bytes[1024];
    split_map(w, bytes);
    w->table = table.values;
    for (int64_t i = 0; i < rows; i++) {
        int16_t *first = limbs + 2 * i * columns;
        each[i] = (Row){.x = ordered + i * columns, .sums = their + i * groups, .limbs = {first, first + columns},
                        .groups = held + i * groups, .rest = rest + i * columns};
        read_row(w, x + i * inputs, inputs, each + i);
        each[i].whole = table.bits && cut(w, &table, each + i);
    }
#pragma omp parallel for schedule(static) num_threads(w->threads)
    for (int64_t number = 0; number < w->tiles; number += TILES) {
        const Tile tiles[2] = {tile_at(w, number), tile_at(w, number + 1 < w->tiles ? number + 1 : number)};
        for (int64_t i = 0, end; i < rows; i = end) {
            const int64_t most = each[i].whole && i + SHARED < rows ? i + SHARED : rows;
            for (end = i + 1; end < most && each[end].whole == each[i].whole;) end++;
            float *out = y + i * 16 * w->tiles;
            if (table.masked) tiles_product(w, tiles, &table, each + i, out, end - i, MASKED);
            else tiles_product(w, tiles, &table, each + i, out, end - i, 0);
        }
    }
    free(each);
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
                for (int64_t k = 0; k < w->group; k++) {
                    const words eight = *(const words *)(codes_of(&tile, g) + 64 * (k / 8) + 4 * at);
                    const floats values = look_up(table, eight >> 4 * ((k ^ w->high_first) % 8));
                    store((values + shifts) * scales, out,
                          ((g * w->group + k) * (last - first) + number - first) * 16 + at, bf16);
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
