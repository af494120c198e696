// Stands in for kernels/mma.cuh.
#pragma once
#include "kernel.h"
