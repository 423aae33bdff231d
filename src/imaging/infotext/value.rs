//! Values of the parameter line, printed as Python prints them: A1111's readers compare text.

use std::fmt;

/// A value of the parameter line.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Text, unquoted.
    Text(String),
    /// An integer: `20`.
    Int(i128),
    /// A float: `7.0`, `1e-05`.
    Float(f64),
    /// `True` or `False`.
    Bool(bool),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Int(number) => write!(f, "{number}"),
            Self::Float(number) => f.write_str(&python_float(*number)),
            Self::Bool(true) => f.write_str("True"),
            Self::Bool(false) => f.write_str("False"),
        }
    }
}

/// The JSON type a Python program would give it.
impl serde::Serialize for Value {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => serializer.serialize_str(text),
            Self::Int(number) => serializer.serialize_i128(*number),
            Self::Float(number) => serializer.serialize_f64(*number),
            Self::Bool(value) => serializer.serialize_bool(*value),
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_string())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Float(number)
    }
}

/// The f64 nearest to the shortest decimal that names this f32: `0.1f32` is `0.1`, not `0.10000000149`.
impl From<f32> for Value {
    fn from(number: f32) -> Self {
        Self::Float(number.to_string().parse().unwrap_or(f64::from(number)))
    }
}

macro_rules! from_integers {
    ($($integer:ty)*) => {$(
        impl From<$integer> for Value {
            fn from(number: $integer) -> Self {
                Self::Int(i128::from(number))
            }
        }
    )*};
}
from_integers!(i32 i64 u8 u32 u64);

impl From<usize> for Value {
    fn from(number: usize) -> Self {
        Self::Int(number as i128)
    }
}

/// Python's `repr` of a float: the shortest digits that read back, with an exponent below 1e-4 and from 1e16 on.
///
/// ```
/// use sdgen::imaging::infotext::python_float;
/// assert_eq!([7.0, 0.35, 1e-5, 1e16].map(python_float), ["7.0", "0.35", "1e-05", "1e+16"]);
/// ```
#[must_use]
pub fn python_float(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 {
            "inf".into()
        } else {
            "-inf".into()
        };
    }
    let scientific = format!("{number:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        return format!("{number:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_in_python() {
        // python3 -c "print([repr(x) for x in (...)])"
        for (number, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (20.0, "20.0"),
            (0.1 + 0.2, "0.30000000000000004"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (9_007_199_254_740_993.0, "9007199254740992.0"),
            (1e16, "1e+16"),
            (1.25e22, "1.25e+22"),
            (1e-300, "1e-300"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(python_float(number), text);
        }
    }

    #[test]
    fn f32_prints_its_own_shortest_digits() {
        assert_eq!(Value::from(0.1f32).to_string(), "0.1");
        assert_eq!(Value::from(7.0f32).to_string(), "7.0");
        assert_eq!(Value::from(1.0f32 / 3.0).to_string(), "0.33333334");
        assert_eq!(
            [Value::from(true), Value::from(u64::MAX), Value::from("x")]
                .map(|value| value.to_string())
                .join(" "),
            "True 18446744073709551615 x"
        );
    }
}
