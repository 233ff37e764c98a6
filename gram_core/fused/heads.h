// SwiGLUs of one input side by side, forward and backward: the heads of a Gaussian.
#pragma once

#include "deviation.h"
#include "gradient.h"

namespace {

struct Swiglu {  // laid out
    const float *gate_up, *down;
};

// Where a head's [positions, D] go: as they are, or with a slope as a deviation and its derivative.
struct Output {
    float *out, *slope;
};

// A head of x [positions, D]. `next` is wanted then.
template <class T>
void head_forward(Swiglus<T>& w, const typename T::Number* x, const Swiglu& weights,
                  const Deviation& deviation, const Output& to, typename T::Number* kept,
                  Memory next) {
    constexpr int N = T::IN_LANE;
    const long size = w.rows * w.D;
    w.gate(x, weights.gate_up, kept, {{to.out, true}, size}, {{to.slope, true}, size});
    product<T>(w.hidden.data(), w.F / N, 1, w.rows,
               in_panels(weights.down, w.F / N, w.D).then(next), [&](long i, long d, Lanes sum) {
                   const long at = i * w.D + d;
                   if (!to.slope) return store(to.out + at, sum);
                   const Deviation::Value value = deviation.of(sum);
                   store(to.out + at, value.std);
                   store(to.slope + at, value.slope);
               });
}

}  // namespace
