#include "../gemm.cu"

#include "launch.h"

int main() {
    return emulation::run({
        ENTRIES_16_BIT(linear_128x128)
        ENTRIES_16_BIT(conv_128x128)
        ENTRIES(linear_64x64)
        ENTRIES(conv_64x64)
    });
}
