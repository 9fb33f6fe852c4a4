// Packets that blocks exchange through L2, and barriers in shared memory.

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

__forceinline__ void arrive_at(unsigned bar) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
