// A stack of post-norm blocks without gradients, one group of sequences at a time.
//
// All that lies between the stack's input and its output stays in the caches of one processor core;
// weights are laid out once a call, for all groups. The residual stays float32.
//
// L positions, D width, F hidden width of the channels' SwiGLU, M of the positions'.
#pragma once

#include <memory>

#include "attention.h"

namespace {

struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Raw = std::unique_ptr<float[], Free>;  // as it comes: not filled with zeros

inline Raw raw(long lanes) { return Raw(new (std::align_val_t(64)) float[lanes]); }

// A weight [out, in] as the right factor of x W^T: panels of [in / N, columns] lanes.
template <class T>
void pack_right(const float* weight, long out, long in, float* to) {
    constexpr long PANEL = COLUMNS * W, N = T::IN_LANE;
    for (long o = 0; o < out; o += W) {
        const long start = o / PANEL * PANEL, width = std::min(PANEL, out - start);
        for (long u = 0; u < in / N; u += W) {
            // in / N need not be whole vectors: what is over is left out.
            const long lanes = std::min<long>(W, in / N - u);
            alignas(64) float rows[W * W] = {}, columns[W * W];
            for (int r = 0; r < W; r++)
                for (long e = 0; e < lanes * N; e += W) {
                    auto* row = reinterpret_cast<typename T::Number*>(rows + r * W);
                    T::put(row + e, load(weight + (o + r) * in + u * N + e));
                }
            transpose(rows, W, columns, W);
            for (long s = 0; s < lanes; s++)
                store(to + start * (in / N) + (u + s) * width + o - start, load(columns + s * W));
        }
    }
}

// A row of numbers padded to whole vectors, in lanes.
template <class T>
constexpr long row_lanes(long numbers) {
    return padded(numbers, W) / T::IN_LANE;
}

// A weight [out, in] as the left factor of W x: rows as they are, and zero rows to whole tiles.
template <class T>
void pack_left(const float* weight, long out, long in, float* to) {
    for (long o = 0; o < padded(out, ROWS); o++) {
        auto* row = reinterpret_cast<typename T::Number*>(to + o * row_lanes<T>(in));
        for (long i = 0; i < in; i += W) {
            alignas(64) float some[W] = {};
            if (o < out) memcpy(some, weight + o * in + i, std::min<long>(W, in - i) * 4);
            T::put(row + i, load(some));
        }
    }
}

// silu(gate) * up
inline Lanes gated(Lanes gate, Lanes up) {
    const Lanes most = Lanes{} + 126.f;
    const Lanes t = gate * -1.4426950408889634f;
    return gate * up / (power_of_two(t > most ? most : t) + 1);
}

struct Shape {
    long batch, length, dim, heads, ffn, mixing;  // mixing: M; 0 for attention
    long group() const { return std::max(1L, 64 / length); }  // sequences that are taken together
};

// A block's weights, laid out.
struct Packed {
    const float *first, *second, *gate_up, *down;
};

template <class T>
struct Worker {
    using Number = typename T::Number;
    static constexpr int N = T::IN_LANE;
    const Shape shape;
    const long L, D, F, rows;  // of a group, in whole tiles
    const float eps;
    Buffer residual, narrow, wide, hidden;

    Worker(const Shape& shape, float eps, long wide_lanes, long hidden_lanes)
        : shape(shape), L(shape.length), D(shape.dim), F(shape.ffn),
          rows(padded(shape.group() * L, ROWS)), eps(eps), residual(rows * D),
          narrow(rows * D / N), wide(std::max(wide_lanes, rows * 2 * F)),
          hidden(std::max(hidden_lanes, rows * F / N)) {}
    virtual ~Worker() = default;

    // residual += the mixing of positions, of `count` sequences
    virtual void mix(const Packed& weights, long count) = 0;

    static Number* numbers(float* p) { return reinterpret_cast<Number*>(p); }

    template <class A, class B>
    void read(const typename A::Number* a, const typename B::Number* b, long count) {
        for (long i = 0; i < count * L * D; i += W)
            store(&residual[i], A::get(a + i) + B::get(b + i));
    }

    // RMSNorm of the residual, in place and rounded.
    void norm(long count, Number* to) {
        for (long i = 0; i < count * L; i++) {
            float* row = &residual[i * D];
            Lanes squares{};
            for (long d = 0; d < D; d += W) squares += load(row + d) * load(row + d);
            const float scale = 1 / std::sqrt(total(squares) / D + eps);
            for (long d = 0; d < D; d += W) {
                const Lanes x = load(row + d) * scale;
                store(row + d, x);
                T::put(to + i * D + d, x);
            }
        }
    }

    void add(const float* a, const float* weight, long fan_in) {
        product<T>(a, fan_in / N, 1, rows, {weight, fan_in / N, D, true},
                   [&](long i, long d, Lanes x) {
                       store(&residual[i * D + d], load(&residual[i * D + d]) + x);
                   });
    }

    void channels(const Packed& weights) {
        product<T>(narrow.data(), D / N, 1, rows, {weights.gate_up, D / N, 2 * F, true},
                   [&](long i, long f, Lanes x) { store(&wide[i * 2 * F + f], x); });
        for (long i = 0; i < rows; i++) {
            const float *gate = &wide[i * 2 * F], *up = gate + F;
            for (long f = 0; f < F; f += W)
                T::put(numbers(hidden.data()) + i * F + f, gated(load(gate + f), load(up + f)));
        }
        add(hidden.data(), weights.down, F);
    }
};

template <class T, int C>
struct AttentionWorker : Worker<T> {
    using Base = Worker<T>;
    using typename Base::Number;
    using Base::D, Base::hidden, Base::L, Base::N, Base::narrow, Base::numbers, Base::residual,
        Base::rows, Base::shape;
    Head<T, C> head;
    Buffer qkv;

    AttentionWorker(const Shape& shape, float eps, const float* table)
        : Base(shape, eps, 0, 0), head(shape.length, shape.heads, table), qkv(rows * 3 * D / N) {}

    void mix(const Packed& weights, long count) override {
        Number *x = numbers(narrow.data()), *in = numbers(qkv.data());
        for (long i = 0; i < count * L * D; i += W) T::put(x + i, load(&residual[i]));
        product<T>(narrow.data(), D / N, 1, rows, {weights.first, D / N, 3 * D, true},
                   [&](long i, long c, Lanes sum) { T::put(in + i * 3 * D + c, sum); });
        for (long s = 0; s < count; s++)
            for (long h = 0; h < shape.heads; h++)
                head.forward(in + s * L * 3 * D + h * C, x + s * L * D + h * C);
        Base::add(narrow.data(), weights.second, D);
    }
};

// SwiGLU over positions: products with the weights on the left, so that nothing is transposed.
template <class T>
struct MixerWorker : Worker<T> {
    using Base = Worker<T>;
    using Base::D, Base::hidden, Base::L, Base::N, Base::residual, Base::shape, Base::wide;
    const long M, LN;  // LN: lanes of the positions
    Buffer columns;

    MixerWorker(const Shape& shape, float eps)
        : Base(shape, eps, padded(2 * shape.mixing, ROWS) * shape.dim, shape.mixing * shape.dim),
          M(shape.mixing), LN(padded(L, N) / N), columns((L + 1) * D) {}

    void mix(const Packed& weights, long count) override {
        for (long s = 0; s < count; s++) {
            float* x = &residual[s * L * D];
            for (long j = 0; j < L; j += 2)
                for (long d = 0; d < D; d += W) {
                    const Lanes second = j + 1 < L ? load(x + (j + 1) * D + d) : Lanes{};
                    T::put_rows(&columns[j / N * D + d], D, load(x + j * D + d), second);
                }
            product<T>(weights.first, row_lanes<T>(L), 1, padded(2 * M, ROWS),
                       {columns.data(), LN, D, false},
                       [&](long m, long d, Lanes sum) { store(&wide[m * D + d], sum); });
            for (long m = 0; m < M; m += 2)
                for (long d = 0; d < D; d += W) {
                    const float *gate = &wide[m * D + d], *up = &wide[(M + m) * D + d];
                    T::put_rows(&hidden[m / N * D + d], D, gated(load(gate), load(up)),
                                gated(load(gate + D), load(up + D)));
                }
            product<T>(weights.second, row_lanes<T>(M), 1, padded(L, ROWS),
                       {hidden.data(), M / N, D, false}, [&](long j, long d, Lanes sum) {
                           if (j < L) store(x + j * D + d, load(x + j * D + d) + sum);
                       });
        }
    }
};

}  // namespace
