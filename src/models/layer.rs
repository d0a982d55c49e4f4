//! [`DecoderLayer`]: the one declaration of a decoder layer, whatever stands for its linear layers and norms: specifications,
//! weights on the host, weights on a device, variables of a training.

use crate::device::Device;
use crate::error::Result;
use crate::layers::Linear;
use crate::quant::LinearWeight;

use super::role::{LinearRole, Slot};

/// A decoder layer. `L` stands for the linear layers that share an input ([`Slot`]), `N` for a norm.
#[derive(Debug, Clone)]
pub struct DecoderLayer<L, N> {
    /// Norm before attention.
    pub input_norm: N,
    /// Attention and its projections.
    pub attention: Attention<L, N>,
    /// Norm before the MLP.
    pub post_attention_norm: N,
    /// The feed-forward part.
    pub mlp: Mlp<L, N>,
}

/// Attention of a decoder layer.
#[derive(Debug, Clone)]
pub struct Attention<L, N> {
    /// q, k and v.
    pub qkv: L,
    /// Norms of query and key heads (Qwen3).
    pub qk_norm: Option<QkNorm<N>>,
    /// Norm before the output projection (BitNet).
    pub sub_norm: Option<N>,
    /// Output projection.
    pub o: L,
}

/// Norms of query and key heads.
#[derive(Debug, Clone)]
pub struct QkNorm<N> {
    /// Of queries, `[head_dim]`.
    pub q: N,
    /// Of keys, `[head_dim]`.
    pub k: N,
}

/// The feed-forward part of a decoder layer.
#[derive(Debug, Clone)]
pub enum Mlp<L, N> {
    /// One gated MLP for all tokens.
    Dense(DenseMlp<L, N>),
}

/// A gated MLP.
#[derive(Debug, Clone)]
pub struct DenseMlp<L, N> {
    /// gate and up.
    pub gate_up: L,
    /// Norm before the output projection, whose activation is then squared ReLU (BitNet).
    pub sub_norm: Option<N>,
    /// Output projection.
    pub down: L,
}

impl<L, N> DecoderLayer<L, N> {
    /// The same layer with its parts borrowed.
    pub fn as_ref(&self) -> DecoderLayer<&L, &N> {
        let Mlp::Dense(mlp) = &self.mlp;
        DecoderLayer {
            input_norm: &self.input_norm,
            attention: Attention {
                qkv: &self.attention.qkv,
                qk_norm: self.attention.qk_norm.as_ref().map(|norm| QkNorm { q: &norm.q, k: &norm.k }),
                sub_norm: self.attention.sub_norm.as_ref(),
                o: &self.attention.o,
            },
            post_attention_norm: &self.post_attention_norm,
            mlp: Mlp::Dense(DenseMlp { gate_up: &mlp.gate_up, sub_norm: mlp.sub_norm.as_ref(), down: &mlp.down }),
        }
    }

    /// What stands for the linear layers that share an input.
    pub fn slot(&self, slot: Slot) -> &L {
        let Mlp::Dense(mlp) = &self.mlp;
        match slot {
            Slot::Qkv => &self.attention.qkv,
            Slot::O => &self.attention.o,
            Slot::GateUp => &mlp.gate_up,
            Slot::Down => &mlp.down,
        }
    }

    /// The same, to change.
    pub fn slot_mut(&mut self, slot: Slot) -> &mut L {
        let Mlp::Dense(mlp) = &mut self.mlp;
        match slot {
            Slot::Qkv => &mut self.attention.qkv,
            Slot::O => &mut self.attention.o,
            Slot::GateUp => &mut mlp.gate_up,
            Slot::Down => &mut mlp.down,
        }
    }

    /// All of them, in the order in which data flows.
    pub fn slots(&self) -> impl Iterator<Item = &L> {
        Slot::ALL.into_iter().map(|slot| self.slot(slot))
    }

    /// All norms, those of the residual stream first.
    pub fn norms(&self) -> impl Iterator<Item = &N> {
        let Mlp::Dense(mlp) = &self.mlp;
        let Attention { qk_norm, sub_norm, .. } = &self.attention;
        let qk_norm = qk_norm.iter().flat_map(|norm| [&norm.q, &norm.k]);
        [&self.input_norm, &self.post_attention_norm].into_iter().chain(qk_norm).chain(sub_norm).chain(&mlp.sub_norm)
    }

    /// The same, to change.
    pub fn norms_mut(&mut self) -> impl Iterator<Item = &mut N> {
        let Mlp::Dense(mlp) = &mut self.mlp;
        let Attention { qk_norm, sub_norm, .. } = &mut self.attention;
        let qk_norm = qk_norm.iter_mut().flat_map(|norm| [&mut norm.q, &mut norm.k]);
        let norms = [&mut self.input_norm, &mut self.post_attention_norm].into_iter().chain(qk_norm);
        norms.chain(sub_norm).chain(&mut mlp.sub_norm)
    }

    /// Replaces what stands for linear layers, in the order in which data flows.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn try_map<M, E>(self, mut f: impl FnMut(Slot, L) -> Result<M, E>) -> Result<DecoderLayer<M, N>, E> {
        let Mlp::Dense(mlp) = self.mlp;
        Ok(DecoderLayer {
            input_norm: self.input_norm,
            attention: Attention {
                qkv: f(Slot::Qkv, self.attention.qkv)?,
                qk_norm: self.attention.qk_norm,
                sub_norm: self.attention.sub_norm,
                o: f(Slot::O, self.attention.o)?,
            },
            post_attention_norm: self.post_attention_norm,
            mlp: Mlp::Dense(DenseMlp {
                gate_up: f(Slot::GateUp, mlp.gate_up)?,
                sub_norm: mlp.sub_norm,
                down: f(Slot::Down, mlp.down)?,
            }),
        })
    }

    /// Replaces the norms.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn try_map_norms<M, E>(self, mut f: impl FnMut(N) -> Result<M, E>) -> Result<DecoderLayer<L, M>, E> {
        let Mlp::Dense(mlp) = self.mlp;
        let qk_norm = self.attention.qk_norm.map(|norm| Ok(QkNorm { q: f(norm.q)?, k: f(norm.k)? })).transpose()?;
        let (input_norm, post_attention_norm) = (f(self.input_norm)?, f(self.post_attention_norm)?);
        Ok(DecoderLayer {
            input_norm,
            attention: Attention {
                qkv: self.attention.qkv,
                qk_norm,
                sub_norm: self.attention.sub_norm.map(&mut f).transpose()?,
                o: self.attention.o,
            },
            post_attention_norm,
            mlp: Mlp::Dense(DenseMlp {
                gate_up: mlp.gate_up,
                sub_norm: mlp.sub_norm.map(&mut f).transpose()?,
                down: mlp.down,
            }),
        })
    }
}

/// Linear layers that share an input, each with its role.
#[derive(Debug, Clone)]
pub struct Projections<L>(Vec<(LinearRole, L)>);

impl<L> Projections<L> {
    /// Those of `slot`, each made by `make`.
    pub fn new(slot: Slot, make: impl Fn(LinearRole) -> L) -> Projections<L> {
        Projections(slot.roles().iter().map(|&role| (role, make(role))).collect())
    }

    /// In the order of their outputs.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &L> {
        self.0.iter().map(|(_, linear)| linear)
    }

    /// The same, to change.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (LinearRole, &mut L)> {
        self.0.iter_mut().map(|(role, linear)| (*role, linear))
    }

    /// The first: what names the slot in messages.
    pub fn first(&self) -> &L {
        &self.0[0].1 // every slot has a role
    }

    /// Each as `f` makes it.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn try_map<M, E>(&self, mut f: impl FnMut(LinearRole, &L) -> Result<M, E>) -> Result<Projections<M>, E> {
        let mapped = self.0.iter().map(|(role, linear)| Ok((*role, f(*role, linear)?)));
        mapped.collect::<Result<_, E>>().map(Projections)
    }

    /// All, without their roles.
    pub fn into_vec(self) -> Vec<L> {
        self.0.into_iter().map(|(_, linear)| linear).collect()
    }
}

impl<L, N> DecoderLayer<Projections<L>, N> {
    /// The linear layer of `role`.
    pub fn linear(&self, role: LinearRole) -> &L {
        let found = self.slot(role.slot()).0.iter().find(|(other, _)| *other == role);
        &found.expect("a slot holds all of its roles").1
    }

    /// The same, to change.
    pub fn linear_mut(&mut self, role: LinearRole) -> &mut L {
        let found = self.slot_mut(role.slot()).0.iter_mut().find(|(other, _)| *other == role);
        &mut found.expect("a slot holds all of its roles").1
    }

    /// All linear layers, in the order in which data flows.
    pub fn linears(&self) -> impl Iterator<Item = (LinearRole, &L)> {
        self.slots().flat_map(|slot| slot.0.iter().map(|(role, linear)| (*role, linear)))
    }
}

impl<N> DecoderLayer<Projections<LinearWeight>, N> {
    /// Packs the linear layers for `device`, those that share an input as one. SwiGLU is fused into gate and up where the device
    /// has that for the weights, and nothing stands between: a norm there has another activation.
    ///
    /// # Errors
    /// As [`Linear::new`].
    pub fn pack(self, device: &Device) -> Result<DecoderLayer<Linear, N>> {
        let linear = |weights: Projections<LinearWeight>| Linear::new(device, weights.into_vec());
        let (Attention { qkv, qk_norm, sub_norm, o }, Mlp::Dense(mlp)) = (self.attention, self.mlp);
        Ok(DecoderLayer {
            input_norm: self.input_norm,
            attention: Attention { qkv: linear(qkv)?, qk_norm, sub_norm, o: linear(o)? },
            post_attention_norm: self.post_attention_norm,
            mlp: Mlp::Dense(DenseMlp {
                gate_up: match &mlp.sub_norm {
                    Some(_) => linear(mlp.gate_up)?,
                    None => Linear::gated(device, mlp.gate_up.into_vec(), mlp.down.first())?,
                },
                sub_norm: mlp.sub_norm,
                down: linear(mlp.down)?,
            }),
        })
    }
}
