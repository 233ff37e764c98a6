// SwiGLUs of one input side by side, forward and backward: the heads of a Gaussian.
#pragma once

#include "deviation.h"
#include "gradient.h"

namespace {

struct Swiglu {  // laid out
    const float *gate_up, *down;
};

// What a head gives: as it is, or a deviation and how fast it grows with what it is made of.
struct Output {
    float* out;
    const Deviation* deviation = nullptr;
    float* slope = nullptr;

    Output from(long at) const { return {out + at, deviation, deviation ? slope + at : nullptr}; }
    void put(long at, Lanes x) const {
        if (!deviation) return store(out + at, x);
        const Deviation::Value value = deviation->of(x);
        store(out + at, value.std);
        store(slope + at, value.slope);
    }
    // Its gradient's at what a head gives.
    Lanes back(const float* grad, long at) const {
        return deviation ? load(grad + at) * load(slope + at) : load(grad + at);
    }
};

// [positions, D] of a head; what is rounded is its input. `next` is wanted then.
template <class T>
void head_forward(Swiglus<T>& w, const Swiglu& weights, const Output& to, typename T::Number* kept,
                  Memory next) {
    constexpr int N = T::IN_LANE;
    const long size = w.rows * w.D;
    w.gate(weights.gate_up, kept, {{to.out, true}, size}, {{to.slope, true}, size});
    product<T>(w.hidden.data(), w.F / N, 1, w.rows,
               in_panels(weights.down, w.F / N, w.D).then(next),
               [&](long i, long d, Lanes x) { to.put(i * w.D + d, x); });
}

}  // namespace
