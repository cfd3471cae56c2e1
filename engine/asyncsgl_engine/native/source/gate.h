/* Where the threads of a step wait for each other, some 240 times a step. */

#ifndef ASYNCSGL_GATE_H
#define ASYNCSGL_GATE_H

#include <sched.h>
#include <stdint.h>

/* The compiler's own barrier spins for milliseconds. On a processor that others use too, that is
   time which the thread that is waited for may need to run at all; so this one soon yields. */
#define SPINS 1000

typedef struct {
    _Alignas(64) int64_t arrived;
    _Alignas(64) int64_t round;
} Gate;

static inline void rest(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Goes on when all threads of the team have come. */
static inline void meet(Gate *gate, int threads) {
    const int64_t round = __atomic_load_n(&gate->round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&gate->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&gate->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&gate->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int64_t turn = 0; __atomic_load_n(&gate->round, __ATOMIC_ACQUIRE) == round; turn++)
        if (turn < SPINS)
            rest();
        else
            sched_yield();
}

#endif
