//! When a call goes without the negative prompt, trading guidance for speed (A1111's NGMS and "skip early CFG").

use super::infotext::{InfotextParams, python_bool, python_float};
use super::plan::Plan;

/// When the negative prompt is left out.
#[derive(Debug, Clone, Copy)]
pub(super) struct SkipRules {
    early: f32,
    below_sigma: f32,
    every_call: bool,
    expected_calls: usize,
    early_used: bool,
    below_used: bool,
}

impl SkipRules {
    pub(super) fn new(plan: &Plan) -> Self {
        Self {
            early: plan.options.skip_early_cond,
            below_sigma: plan.options.s_min_uncond,
            every_call: plan.options.s_min_uncond_all,
            expected_calls: plan.expected_calls(),
            early_used: false,
            below_used: false,
        }
    }

    /// What infotext says about the rules that have acted.
    pub(super) fn infotext(&self) -> InfotextParams {
        let mut params = InfotextParams::new();
        if self.early_used {
            params.push(("Skip Early CFG".to_string(), python_float(self.early)));
        }
        if self.below_used {
            params.push(("NGMS".to_string(), python_float(self.below_sigma)));
            if self.every_call {
                params.push(("NGMS all steps".to_string(), python_bool(true)));
            }
        }
        params
    }

    /// Whether a call goes without the negative prompt.
    ///
    /// `level` is sigma, or the timestep for the samplers that count in timesteps (as A1111 compares it).
    pub(super) fn skip(&mut self, call: usize, level: f32) -> bool {
        let early = self.early != 0.0 && call as f32 / self.expected_calls as f32 <= self.early;
        let below = self.below_sigma > 0.0
            && level < self.below_sigma
            && (call % 2 == 1 || self.every_call);
        self.early_used |= early;
        self.below_used |= below && !early;
        early || below
    }
}
