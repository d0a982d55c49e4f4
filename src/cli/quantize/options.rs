//! Values of `quantize`'s flags.

use clap::ValueEnum;

use crate::models::quantize::{Activation, Observer};
use crate::quant::affine::Mapping;

use super::super::options::parse_number;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum KvScalesName {
    Tensor,
    Head,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum MappingName {
    /// amax / 7 (of 4 bits), the lowest code never used
    Narrow,
    /// 2 amax / 15
    Centered,
    /// amax / 7
    MaxClip,
    /// amax / 8, with the sign by which the largest weight gets the lowest code
    SignedFull,
    /// As centered, in whole multiples of one scale an output channel (QServe): `w4a8` in groups runs faster
    Progressive,
    /// From the smallest to the largest weight, with a zero point
    Asymmetric,
}

impl MappingName {
    pub(super) fn mapping(self) -> Mapping {
        match self {
            MappingName::Narrow => Mapping::Narrow,
            MappingName::Centered => Mapping::Centered,
            MappingName::MaxClip => Mapping::MaxClip,
            MappingName::SignedFull => Mapping::SignedFull,
            MappingName::Progressive => Mapping::Progressive,
            MappingName::Asymmetric => Mapping::Asymmetric,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ActOrderName {
    None,
    Static,
    GroupAware,
    Dynamic,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum FormatName {
    Gptq,
    GptqV2,
    Awq,
    CompressedTensors,
    Bitsandbytes,
    Hqq,
    Codebook,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct SchemeName {
    pub(super) bits: u8,
    pub(super) activation: Activation,
}

impl SchemeName {
    pub(super) fn parse(text: &str) -> Result<SchemeName, String> {
        let bad = || {
            format!(
                "`{text}`: expected w2a16 to w8a16, w2a8 to w8a8, or one of these with -asym, -static or -static-asym"
            )
        };
        let (bits, rest) = text.strip_prefix('w').and_then(|s| s.split_once('a')).ok_or_else(bad)?;
        let activation = match rest {
            "16" => Activation::None,
            "8" => Activation::Dynamic { asymmetric: false },
            "8-asym" => Activation::Dynamic { asymmetric: true },
            "8-static" => Activation::Static { asymmetric: false, observer: Observer::Mse },
            "8-static-asym" => Activation::Static { asymmetric: true, observer: Observer::Mse },
            _ => return Err(bad()),
        };
        let bits = bits.parse().ok().filter(|b| (2..=8).contains(b)).ok_or_else(bad)?;
        Ok(SchemeName { bits, activation })
    }
}

pub(super) fn parse_fraction(text: &str) -> Result<f64, String> {
    parse_number(text, "a number from 0 to 1", |x| (0.0..=1.0).contains(x))
}

pub(super) fn parse_threshold(text: &str) -> Result<f64, String> {
    parse_number(text, "a number, 0 or more", |x| (0.0..=1e30).contains(x))
}

pub(super) fn parse_observer(text: &str) -> Result<Observer, String> {
    match text {
        "minmax" => Ok(Observer::MinMax),
        "mse" => Ok(Observer::Mse),
        "percentile" => Ok(Observer::Percentile(99.99)),
        "entropy" => Ok(Observer::Entropy),
        "ema" => Ok(Observer::MovingAverage),
        _ => {
            let percent: Option<f64> = text.strip_prefix("percentile:").and_then(|p| p.parse().ok());
            let percent = percent.filter(|p| *p > 0.0 && *p <= 100.0);
            let bad =
                || format!("`{text}`: expected minmax, mse, percentile, percentile:P (0 < P <= 100), entropy or ema");
            percent.map(Observer::Percentile).ok_or_else(bad)
        }
    }
}

pub(super) fn parse_bpw(text: &str) -> Result<f64, String> {
    parse_number(text, "a number above 0 and below 16", |x| *x > 0.0 && *x < 16.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes() {
        let parse = |text: &str| SchemeName::parse(text).map(|s| (s.bits, s.activation));
        assert_eq!(parse("w4a16"), Ok((4, Activation::None)));
        assert_eq!(parse("w8a8"), Ok((8, Activation::Dynamic { asymmetric: false })));
        assert_eq!(
            parse("w8a8-static-asym"),
            Ok((8, Activation::Static { asymmetric: true, observer: Observer::Mse }))
        );
        for bad in ["", "w4", "w1a16", "w9a16", "w4a4", "w8a8-dynamic", "4a16"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
