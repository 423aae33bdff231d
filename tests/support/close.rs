//! The one comparison of numbers: says where the worst difference is and how much of the tolerance it used, also on success.

#![allow(
    dead_code,
    reason = "every test file uses its own part of the shared code"
)]

/// How far a value may be off: by `abs`, plus by `rel_of_max` of the largest wanted magnitude.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tolerance {
    pub(crate) abs: f32,
    pub(crate) rel_of_max: f32,
}

/// Compares element by element with one allowance for all.
#[track_caller]
pub(crate) fn assert_close(name: &str, got: &[f32], want: &[f32], tolerance: Tolerance) {
    let largest = want.iter().fold(0.0f32, |max, v| max.max(v.abs()));
    let allowed = tolerance.abs + tolerance.rel_of_max * largest;
    check(name, got, want, |_| allowed);
}

/// Compares element by element, each relative to its own wanted value.
#[track_caller]
pub(crate) fn assert_close_relative(name: &str, got: &[f32], want: &[f32], relative: f32) {
    check(name, got, want, |want| relative * want.abs());
}

#[track_caller]
fn check(name: &str, got: &[f32], want: &[f32], allowed: impl Fn(f32) -> f32) {
    assert_eq!(got.len(), want.len(), "{name}: number of values");
    let used = |i: usize| {
        let difference = (f64::from(got[i]) - f64::from(want[i])).abs();
        let share = difference / f64::from(allowed(want[i]));
        // 0 of 0 is exact; a NaN is infinitely wrong.
        if difference == 0.0 {
            0.0
        } else if share.is_nan() {
            f64::INFINITY
        } else {
            share
        }
    };
    let worst = (0..got.len()).max_by(|&a, &b| used(a).total_cmp(&used(b)));
    let Some(worst) = worst else { return };
    let report = format!(
        "{name}: worst of {} at [{worst}]: got {:?}, want {:?}, {:.1}% of the tolerance",
        got.len(),
        got[worst],
        want[worst],
        100.0 * used(worst)
    );
    eprintln!("{report}");
    assert!(used(worst) <= 1.0, "{report}");
}
