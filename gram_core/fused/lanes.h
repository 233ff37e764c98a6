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
#include <vector>

namespace {  // what is in no library cannot be taken from another

// A tile of a product is ROWS x COLUMNS vectors: as many sums as the registers hold beside factors.
#ifdef __AVX512F__
constexpr int W = 16, COLUMNS = 4;
#else
constexpr int W = 8, COLUMNS = 2;
#endif
constexpr int ROWS = 6;  // even: bfloat16 goes in pairs of rows

typedef float Lanes __attribute__((vector_size(4 * W)));
typedef int32_t Words __attribute__((vector_size(4 * W)));

inline Lanes load(const float* p) {
    Lanes x;
    memcpy(&x, p, sizeof x);
    return x;
}
inline void store(float* p, Lanes x) { memcpy(p, &x, sizeof x); }
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
    // Two neighbouring rows, as a sum over rows reads them.
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
    static void put_rows(float* p, long, Lanes first, Lanes second) {
        __m512i high = _mm512_slli_epi32(low(second), 16);
        store(p, (Lanes)_mm512_or_si512(low(first), high));
    }
    static __m512i low(Lanes x) {
        return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
    }
};
#endif

// One tile: put(r, c, sum over s of a[r * row + s * step] * b[s * width + c .. + W]), r < ROWS, for
// VECTORS vectors of columns.
template <class T, int VECTORS, class Put>
inline void tile(const float* a, long row, long step, const float* b, long width, long steps,
                 Put put) {
    Lanes sum[ROWS][VECTORS] = {};
    for (long s = 0; s < steps; s++) {
        Lanes right[VECTORS];
        for (int c = 0; c < VECTORS; c++) right[c] = load(b + s * width + c * W);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int c = 0; c < VECTORS; c++)
                sum[r][c] = T::add(sum[r][c], a[r * row + s * step], right[c]);
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++) put(r, c * W, sum[r][c]);
}

// The right factor of a product, [steps, columns] lanes: row by row, or in panels of COLUMNS vectors
// of columns, one behind the other.
struct Right {
    const float* at;
    long steps, columns;
    bool panels;
};

// put(i, c, sum over s of a[i * row + s * step] * b[s][c]) for `rows` rows (whole tiles: those that
// pad are computed, too) and all columns. A panel of b stays in the caches for all rows.
template <class T, class Put>
inline void product(const float* a, long row, long step, long rows, Right b, Put put) {
    for (long c = 0; c < b.columns; c += COLUMNS * W) {
        const long vectors = std::min<long>(COLUMNS, (b.columns - c) / W);
        const float* panel = b.panels ? b.at + c * b.steps : b.at + c;
        const long width = b.panels ? vectors * W : b.columns;
        for (long i = 0; i < rows; i += ROWS) {
            const float* left = a + i * row;
            auto here = [&](long r, long d, Lanes x) { put(i + r, c + d, x); };
            switch (vectors) {
                case 4: tile<T, 4>(left, row, step, panel, width, b.steps, here); break;
                case 3: tile<T, 3>(left, row, step, panel, width, b.steps, here); break;
                case 2: tile<T, 2>(left, row, step, panel, width, b.steps, here); break;
                case 1: tile<T, 1>(left, row, step, panel, width, b.steps, here); break;
            }
        }
    }
}

// 2^t for t <= 126, and 2^-126 for all below -126; NaN stays NaN. The polynomial for 2^f between
// -1/2 and 1/2 is that of Cephes' exp2f.
inline Lanes power_of_two(Lanes t) {
    const Lanes least = Lanes{} - 126.f, magic = Lanes{} + 12582912.f;  // 1.5 * 2^23
    t = t < least ? least : t;
    const Lanes whole = t + magic;  // its last bits are t, rounded
    const Lanes f = t - (whole - magic);
    Lanes p = Lanes{} + 1.535336188319500e-4f;
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.f;
    return p * (Lanes)(((Words)whole << 23) + 0x3f800000);
}

// W x W lanes, by exchanging halves, quarters, ...
inline void transpose(const float* in, long in_width, float* out, long out_width) {
    Words x[W];
    for (int i = 0; i < W; i++) x[i] = (Words)load(in + i * in_width);
#pragma GCC unroll 4
    for (int s = 1; s < W; s *= 2) {
        Words first, second;
        for (int l = 0; l < W; l++) {
            first[l] = l & s ? l - s + W : l;
            second[l] = l & s ? l + W : l + s;
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++)
            if (!(i & s)) {
                const Words a = x[i], b = x[i + s];
                x[i] = __builtin_shuffle(a, b, first);
                x[i + s] = __builtin_shuffle(a, b, second);
            }
    }
    for (int i = 0; i < W; i++) store(out + i * out_width, (Lanes)x[i]);
}

}  // namespace
