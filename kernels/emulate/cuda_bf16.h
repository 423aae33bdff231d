// Stands before CUDA's header of this name when the kernels are compiled for the CPU.
#include "emulate.h"
