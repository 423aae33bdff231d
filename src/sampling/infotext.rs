//! What a run adds to infotext: options that differ from their defaults, under A1111's names and in Python's spelling.

#![allow(
    clippy::float_cmp,
    reason = "an option is compared with its own default"
)]

use super::Sampler;
use super::options::SamplerOptions;
use super::sampler::{Eta, Flag, TCD_GAMMA};

/// Keys and values of infotext, in order.
pub type InfotextParams = Vec<(String, String)>;

/// A number as Python prints a float.
pub(super) fn python_float(value: f32) -> String {
    format!("{value:?}")
}

/// A boolean as Python prints it.
pub(super) fn python_bool(value: bool) -> String {
    if value { "True" } else { "False" }.to_string()
}

/// Infotext of the solver's own numbers, where they are not the defaults.
pub(super) fn describe_solver(
    sampler: Sampler,
    options: &SamplerOptions,
    say: &mut impl FnMut(&str, String),
) {
    let mut number = |key: &str, value: f32, default: f32| {
        if value != default {
            say(key, python_float(value));
        }
    };
    match sampler.info().eta {
        Eta::Unused => {}
        Eta::Ancestral => number("Eta", sampler.eta(options), 1.0),
        Eta::Ddim => number("Eta DDIM", sampler.eta(options), 0.0),
        Eta::Tcd => number("Eta", sampler.eta(options), TCD_GAMMA),
    }
    if sampler.has(Flag::Churn) {
        number("Sigma churn", options.s_churn, 0.0);
        number("Sigma tmin", options.s_tmin, 0.0);
        number("Sigma tmax", options.s_tmax, 0.0);
    }
    if sampler.has(Flag::Noise) {
        number("Sigma noise", options.s_noise, 1.0);
    }
    if sampler == Sampler::UniPc {
        describe_unipc(options, say);
    }
}

fn describe_unipc(options: &SamplerOptions, say: &mut impl FnMut(&str, String)) {
    let default = SamplerOptions::default();
    if options.uni_pc_variant != default.uni_pc_variant {
        say("UniPC variant", options.uni_pc_variant.name().to_string());
    }
    if options.uni_pc_skip_type != default.uni_pc_skip_type {
        say(
            "UniPC skip type",
            options.uni_pc_skip_type.name().to_string(),
        );
    }
    if options.uni_pc_order != default.uni_pc_order {
        say("UniPC order", options.uni_pc_order.to_string());
    }
    if options.uni_pc_lower_order_final != default.uni_pc_lower_order_final {
        say(
            "UniPC lower order final",
            python_bool(options.uni_pc_lower_order_final),
        );
    }
}
