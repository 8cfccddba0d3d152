// Attention of many queries on a CPU with AVX-512; cpu_attention.py says what the arguments are. As in flash_attention.py,
// scores stay in the first cache: a block of keys meets ROWS queries, its weights are summed up, and on it goes.
//
// All numbers are packed as words of 32 bits. With bf16 instructions a word is two bf16 numbers, neighbours in what is
// summed over, whose products one instruction adds to an fp32 sum; else it is one fp32 number. `in_pairs` says which.

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

enum {
    LANES = 16,
    ROWS = 6, WIDE = 4, // sums in registers: so many queries times so many registers of keys, or of columns of v
    KEYS = WIDE * LANES, // in a block
    QUERIES = 48,        // that meet a block while it is in the first cache
    PACKED = 1 << 22,    // words of keys and values packed at a time, about: 16 MiB, which glibc keeps from call to call,
                         // so that the pages of it are not made anew each time
};

typedef struct {
    const void *q, *k, *v;
    const uint8_t *valid;                                 // (B, S), 0 for padding, or NULL
    void *y;                                              // (B, T, H, D)
    int64_t batch, heads, kv_heads, queries, keys, width; // q (B, H, T, D), k and v (B, K, S, D)
    int64_t q_strides[3], k_strides[3], v_strides[3];     // in numbers; the last dimension is contiguous
    int64_t causal, half, threads;                        // half: bf16, else fp32
    double scale;
} Attention;

typedef struct { // of one thread
    float *q;                // (QUERIES, words of q)
    float *sums;             // (QUERIES, columns): Σ weight · v
    float *shares;           // (QUERIES, LANES): Σ weight, in parts
    float *most;             // (QUERIES): the largest score so far
    float *scores, *weights; // (ROWS, KEYS)
    int64_t limits[QUERIES]; // how many keys each query may attend to; with a causal mask, the last one is its own
    const uint8_t *valid;    // of these keys, or NULL
    int64_t keys;
} Room;

#define INLINE static inline __attribute__((always_inline))

INLINE __m512 add_products(__m512 sum, __m512 a, __m512 b, const int in_pairs) {
#ifdef __AVX512BF16__
    if (in_pairs) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
    return _mm512_fmadd_ps(a, b, sum);
}

INLINE float number_at(const void *numbers, int64_t at, const int half) {
    if (!half) return ((const float *)numbers)[at];
    const union { uint32_t bits; float value; } wide = {(uint32_t)((const bf16 *)numbers)[at] << 16};
    return wide.value;
}

// Rounded to nearest, ties to even.
INLINE bf16 narrow(float value) {
    const union { float value; uint32_t bits; } number = {value};
    return value != value ? 0x7fc0 : (bf16)((number.bits + 0x7fff + (number.bits >> 16 & 1)) >> 16);
}

// 2^x for x ≤ 0, within 1e-7 of it; 0 below 2^-149. The polynomial is the one of degree five whose largest relative error
// between -1/2 and 1/2 is least.
INLINE __m512 power(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200), x); // not -∞, which has no fraction; NaN stays
    const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
    const float factors[] = {1.32764715e-3f, 9.67554133e-3f, 5.55071327e-2f, 2.40221197e-1f, 6.93146967e-1f, 1.00000007f};
    __m512 sum = _mm512_set1_ps(factors[0]);
#pragma GCC unroll 5
    for (int i = 1; i < 6; i++) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factors[i]));
    return _mm512_scalef_ps(sum, whole);
}

// sums (rows, wide) += a (rows, count), its rows `stride` apart, times b (count, wide), its rows `width` apart.
INLINE void multiply(const float *a, int64_t stride, const float *b, int64_t width, int64_t count, __m512 *sums,
                     const int rows, const int wide, const int in_pairs) {
    for (int64_t i = 0; i < count; i++) {
        __m512 given[WIDE];
#pragma GCC unroll 4
        for (int c = 0; c < wide; c++) given[c] = _mm512_loadu_ps(b + i * width + LANES * c);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int c = 0; c < wide; c++)
                sums[r * wide + c] =
                    add_products(sums[r * wide + c], given[c], _mm512_set1_ps(a[r * stride + i]), in_pairs);
    }
}

// Σ weight · v of `rows` queries for `wide` registers of v's columns: what there is, times `kept`, and these keys' part.
INLINE void add_values(const float *weights, const float *v, int64_t columns, int64_t count, float *at, const float *kept,
                       const int rows, const int wide, const int in_pairs) {
    __m512 sums[ROWS * WIDE];
#pragma GCC unroll 24
    for (int i = 0; i < rows * wide; i++)
        sums[i] = _mm512_mul_ps(_mm512_loadu_ps(at + i / wide * columns + i % wide * LANES), _mm512_set1_ps(kept[i / wide]));
    multiply(weights, KEYS, v, columns, count, sums, rows, wide, in_pairs);
#pragma GCC unroll 24
    for (int i = 0; i < rows * wide; i++) _mm512_storeu_ps(at + i / wide * columns + i % wide * LANES, sums[i]);
}

// A register of weights, number `c` of a row: as fp32, or as half as many pairs.
INLINE void store_weights(__m512 weights, float *row, int64_t c, const int in_pairs) {
#ifdef __AVX512BF16__
    if (in_pairs) {
        _mm256_storeu_si256((void *)(row + c * LANES / 2), (__m256i)_mm512_cvtneps_pbh(weights));
        return;
    }
#endif
    _mm512_storeu_ps(row + c * LANES, weights);
}

// Which of LANES keys from `slot` on are hidden from a query: keys after its limit, and padding; its own slot never.
INLINE __mmask16 hidden_of(const Room *room, int64_t query, int64_t slot) {
    const int64_t seen = room->limits[query] - slot, left = room->keys - slot;
    const __mmask16 late = seen >= LANES ? 0 : seen <= 0 ? 0xffff : 0xffff << seen;
    if (!room->valid) return late;
    const __mmask16 there = left >= LANES ? 0xffff : (1 << left) - 1;
    const __m128i valid = _mm_maskz_loadu_epi8(there, room->valid + slot);
    const __mmask16 own = seen > 0 && seen <= LANES ? 1 << (seen - 1) : 0;
    return (late | _mm_testn_epi8_mask(valid, valid)) & ~own;
}

// Queries `first` … meet `wide` registers of keys, the first of these `slot`. k: (words, KEYS); v: (keys as words,
// columns). Fewer registers than WIDE are keys of which some are hidden.
INLINE void meet(const Room *room, int64_t first, const float *k, const float *v, int64_t slot, int64_t words,
                 int64_t columns, float scale, const int rows, const int wide, const int in_pairs) {
    __m512 sums[ROWS * WIDE];
    float kept[ROWS];
#pragma GCC unroll 24
    for (int i = 0; i < rows * wide; i++) sums[i] = _mm512_setzero_ps();
    multiply(room->q + first * words, words, k, KEYS, words, sums, rows, wide, in_pairs);
#pragma GCC unroll 24
    for (int i = 0; i < rows * wide; i++) {
        const __m512 scores = _mm512_mul_ps(sums[i], _mm512_set1_ps(scale));
        const __mmask16 hidden = wide < WIDE ? hidden_of(room, first + i / wide, slot + i % wide * LANES) : 0;
        _mm512_storeu_ps(room->scores + i / wide * KEYS + i % wide * LANES,
                         _mm512_mask_mov_ps(scores, hidden, _mm512_set1_ps(-INFINITY)));
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        __m512 scores[WIDE];
        for (int c = 0; c < wide; c++) scores[c] = _mm512_loadu_ps(room->scores + r * KEYS + c * LANES);
        __m512 most = scores[0];
        for (int c = 1; c < wide; c++) most = _mm512_max_ps(most, scores[c]);
        const float before = room->most[first + r], found = _mm512_reduce_max_ps(most);
        const float most_now = before > found ? before : found;
        const float now = most_now == -INFINITY ? 0 : most_now; // nothing but padding so far: weights of 0
        room->most[first + r] = most_now;
        kept[r] = _mm512_cvtss_f32(power(_mm512_set1_ps(before - now)));
        float *shares = room->shares + (first + r) * LANES;
        __m512 share = _mm512_mul_ps(_mm512_loadu_ps(shares), _mm512_set1_ps(kept[r]));
        for (int c = 0; c < wide; c++) {
            const __m512 weight = power(_mm512_sub_ps(scores[c], _mm512_set1_ps(now)));
            share = _mm512_add_ps(share, weight);
            store_weights(weight, room->weights + r * KEYS, c, in_pairs);
        }
        _mm512_storeu_ps(shares, share);
    }
    for (int64_t c = 0; c < columns; c += KEYS) {
        const int64_t count = wide * LANES >> in_pairs, left = (columns - c) / LANES;
        float *at = room->sums + first * columns + c;
        if (left >= 4) add_values(room->weights, v + c, columns, count, at, kept, rows, 4, in_pairs);
        else if (left == 3) add_values(room->weights, v + c, columns, count, at, kept, rows, 3, in_pairs);
        else if (left == 2) add_values(room->weights, v + c, columns, count, at, kept, rows, 2, in_pairs);
        else add_values(room->weights, v + c, columns, count, at, kept, rows, 1, in_pairs);
    }
}

// `rows` queries meet a block of keys. Where some do not attend to all of it, they meet one register of keys after the
// other, so that little is computed in vain.
INLINE void meet_block(const Room *room, int64_t first, const float *k, const float *v, int64_t slot, int64_t words,
                       int64_t columns, float scale, const int rows, const int in_pairs) {
    if (slot + KEYS <= room->limits[first] && !(room->valid && memchr(room->valid + slot, 0, KEYS))) {
        meet(room, first, k, v, slot, words, columns, scale, rows, WIDE, in_pairs);
        return;
    }
    for (int64_t i = 0; i < KEYS && slot + i < room->limits[first + rows - 1]; i += LANES)
        meet(room, first, k + i, v + (i >> in_pairs) * columns, slot + i, words, columns, scale, rows, 1, in_pairs);
}

INLINE float pair_of(bf16 first, bf16 second) {
    const union { uint32_t bits; float value; } word = {first | (uint32_t)second << 16};
    return word.value;
}

// A word of a row of `width` numbers.
INLINE float word_at(const void *row, int64_t i, int64_t width, const int half, const int in_pairs) {
    if (!in_pairs) return number_at(row, i, half);
    const bf16 *pair = (const bf16 *)row + 2 * i;
    return pair_of(pair[0], 2 * i + 1 < width ? pair[1] : 0);
}

INLINE const void *row_at(const void *numbers, const int64_t *strides, int64_t batch, int64_t head, int64_t row,
                          const int half) {
    return (const char *)numbers + (batch * strides[0] + head * strides[1] + row * strides[2]) * (half ? 2 : 4);
}

static int64_t words_of(const Attention *a, const int in_pairs) { return in_pairs ? (a->width + 1) / 2 : a->width; }
static int64_t columns_of(const Attention *a) { return (a->width + LANES - 1) / LANES * LANES; }

// A block of keys as (words, KEYS), and their values as (KEYS words or pairs, columns); zeros after the last.
INLINE void pack(const Attention *a, int64_t batch, int64_t head, int64_t slot, float *k, float *v, const int half,
                 const int in_pairs) {
    const int64_t words = words_of(a, in_pairs), columns = columns_of(a);
    const int64_t left = a->keys - slot < KEYS ? a->keys - slot : KEYS;
    if (left < KEYS) memset(k, 0, words * KEYS * sizeof *k);
    memset(v, 0, (KEYS >> in_pairs) * columns * sizeof *v);
    const char *key = row_at(a->k, a->k_strides, batch, head, slot, half);
    const int64_t apart = a->k_strides[2] * (half ? 2 : 4);
    for (int64_t i = 0; i < words; i++)
        for (int64_t s = 0; s < left; s++) k[i * KEYS + s] = word_at(key + s * apart, i, a->width, half, in_pairs);
    for (int64_t s = 0; s < left; s += 1 + in_pairs) {
        const void *value = row_at(a->v, a->v_strides, batch, head, slot + s, half);
        const bf16 *next = row_at(a->v, a->v_strides, batch, head, slot + s + (s + 1 < left), half);
        float *row = v + (s >> in_pairs) * columns;
        for (int64_t i = 0; i < a->width; i++)
            row[i] = in_pairs ? pair_of(((const bf16 *)value)[i], s + 1 < left ? next[i] : 0) : number_at(value, i, half);
    }
}

// QUERIES queries from `first` on of a head, with all its keys and values.
INLINE void attend(const Attention *a, int64_t batch, int64_t head, int64_t first, const float *keys, const float *values,
                   Room *room, const int half, const int in_pairs) {
    const int64_t words = words_of(a, in_pairs), columns = columns_of(a);
    const int64_t count = a->queries - first < QUERIES ? a->queries - first : QUERIES;
    room->valid = a->valid ? a->valid + batch * a->keys : NULL;
    memset(room->sums, 0, QUERIES * columns * sizeof(float));
    memset(room->shares, 0, QUERIES * LANES * sizeof(float));
    for (int64_t r = 0; r < count; r++) {
        const void *row = row_at(a->q, a->q_strides, batch, head, first + r, half);
        for (int64_t i = 0; i < words; i++) room->q[r * words + i] = word_at(row, i, a->width, half, in_pairs);
        room->most[r] = -INFINITY;
        room->limits[r] = a->causal ? a->keys - a->queries + first + r + 1 : a->keys;
    }
    const float scale = (float)(a->scale * 1.4426950408889634); // scores are powers of two
    for (int64_t slot = 0; slot < a->keys; slot += KEYS) {
        int64_t r = 0;
        for (; r + ROWS <= count; r += ROWS)
            meet_block(room, r, keys, values, slot, words, columns, scale, ROWS, in_pairs);
        for (; r + 2 <= count; r += 2) meet_block(room, r, keys, values, slot, words, columns, scale, 2, in_pairs);
        for (; r < count; r++) meet_block(room, r, keys, values, slot, words, columns, scale, 1, in_pairs);
        keys += words * KEYS;
        values += (KEYS >> in_pairs) * columns;
    }
    for (int64_t r = 0; r < count; r++) {
        const float share = _mm512_reduce_add_ps(_mm512_loadu_ps(room->shares + r * LANES));
        const int64_t at = ((batch * a->queries + first + r) * a->heads + head) * a->width;
        for (int64_t i = 0; i < a->width; i++) {
            const float value = room->sums[r * columns + i] / share;
            if (half) ((bf16 *)a->y)[at + i] = narrow(value);
            else ((float *)a->y)[at + i] = value;
        }
    }
}

INLINE int run(const Attention *a, const int half, const int in_pairs) {
    const int64_t words = words_of(a, in_pairs), columns = columns_of(a), group = a->heads / a->kv_heads;
    const int64_t blocks = (a->keys + KEYS - 1) / KEYS, parts = (a->queries + QUERIES - 1) / QUERIES;
    const int64_t for_keys = words * KEYS, for_values = (KEYS >> in_pairs) * columns;
    const int64_t for_thread = QUERIES * (words + columns + LANES + 1) + 2 * ROWS * KEYS;
    const int64_t all = a->batch * a->kv_heads, fit = PACKED / (blocks * (for_keys + for_values)) + 1;
    const int64_t most = fit < all ? fit : all; // heads packed at a time
    // Whole registers, so that none crosses a line of the cache: all sizes are multiples of LANES.
    float *keys = aligned_alloc(64, (most * blocks * (for_keys + for_values) + a->threads * for_thread) * sizeof *keys);
    if (!keys) return 1;
    float *values = keys + most * blocks * for_keys, *rooms = values + most * blocks * for_values;
#pragma omp parallel num_threads(a->threads)
    {
        Room room = {.q = rooms + omp_get_thread_num() * for_thread, .keys = a->keys};
        room.sums = room.q + QUERIES * words;
        room.shares = room.sums + QUERIES * columns;
        room.most = room.shares + QUERIES * LANES;
        room.scores = room.most + QUERIES;
        room.weights = room.scores + ROWS * KEYS;
        for (int64_t from = 0; from < all; from += most) { // heads of k, of all batches
            const int64_t some = all - from < most ? all - from : most;
#pragma omp for
            for (int64_t i = 0; i < some * blocks; i++) {
                const int64_t number = from + i / blocks;
                pack(a, number / a->kv_heads, number % a->kv_heads, i % blocks * KEYS, keys + i * for_keys,
                     values + i * for_values, half, in_pairs);
            }
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < some * group * parts; i++) {
                const int64_t number = from * group + i / parts, block = i / parts / group * blocks;
                attend(a, number / a->heads, number % a->heads, i % parts * QUERIES, keys + block * for_keys,
                       values + block * for_values, &room, half, in_pairs);
            }
        }
    }
    free(keys);
    return 0;
}

// Returns 1 where there is no memory, else 0.
int attention(const Attention *a) {
#ifdef __AVX512BF16__
    return a->half ? run(a, 1, 1) : run(a, 0, 0);
#else
    return a->half ? run(a, 1, 0) : run(a, 0, 0);
#endif
}
