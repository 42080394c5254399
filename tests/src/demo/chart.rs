//! placeholder
use super::story::Outcome;
/// Draws.
#[must_use]
pub fn draw(_outcome: &Outcome) -> String {
    String::new()
}
