// SwiGLUs of one input side by side, forward and backward: the heads of a Gaussian.
#pragma once

#include "gradient.h"

namespace {

struct Swiglu {  // laid out
    const float *gate_up, *down;
};

template <class T>
struct HeadsWorker : Worker<T> {
    using Worker<T>::Worker;
    void mix(const Packed&, const Kept<T>&) override {}

    // out [positions, D] of a head; what is rounded is its input. Gate and up are kept, if anywhere.
    void head(const Swiglu& weights, float* out, typename T::Number* gate_up) {
        const long D = this->D, F = this->F;
        this->gate(weights.gate_up);
        if (gate_up)
            for (long i = 0; i < this->live * 2 * F; i += W)
                T::put(gate_up + i, load(&this->wide[i]));
        product<T>(this->hidden.data(), F / T::IN_LANE, 1, this->rows,
                   in_panels(weights.down, F / T::IN_LANE, D), [&](long i, long d, Lanes x) {
                       if (i < this->live) store(out + i * D + d, x);
                   });
    }
};

template <class T>
struct HeadsBackward : Backward<T> {
    using Backward<T>::Backward;
    void mix(const Packed&, const Kept<T>&, Span<T>&, long) override {}

    // The residual += the gradient at the input of a head with the gradient `grad` [positions, D].
    void head(const Swiglu& weights, const float* grad, const Kept<T>& kept, Span<T>& span,
              long group) {
        for (long i = 0; i < this->live * this->D; i += W)
            T::put(this->numbers(this->narrow.data()) + i, load(grad + i));
        this->channels({nullptr, nullptr, weights.gate_up, weights.down}, kept, span, group);
    }
};

}  // namespace
