//! Layouts that several families share.

pub(super) mod blocks;
pub(super) mod e4m3;
pub(super) mod fragments;
pub(super) mod steps;
