//! Every op against the specification, on every device. A case is written once, as a function of a device;
//! [`on_every_device!`] makes a test of it for the CPU (each SIMD level this machine has) and one for CUDA.

mod attention;
mod batch_invariant;
#[cfg(lowbit_cuda)]
mod candidates;
mod factored;
mod fp8;
mod fused;
mod gate;
mod linear;
mod linear_input;
#[cfg(lowbit_cuda)]
mod peers;
#[cfg(lowbit_cuda)]
mod repack;
#[cfg(lowbit_cuda)]
mod replays;
mod rows;
mod sample;

use lowbit::device::cpu::CpuDevice;
use lowbit::device::{Device, LinearInput, Tensor};
use lowbit::dtype::{DType, HostData};

/// For each function `case(&Device)`: tests `case::cpu` and `case::cuda`.
macro_rules! on_every_device {
    ($($case:ident),* $(,)?) => {$(
        mod $case {
            #[test]
            fn cpu() {
                for device in $crate::ops::cpu_devices() {
                    println!("on {device:?}");
                    super::$case(&device);
                }
            }

            #[test]
            #[ignore = "needs a CUDA device"]
            fn cuda() {
                for device in $crate::ops::cuda_devices() {
                    println!("on {device:?}");
                    super::$case(&device);
                }
            }
        }
    )*};
}
pub(crate) use on_every_device;

/// Numbers of rows that hurt: one, odd, a tile's edge and one past it.
pub const ROWS: [usize; 10] = [1, 2, 3, 8, 15, 16, 17, 33, 64, 65];

/// The specification and every fast path of this machine.
pub fn cpu_devices() -> Vec<Device> {
    CpuDevice::all().into_iter().map(Device::Cpu).collect()
}

/// The first GPU in each of its activation types.
pub fn cuda_devices() -> Vec<Device> {
    [DType::F16, DType::BF16].map(|dtype| Device::cuda(0, dtype).expect("a CUDA device")).into()
}

/// `values` rounded to the device's activation type: the tensor, and the same values on the host.
pub fn activations(device: &Device, values: &[f32]) -> (Tensor, Vec<f32>) {
    let data = HostData::from_f32(device.activation_dtype(), values.to_vec());
    let rounded = data.to_f32();
    (device.upload(data).expect("upload"), rounded)
}

/// An `F32` tensor.
pub fn f32s(device: &Device, values: &[f32]) -> Tensor {
    device.upload(HostData::F32(values.to_vec())).expect("upload")
}

/// A `U32` tensor.
pub fn u32s(device: &Device, values: &[u32]) -> Tensor {
    device.upload(HostData::U32(values.to_vec())).expect("upload")
}

/// `len` NaN: an element an op forgets to write fails its test.
pub fn poisoned(device: &Device, dtype: DType, len: usize) -> Tensor {
    device.upload(HostData::from_f32(dtype, vec![f32::NAN; len])).expect("upload")
}

/// An input of linear layers, poisoned, with one row more than `m` as a canary.
pub fn poisoned_act(device: &Device, m: usize, k: usize) -> LinearInput {
    let mut x = LinearInput::new(device, m + 1, k).expect("input");
    x.floats = poisoned(device, device.activation_dtype(), (m + 1) * k);
    x.codes = device.upload(HostData::I8(vec![CANARY_CODE; (m + 1) * k])).expect("upload");
    x.scales = poisoned(device, DType::F32, m + 1);
    x.zero_points = device.upload(HostData::I32(vec![i32::MIN; m + 1])).expect("upload");
    x.outliers = device.upload(HostData::U32(vec![u32::MAX; (m + 1) * LinearInput::outlier_words(k)])).expect("upload");
    x
}

/// A code that quantization never writes to the row behind the last.
pub const CANARY_CODE: i8 = 85;

/// The first `len` elements as f32.
pub fn read(device: &Device, tensor: &Tensor, len: usize) -> Vec<f32> {
    device.download(tensor, len).expect("download").to_f32()
}

/// The first `len` elements of a `U32` tensor.
pub fn read_u32s(device: &Device, tensor: &Tensor, len: usize) -> Vec<u32> {
    match device.download(tensor, len).expect("download") {
        HostData::U32(values) => values,
        other => panic!("{} elements", other.dtype()),
    }
}

/// Fails unless everything from element `len` on is still the poison of [`poisoned`].
pub fn assert_untouched(what: &str, device: &Device, tensor: &Tensor, len: usize) {
    let all = read(device, tensor, tensor.len());
    if let Some(i) = all[len..].iter().position(|x| !x.is_nan()) {
        panic!("{what}: element {} behind the last was written", len + i);
    }
}
