// SwiGLUs of one input side by side, forward and backward: the heads of a Gaussian.
#pragma once

#include "gradient.h"

namespace {

struct Swiglu {  // laid out
    const float *gate_up, *down;
};

// out [positions, D] of a head of x. `next` is wanted then.
template <class T>
void head_forward(Swiglus<T>& w, const typename T::Number* x, const Swiglu& weights, float* out,
                  typename T::Number* kept, Memory next) {
    constexpr int N = T::IN_LANE;
    w.gate(x, weights.gate_up, kept, {{out, true}, w.rows * w.D});
    product<T>(w.hidden.data(), w.F / N, 1, w.rows,
               in_panels(weights.down, w.F / N, w.D).then(next),
               [&](long i, long d, Lanes sum) { store(out + i * w.D + d, sum); });
}

}  // namespace
