// Element types for kernels compiled without CUDA's headers: bfloat16 and float16 as raw bits.

typedef long long int64;

struct bfloat16 {
    unsigned short bits;
};

struct float16 {
    unsigned short bits;
};

inline float load(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

inline float load(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

inline float load(float x) { return x; }

inline void store(bfloat16 &to, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }

inline void store(float16 &to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }

inline void store(float &to, float x) { to = x; }

// V neighbouring channels, read and written at once.
template <class T, int V> struct alignas(sizeof(T) * V) Pack {
    T at[V];
};

// The reciprocal to 1 unit in the last place: a division would be a dozen instructions.
inline float sigmoid(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(1.f + __expf(-x)));
    return y;
}
