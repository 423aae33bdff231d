//! A1111's settings that change how a job is carried out, with A1111's defaults; what a request says itself is not here.
//!
//! A setting that changes nothing in a job leaves no trace in its infotext. Follows `shared_options.py` of A1111 1.10.

use super::padding::PadConds;
use crate::imaging::infotext::Params;
use crate::prompt::{COMMA_BACKTRACK, EditRule};
use crate::sampling::{SigmaTable, TableOptions};

/// The settings of one job.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Top and left of the crop SDXL is told, pixels (`sdxl_crop_top`, `sdxl_crop_left`).
    pub crop: (usize, usize),
    /// Let the request's clip skip act on CLIP-L: 1 reads its last layer, 2 the one before, as SDXL was trained
    /// (`sdxl_clip_l_skip`).
    pub clip_l_skip: bool,
    /// Tokens that may move to the next chunk so that it starts after a comma (`comma_padding_backtrack`).
    pub comma_backtrack: usize,
    /// Take `#` and what follows it on its line out of prompts (`enable_prompt_comments`).
    pub strip_comments: bool,
    /// How the numbers of prompt editing are read (`use_old_scheduling`).
    pub edit_rule: EditRule,
    /// How prompts of different length are brought together (`pad_cond_uncond`, `pad_cond_uncond_v0`).
    pub padding: PadConds,
    /// Encode the second pass's prompts with the LoRAs of the first (`hires_fix_use_firstpass_conds`).
    pub firstpass_conds: bool,
    /// Noise added to the second pass's start besides (`img2img_extra_noise`).
    pub hires_extra_noise: f32,
    /// How far an inpainting checkpoint is shown what is under the mask, as infotext says it (`inpainting_mask_weight`).
    pub mask_weight: f32,
    /// The training schedule (`sd_noise_schedule`, `use_downcasted_alpha_bar`, `enable_quantization`).
    pub table: TableOptions,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            crop: (0, 0),
            clip_l_skip: false,
            comma_backtrack: COMMA_BACKTRACK,
            strip_comments: true,
            edit_rule: EditRule::Current,
            padding: PadConds::Apart,
            firstpass_conds: false,
            hires_extra_noise: 0.0,
            mask_weight: 1.0,
            table: TableOptions::default(),
        }
    }
}

impl Settings {
    /// The training schedule of a checkpoint whose own is `own` under these settings.
    pub(super) fn table(&self, own: TableOptions) -> SigmaTable {
        SigmaTable::new(TableOptions {
            zero_terminal_snr: own.zero_terminal_snr || self.table.zero_terminal_snr,
            ..self.table
        })
    }

    /// What infotext says about the training schedule.
    pub(super) fn schedule_infotext(&self) -> Params {
        let mut p = Params::new();
        p.insert_some(
            "Downcast alphas_cumprod",
            self.table.downcast_alphas.then_some(true),
        );
        p.insert_some(
            "Noise Schedule",
            self.table.zero_terminal_snr.then_some("Zero Terminal SNR"),
        );
        p
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changed_schedules_are_mentioned() {
        assert!(Settings::default().schedule_infotext().is_empty());
        let settings = Settings {
            table: TableOptions {
                downcast_alphas: true,
                zero_terminal_snr: true,
                quantize: true,
            },
            ..Settings::default()
        };
        assert_eq!(
            settings.schedule_infotext().to_line(),
            "Downcast alphas_cumprod: True, Noise Schedule: Zero Terminal SNR"
        );
    }

    #[test]
    fn a_checkpoint_trained_to_zero_snr_stays_so() {
        let own = TableOptions {
            zero_terminal_snr: true,
            ..TableOptions::default()
        };
        let sigma_max = |own| Settings::default().table(own).sigma_max();
        assert!((sigma_max(TableOptions::default()) - 14.614_642).abs() < 1e-4);
        assert!((sigma_max(own) / 4518.76 - 1.0).abs() < 1e-5);
    }
}
