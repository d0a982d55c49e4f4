//! Packed weights: which family takes one, and its launches, resolved once.
#![allow(unsafe_code)] // kernel launches

use super::dense;
use super::families::first_family;
use super::family::{GemmFamily, Input, Plan, Problem, Target, Weight};
use super::plans::Plans;
use super::table::{Choice, Tuned};
use super::tuned;
use crate::device::cpu::check;
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::LinearOut;
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::memory::Buffer;
use crate::device::{Activation, Epilogue, Output};
use crate::dtype::HostData;
use crate::error::Result;
use crate::quant::{ActQuant, LinearWeight, Weight as HostWeight};

/// A weight in the layout of one family, on the GPU.
#[derive(Debug)]
pub(crate) struct CudaPacked {
    pub(super) weight: Weight,
    pub(super) runner: Box<dyn Runner>,
}

/// A family with the launches of one weight.
pub(super) trait Runner: std::fmt::Debug + Send + Sync {
    /// Codes as activations; else floats.
    fn takes_int8(&self) -> bool;

    /// Whether rows come with outliers.
    fn takes_outliers(&self) -> bool;

    /// Enqueues the layer; the addresses of `y` and `x` were checked.
    ///
    /// # Errors
    /// `Cuda`.
    fn run(&self, w: &Weight, y: LinearOut, x: &Input) -> Result<()>;

    /// Name of the kernel that runs for `m` rows, at least 1, and its configuration.
    fn kernel_name(&self, w: &Weight, m: usize) -> String;

    /// Configurations among which the fastest for `m` rows should be, that of the cost model first; empty where there is nothing
    /// to choose.
    fn candidates(&self, w: &Weight, m: usize) -> Vec<Choice>;

    /// The same for a copy of the weight.
    fn duplicate(&self) -> Box<dyn Runner>;

    /// The same with `table` for what was measured, in place of what it had.
    fn tuned_by(&self, w: &Weight, table: &Tuned) -> Box<dyn Runner>;
}

/// [`Runner`] of a family.
#[derive(Debug)]
struct Chosen<F: GemmFamily> {
    family: F,
    /// Rows and the configuration measured to be the fastest for them, ascending.
    tuned: Vec<(usize, F::Config)>,
    /// Launches for int8 activations or floats, and for uint8 ones.
    plans: [Plans<F::Params>; 2],
}

impl<F: GemmFamily> Chosen<F> {
    fn new(family: F, w: &Weight, table: &Tuned) -> Self {
        Chosen { family, tuned: tuned::resolve(table, &family, &problem(w, false)), plans: Default::default() }
    }

    /// The configuration for `m` rows, at least 1.
    fn config(&self, w: &Weight, p: &Problem, m: usize) -> F::Config {
        if w.device.is_batch_invariant() {
            return self.family.choose_batch_invariant(p, m);
        }
        // Some kernels of uint8 have fewer tiles than those that were measured.
        match tuned::config(&self.tuned, m).filter(|_| !p.x_u8) {
            Some(config) => config,
            None => self.family.choose(p, m),
        }
    }

    fn resolve(&self, w: &Weight, m: usize, x_u8: bool) -> Result<Plan<F::Params>> {
        let p = problem(w, x_u8);
        let launch = self.family.launch(&p, self.config(w, &p, m), m);
        let kernel = w.device.kernel(launch.module, &launch.function)?;
        Ok(Plan { kernel, grid: launch.grid, params: launch.params })
    }
}

impl<F: GemmFamily> Runner for Chosen<F> {
    fn takes_int8(&self) -> bool {
        self.family.takes_int8()
    }

    fn takes_outliers(&self) -> bool {
        self.family.takes_outliers()
    }

    fn run(&self, w: &Weight, y: LinearOut, x: &Input) -> Result<()> {
        let x_u8 = x.flip != 0;
        let plans = &self.plans[usize::from(x_u8)];
        let Some(slot) = plans.slot(x.m) else {
            let plan = self.resolve(w, x.m, x_u8)?;
            return enqueue(&self.family, w, &plan, y, x);
        };
        let plan = match slot.get() {
            Some(plan) => plan,
            None => {
                let plan = self.resolve(w, Plans::<F::Params>::rows(x.m), x_u8)?;
                slot.get_or_init(|| Box::new(plan))
            }
        };
        enqueue(&self.family, w, plan, y, x)
    }

    fn kernel_name(&self, w: &Weight, m: usize) -> String {
        if self.family.runs_by_library(w) {
            return "cublaslt".into();
        }
        let p = problem(w, false);
        let config = self.config(w, &p, m);
        format!("{} {}", self.family.launch(&p, config, m).module, self.family.config_name(config))
    }

    fn candidates(&self, w: &Weight, m: usize) -> Vec<Choice> {
        let Some(family) = self.family.table_name() else { return Vec::new() };
        let p = problem(w, false);
        let choice =
            |config| Choice { family: family.into(), n: p.n, k: p.k, m, config: self.family.config_name(config) };
        let model = choice(self.family.choose(&p, m));
        let all = self.family.configs(&p, m).into_iter().map(choice);
        let others: Vec<Choice> = all.filter(|choice| choice.config != model.config).collect();
        std::iter::once(model).chain(others).collect()
    }

    fn duplicate(&self) -> Box<dyn Runner> {
        Box::new(Chosen { family: self.family, tuned: self.tuned.clone(), plans: Default::default() })
    }

    fn tuned_by(&self, w: &Weight, table: &Tuned) -> Box<dyn Runner> {
        Box::new(Chosen::new(self.family, w, table))
    }
}

/// Enqueues `plan`, made for these rows of `w`.
fn enqueue<F: GemmFamily>(family: &F, w: &Weight, plan: &Plan<F::Params>, y: LinearOut, x: &Input) -> Result<()> {
    // SAFETY: `place` made the parts of `w` for this family; `linear.rs`, the only maker of inputs and destinations, checked both.
    unsafe { family.run(w, plan, y, x) }
}

/// What the launches of `w` depend on beside the number of rows.
fn problem(w: &Weight, x_u8: bool) -> Problem {
    let (sm_count, max_shared) = (w.device.sm_count(), w.device.max_dynamic_shared());
    Problem { n: w.n, k: w.k, epilogue: w.epilogue, x_u8, sm_count, max_shared, dtype: w.device.dtype() }
}

impl CudaPacked {
    /// Bytes in device memory.
    pub(crate) fn bytes(&self) -> usize {
        let beside = [&self.weight.bias, &self.weight.fixed].into_iter().flatten();
        self.weight.parts.parts().chain(beside).map(|buffer| buffer.len() * buffer.dtype().size_bytes()).sum()
    }

    /// A copy in memory of its own.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cuda`.
    pub(super) fn duplicate(&self) -> Result<Self> {
        let of = &self.weight;
        let copy = |part: &Option<Buffer>| part.as_ref().map(Buffer::duplicate).transpose();
        let weight = Weight {
            device: of.device.clone(),
            parts: of.parts.duplicate()?,
            bias: copy(&of.bias)?,
            fixed: copy(&of.fixed)?,
            ..*of
        };
        Ok(CudaPacked { weight, runner: self.runner.duplicate() })
    }

    /// Name of the kernel that runs for `m` rows, and its configuration.
    pub(crate) fn kernel(&self, m: usize) -> String {
        self.runner.kernel_name(&self.weight, m.max(1))
    }
}

/// Fails where the kernels that would run `weight` do not have `epilogue`.
pub(crate) fn check_epilogue(device: &CudaDevice, weight: &LinearWeight, epilogue: Epilogue) -> Result<()> {
    // To find the family may take a look at every code, which is done only where something depends on it.
    let is_on_codes = weight.activation != ActQuant::None && epilogue.output != Output::Groups;
    if epilogue == Epilogue::NONE || is_on_codes {
        return Ok(());
    }
    first_family!(weight, Target::of(device), family => family.check_epilogue(weight, epilogue))
}

/// Checks `weight` and moves it to the GPU in the layout of the kernels that will run it.
/// Beside it comes the order of its columns that the producer of its input must apply.
///
/// # Errors
/// As the CPU's check of canonical weights; `Cuda` or `OutOfMemory` from the upload.
pub(crate) fn pack(
    device: &CudaDevice,
    mut weight: LinearWeight,
    epilogue: Epilogue,
) -> Result<(CudaPacked, Option<Vec<u32>>)> {
    check(&weight)?;
    epilogue.check(&weight)?;
    // Kernels of sm_90 multiply by factors, others have the weight in int8.
    if let Some((q, factored)) = weight.factored()
        && !device.uses_sm90()
    {
        weight.weight = HostWeight::Quant(factored.int8_rows(q));
    }
    let (n, k) = (weight.n(), weight.k());
    // Layouts pad both sides to whole tiles of at most 256.
    u32_of(n.next_multiple_of(256))?;
    u32_of(k.next_multiple_of(256))?;
    first_family!(&weight, Target::of(device), family => {
        family.check_epilogue(&weight, epilogue)?;
        place(device, family, weight, epilogue)
    })
}

/// Moves a weight that `family` accepts to the GPU, and the order of its columns.
fn place<F: GemmFamily>(
    device: &CudaDevice,
    family: F,
    mut weight: LinearWeight,
    epilogue: Epilogue,
) -> Result<(CudaPacked, Option<Vec<u32>>)> {
    let (n, k) = (weight.n(), weight.k());
    let upload = |data: HostData| Buffer::upload(device, &data);
    let fixed = Some(epilogue.fixed_point(&weight)?).filter(|columns| !columns.is_empty());
    if epilogue.activation == Activation::SwiGlu && family.interleaves_gate_and_up() {
        interleave(&mut weight);
    }
    let (mut order, mut zero_point, mut group_size, mut codebook) = (None, 0, k, None);
    let parts = match weight.weight {
        HostWeight::Dense { data, .. } => dense::upload(device, data)?,
        HostWeight::Quant(mut q) => {
            order = q.order.take();
            zero_point = q.zeros[0] as u32;
            group_size = q.group_size.min(k);
            codebook = q.encoding.codebook().copied();
            super::pack::pack(device, &q, &family.recipe(&q, device.dtype()))?
        }
    };
    let weight = Weight {
        device: device.clone(),
        n,
        k,
        group_size,
        parts,
        zero_point,
        x_zero_point: weight.activation.zero_point(),
        has_x_zero_points: weight.activation == ActQuant::DynamicAsymmetric,
        codebook,
        bias: weight.bias.map(HostData::F32).map(upload).transpose()?,
        fixed: fixed.map(HostData::I32).map(upload).transpose()?,
        epilogue,
    };
    let runner = Box::new(Chosen::new(family, &weight, device.tuned()));
    Ok((CudaPacked { weight, runner }, order))
}

/// Gate above up as 8 rows of gate, 8 of up, and so on, for kernels that own such blocks.
fn interleave(weight: &mut LinearWeight) {
    let HostWeight::Quant(q) = &mut weight.weight else { return };
    let n = q.n;
    let rows: Vec<u32> = (0..n as u32).collect();
    q.codes.gather_rows(q.k, &interleaved(&rows, n));
    q.scales = interleaved(&q.scales, n);
    q.zeros = interleaved(&q.zeros, n);
    if let Some(bias) = &mut weight.bias {
        *bias = interleaved(bias, n);
    }
}

/// The `n` rows of `values`, blocks of 8 of its first half and of its second in turn.
fn interleaved<T: Copy>(values: &[T], n: usize) -> Vec<T> {
    let (gate, up) = values.split_at(values.len() / 2);
    let block = 8 * values.len() / n;
    gate.chunks(block).zip(up.chunks(block)).flat_map(|(gate, up)| [gate, up].concat()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// docs/formats.md, "Gate and up".
    #[test]
    fn gate_and_up_interleave_in_blocks_of_eight() {
        let (inner, width) = (24, 3);
        let values: Vec<u32> = (0..2 * inner * width).collect();
        let out = interleaved(&values, 2 * inner as usize);
        for (row, got) in out.chunks_exact(width as usize).enumerate() {
            let (b, r) = (row as u32 / 16, row as u32 % 16);
            let from = if r < 8 { 8 * b + r } else { inner + 8 * b + r - 8 };
            let expected: Vec<u32> = (from * width..(from + 1) * width).collect();
            assert_eq!(got, expected, "row {row}");
        }
    }
}
