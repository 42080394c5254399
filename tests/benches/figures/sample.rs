//! Numbers that were measured several times.

/// The samples of one figure, in the order of the runs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    pub(crate) fn values(&self) -> &[f64] {
        &self.0
    }

    pub(crate) fn runs(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub(crate) fn lowest(&self) -> f64 {
        self.quantile(0.0)
    }

    pub(crate) fn highest(&self) -> f64 {
        self.quantile(1.0)
    }

    /// The sample that `share` of all are not above.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an index"
        )]
        let index = (to_f64(last as u64) * share).round() as usize;
        sorted.get(index).copied().unwrap_or(f64::NAN)
    }

    /// Run by run, this over `other`, which was measured right beside it.
    pub(crate) fn over(&self, other: &Self) -> Self {
        Self(
            self.0
                .iter()
                .zip(&other.0)
                .map(|(own, other)| own / other)
                .collect(),
        )
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<T: IntoIterator<Item = f64>>(values: T) -> Self {
        Self(values.into_iter().collect())
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
pub(crate) fn to_f64(number: u64) -> f64 {
    number as f64
}

pub(crate) fn gib(bytes: u64) -> f64 {
    to_f64(bytes) / to_f64(1 << 30)
}
