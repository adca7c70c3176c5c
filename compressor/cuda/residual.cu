// Passes over whole matrices between products: W − Q, W beside others, and how far two are apart. NVRTC compiles them,
// `residual.py` launches them. Matrices are (I, O), a column of the layer's weight after the other.

constexpr int SLOT = 32, THREADS = 128, HEIGHT = 4;
constexpr unsigned ALL = ~0u;

#ifdef __CUDACC__
__device__ float from_half(unsigned short half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}
__device__ unsigned short to_half(float x) {
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}
#endif

// Numbers of neighbouring rows, which are read and written at once where `aligned` says that they can be.
template <typename T> struct alignas(sizeof(T) * HEIGHT) Rows {
    T of[HEIGHT];
};

template <typename T> __device__ Rows<T> fetched(const T* from, int count, bool aligned) {
    if (aligned) return *(const Rows<T>*)from;
    Rows<T> found = {};
#pragma unroll
    for (int i = 0; i < HEIGHT; i++)
        if (i < count) found.of[i] = from[i];
    return found;
}

template <typename T> __device__ void store(T* onto, const Rows<T>& x, int count, bool aligned) {
    if (aligned) {
        *(Rows<T>*)onto = x;
        return;
    }
#pragma unroll
    for (int i = 0; i < HEIGHT; i++)
        if (i < count) onto[i] = x.of[i];
}

// 2^exponent (W − (code − zero) · scale), in float16 and within its range. Codes and what is found are (I, O), a column
// every so many numbers; scales, bfloat16, and zeros have a row of Q and a group every so many.
extern "C" __global__ void __launch_bounds__(THREADS) subtract_quantized(
    const float* w_IO, const unsigned char* code_IO, const unsigned short* scale_OG, const unsigned char* zero_OG,
    unsigned short* found_IO, int exponent, int aligned, int rows, int columns, int group_size, int code_stride,
    int found_stride, int scale_row, int scale_group, int zero_row, int zero_group
) {
    int row = (blockIdx.x * THREADS + threadIdx.x) * HEIGHT, first = blockIdx.y * SLOT, group = first / group_size;
    int height = min(HEIGHT, rows - row), count = min(SLOT, columns - first);
    if (height <= 0) return;
    float scale[HEIGHT], zero[HEIGHT], by = ldexpf(1.0f, exponent);
#pragma unroll
    for (int i = 0; i < HEIGHT; i++) {
        long there = row + min(i, height - 1);
        scale[i] = __uint_as_float((unsigned)scale_OG[there * scale_row + (long)group * scale_group] << 16);
        zero[i] = zero_OG[there * zero_row + (long)group * zero_group];
    }
    w_IO += (long)first * rows + row;
    code_IO += (long)first * code_stride + row;
    found_IO += (long)first * found_stride + row;
#pragma unroll 8
    for (int column = 0; column < count; column++) {
        Rows<float> w = fetched(w_IO + (long)column * rows, height, aligned);
        Rows<unsigned char> code = fetched(code_IO + (long)column * code_stride, height, aligned);
        Rows<unsigned short> found;
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) {
            float error = (w.of[i] - (code.of[i] - zero[i]) * scale[i]) * by;
            found.of[i] = to_half(fminf(fmaxf(error, -65504.0f), 65504.0f));
        }
        store(found_IO + (long)column * found_stride, found, height, aligned);
    }
}

// A matrix (I, O) beside others: a column every so many numbers.
extern "C" __global__ void __launch_bounds__(THREADS) put_columns(
    const float* w_IO, float* found_IO, int aligned, int rows, int columns, int found_stride
) {
    int row = (blockIdx.x * THREADS + threadIdx.x) * HEIGHT, first = blockIdx.y * SLOT;
    int height = min(HEIGHT, rows - row), count = min(SLOT, columns - first);
    if (height <= 0) return;
    w_IO += (long)first * rows + row;
    found_IO += (long)first * found_stride + row;
#pragma unroll 8
    for (int column = 0; column < count; column++)
        store(
            found_IO + (long)column * found_stride, fetched(w_IO + (long)column * rows, height, aligned), height, aligned
        );
}

// Of every thread block its part of Σ (unit · a − b)²; a has a column every so many numbers.
extern "C" __global__ void __launch_bounds__(THREADS) squared_distance(
    const unsigned short* a_IO, const float* b_IO, float* part_B, int exponent, int aligned, int rows, int columns,
    int a_stride
) {
    __shared__ float of_warp[THREADS / 32];
    int row = (blockIdx.x * THREADS + threadIdx.x) * HEIGHT, first = blockIdx.y * SLOT;
    int height = min(HEIGHT, rows - row), count = height > 0 ? min(SLOT, columns - first) : 0;
    float unit = ldexpf(1.0f, exponent), sum = 0;
    a_IO += (long)first * a_stride + row;
    b_IO += (long)first * rows + row;
#pragma unroll 8
    for (int column = 0; column < count; column++) {
        Rows<unsigned short> a = fetched(a_IO + (long)column * a_stride, height, aligned);
        Rows<float> b = fetched(b_IO + (long)column * rows, height, aligned);
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) {
            float apart = from_half(a.of[i]) * unit - b.of[i];
            sum = fmaf(apart, apart, sum);
        }
    }
    for (int apart = 1; apart < 32; apart *= 2) sum += __shfl_xor_sync(ALL, sum, apart);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    for (int warp = 1; warp < THREADS / 32; warp++) sum += of_warp[warp];
    part_B[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}
