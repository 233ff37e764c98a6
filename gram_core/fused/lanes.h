// Vectors, number formats and products: what attention.h and stack.h are made of.
//
// Numbers are float32, or bfloat16 where the processor multiplies it. All buffers are counted in
// lanes of 32 bits: one float32, or two bfloat16 that lie along the axis that a product sums over.
// So one product serves both. Sums are float32.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

namespace {  // what is in no library cannot be taken from another

// What a call returns, but for 0: not a format, width or size of these files; no memory.
constexpr int UNFIT = 1, NO_MEMORY = 2;

// A tile of a product is ROWS x COLUMNS vectors: as many sums as the registers hold beside factors.
// Every STEPS steps of its loop it fetches a cache line: at each of AVX2's, which are half as long,
// that would cost more than it saves.
#ifdef __AVX512F__
constexpr int W = 16, COLUMNS = 4, STEPS = 1;
#else
constexpr int W = 8, COLUMNS = 2, STEPS = 4;
#endif
constexpr int ROWS = 6;              // even: in attention bfloat16 goes in pairs of rows
constexpr long PANEL = COLUMNS * W;  // columns
constexpr long LINE = 16;            // lanes of a cache line

typedef float Lanes __attribute__((vector_size(4 * W)));
typedef int32_t Words __attribute__((vector_size(4 * W)));

// Through a type of floats: memcpy's bytes could be any object's, and after each store all that says
// where the next one goes would be read again.
typedef float Floats __attribute__((vector_size(4 * W), aligned(4)));
inline Lanes load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void store(float* p, Lanes x) { *reinterpret_cast<Floats*>(p) = x; }
constexpr long padded(long n, long to) { return (n + to - 1) / to * to; }

#ifdef __AVX512F__
inline float largest(Lanes x) { return _mm512_reduce_max_ps((__m512)x); }
inline float total(Lanes x) { return _mm512_reduce_add_ps((__m512)x); }
#else
inline float largest(Lanes x) {
    float most = x[0];
    for (int i = 1; i < W; i++) most = x[i] > most ? x[i] : most;
    return most;
}
inline float total(Lanes x) {
    float sum = x[0];
    for (int i = 1; i < W; i++) sum += x[i];
    return sum;
}
#endif

// Whole cache lines: a vector that lies across two costs twice.
template <class X>
struct Aligned {
    using value_type = X;
    X* allocate(std::size_t n) {
        return static_cast<X*>(::operator new(n * sizeof(X), std::align_val_t(64)));
    }
    void deallocate(X* p, std::size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};
using Buffer = std::vector<float, Aligned<float>>;

struct Single {
    using Number = float;
    static constexpr int IN_LANE = 1;
    static Lanes add(Lanes sum, float a, Lanes b) { return sum + a * b; }
    static Lanes get(const float* p) { return load(p); }
    static void put(float* p, Lanes x) { store(p, x); }
    // As many neighbouring rows as a lane holds, as a sum over rows reads them.
    static void put_lanes(float* p, const Lanes (&rows)[IN_LANE]) { store(p, rows[0]); }
    // Two of them.
    static void put_rows(float* p, long row, Lanes first, Lanes second) {
        store(p, first);
        store(p + row, second);
    }
};

#ifdef __AVX512BF16__
struct Half {
    using Number = uint16_t;
    static constexpr int IN_LANE = 2;
    static Lanes add(Lanes sum, float a, Lanes b) {
        return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
    }
    static Lanes get(const uint16_t* p) {
        __m256i x;
        memcpy(&x, p, sizeof x);
        return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
    }
    static void put(uint16_t* p, Lanes x) {
        __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
        memcpy(p, &rounded, sizeof rounded);
    }
    static void put_lanes(float* p, const Lanes (&rows)[IN_LANE]) {
        __m512i high = _mm512_slli_epi32(low(rows[1]), 16);
        store(p, (Lanes)_mm512_or_si512(low(rows[0]), high));
    }
    static void put_rows(float* p, long, Lanes first, Lanes second) {
        put_lanes(p, {first, second});
    }
    static __m512i low(Lanes x) {
        return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
    }
};
#endif

// Memory that is wanted soon: where it begins, and whether it will be written.
struct Ahead {
    const float* at;
    bool write = false;
};
struct Nothing {};  // is wanted

// One tile: put(r, c, sum over s of a[r * row + s * step] * b[s * width + c .. + W]), r < R, for
// VECTORS vectors of columns. Meanwhile a cache line every so many steps is fetched, from `ahead`
// on, if any.
template <class T, int R, int VECTORS, class Wanted, class Put>
inline void tile(const float* a, long row, long step, const float* b, long width, long steps,
                 Wanted ahead, Put put) {
    Lanes sum[R][VECTORS] = {};
    auto one = [&](long s) __attribute__((always_inline)) {
        Lanes right[VECTORS];
        for (int c = 0; c < VECTORS; c++) right[c] = load(b + s * width + c * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < VECTORS; c++)
                sum[r][c] = T::add(sum[r][c], a[r * row + s * step], right[c]);
    };
    long s = 0;
    if constexpr (std::is_same_v<Wanted, Ahead>)
        for (; s + STEPS <= steps; s += STEPS, ahead.at += LINE) {
            if (ahead.write) __builtin_prefetch(ahead.at, 1, 2);
            else __builtin_prefetch(ahead.at, 0, 2);
#pragma GCC unroll 8
            for (long k = 0; k < STEPS; k++) one(s + k);
        }
    for (; s < steps; s++) one(s);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < VECTORS; c++) put(r, c * W, sum[r][c]);
}

struct Memory {
    Ahead ahead = {};  // of null: nothing
    long lanes = 0;
};

// The right factor of a product, [steps, columns] lanes: row by row, `width` apart, or in panels of
// columns (`width` 0), one behind the other, with room for `depth` steps each.
struct Right {
    const float* at;
    long steps, columns, width, depth = 0;
    Memory next[2] = {};  // what is read or written after the product

    Right then(Memory first, Memory second = {}) const {
        Right more = *this;
        more.next[0] = first, more.next[1] = second;
        return more;
    }
};

inline Right in_rows(const float* at, long steps, long columns) {
    return {at, steps, columns, columns};
}
inline Right in_panels(const float* at, long steps, long columns) {
    return {at, steps, columns, 0, steps};
}

// R rows by a panel's columns, from c on.
template <class T, int R, class Wanted, class Put>
inline void tiles(const float* a, long row, long step, const Right& b, long c, Wanted ahead,
                  Put put) {
    const long columns = std::min(PANEL, b.columns - c);
    const float* panel = b.at + (b.width ? c : c * b.depth);
    const long width = b.width ? b.width : columns;
    auto here = [&](long r, long d, Lanes x) { put(r, c + d, x); };
    switch (columns / W) {
        case 4: return tile<T, R, 4>(a, row, step, panel, width, b.steps, ahead, here);
        case 3: return tile<T, R, 3>(a, row, step, panel, width, b.steps, ahead, here);
        case 2: return tile<T, R, 2>(a, row, step, panel, width, b.steps, ahead, here);
        case 1: return tile<T, R, 1>(a, row, step, panel, width, b.steps, ahead, here);
    }
}

// put(r, c, sum over s of a[r * row + s * step] * b[s][c]) for ROWS rows and all columns.
template <class T, class Put>
inline void stripe(const float* a, long row, long step, const Right& b, Put put) {
    for (long c = 0; c < b.columns; c += PANEL) tiles<T, ROWS>(a, row, step, b, c, Nothing(), put);
}

// The same for `rows` rows. A panel of b stays in the caches for all of them; meanwhile the panel
// behind it is fetched (behind the last lies the weight that is used next), then what b names.
template <class T, class Put>
inline void product(const float* a, long row, long step, long rows, const Right& b, Put put) {
    // Tiles that are a row lower are as fast, those that are two rows lower are not.
    const long lower = (ROWS - rows % ROWS) % ROWS, rest = rows - lower * (ROWS - 1);
    Memory next[] = {{}, b.next[0], b.next[1]};
    auto ahead = [&]() -> Ahead {
        for (Memory& memory : next)
            if (memory.ahead.at && memory.lanes > 0) {
                const Ahead lines = memory.ahead;
                memory.ahead.at += b.steps / STEPS * LINE;
                memory.lanes -= b.steps / STEPS * LINE;
                return lines;
            }
        return {b.at};  // nothing more
    };
    for (long c = 0; c < b.columns; c += PANEL) {
        const long columns = std::min(PANEL, b.columns - c);
        if (!b.width) next[0] = {{b.at + (c + columns) * b.depth}, columns * b.steps};
        long i = 0, whole = (rest < 0 ? rows : rest) / ROWS;
        auto some = [&](auto height) {
            auto here = [&](long r, long d, Lanes x) { put(i + r, d, x); };
            const float* left = a + i * row;
            if constexpr (height < ROWS - 1) tiles<T, height>(left, row, step, b, c, Nothing(), here);
            else tiles<T, height>(left, row, step, b, c, ahead(), here);
            i += height;
        };
        while (whole-- > 0) some(std::integral_constant<int, ROWS>());
        while (rows - i >= ROWS - 1) some(std::integral_constant<int, ROWS - 1>());
        while (rows - i >= 2) some(std::integral_constant<int, 2>());
        if (rows > i) some(std::integral_constant<int, 1>());
    }
}

// 2^t for t <= 126, and 2^-126 for all below -126; NaN stays NaN. The polynomial for 2^f between
// -1/2 and 1/2 is that of Cephes' exp2f.
inline Lanes power_of_two(Lanes t) {
    const Lanes least = Lanes{} - 126.f;
    t = t < least ? least : t;
#ifdef __AVX512F__
    const Lanes whole = (Lanes)_mm512_roundscale_ps((__m512)t, 0), f = t - whole;
#else
    const Lanes magic = Lanes{} + 12582912.f;  // 1.5 * 2^23
    const Lanes whole = t + magic;             // its last bits are t, rounded
    const Lanes f = t - (whole - magic);
#endif
    Lanes p = Lanes{} + 1.535336188319500e-4f;
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.f;
#ifdef __AVX512F__
    return (Lanes)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    return p * (Lanes)(((Words)whole << 23) + 0x3f800000);
#endif
}

// e^x for |x| below 87, and what is next to it beyond.
inline Lanes exponential(Lanes x) {
    const Lanes most = Lanes{} + 126.f, t = x * 1.4426950408889634f;
    return power_of_two(t > most ? most : t);
}

// log(1 + y) for y between 0 and 1: 2 artanh(z), z = y / (2 + y) <= 1/3, by its series.
inline Lanes log_one_plus(Lanes y) {
    const Lanes z = y / (y + 2.f), s = z * z;
    Lanes p = Lanes{} + 2.f / 15;
    p = p * s + 2.f / 13;
    p = p * s + 2.f / 11;
    p = p * s + 2.f / 9;
    p = p * s + 2.f / 7;
    p = p * s + 2.f / 5;
    p = p * s + 2.f / 3;
    p = p * s + 2.f;
    return p * z;
}

// Four columns of rows r, r + 4, ... side by side.
inline Lanes every_fourth(const float* p, long width) {
#ifdef __AVX512F__
    __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(p));
    x = _mm512_mask_broadcast_f32x4(x, 0x00f0, _mm_loadu_ps(p + 4 * width));
    x = _mm512_mask_broadcast_f32x4(x, 0x0f00, _mm_loadu_ps(p + 8 * width));
    return (Lanes)_mm512_mask_broadcast_f32x4(x, 0xf000, _mm_loadu_ps(p + 12 * width));
#else
    const __m256 x = _mm256_castps128_ps256(_mm_loadu_ps(p));
    return (Lanes)_mm256_insertf128_ps(x, _mm_loadu_ps(p + 4 * width), 1);
#endif
}

// W x W lanes, four columns at a time: they are brought together by loads, and what is then left to
// exchange lies within quarters of 128 bits, which costs least.
inline void transpose(const float* in, long in_width, float* out, long out_width) {
    Words low, high, even, odd;
    for (int l = 0; l < W; l++) {
        low[l] = l / 4 * 4 + l % 4 / 2 + l % 2 * W;
        high[l] = low[l] + 2;
        even[l] = l / 4 * 4 + l % 2 + l % 4 / 2 * W;
        odd[l] = even[l] + 2;
    }
#pragma GCC unroll 4
    for (int c = 0; c < W; c += 4) {
        Lanes x[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) x[r] = every_fourth(in + r * in_width + c, in_width);
        const Lanes a = __builtin_shuffle(x[0], x[1], low);
        const Lanes b = __builtin_shuffle(x[2], x[3], low);
        const Lanes d = __builtin_shuffle(x[0], x[1], high);
        const Lanes e = __builtin_shuffle(x[2], x[3], high);
        float* column = out + c * out_width;
        store(column, __builtin_shuffle(a, b, even));
        store(column + out_width, __builtin_shuffle(a, b, odd));
        store(column + 2 * out_width, __builtin_shuffle(d, e, even));
        store(column + 3 * out_width, __builtin_shuffle(d, e, odd));
    }
}

}  // namespace
