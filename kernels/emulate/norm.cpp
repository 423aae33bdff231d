#include "../norm.cu"

#include "launch.h"

int main() {
    return emulation::run({
        ENTRIES(group_norm_statistics)
        ENTRIES(group_norm_apply)
        ENTRIES(channel_sums)
        ENTRIES(group_affine)
        ENTRIES(channel_affine)
        ENTRIES(layer_norm)
        ENTRIES(layer_norm_fp8)
        ENTRY(channel_sums_add)
    });
}
