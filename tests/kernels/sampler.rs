//! What happens between two calls of the network, against a formula in `f64`.

use crate::emulation::{Arg, Grid, Type, compare_within, launch, noise};

#[test]
fn latents_are_combined() {
    for count in 1..=8 {
        let inputs: Vec<Vec<f32>> = (0..8).map(|i| noise(20 + i, 300)).collect();
        let c = noise(9, 8);
        // In place: the result is the first input.
        let mut args = vec![Arg::values(Type::F32, &inputs[0]), Arg::Again(0, 0)];
        args.extend((1..8).map(|i| Arg::optional(Type::F32, inputs.get(i).filter(|_| i < count))));
        args.extend(c.iter().copied().map(Arg::Float));
        args.extend([Arg::Int(count), Arg::Long(300)]);
        let out = Type::F32.decode(&launch("sampler", "combine_latents", Grid::any(), &args)[0]);
        let want: Vec<f32> = (0..300)
            .map(|i| {
                (0..count)
                    .map(|j| f64::from(c[j]) * f64::from(inputs[j][i]))
                    .sum::<f64>() as f32
            })
            .collect();
        // Eight roundings to f32.
        compare_within(&format!("combine_latents of {count}"), 1e-6, &out, &want);
    }
}
