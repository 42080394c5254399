//! Which pages, without any system call: lists to ranges, and who owns what. All of it is pure.

pub mod frames;
pub mod ownership;
pub mod ranges;
