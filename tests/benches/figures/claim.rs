//! What is claimed of the library, and whether a run bears it out.

use super::sample::Samples;
use serde_json::{Value, json};

/// What a ratio has to be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    fn is_reached(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(goal) => ratio >= goal,
            Self::AtMost(goal) => ratio <= goal,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(goal) => format!(">= {}", number(goal)),
            Self::AtMost(goal) => format!("<= {}", number(goal)),
        }
    }
}

/// One ratio of a run, with its spread.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    pub(crate) figure: &'static str,
    pub(crate) case: String,
    pub(crate) against: &'static str,
    pub(crate) goal: Goal,
    pub(crate) ratios: Samples,
}

impl Claim {
    pub(crate) fn is_reached(&self) -> bool {
        self.goal.is_reached(self.ratios.median())
    }

    fn verdict(&self) -> &'static str {
        if self.is_reached() {
            "reached"
        } else {
            "MISSED"
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "figure": self.figure,
            "case": self.case,
            "against": self.against,
            "goal": self.goal.text(),
            "median": self.ratios.median(),
            "lowest": self.ratios.lowest(),
            "highest": self.ratios.highest(),
            "runs": self.ratios.runs(),
            "verdict": self.verdict(),
        })
    }
}

/// A ratio as one reads it: 4.1, 0.021.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        0.1.. => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// All claims with their verdicts.
pub(crate) fn print(claims: &[Claim]) {
    println!(
        "{:<34} {:<28} {:<26} {:>8} {:>8} {:>17} {:>4}  verdict",
        "figure", "case", "against", "reach", "median", "lowest..highest", "runs"
    );
    for claim in claims {
        let spread = format!(
            "{}..{}",
            number(claim.ratios.lowest()),
            number(claim.ratios.highest())
        );
        println!(
            "{:<34} {:<28} {:<26} {:>8} {:>8} {:>17} {:>4}  {}",
            claim.figure,
            claim.case,
            claim.against,
            claim.goal.text(),
            number(claim.ratios.median()),
            spread,
            claim.ratios.runs(),
            claim.verdict()
        );
    }
    let missed = claims.iter().filter(|claim| !claim.is_reached()).count();
    println!("{} of {} reached", claims.len() - missed, claims.len());
}
