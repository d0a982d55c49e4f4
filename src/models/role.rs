//! Roles of linear layers in a decoder layer, and which of them share their input.

/// What a linear layer of a decoder layer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinearRole {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention output.
    O,
    /// Gate of the MLP.
    Gate,
    /// What the gate multiplies.
    Up,
    /// MLP output.
    Down,
}

/// Along which axis of its weight `[n, k]` a linear layer is cut for tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitAxis {
    /// Column parallel: each device has some outputs, from all inputs.
    Outputs,
    /// Row parallel: each device has some inputs, and the sums of all devices are added.
    Inputs,
}

impl LinearRole {
    /// In the order in which data flows.
    pub const ALL: [LinearRole; 7] = [
        LinearRole::Q,
        LinearRole::K,
        LinearRole::V,
        LinearRole::O,
        LinearRole::Gate,
        LinearRole::Up,
        LinearRole::Down,
    ];

    /// What it shares its input with.
    pub fn slot(self) -> Slot {
        match self {
            LinearRole::Q | LinearRole::K | LinearRole::V => Slot::Qkv,
            LinearRole::O => Slot::O,
            LinearRole::Gate | LinearRole::Up => Slot::GateUp,
            LinearRole::Down => Slot::Down,
        }
    }

    /// The axis it is cut along.
    pub fn split_axis(self) -> SplitAxis {
        match self {
            LinearRole::O | LinearRole::Down => SplitAxis::Inputs,
            _ => SplitAxis::Outputs,
        }
    }

    /// `q`, `k`, `v`, `o`, `gate`, `up` or `down`.
    pub fn name(self) -> &'static str {
        let module = self.module().split_once('.').map_or("", |(_, module)| module);
        module.trim_end_matches("_proj")
    }

    /// Name of its module within the decoder layer.
    pub(super) fn module(self) -> &'static str {
        match self {
            LinearRole::Q => "self_attn.q_proj",
            LinearRole::K => "self_attn.k_proj",
            LinearRole::V => "self_attn.v_proj",
            LinearRole::O => "self_attn.o_proj",
            LinearRole::Gate => "mlp.gate_proj",
            LinearRole::Up => "mlp.up_proj",
            LinearRole::Down => "mlp.down_proj",
        }
    }
}

/// Linear layers of a decoder layer that share their input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    /// q, k, v.
    Qkv,
    /// Attention output.
    O,
    /// gate, up.
    GateUp,
    /// MLP output.
    Down,
}

impl Slot {
    /// In the order in which data flows.
    pub const ALL: [Slot; 4] = [Slot::Qkv, Slot::O, Slot::GateUp, Slot::Down];

    /// Who shares the input, in the order of their outputs.
    pub fn roles(self) -> &'static [LinearRole] {
        match self {
            Slot::Qkv => &[LinearRole::Q, LinearRole::K, LinearRole::V],
            Slot::O => &[LinearRole::O],
            Slot::GateUp => &[LinearRole::Gate, LinearRole::Up],
            Slot::Down => &[LinearRole::Down],
        }
    }
}
