// How kernels of kernels/ops and kernels/attention begin, which are launched as those that wait by themselves (programmatic
// dependent launch, `CudaDevice::launch`): the kernel after this one may start, and has its blocks in place and a linear
// layer its first weights when this one ends; and this one waits here until those before it have ended.
#pragma once

__device__ __forceinline__ void overlap() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
