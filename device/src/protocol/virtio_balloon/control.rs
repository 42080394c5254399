//! What a VMM can ask of this protocol alone: statistics (S8) and free page hints (S9).

use super::{Features, HintState, MAX_ROUND, StatsBoard, VirtioBalloon};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::memory::PfnRange;
use crate::metrics::GuestStats;
use crate::protocol::contract::ASKED;
use std::time::Duration;

impl Device {
    /// What the guest last said of its memory. With a `timeout` of more than zero it is asked for
    /// news first, and the call waits that long for the answer.
    ///
    /// # Errors
    /// Asking needs an active device with STATS_VQ, and a guest that answers in time.
    pub fn guest_stats(&self, timeout: Duration) -> Result<GuestStats> {
        let stats = self
            .protocol::<VirtioBalloon>()
            .map(|protocol| &protocol.stats);
        if timeout.is_zero() {
            // A guest that cannot say anything has never said anything.
            return Ok(stats.map_or_else(GuestStats::default, StatsBoard::latest));
        }
        let stats = stats.ok_or(Error::NotSupported("STATS_VQ"))?;
        active_with(self, Features::STATS_VQ, "STATS_VQ")?;
        let mark = stats.mark();
        self.shared.schedule(ASKED);
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        match stats.wait_behind(mark, timeout) {
            Some(stats) => Ok(stats),
            // A reset ends the wait at once, and then there is more to say than "too late".
            None => active_with(self, Features::STATS_VQ, "STATS_VQ")
                .and(Err(Error::TimedOut { timeout_ms })),
        }
    }

    /// Asks the guest for statistics every `interval` from now on; `None` stops that. Of no effect where
    /// the protocol has none.
    pub fn set_stats_interval(&self, interval: Option<Duration>) {
        if let Some(protocol) = self.protocol::<VirtioBalloon>() {
            let interval = interval.filter(|interval| !interval.is_zero());
            protocol.stats.poll_every(interval);
            self.shared.set_timer();
        }
    }

    /// Begins a round of free page hints (S9) and asks the guest for them through `config_event`;
    /// returns the round's id. It ends with [`Self::finish_hints`], or by itself after `limit` (at most
    /// ten minutes): until then the guest leaves nearly all its free pages to the device.
    ///
    /// # Errors
    /// Needs an active device with FREE_PAGE_HINT and no round that is still running.
    pub fn start_hints(&self, limit: Duration) -> Result<u32> {
        // A reset comes before, or ends the round.
        let _service = self.shared.service.lock();
        active_with(self, Features::FREE_PAGE_HINT, "FREE_PAGE_HINT")?;
        if limit.is_zero() || limit > MAX_ROUND {
            let value = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
            let expected = "from 1 to 600000";
            return Err(Error::Invalid {
                what: "limit_ms",
                value,
                expected,
            });
        }
        let protocol = traditional(self, "FREE_PAGE_HINT")?;
        let id = protocol.hints.start(&protocol.config, limit)?;
        self.shared.set_timer();
        self.shared.signal_config();
        Ok(id)
    }

    /// Ends the round of hints: the guest may use its pages again. Hints that came are kept.
    ///
    /// # Errors
    /// No round is running; it may have ended by itself.
    pub fn finish_hints(&self) -> Result<()> {
        let protocol = traditional(self, "FREE_PAGE_HINT")?;
        if !protocol.hints.done(&protocol.config) {
            return Err(Error::Unbalanced("finish_hints"));
        }
        self.shared.set_timer();
        self.shared.signal_config();
        Ok(())
    }

    /// Takes up to `max` ranges that the guest said are free, oldest first. They were free at some
    /// moment of the round, and may have been written since: use them only with writes tracked from
    /// before [`Self::start_hints`]. Nothing was discarded.
    pub fn take_hints(&self, max: usize, into: &mut Vec<PfnRange>) -> HintState {
        self.protocol::<VirtioBalloon>()
            .map_or(HintState::Idle, |protocol| protocol.hints.take(max, into))
    }
}

/// The device's protocol, where it is this one; `name` is what others do not have.
fn traditional<'a>(device: &'a Device, name: &'static str) -> Result<&'a VirtioBalloon> {
    device.protocol().ok_or(Error::NotSupported(name))
}

/// Fails unless the device is active and `feature` was negotiated.
fn active_with(device: &Device, feature: Features, name: &'static str) -> Result<()> {
    traditional(device, name)?;
    device.expect_active()?;
    let negotiated = Features::from_bits_retain(device.features()).contains(feature);
    negotiated.then_some(()).ok_or(Error::NotSupported(name))
}
