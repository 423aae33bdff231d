//! The words of the layers below, as the API and the command line spell them: samplers, schedulers, their options, and the
//! fields of an infotext.
//!
//! The one file of the outer rooms that knows how `sampling`, `prompt` and `rng` name things.

use serde_json::{Value, json};

use super::options::Options;
use super::types::Generation;
use crate::imaging::infotext::{Completion, parse};
use crate::pipeline::LatentMode;
use crate::prompt::{Emphasis, parse_attention};
use crate::rng::NoiseSource;
use crate::sampling::{Sampler, SamplerOptions, Scheduler, UniPcSkip, UniPcVariant};

/// Finds a sampler by label or alias in any letter case, with the scheduler its name may end in.
///
/// # Errors
/// A sentence with every valid name.
pub fn find_sampler(name: &str) -> Result<(Sampler, Option<Scheduler>), String> {
    Sampler::find_with_scheduler(name.trim())
        .ok_or_else(|| unknown("sampler", name, Sampler::all().map(Sampler::label)))
}

/// Finds a scheduler by name, label or alias in any letter case.
///
/// # Errors
/// A sentence with every valid name.
pub fn find_scheduler(name: &str) -> Result<Scheduler, String> {
    Scheduler::find(name.trim())
        .ok_or_else(|| unknown("scheduler", name, Scheduler::all().map(Scheduler::label)))
}

/// Hires fix's modes in latent space, in A1111's order.
pub const LATENT_UPSCALERS: &[LatentMode] = &LatentMode::ALL;

/// The option `randn_source`.
///
/// # Errors
/// A sentence with every valid name.
pub fn find_noise_source(name: &str) -> Result<NoiseSource, String> {
    name.parse().map_err(|_| {
        unknown(
            "noise source",
            name,
            NoiseSource::ALL.into_iter().map(NoiseSource::label),
        )
    })
}

/// The option `emphasis`.
///
/// # Errors
/// A sentence with every valid name.
pub fn find_emphasis(name: &str) -> Result<Emphasis, String> {
    name.parse().map_err(|_| {
        unknown(
            "emphasis",
            name,
            Emphasis::ALL.into_iter().map(Emphasis::label),
        )
    })
}

/// The sentence that says what is unknown and what there is.
fn unknown(what: &str, name: &str, valid: impl Iterator<Item = &'static str>) -> String {
    let valid: Vec<String> = valid.map(|name| format!("`{name}`")).collect();
    let shown: String = name.chars().take(100).collect();
    format!("unknown {what}: `{shown}`; valid: {}", valid.join(", "))
}

/// `GET /sdapi/v1/samplers`: exactly `{name, aliases, options}`, option values as text.
#[must_use]
pub fn samplers_json() -> Value {
    let row = |sampler: Sampler| {
        let options: serde_json::Map<String, Value> = sampler
            .options()
            .into_iter()
            .map(|(key, value)| (key.to_string(), Value::from(value)))
            .collect();
        json!({ "name": sampler.label(), "aliases": sampler.info().aliases, "options": options })
    };
    Sampler::all().map(row).collect()
}

/// `GET /sdapi/v1/schedulers`: exactly `{name, label, aliases, default_rho, need_inner_model}`.
#[must_use]
pub fn schedulers_json() -> Value {
    let row = |scheduler: Scheduler| {
        let info = scheduler.info();
        json!({
            "name": info.name,
            "label": info.label,
            "aliases": info.alias.map(|alias| vec![alias]),
            "default_rho": info.default_rho,
            "need_inner_model": info.need_inner_model,
        })
    };
    Scheduler::all().map(row).collect()
}

/// The solver's numbers from request and options. A churn setting that differs from its default beats the request, as in A1111.
#[must_use]
pub fn sampler_options(request: &Generation, options: &Options) -> SamplerOptions {
    let number = |key: &str| options.float(key) as f32;
    let defaults = SamplerOptions::default();
    let churn = |key: &str, sent: Option<f64>, default: f32| {
        let setting = number(key);
        let is_changed = (setting - default).abs() > f32::EPSILON;
        if is_changed {
            setting
        } else {
            sent.map_or(setting, |sent| sent as f32)
        }
    };
    SamplerOptions {
        eta: request.eta.map(|eta| eta as f32),
        eta_ancestral: number("eta_ancestral"),
        eta_ddim: number("eta_ddim"),
        s_churn: churn("s_churn", request.s_churn, defaults.s_churn),
        s_tmin: churn("s_tmin", request.s_tmin, defaults.s_tmin),
        s_tmax: churn("s_tmax", request.s_tmax, defaults.s_tmax),
        s_noise: churn("s_noise", request.s_noise, defaults.s_noise),
        s_min_uncond: request
            .s_min_uncond
            .map_or_else(|| number("s_min_uncond"), |sent| sent as f32),
        s_min_uncond_all: options.flag("s_min_uncond_all"),
        skip_early_cond: number("skip_early_cond"),
        sigma_min: number("sigma_min"),
        sigma_max: number("sigma_max"),
        rho: number("rho"),
        use_old_karras_scheduler_sigmas: options.flag("use_old_karras_scheduler_sigmas"),
        always_discard_next_to_last_sigma: options.flag("always_discard_next_to_last_sigma"),
        sgm_noise_multiplier: options.flag("sgm_noise_multiplier"),
        eta_noise_seed_delta: options.int("eta_noise_seed_delta"),
        no_dpmpp_sde_batch_determinism: options.flag("no_dpmpp_sde_batch_determinism"),
        uni_pc_variant: UniPcVariant::find(options.text("uni_pc_variant")).unwrap_or_default(),
        uni_pc_skip_type: UniPcSkip::find(options.text("uni_pc_skip_type")).unwrap_or_default(),
        uni_pc_order: options.int("uni_pc_order").clamp(1, 50) as usize,
        uni_pc_lower_order_final: options.flag("uni_pc_lower_order_final"),
        beta_dist_alpha: options.float("beta_dist_alpha"),
        beta_dist_beta: options.float("beta_dist_beta"),
    }
}

/// The fields of an infotext with A1111's defaults, as `png-info` answers them.
#[must_use]
pub fn infotext_fields(infotext: &str, back_compatible: bool) -> Value {
    let parsed = parse(infotext);
    let weighted_prompt = has_weights(&parsed.prompt) || has_weights(&parsed.negative_prompt);
    serde_json::to_value(parsed.fields(Completion {
        weighted_prompt,
        back_compatible,
    }))
    .unwrap_or_default()
}

/// Whether a part of a prompt weighs more or less than the rest.
#[must_use]
pub fn has_weights(prompt: &str) -> bool {
    parse_attention(prompt)
        .iter()
        .any(|(_, weight)| (*weight - 1.0).abs() > f32::EPSILON)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_leniently_and_errors_list_the_valid_ones() {
        assert!(find_sampler("dpm++ 2m KARRAS").unwrap().1.is_some());
        assert!(find_sampler("k_euler_a").is_ok());
        let error = find_sampler("Eulerr").unwrap_err();
        assert!(
            error.starts_with("unknown sampler: `Eulerr`; valid: `DPM++ 2M`, "),
            "{error}"
        );
        assert!(find_scheduler("automatic").is_ok() && find_scheduler("KARRAS").is_ok());
        assert_eq!(
            find_noise_source("x").unwrap_err(),
            "unknown noise source: `x`; valid: `GPU`, `CPU`, `NV`"
        );
    }

    #[test]
    fn sampler_option_values_are_text() {
        let rows = samplers_json();
        for row in rows.as_array().unwrap() {
            assert!(
                row["options"]
                    .as_object()
                    .unwrap()
                    .values()
                    .all(Value::is_string),
                "{row}"
            );
        }
    }
}
