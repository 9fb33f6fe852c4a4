// Packets that blocks exchange through L2, barriers in shared memory, and who has which registers.

struct Packet { float a, b, c; unsigned exchange; };  // three numbers and the number of their exchange

// 16 bytes at once: who reads a packet has all of it or nothing of it.
__forceinline__ void put(Packet *to, float a, float b, float c, unsigned exchange) {
    const unsigned long long low = __float_as_uint(a) | (unsigned long long)__float_as_uint(b) << 32;
    const unsigned long long high = __float_as_uint(c) | (unsigned long long)exchange << 32;
    asm volatile("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.gpu.global.b128 [%0], v; }"
                 ::"l"(to), "l"(low), "l"(high) : "memory");
}

__forceinline__ Packet look(const Packet *from) {
    unsigned long long low, high;
    asm volatile("{ .reg .b128 v; ld.relaxed.gpu.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }"
                 : "=l"(low), "=l"(high) : "l"(from) : "memory");
    return {__uint_as_float((unsigned)low), __uint_as_float((unsigned)(low >> 32)), __uint_as_float((unsigned)high),
            (unsigned)(high >> 32)};
}

__forceinline__ bool is_there(unsigned bar, unsigned parity) {
    unsigned done;
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    return done;
}

// Until a barrier of this block alone has that phase. `wait` acquires for a cluster, which throws away
// what the multiprocessor has cached.
__forceinline__ void wait_for(unsigned bar, unsigned parity) {
    while (!is_there(bar, parity)) {
    }
}

__forceinline__ void arrive_at(unsigned bar) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Four warps (as many hand over registers together) are beside those that compute. Twelve warps begin with
// 168 registers a thread; those beside keep 24, so that the others have 240 and passes of several bytes spill
// little. Only machine code of an architecture's own, such as sm_90a, can do that.
constexpr int BESIDE = 128;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool MANY_REGISTERS = true;
#else
constexpr bool MANY_REGISTERS = false;
#endif

template <int COUNT> __forceinline__ void keep_registers() {
    if constexpr (MANY_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT> __forceinline__ void take_registers() {
    if constexpr (MANY_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
