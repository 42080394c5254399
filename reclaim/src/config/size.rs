//! Sizes and addresses as they are written in the configuration.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Bytes, written as `"512M"`, `"2.5GiB"`, `"0"` or a number. Letters are powers of 1024.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// A text that is no size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a size; write bytes with a unit, as in \"512M\" or \"2GiB\" (K, M, G, T: powers of 1024)"
)]
pub struct SizeError;

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let text = text.trim();
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = text
            .get(digits.len()..)
            .ok_or(SizeError)?
            .to_ascii_uppercase();
        let letter = unit.trim_end_matches("IB").trim_end_matches('B');
        let shift = match letter {
            "" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(SizeError),
        };
        let (whole, fraction) = digits.trim().split_once('.').unwrap_or((digits.trim(), ""));
        let factor = 1_u64 << shift;
        let whole: u64 = whole.parse().map_err(|_| SizeError)?;
        let bytes = whole.checked_mul(factor).ok_or(SizeError)?;
        if fraction.is_empty() {
            return Ok(Self(bytes));
        }
        // Up to six digits, so that nothing overflows.
        let digits: u64 = fraction.parse().map_err(|_| SizeError)?;
        let scale = u32::try_from(fraction.len()).ok().filter(|len| *len <= 6);
        let scale = 10_u64.pow(scale.ok_or(SizeError)?);
        let part = u128::from(digits) * u128::from(factor) / u128::from(scale);
        let part = u64::try_from(part).map_err(|_| SizeError)?;
        bytes.checked_add(part).map(Self).ok_or(SizeError)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];
        for (unit, shift) in units {
            if self.0 >= 1 << shift {
                let whole = self.0 >> shift;
                // Tenths, rounded down, by integers.
                let tenth = ((self.0 >> (shift - 10)) & 1023) * 10 / 1024;
                return if tenth == 0 || whole >= 100 {
                    write!(formatter, "{whole}{unit}")
                } else {
                    write!(formatter, "{whole}.{tenth}{unit}")
                };
            }
        }
        write!(formatter, "{}", self.0)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Size;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a size, as in \"512M\" or \"2GiB\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Size, E> {
                u64::try_from(number)
                    .map(Size)
                    .map_err(|_| E::custom("a size cannot be negative"))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Size, E> {
                Ok(Size(number))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        let good = [
            ("0", 0),
            ("4096", 4096),
            ("1K", 1 << 10),
            ("512M", 512 << 20),
            ("2GiB", 2 << 30),
            ("1.5g", 3 << 29),
            ("0.25 T", 1 << 38),
            ("7kb", 7 << 10),
        ];
        for (text, bytes) in good {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in [
            "",
            "M",
            "-1M",
            "1X",
            "1.M2",
            "99999999999T",
            "1.1234567G",
            "ö",
        ] {
            assert_eq!(text.parse::<Size>(), Err(SizeError), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_short() {
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023"),
            (1 << 20, "1M"),
            (3 << 29, "1.5G"),
            (300 << 30, "300G"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }
}
