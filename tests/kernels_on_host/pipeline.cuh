// Stands in for kernels/pipeline.cuh.
#pragma once
#include "kernel.h"
