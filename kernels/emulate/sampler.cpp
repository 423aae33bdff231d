#include "../sampler.cu"

#include "launch.h"

int main() {
    return emulation::run({
        ENTRIES(scale_input)
        ENTRIES(guide)
        ENTRIES(check_finite)
        ENTRY(combine_latents)
        ENTRY(mask_blend)
        ENTRY(advance_step)
    });
}
