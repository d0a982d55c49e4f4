//! A linear layer: one weight, or several that share their input (q, k, v; gate, up) and write side by side.

use crate::device::{Columns, Device, Epilogue, InputFormat, LinearInput, PackedWeight, Tensor, Write};
use crate::dtype::HostData;
use crate::error::{Error, Result};
use crate::quant::{ActQuant, LinearWeight, QuantWeight, Scheme, Weight};

/// One or more packed weights over the same input, writing adjacent columns of the output.
///
/// Weights of the same scheme are joined into one before packing, so that the usual layer is one launch. Those that
/// differ (mixed bits, their own act-order or static scale) stay separate parts.
#[derive(Debug)]
pub struct Linear {
    pub(super) parts: Vec<PackedWeight>,
    n: usize,
    k: usize,
    /// All parts read their input in the same format, so its producer can write it so.
    uniform_input: bool,
}

impl Linear {
    /// Packs `weights` (at least one, equal `k`) for `device`.
    pub fn new(device: &Device, weights: Vec<LinearWeight>) -> Result<Linear> {
        Linear::pack(device, Linear::join(weights)?, Epilogue::NONE)
    }

    /// Joins what has one scheme.
    pub(super) fn join(weights: Vec<LinearWeight>) -> Result<Vec<LinearWeight>> {
        let k = weights.first().map_or(0, LinearWeight::k);
        if k == 0 || weights.iter().any(|w| w.k() != k) {
            return Err(Error::Shape {
                op: "linear",
                expected: format!("weights that share {k} > 0 inputs"),
                got: format!("{:?} inputs", weights.iter().map(LinearWeight::k).collect::<Vec<_>>()),
            });
        }
        let mut joined: Vec<LinearWeight> = Vec::new();
        for weight in weights {
            match joined.pop() {
                None => joined.push(weight),
                Some(last) => match join(last, weight) {
                    Ok(one) => joined.push(one),
                    Err(two) => joined.extend(*two),
                },
            }
        }
        Ok(joined)
    }

    /// Packs at least one weight, all of equal `k`.
    pub(super) fn pack(device: &Device, weights: Vec<LinearWeight>, epilogue: Epilogue) -> Result<Linear> {
        let (n, k) = (weights.iter().map(LinearWeight::n).sum(), weights[0].k());
        let first = input_of(&weights[0]);
        let uniform_input = weights.iter().all(|w| input_of(w) == first);
        let parts = weights.into_iter().map(|w| device.pack_fused(w, epilogue)).collect::<Result<Vec<_>>>()?;
        Ok(Linear { parts, n, k, uniform_input })
    }

    /// Output channels of all parts.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The packed weights, in column order.
    pub fn parts(&self) -> &[PackedWeight] {
        &self.parts
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(PackedWeight::bytes).sum()
    }

    /// What the producer of the input should write.
    pub fn input_format(&self) -> InputFormat<'_> {
        if self.uniform_input { self.parts[0].input_format() } else { InputFormat::FLOATS }
    }

    /// `out[r, ..n] (+)= x w^T + bias` for `m` rows of stride `n`; `x` as [`Linear::input_format`] asked. `spare` is scratch
    /// for parts that need an input of their own.
    pub fn forward(
        &self,
        device: &Device,
        out: &mut Tensor,
        x: &LinearInput,
        spare: &mut LinearInput,
        write: Write,
        m: usize,
    ) -> Result<()> {
        let mut offset = 0;
        for part in &self.parts {
            let columns = Columns { offset, stride: self.n };
            let own_input = !self.uniform_input && (part.order.is_some() || part.scheme.activation != ActQuant::None);
            if own_input {
                device.quantize(spare, x.plain_floats()?, self.k, part.input_format(), m)?;
                device.linear(out, columns, spare, part, write, m)?;
            } else {
                device.linear(out, columns, x, part, write, m)?;
            }
            offset += part.n;
        }
        Ok(())
    }

    /// Schemes of the parts.
    pub fn schemes(&self) -> impl Iterator<Item = Scheme> + '_ {
        self.parts.iter().map(|p| p.scheme)
    }
}

/// What a weight wants its input to look like.
fn input_of(w: &LinearWeight) -> (Option<&[u32]>, ActQuant) {
    let order = match &w.weight {
        Weight::Quant(q) => q.order.as_deref(),
        Weight::Dense { .. } => None,
    };
    (order, w.activation)
}

/// `a` above `b` as one weight when they have one scheme, else both back.
fn join(a: LinearWeight, b: LinearWeight) -> Result<LinearWeight, Box<[LinearWeight; 2]>> {
    let same = input_of(&a) == input_of(&b)
        && match (&a.weight, &b.weight) {
            (Weight::Dense { data: x, .. }, Weight::Dense { data: y, .. }) => x.dtype() == y.dtype(),
            (Weight::Quant(x), Weight::Quant(y)) => {
                x.bits == y.bits && x.group_size == y.group_size && x.encoding == y.encoding
            }
            _ => false,
        };
    if !same {
        return Err(Box::new([a, b]));
    }
    let bias = (a.bias.is_some() || b.bias.is_some()).then(|| {
        let mut bias = a.bias.clone().unwrap_or_else(|| vec![0.0; a.n()]);
        bias.extend(b.bias.clone().unwrap_or_else(|| vec![0.0; b.n()]));
        bias
    });
    let activation = a.activation;
    let weight = match (a.weight, b.weight) {
        (Weight::Dense { n, k, data }, Weight::Dense { n: n2, data: data2, .. }) => {
            Weight::Dense { n: n + n2, k, data: append(data, data2) }
        }
        (Weight::Quant(x), Weight::Quant(y)) => Weight::Quant(stack(x, y)),
        (weight, _) => weight,
    };
    Ok(LinearWeight { weight, bias, activation })
}

fn stack(mut a: QuantWeight, b: QuantWeight) -> QuantWeight {
    a.n += b.n;
    a.codes.append(b.codes);
    a.scales.extend(b.scales);
    a.zeros.extend(b.zeros);
    a
}

fn append(a: HostData, b: HostData) -> HostData {
    match (a, b) {
        (HostData::F32(mut a), HostData::F32(b)) => {
            a.extend(b);
            HostData::F32(a)
        }
        (HostData::F16(mut a), HostData::F16(b)) => {
            a.extend(b);
            HostData::F16(a)
        }
        (HostData::BF16(mut a), HostData::BF16(b)) => {
            a.extend(b);
            HostData::BF16(a)
        }
        (a, _) => a, // unreachable: `join` compared the types, and weights are floating
    }
}
