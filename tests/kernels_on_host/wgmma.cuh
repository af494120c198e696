// Stands in for kernels/wgmma.cuh.
#pragma once
#include "kernel.h"
