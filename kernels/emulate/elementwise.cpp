#include "../elementwise.cu"

#include "launch.h"

int main() {
    return emulation::run({
        ENTRIES(concat_channels)
        ENTRIES(activate)
        ENTRIES(add)
        ENTRIES(geglu)
        ENTRIES(geglu_pairs)
        ENTRIES(finish)
        ENTRIES(upsample_nearest)
        ENTRY(cast_bf16_f16)
        ENTRY(cast_bf16_f32)
        ENTRY(cast_f16_bf16)
        ENTRY(cast_f16_f32)
        ENTRY(cast_f32_bf16)
        ENTRY(cast_f32_f16)
    });
}
