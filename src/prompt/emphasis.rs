//! How attention weights act on the output of a text encoder.
//!
//! Follows A1111's `sd_emphasis`: the default restores the mean over the whole tensor, one value for all prompts, positions
//! and channels.

use std::fmt;
use std::str::FromStr;

use super::Error;

/// How attention weights act on the encoders' output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Emphasis {
    /// Multiply, then restore the mean.
    #[default]
    Original,
    /// Multiply only.
    NoNorm,
    /// Read the brackets, use no weight.
    Ignore,
    /// Brackets are ordinary text.
    None,
}

impl Emphasis {
    /// Every mode, in A1111's order.
    pub const ALL: [Self; 4] = [Self::None, Self::Ignore, Self::Original, Self::NoNorm];

    /// A1111's name, as in its `emphasis` setting and the infotext.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Ignore => "Ignore",
            Self::Original => "Original",
            Self::NoNorm => "No norm",
        }
    }

    /// Fragments and weights of `text`: parsed, or one literal fragment.
    #[must_use]
    pub fn fragments(self, text: &str) -> Vec<(String, f32)> {
        match self {
            Self::None => vec![(text.to_string(), 1.0)],
            _ => super::parse_attention(text),
        }
    }

    /// Weights the encoder output `z`, `[prompts, positions, channels]`, by one multiplier per prompt and position.
    ///
    /// # Errors
    /// [`Error::EmphasisShape`] if `z` is not `multipliers.len()` rows of equal length.
    pub fn apply(self, z: &mut [f32], multipliers: &[f32]) -> Result<(), Error> {
        let channels = z.len().checked_div(multipliers.len()).unwrap_or(0);
        if channels * multipliers.len() != z.len() {
            return Err(Error::EmphasisShape {
                values: z.len(),
                multipliers: multipliers.len(),
            });
        }
        if matches!(self, Self::Ignore | Self::None) || channels == 0 {
            return Ok(());
        }
        let before = sum(z);
        for (row, &multiplier) in z.chunks_exact_mut(channels).zip(multipliers) {
            for value in row {
                *value *= multiplier;
            }
        }
        if self == Self::Original {
            let ratio = (before / sum(z)) as f32;
            for value in z {
                *value *= ratio;
            }
        }
        Ok(())
    }
}

/// The mean's numerator; f64 because the mean of a hidden state is small beside its values.
fn sum(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value)).sum()
}

impl fmt::Display for Emphasis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

impl FromStr for Emphasis {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.label().eq_ignore_ascii_case(text.trim()))
            .ok_or_else(|| Error::UnknownEmphasis(text.to_string()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn original_restores_the_mean_of_the_whole_tensor() {
        // numpy: z = arange(1, 13).reshape(2, 3, 2); m = [[1, 1.5, 1], [1, .5, -1]]; z * m * (z.mean() / (z * m).mean())
        let mut z: Vec<f32> = (1..=12).map(|value| value as f32).collect();
        Emphasis::Original
            .apply(&mut z, &[1.0, 1.5, 1.0, 1.0, 0.5, -1.0])
            .unwrap();
        let ratio = 78.0 / 26.0;
        let expected = [
            1.0, 2.0, 4.5, 6.0, 5.0, 6.0, 7.0, 8.0, 4.5, 5.0, -11.0, -12.0,
        ]
        .map(|value: f32| value * ratio);
        assert!(
            z.iter()
                .zip(expected)
                .all(|(got, want)| (got - want).abs() < 1e-5),
            "{z:?}"
        );
    }

    #[test]
    fn other_modes_multiply_or_leave() {
        let mut z = vec![1.0, 2.0, 3.0, 4.0];
        Emphasis::Ignore.apply(&mut z, &[2.0, 3.0]).unwrap();
        Emphasis::NoNorm.apply(&mut z, &[2.0, 1.0]).unwrap();
        assert_eq!(z, [2.0, 4.0, 3.0, 4.0]);
        assert!(Emphasis::NoNorm.apply(&mut z, &[1.0; 3]).is_err());
        assert_eq!("no norm".parse::<Emphasis>().unwrap(), Emphasis::NoNorm);
        assert!("Loud".parse::<Emphasis>().is_err());
        assert_eq!(
            Emphasis::None.fragments("(a:2) BREAK"),
            [("(a:2) BREAK".to_string(), 1.0)]
        );
    }
}
