// What the Python beside this file calls: it is compiled for the processor that it finds.

#include "attention_call.h"
#include "heads_call.h"
#include "transition_call.h"

template <class Call>
int in_format(const Call& call, int (*half)(const Call&), int (*single)(const Call&)) {
    try {
        return call.half ? half ? half(call) : UNFIT : single(call);
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}

#ifdef __AVX512BF16__
#define IN_FORMAT(f) return in_format(*call, f<Half>, f<Single>)
#else
#define IN_FORMAT(f) return in_format(*call, {}, f<Single>)
#endif

// 0: done; UNFIT: not a format or width of these files; NO_MEMORY.
extern "C" {
int gram_attend(const AttentionCall* call) { IN_FORMAT(attend); }
int gram_heads(const HeadsCall* call) { IN_FORMAT(run_heads); }
int gram_heads_backward(const HeadsCall* call) { IN_FORMAT(run_heads_backward); }
int gram_transitions(const TransitionCall* call) { IN_FORMAT(run_transitions); }
int gram_recursion_backward(const TransitionCall* call) { IN_FORMAT(run_backward); }
}
