// Argument structs and constants shared by the kernels and Rust.
//
// Plain C with <stdint.h> alone: nvcc includes it, and bindgen turns it into `device::cuda::embedded::abi`. Each kernel
// takes exactly one struct, by value, named after it: `rms_norm` takes `RmsNormArgs`. Pointers are device addresses and
// are declared uint64_t; every field says its shape and dtype.
#ifndef LOWBIT_ABI_H
#define LOWBIT_ABI_H

#include <stdint.h>

// Lanes of a warp, on every architecture we build for.
#define WARP_SIZE 32

#endif
