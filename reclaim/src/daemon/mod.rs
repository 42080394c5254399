//! aerostatd around the engine: its sockets, its signals, its views.

pub mod check;
pub mod client;
pub mod control;
pub mod metrics;
pub mod run;
pub mod top;
pub mod view;
