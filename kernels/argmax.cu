// argmax: the place of the largest logit of each row: of equal ones the first, NaN before everything (torch.argmax); and the move
// to the next position of a decoder that runs without the host.
//
// Writes ids[r] = place. Where `log` is given also log[r * log_row + steps[r]] = place, and adds 1 to steps[r], positions[r],
// slots[r], and (row 0) to *before.
// Layouts: x [rows, columns] bfloat16 or float32 (X_FLOAT32), contiguous. Grid: rows; 1024 threads a row.
#include "elements.cuh"

typedef Element<X_FLOAT32 != 0>::type X;

struct Arguments {
    const X* x;
    long long* ids;
    long long* log;
    long long* steps;
    long long* positions;
    long long* slots;
    int* before;
    long long log_row;
    int columns;
};

// Whether b at j is to be taken rather than a at i.
__device__ __forceinline__ bool better(float b, int j, float a, int i) {
    const bool nan_a = a != a, nan_b = b != b;
    if (nan_a || nan_b) return nan_b && (!nan_a || j < i);
    return b > a || (b == a && j < i);
}

extern "C" __global__ void __launch_bounds__(1024) argmax(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    float* values = (float*)memory;
    int* places = (int*)(values + 1024);
    const X* x = a.x + (long long)blockIdx.x * a.columns;
    const int thread = threadIdx.x;
    float value = -__uint_as_float(0x7F800000u);
    int place = 0x7FFFFFFF;
    for (int i = thread; i < a.columns; i += 1024) {
        const float v = widen(x[i]);
        if (better(v, i, value, place)) value = v, place = i;
    }
    values[thread] = value, places[thread] = place;
    for (int half = 512; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half && better(values[thread + half], places[thread + half], values[thread], places[thread]))
            values[thread] = values[thread + half], places[thread] = places[thread + half];
    }
    if (thread != 0) return;
    const int row = blockIdx.x;
    a.ids[row] = places[0];
    if (a.log == nullptr) return;
    a.log[row * a.log_row + a.steps[row]] = places[0];
    a.steps[row] += 1, a.positions[row] += 1, a.slots[row] += 1;
    if (row == 0) *a.before += 1;
}
