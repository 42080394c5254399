//! Water-filling: an amount is divided by weight, and nobody gives more than it has.
//!
//! Each claimant gives `min(limit, level * weight)` with one level for all, chosen so that the sum
//! is the amount asked for: those with a low limit give all of it, and what they lack is shared
//! again by the others. Sorting by the level at which each claimant is exhausted finds it in
//! O(n log n).

/// One that takes part in a division.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Claim {
    /// It gives, or gets, no more than this.
    pub(super) limit_bytes: u64,
    /// Its part against the others'. Not positive: it takes no part.
    pub(super) weight: f64,
}

impl Claim {
    /// The level at which it is exhausted.
    fn exhausted_at(&self) -> f64 {
        self.limit_bytes as f64 / self.weight
    }

    fn takes_part(&self) -> bool {
        self.limit_bytes > 0 && self.weight > 0.0 && self.weight.is_finite()
    }
}

/// Divides `amount_bytes` over the claims, in their order. The sum is the amount, or the sum of all
/// limits if that is less.
pub(super) fn divide(amount_bytes: u64, claims: &[Claim]) -> Vec<u64> {
    let mut shares = vec![0; claims.len()];
    if amount_bytes == 0 {
        return shares;
    }
    let mut order: Vec<usize> = (0..claims.len())
        .filter(|index| claims[*index].takes_part())
        .collect();
    order.sort_unstable_by(|left, right| {
        let levels = (claims[*left].exhausted_at(), claims[*right].exhausted_at());
        levels.0.total_cmp(&levels.1).then(left.cmp(right))
    });

    let mut weight_left: f64 = order.iter().map(|index| claims[*index].weight).sum();
    let mut amount_left = amount_bytes;
    for index in order {
        let claim = &claims[index];
        // In this order a claim that is not exhausted by its share means that none after it is, so
        // their shares all come out at the same level.
        let part = if weight_left > 0.0 {
            (claim.weight / weight_left).min(1.0)
        } else {
            1.0
        };
        let share = super::amount::scaled(amount_left, part)
            .min(claim.limit_bytes)
            .min(amount_left);
        shares[index] = share;
        amount_left -= share;
        weight_left -= claim.weight;
    }
    hand_out_rest(amount_left, claims, &mut shares);
    shares
}

/// Rounding down leaves a few bytes at most, unless everyone is exhausted: the first that can takes
/// them.
fn hand_out_rest(mut rest: u64, claims: &[Claim], shares: &mut [u64]) {
    for (claim, share) in claims.iter().zip(shares) {
        if rest == 0 {
            return;
        }
        if claim.takes_part() {
            let more = rest.min(claim.limit_bytes - *share);
            *share += more;
            rest -= more;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claim(limit_bytes: u64, weight: f64) -> Claim {
        Claim {
            limit_bytes,
            weight,
        }
    }

    #[test]
    fn equal_weights_with_room_share_equally() {
        assert_eq!(divide(90, &[claim(100, 1.0); 3]), [30, 30, 30]);
    }

    #[test]
    fn what_an_exhausted_one_lacks_is_shared_by_the_others() {
        let claims = [claim(100, 1.0), claim(10, 1.0), claim(100, 1.0)];
        assert_eq!(divide(90, &claims), [40, 10, 40]);
    }

    #[test]
    fn shares_follow_weights() {
        let claims = [claim(1000, 1.0), claim(1000, 3.0)];
        assert_eq!(divide(400, &claims), [100, 300]);
    }

    #[test]
    fn more_than_all_have_takes_all() {
        assert_eq!(divide(500, &[claim(100, 1.0), claim(20, 9.0)]), [100, 20]);
    }

    #[test]
    fn one_without_weight_gives_nothing() {
        let claims = [claim(100, 0.0), claim(100, 1.0), claim(100, f64::NAN)];
        assert_eq!(divide(150, &claims), [0, 100, 0]);
    }

    fn claims() -> impl Strategy<Value = Vec<Claim>> {
        prop::collection::vec(
            (0_u64..1 << 40, 0.0..1e6_f64).prop_map(|(limit, weight)| claim(limit, weight)),
            0..60,
        )
    }

    proptest! {
        #[test]
        fn the_sum_is_the_amount_or_everything(amount in 0_u64..1 << 45, claims in claims()) {
            let shares = divide(amount, &claims);

            let all: u64 = claims.iter().filter(|c| c.takes_part()).map(|c| c.limit_bytes).sum();
            prop_assert_eq!(shares.iter().sum::<u64>(), amount.min(all));
            for (share, claim) in shares.iter().zip(&claims) {
                prop_assert!(*share <= claim.limit_bytes);
            }
        }

        #[test]
        fn all_that_are_not_exhausted_stand_at_one_level(
            amount in 0_u64..1 << 45,
            claims in claims(),
        ) {
            let shares = divide(amount, &claims);

            let levels: Vec<f64> = shares.iter().zip(&claims)
                .filter(|(share, claim)| claim.weight > 0.01 && **share < claim.limit_bytes)
                .map(|(share, claim)| *share as f64 / claim.weight)
                .collect();
            let highest = levels.iter().copied().fold(0.0, f64::max);
            for level in levels {
                // A few bytes of rounding, over the smallest weight looked at.
                prop_assert!(highest - level <= 1e-6 * highest + 100.0 * claims.len() as f64);
            }
        }

        #[test]
        fn a_larger_amount_takes_less_from_nobody(
            amount in 0_u64..1 << 45,
            more in 0_u64..1 << 45,
            claims in claims(),
        ) {
            let (less, all) = (divide(amount, &claims), divide(amount + more, &claims));
            for (smaller, larger) in less.iter().zip(&all) {
                prop_assert!(*smaller <= larger + 64 + (*larger >> 30));
            }
        }
    }
}
