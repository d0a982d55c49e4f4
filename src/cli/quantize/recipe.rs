//! From flags to a recipe, and what is wrong with flags together.

use clap::ValueEnum;

use crate::checkpoint::write::{Format, KvScales};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::models::quantize::{Activation, LayerScheme, Recipe, Rule, Target, overrides};
use crate::quant::affine::Mapping;
use crate::quant::factored::COLUMNS;
use crate::quant::gptq::{ActOrder, GptqOptions};
use crate::quant::grid::{Grid, Search};

use super::Args;
use super::methods::MethodName;
use super::options::{ActOrderName, FormatName, KvScalesName, MappingName, SchemeName};
use super::rules::{LayerSpec, RuleSpec};

impl Args {
    /// Fails when an option is there that the method does not have.
    fn check(&self) -> Result<()> {
        let (method, name) = (self.method, self.method.name());
        if method != MethodName::Qat {
            self.qat.refuse(&name)?;
        }
        let table = matches!(method, MethodName::Nf4 | MethodName::Fp4);
        if self.double_quant && !table {
            return Err(Error::input("--double-quant", format!("not with --method {name}; only with nf4 and fp4")));
        }
        if self.outlier_threshold.is_some() && method != MethodName::LlmInt8 {
            return Err(Error::input("--outlier-threshold", format!("not with --method {name}; only with llm-int8")));
        }
        let own = match method {
            MethodName::Hqq => FormatName::Hqq,
            MethodName::Kmeans => FormatName::Codebook,
            _ if table || method == MethodName::LlmInt8 => FormatName::Bitsandbytes,
            _ => return Ok(()),
        };
        if self.format.is_some_and(|format| format != own) {
            let own = own.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
            return Err(Error::input("--format", format!("--method {name} has the format {own} alone")));
        }
        Ok(())
    }

    /// What a layer of `spec` becomes, by the other options where it says nothing; `None` for `skip`.
    fn layer(&self, spec: LayerSpec) -> Result<Option<LayerScheme>> {
        let LayerSpec::Become { scheme, group_size, mapping } = spec else { return Ok(None) };
        let SchemeName { bits, mut activation } = scheme.or(self.scheme).unwrap_or(self.method.scheme());
        let asked = mapping.or(self.mapping).map(MappingName::mapping);
        let stores_largest = self.format == Some(FormatName::Bitsandbytes);
        let mapping = match (asked, self.method.mapping()) {
            (None, Some(own)) => own,
            (Some(_), Some(_)) => {
                let reason = format!("not with --method {}, which has its own", self.method.name());
                return Err(Error::input("--mapping", reason));
            }
            (None, None) if self.method.is_awq() && activation == Activation::None => Mapping::Asymmetric,
            (None, None) if stores_largest => Mapping::Narrow,
            (None, None) => Mapping::Centered,
            (Some(asked), None) if stores_largest && asked != Mapping::Narrow => {
                let reason = "the format bitsandbytes stores 127 times the scale, which is `narrow`";
                return Err(Error::input("--mapping", reason));
            }
            (Some(asked), None) => asked,
        };
        match (&mut activation, self.observer) {
            (Activation::Static { observer, .. }, Some(chosen)) => *observer = chosen,
            (_, Some(_)) if scheme.is_none() => {
                return Err(Error::input("--observer", "only with static activations (--scheme w8a8-static)"));
            }
            _ => {}
        }
        let group = group_size.or(self.group_size).unwrap_or(self.method.group_size(bits)) as usize;
        let shrink = matches!(self.method, MethodName::RtnMse | MethodName::Qat);
        let search = if shrink { Search::Shrink { norm: 2.4 } } else { Search::MinMax };
        let grid = Grid {
            bits,
            group_size: (group > 0).then_some(group),
            mapping,
            search,
            scale_type: DType::F16, // the format's, in the end
            smallest_zero: 0,
        };
        let mut layer = LayerScheme { grid, activation };
        if mapping == Mapping::Progressive {
            self.check_progressive(&layer)?;
        }
        if let Some((flag, reason)) = self.method.objection(&layer) {
            return Err(Error::input(flag, reason));
        }
        if self.method == MethodName::LlmInt8 {
            let threshold = self.outlier_threshold.unwrap_or(6.0) as f32;
            if threshold > 0.0 {
                layer.activation = Activation::LlmInt8 { threshold };
            }
        }
        Ok(Some(layer))
    }

    /// Fails where nothing would come of scales that are multiples of one a row.
    fn check_progressive(&self, layer: &LayerScheme) -> Result<()> {
        let Grid { bits, group_size, .. } = layer.grid;
        let groups = group_size.is_some_and(|size| size.is_multiple_of(COLUMNS));
        let reason = if bits > 4 || layer.activation == Activation::None || !groups {
            format!(
                "progressive is for up to 4 bits in groups of a multiple of {COLUMNS} beside int8 activations, as --scheme w4a8 \
                 has them; a rule for other layers says `sym` or `asym`"
            )
        } else if self.method == MethodName::Qat {
            "not progressive with --method qat, whose scales are trained one by one".into()
        } else if self.target_bpw.is_some() {
            "not progressive with --target-bpw: beside int8 activations it chooses among 8 bits alone".into()
        } else if self.format.is_some_and(|format| format != FormatName::CompressedTensors) {
            "progressive has the format compressed-tensors, whose scales may be of 32 bits".into()
        } else {
            return Ok(());
        };
        Err(Error::input("--mapping", reason))
    }

    /// The recipe for a model of linear layers `names`.
    pub(super) fn recipe(&self, names: &[String]) -> Result<Recipe> {
        let base = LayerSpec::Become { scheme: None, group_size: None, mapping: None };
        self.check()?;
        let base = self.layer(base)?.ok_or_else(|| Error::input("--scheme", "missing"))?;
        let rule = |rule: &RuleSpec| Rule::new(&rule.pattern, self.layer(rule.spec)?);
        let rules = self.rules.iter().map(rule).collect::<Result<Vec<_>>>()?;
        let act_order = match self.act_order {
            ActOrderName::None => ActOrder::None,
            ActOrderName::Static => ActOrder::Static,
            ActOrderName::GroupAware => ActOrder::GroupAware,
            ActOrderName::Dynamic => ActOrder::Dynamic,
        };
        let options = GptqOptions { act_order, damp: self.damp };
        let (transform, rounding) = self.method.steps(options, self.alpha as f32, self.calib.is_some());
        let LayerScheme { grid: Grid { bits, mapping, .. }, activation } = base;
        let format = match self.format {
            Some(FormatName::Gptq) => Format::Gptq,
            Some(FormatName::GptqV2) => Format::GptqV2,
            Some(FormatName::Awq) => Format::Awq,
            Some(FormatName::CompressedTensors) => Format::CompressedTensors,
            Some(FormatName::Bitsandbytes) => Format::BitsAndBytes { double_quant: self.double_quant },
            Some(FormatName::Hqq) => Format::Hqq,
            Some(FormatName::Codebook) => Format::Codebook,
            None if let Some(own) = self.method.format(self.double_quant) => own,
            None if self.kv_scales.is_some() => Format::CompressedTensors,
            None if activation != Activation::None || ![2, 3, 4, 8].contains(&bits) => Format::CompressedTensors,
            None if self.method.is_awq() && bits == 4 && mapping == Mapping::Asymmetric => Format::Awq,
            None => Format::Gptq,
        };
        Ok(Recipe {
            base,
            overrides: overrides(&rules, names)?,
            target: self.target_bpw.map(|bits_per_weight| Target { bits_per_weight, fused: self.fused_widths }),
            head: self.lm_head.map(|spec| self.layer(spec)).transpose()?.flatten(),
            kv_scales: self.kv_scales.map(|name| match name {
                KvScalesName::Tensor => KvScales::Tensor,
                KvScalesName::Head => KvScales::Head,
            }),
            transform,
            rounding,
            true_sequential: self.true_sequential,
            format,
        })
    }
}
