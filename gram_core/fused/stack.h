// A stack of post-norm blocks, one group of sequences at a time.
//
// All that lies between a stack's input and its output stays in the caches of one processor core.
// The residual stays float32. Weights are laid out once a call, for all groups.
//
// L positions, D width, F hidden width of the channels' SwiGLU, M of the positions'.
#pragma once

#include "attention.h"
#include "packing.h"

namespace {

struct Shape {
    long batch, length, dim, heads, ffn, mixing, blocks;  // mixing: M; 0 for attention
    long group() const { return std::max(1L, 64 / length); }  // sequences that are taken together
    long groups() const { return (batch + group() - 1) / group(); }
    long positions() const { return batch * length; }
    // Numbers of a sequence's qkv, or of its positions' gate and up.
    long first() const { return mixing ? 2 * mixing * dim : 3 * length * dim; }
};

// A block's weights, laid out.
struct Packed {
    const float *first, *second, *gate_up, *down;
};

inline Lanes silu(Lanes x) { return x / (exponential(-x) + 1.f); }

// What one application of a stack leaves for its backward: the input of each block, and the rest of
// this struct for each block in turn. Every part is of all positions. `out` is the next block's x.
template <class T>
struct Kept {
    using Number = typename T::Number;
    Number *x = nullptr, *first = nullptr, *mixed = nullptr, *normed = nullptr,
           *gate_up = nullptr, *out = nullptr;
    float *scale = nullptr, *out_scale = nullptr;  // of the norms, one a position

    Kept() = default;
    Kept(const Shape& s, void* numbers, float* scales, long application, long block) {
        const long wide = s.positions() * s.dim;
        Number* at = static_cast<Number*>(numbers) + application * of_application(s);
        x = at + block * of_block(s);  // of a later one: the output of the one before
        first = at + wide + block * of_block(s);
        mixed = first + s.batch * s.first();
        normed = mixed + (s.mixing ? 0 : wide);
        gate_up = normed + wide;
        out = gate_up + 2 * s.positions() * s.ffn;
        scale = scales + 2 * (application * s.blocks + block) * s.positions();
        out_scale = scale + s.positions();
    }
    static long of_block(const Shape& s) {
        return s.batch * s.first() + s.positions() * ((s.mixing ? 2 : 3) * s.dim + 2 * s.ffn);
    }
    static long of_application(const Shape& s) {
        return s.positions() * s.dim + s.blocks * of_block(s);
    }

    // The same from one sequence on.
    Kept from(const Shape& s, long sequence) const {
        if (!x) return {};
        const long wide = sequence * s.length * s.dim;
        Kept k = *this;
        k.x += wide;
        k.first += sequence * s.first();
        k.mixed += wide;
        k.normed += wide;
        k.gate_up += 2 * sequence * s.length * s.ffn;
        k.out += wide;
        k.scale += sequence * s.length;
        k.out_scale += sequence * s.length;
        return k;
    }
};

// A group of sequences: its residual in float32, and rounded.
template <class T>
struct Group {
    using Number = typename T::Number;
    static constexpr int N = T::IN_LANE;
    const Shape shape;
    const long L, D, F, most;  // most: positions of a group, at the most
    // Of this one: its first sequence, sequences, positions.
    long first = 0, count = 0, rows = 0;
    Buffer own, narrow;
    float* residual;  // in `own`; backward where its gradient is asked for
    Number* rounded;  // [rows, D]: what the next product reads

    explicit Group(const Shape& shape)
        : shape(shape), L(shape.length), D(shape.dim), F(shape.ffn), most(shape.group() * L),
          own(most * D), narrow(most * D / N), residual(own.data()),
          rounded(numbers(narrow.data())) {}
    virtual ~Group() = default;

    static Number* numbers(float* p) { return reinterpret_cast<Number*>(p); }
    static const float* lanes(const Number* p) { return reinterpret_cast<const float*>(p); }

    void begin(long group) {
        const long at = group * shape.group();
        take(at, std::min(shape.group(), shape.batch - at));
    }
    void take(long from, long sequences) {
        first = from, count = sequences, rows = sequences * L;
    }

    // x [rows, D] in the products' format: float32 itself, or rounded in `room`.
    const Number* in_format(const float* x, Buffer& room) const {
        if constexpr (N == 1) {
            return x;
        } else {
            Number* to = numbers(room.data());
            for (long i = 0; i < rows * D; i += W) T::put(to + i, load(x + i));
            return to;
        }
    }

    // What is rounded next is written where it is kept, if it is.
    void round_into(Number* kept) { rounded = kept ? kept : numbers(narrow.data()); }

    // So many numbers that are read soon, or written (`room`).
    static Memory part(const Number* at, long count) { return {{lanes(at)}, count / N}; }
    static Memory room(const Number* at, long count) { return {{lanes(at), true}, count / N}; }

    // residual += a W, [rows, fan] by a weight that is laid out; `next` is read or written then.
    void add(const float* a, const float* weight, long fan, Memory next = {}, Memory last = {}) {
        product<T>(a, fan / N, 1, rows, in_panels(weight, fan / N, D).then(next, last),
                   [&](long i, long d, Lanes x) {
                       store(&residual[i * D + d], load(&residual[i * D + d]) + x);
                   });
    }
};

template <class T>
struct Swiglus : Group<T> {
    using Base = Group<T>;
    using typename Base::Number;
    using Base::D, Base::F, Base::lanes, Base::N, Base::numbers, Base::rows;
    Buffer wide, hidden;

    explicit Swiglus(const Shape& s, long wide_lanes = 0, long hidden_lanes = 0)
        : Base(s), wide(std::max(wide_lanes, Base::most * 2 * F)),
          hidden(std::max(hidden_lanes, Base::most * F / N)) {}

    // Where gate and up are computed: in float32 where they are kept, if they are.
    float* wide_or(Number* kept) {
        return N == 1 && kept ? reinterpret_cast<float*>(kept) : wide.data();
    }

    // The hidden numbers of a SwiGLU of x, into `hidden`; gate and up are kept, if anywhere. `next`
    // and `last` are written then.
    void gate(const Number* x, const float* gate_up, Number* kept, Memory next = {},
              Memory last = {}) {
        float* both = wide_or(kept);
        product<T>(lanes(x), D / N, 1, rows,
                   in_panels(gate_up, D / N, 2 * F).then(next, last),
                   [&](long i, long f, Lanes sum) { store(both + i * 2 * F + f, sum); });
        for (long i = 0; i < rows; i++)
            for (long f = 0; f < F; f += W) {
                const long at = i * 2 * F + f;
                const Lanes gate = load(both + at), up = load(both + at + F);
                T::put(numbers(hidden.data()) + i * F + f, silu(gate) * up);
                if (N == 1 || !kept) continue;
                T::put(kept + at, gate);
                T::put(kept + at + F, up);
            }
    }
};

template <class T>
struct Worker : Swiglus<T> {
    using Base = Swiglus<T>;
    using typename Base::Number;
    using Base::D, Base::F, Base::hidden, Base::residual, Base::rounded, Base::rows, Base::shape;
    const float eps;

    Worker(const Shape& s, float eps, long wide_lanes, long hidden_lanes)
        : Base(s, wide_lanes, hidden_lanes), eps(eps) {}

    // residual += the mixing of positions
    virtual void mix(const Packed& weights, const Kept<T>& kept) = 0;

    // The blocks of residual + added; their output is in the residual, and rounded. `kept` of each
    // block and of the one after, of all positions, or null.
    void stack(const float* added, const Packed* weights, const Kept<T>* kept) {
        auto of = [&](long b) { return kept ? kept[b].from(shape, Base::first) : Kept<T>(); };
        begin_with(added, of(0).x);
        for (long b = 0; b < shape.blocks; b++) {
            const Kept<T> here = of(b), next = of(b + 1);
            mix(weights[b], here);
            norm(here.normed, here.scale);
            Base::gate(rounded, weights[b].gate_up, here.gate_up, Base::room(here.out, rows * D));
            // Within a stack the next block's x is what this one puts out.
            const Number* x = b + 1 < shape.blocks ? nullptr : next.x;
            Base::add(hidden.data(), weights[b].down, F, Base::room(x, rows * D),
                      Base::room(next.first, Base::count * shape.first()));
            norm(here.out, here.out_scale);
        }
    }

    void begin_with(const float* added, Number* kept) {
        Base::round_into(kept);
        for (long i = 0; i < rows * D; i += W) {
            const Lanes x = load(&residual[i]) + load(added + i);
            store(&residual[i], x);
            T::put(rounded + i, x);
        }
    }

    // RMSNorm of the residual, in place and rounded.
    void norm(Number* kept, float* scales) {
        Base::round_into(kept);
        for (long i = 0; i < rows; i++) {
            float* row = &residual[i * D];
            Lanes squares{};
            for (long d = 0; d < D; d += W) squares += load(row + d) * load(row + d);
            const float scale = 1 / std::sqrt(total(squares) / D + eps);
            if (scales) scales[i] = scale;
            for (long d = 0; d < D; d += W) {
                const Lanes x = load(row + d) * scale;
                store(row + d, x);
                T::put(rounded + i * D + d, x);
            }
        }
    }
};

// [length, width] of float32 as a product that sums over rows reads it.
template <class T>
void pair_rows(const float* x, long length, long width, float* to) {
    for (long j = 0; j < length; j += 2)
        for (long d = 0; d < width; d += W) {
            const float* row = x + j * width + d;
            const Lanes second = j + 1 < length ? load(row + width) : Lanes{};
            T::put_rows(to + j / T::IN_LANE * width + d, width, load(row), second);
        }
}

template <class T>
struct AttentionWorker : Worker<T> {
    using Base = Worker<T>;
    using typename Base::Number;
    using Base::count, Base::D, Base::L, Base::lanes, Base::N, Base::rounded, Base::rows,
        Base::shape;
    Buffer qkv;

    AttentionWorker(const Shape& shape, float eps)
        : Base(shape, eps, 0, 0), qkv(Base::most * 3 * D / N) {}

    // One head of one sequence.
    virtual void head(const Number* qkv, Number* out) = 0;

    void mix(const Packed& weights, const Kept<T>& kept) override {
        Number* in = kept.first ? kept.first : Base::numbers(qkv.data());
        const Right first = in_panels(weights.first, D / N, 3 * D);
        product<T>(lanes(rounded), D / N, 1, rows,
                   first.then(Base::room(kept.mixed, rows * D), Base::room(kept.normed, rows * D)),
                   [&](long i, long c, Lanes sum) { T::put(in + i * 3 * D + c, sum); });
        Base::round_into(kept.mixed);
        const long C = D / shape.heads;
        for (long s = 0; s < count; s++)
            for (long h = 0; h < shape.heads; h++)
                head(in + s * L * 3 * D + h * C, rounded + s * L * D + h * C);
        Base::add(lanes(rounded), weights.second, D,
                  Base::room(kept.gate_up, rows * 2 * shape.ffn));
    }
};

template <class T, int C>
struct HeadsOf : AttentionWorker<T> {
    Head<T, C> one;
    HeadsOf(const Shape& s, float eps, const float* table)
        : AttentionWorker<T>(s, eps), one(s.length, s.heads, table) {}
    void head(const typename T::Number* qkv, typename T::Number* out) override {
        one.forward(qkv, out);
    }
};

// SwiGLU over positions: products with the weights on the left, so that nothing is transposed.
template <class T>
struct MixerWorker : Worker<T> {
    using Base = Worker<T>;
    using Base::count, Base::D, Base::hidden, Base::L, Base::N, Base::residual, Base::rows,
        Base::shape;
    const long M, LN;  // LN: lanes of the positions
    Buffer columns;

    MixerWorker(const Shape& shape, float eps)
        : Base(shape, eps, 2 * shape.mixing * shape.dim, shape.mixing * shape.dim),
          M(shape.mixing), LN(padded(L, N) / N), columns((L + 1) * D) {}

    void mix(const Packed& weights, const Kept<T>& kept) override {
        for (long s = 0; s < count; s++) {
            float* x = &residual[s * L * D];
            typename T::Number* first = kept.first ? kept.first + s * 2 * M * D : nullptr;
            float* both = Base::wide_or(first);
            pair_rows<T>(x, L, D, columns.data());
            product<T>(weights.first, row_lanes<T>(L), 1, 2 * M, in_rows(columns.data(), LN, D),
                       [&](long m, long d, Lanes sum) { store(both + m * D + d, sum); });
            for (long m = 0; m < M; m += 2)
                for (long d = 0; d < D; d += W) {
                    const float *gate = both + m * D + d, *up = gate + M * D;
                    T::put_rows(&hidden[m / N * D + d], D, silu(load(gate)) * load(up),
                                silu(load(gate + D)) * load(up + D));
                }
            if (N == 2 && first)
                for (long i = 0; i < 2 * M * D; i += W) T::put(first + i, load(both + i));
            Right on = in_rows(hidden.data(), M / N, D);
            if (s + 1 == count)
                on = on.then(Base::room(kept.normed, rows * D),
                             Base::room(kept.gate_up, rows * 2 * shape.ffn));
            product<T>(weights.second, row_lanes<T>(M), 1, L, on,
                       [&](long j, long d, Lanes sum) {
                           store(x + j * D + d, load(x + j * D + d) + sum);
                       });
        }
    }
};

}  // namespace
