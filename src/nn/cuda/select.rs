//! Which of several implementations of one operation runs, decided once per shape by measurement.
//!
//! Invariant: ours is the measure of correctness. What differs from it by more than its type's rounding is out, however fast.

use super::choice::KernelChoice;
use super::geometry::Kind;

/// Values compared at the beginning, in the middle and at the end of a result.
pub(super) const SAMPLE: usize = 1 << 16;

/// What was found about a candidate of the library.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trial {
    /// Median of a run, milliseconds.
    pub(super) milliseconds: f32,
    /// Largest difference to ours, relative to our largest value.
    pub(super) difference: f32,
}

/// Largest relative difference between two correct results: each rounds once, to half of 2^-8 (bf16) or 2^-11 (f16) of a value; f32
/// sums of 12 thousand products in another order differ by 1e-5.
pub(super) fn tolerance(kind: Kind) -> f32 {
    match kind {
        Kind::Bf16 => 1e-2,
        Kind::F16 => 2e-3,
        Kind::F32 => 1e-4,
    }
}

/// Which candidates are worth trying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contest {
    /// Ours, without a look.
    Own,
    /// The library's first, without a look.
    First,
    /// All of them, measured.
    Measure,
}

/// How a choice is met where the library offers `candidates`.
pub(super) fn contest(choice: KernelChoice, candidates: usize) -> Contest {
    match (choice, candidates) {
        (KernelChoice::Own, _) | (_, 0) => Contest::Own,
        (KernelChoice::Library, _) => Contest::First,
        (KernelChoice::Auto, _) => Contest::Measure,
    }
}

/// The index of the fastest candidate that is right and faster than ours; `None` = ours.
pub(super) fn fastest(kind: Kind, own_milliseconds: f32, trials: &[Trial]) -> Option<usize> {
    let right = |trial: &Trial| trial.difference <= tolerance(kind);
    let candidates = trials.iter().enumerate().filter(|(_, trial)| right(trial));
    candidates
        .min_by(|a, b| a.1.milliseconds.total_cmp(&b.1.milliseconds))
        .filter(|(_, trial)| trial.milliseconds < own_milliseconds)
        .map(|(index, _)| index)
}

/// Largest difference of `got` to `want` relative to the largest of `want`; infinite if any is not finite.
pub(super) fn difference(want: &[f32], got: &[f32]) -> f32 {
    if want.iter().chain(got).any(|v| !v.is_finite()) {
        return f32::INFINITY;
    }
    let largest = want.iter().fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
    let apart = want.iter().zip(got).map(|(want, got)| (want - got).abs());
    apart.fold(0f32, f32::max) / largest
}

/// Where [`SAMPLE`] values are read of `count`: offset and length of each part, not overlapping.
pub(super) fn samples(count: usize) -> Vec<(usize, usize)> {
    if count <= 3 * SAMPLE {
        return vec![(0, count)];
    }
    [0, (count - SAMPLE) / 2, count - SAMPLE]
        .map(|offset| (offset, SAMPLE))
        .to_vec()
}

/// The median of some times.
pub(super) fn median(times: &mut [f32]) -> f32 {
    times.sort_by(f32::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f32::INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(milliseconds: f32, difference: f32) -> Trial {
        Trial {
            milliseconds,
            difference,
        }
    }

    #[test]
    fn the_fastest_right_candidate_wins_and_ours_wins_ties() {
        let trials = [trial(3.0, 0.0), trial(1.0, 0.5), trial(2.0, 4e-3)];
        assert_eq!(fastest(Kind::Bf16, 5.0, &trials), Some(2));
        assert_eq!(
            fastest(Kind::F16, 5.0, &trials),
            Some(0),
            "4e-3 is too much for f16"
        );
        assert_eq!(fastest(Kind::Bf16, 2.0, &trials), None);
        assert_eq!(fastest(Kind::Bf16, 2.0, &[]), None);
    }

    #[test]
    fn a_choice_decides_whether_anything_is_measured() {
        assert_eq!(contest(KernelChoice::Auto, 3), Contest::Measure);
        assert_eq!(contest(KernelChoice::Library, 3), Contest::First);
        assert_eq!(
            contest(KernelChoice::Library, 0),
            Contest::Own,
            "no library, or it has nothing"
        );
        assert_eq!(contest(KernelChoice::Own, 3), Contest::Own);
    }

    #[test]
    fn differences_are_relative_to_the_largest_value() {
        let is = |want: &[f32], got: &[f32], apart: f32| {
            let found = difference(want, got);
            assert!(found.to_bits() == apart.to_bits(), "{found} for {apart}");
        };
        is(&[0.0, -4.0], &[0.0, -3.0], 0.25);
        is(&[1.0], &[f32::NAN], f32::INFINITY);
        is(&[f32::INFINITY], &[f32::INFINITY], f32::INFINITY);
        is(&[0.0], &[0.0], 0.0);
    }

    #[test]
    fn one_slow_run_does_not_count() {
        assert!(median(&mut [2.0, 90.0, 1.0, 3.0, 2.5]) < 2.6);
        assert!(median(&mut []).is_infinite());
    }

    #[test]
    fn samples_lie_inside_and_do_not_overlap() {
        assert_eq!(samples(100), [(0, 100)]);
        for count in [3 * SAMPLE + 1, 10 * SAMPLE + 7] {
            let parts = samples(count);
            assert_eq!(parts.len(), 3);
            assert!(parts.windows(2).all(|p| p[0].0 + p[0].1 <= p[1].0));
            assert_eq!(parts[2].0 + parts[2].1, count);
        }
    }
}
