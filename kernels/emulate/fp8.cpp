#include "../fp8.cu"

#include "launch.h"

int main() {
    return emulation::run({
        ENTRIES(quantise_rows)
        ENTRIES(dequantise)
        ENTRY(widen_e4m3)
    });
}
