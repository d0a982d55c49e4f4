//! gate and up of an MLP: one linear layer with SwiGLU fused where the device has it for the weight, else `silu_mul` after it.

use super::Linear;
use crate::device::{Activation, Columns, Device, Epilogue, InputFormat, LinearInput, OrderId, Output, Tensor, Write};
use crate::error::Result;
use crate::quant::{ActQuant, LinearWeight, QuantWeight, Weight};

impl Linear {
    /// Packs gate and up, `[gate, up]`, for an MLP whose output layer is `down`.
    ///
    /// Fused, outputs already come in the order of `down`'s columns, and as its codes where its activations are static.
    ///
    /// # Errors
    /// As [`Linear::new`].
    pub fn gated(device: &Device, gate_up: Vec<LinearWeight>, down: &LinearWeight) -> Result<Linear> {
        let gate_rows = gate_up.first().map_or(0, LinearWeight::n);
        let mut joined = Linear::join(gate_up)?;
        let output = match down.activation {
            ActQuant::StaticPerTensor { scale, zero_point } => Output::Static { scale, zero_point },
            _ => Output::Floats,
        };
        let fused = [output, Output::Floats].map(|output| Epilogue { activation: Activation::SwiGlu, output });
        let fits = |weight: &LinearWeight, epilogue: &Epilogue| {
            weight.n() == 2 * gate_rows && device.check_epilogue(weight, *epilogue).is_ok()
        };
        let epilogue = match joined.as_slice() {
            [weight] => fused.into_iter().find(|epilogue| fits(weight, epilogue)).unwrap_or(Epilogue::NONE),
            _ => Epilogue::NONE,
        };
        let mut output_order = None;
        if let (true, [weight], Weight::Quant(down)) = (epilogue != Epilogue::NONE, &mut joined[..], &down.weight)
            && let Some(order) = &down.order
        {
            order_halves(weight, order);
            output_order = Some(OrderId::of(order));
        }
        let mut linear = Linear::pack(device, joined, epilogue)?;
        linear.parts.iter_mut().for_each(|part| part.output_order = output_order);
        Ok(linear)
    }

    /// `out = silu(gate) * up` of `m` rows as `down` takes it; `gate_up` is scratch of `[m, 2 * intermediate]`.
    pub fn gate(
        &self,
        device: &Device,
        out: &mut LinearInput,
        x: &LinearInput,
        gate_up: &mut Tensor,
        down: &Linear,
        m: usize,
    ) -> Result<()> {
        let format = down.input_format();
        match self.parts() {
            [part] if part.epilogue.output != Output::Floats => device.linear_codes(out, x, part, m),
            [part] if part.epilogue.activation == Activation::SwiGlu => {
                let columns = Columns { offset: 0, stride: down.k() };
                if format.quant == ActQuant::None {
                    device.linear(&mut out.floats, columns, x, part, Write::Store, m)?;
                    out.record(format, m, down.k());
                    return Ok(());
                }
                device.linear(gate_up, columns, x, part, Write::Store, m)?;
                device.quantize(out, gate_up, down.k(), InputFormat { is_gathered: true, ..format }, m)
            }
            _ => {
                self.forward(device, gate_up, x, out, Write::Store, m)?;
                device.silu_mul(out, gate_up, down.k(), format, m)
            }
        }
    }

    /// True where [`Linear::gate`] is one launch with the activation in it.
    pub fn is_gate_fused(&self) -> bool {
        matches!(self.parts(), [part] if part.epilogue.activation == Activation::SwiGlu)
    }
}

/// Puts the rows of either half of a weight in `order`.
fn order_halves(weight: &mut LinearWeight, order: &[u32]) {
    let Weight::Quant(q) = &mut weight.weight else { return };
    let rows: Vec<u32> =
        [0, q.n / 2].into_iter().flat_map(|half| order.iter().map(move |&r| half as u32 + r)).collect();
    let groups = q.groups();
    let QuantWeight { k, codes, scales, zeros, .. } = q;
    codes.gather_rows(*k, &rows);
    *scales = gather(scales, groups, &rows);
    *zeros = gather(zeros, groups, &rows);
    if let Some(bias) = &mut weight.bias {
        *bias = gather(bias, 1, &rows);
    }
}

fn gather<T: Copy>(values: &[T], width: usize, rows: &[u32]) -> Vec<T> {
    rows.iter().flat_map(|&r| &values[r as usize * width..][..width]).copied().collect()
}
