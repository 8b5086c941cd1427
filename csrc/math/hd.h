// Formulas under csrc/math are written once and compiled for the host and for the device.
//
// Results must be bit-identical everywhere, so every rounding is explicit: the host compiles with
// -ffp-contract=off, where a·b + c is two roundings and std::fma one.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SANM_HD __host__ __device__ __forceinline__
#else
#define SANM_HD inline
#endif
