// The deviation of a Gaussian, from what its head gives.
#pragma once

#include "lanes.h"

namespace {

// floor + softplus(x + offset), or floor + exp(x + offset).
struct Deviation {
    float offset, floor;
    bool exponential;

    struct Value {
        Lanes std, slope;  // its derivative
    };
    Value of(Lanes x) const {
        x += offset;
        if (exponential) {
            const Lanes power = ::exponential(x);
            return {floor + power, power};
        }
        const Lanes zero{}, one = zero + 1.f, small = ::exponential(x > zero ? -x : x);
        const Lanes softplus = (x > zero ? x : zero) + log_one_plus(small);
        return {floor + softplus, (x > zero ? one : small) / (small + 1.f)};
    }
};

}  // namespace
