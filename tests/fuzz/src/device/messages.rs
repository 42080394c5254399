//! What the driver sends: any chain, and messages as drivers write them on each queue.

use super::Run;
use crate::guest::{Kind, PAGE};
use crate::script::{Address, Hint, Layout, Length, Pages, Segment};
use aerostat_device::{Element, IoVec};

/// The feature that each role's queue needs, in the order of the text's numbers.
const ROLES: [u64; 5] = [0, 0, 1 << 1, 1 << 3, 1 << 5];
const STATISTICS: usize = 2;
const HINTS: usize = 3;
const REPORTING: usize = 4;

/// A device-writable buffer of so many pages from an interesting one on.
fn pages_at(page: u8, count: u8) -> Segment {
    Segment {
        address: Address::Page(page),
        length: Length::Pages(count % 40),
        writable: true,
        odd: 0,
    }
}

fn bytes_at(at: u64, len: usize, writable: bool) -> Segment {
    Segment {
        address: Address::Raw(at),
        length: Length::Raw(u32::try_from(len).unwrap_or(u32::MAX)),
        writable,
        odd: 0,
    }
}
impl Run<'_> {
    pub(super) fn offer(&mut self, queue: u16, segments: &[Segment], indirect: bool) {
        if self.layout == Layout::Elements {
            self.submit(queue, segments);
        } else {
            let driver = &mut self.drivers[usize::from(queue)];
            driver.offer(&mut self.host.guest, segments, indirect);
        }
    }

    /// Offers a chain on the queue of a role and kicks.
    fn send(&mut self, role: usize, segments: &[Segment], indirect: bool) {
        let queue = self.queue_of(role);
        self.offer(queue, segments, indirect);
        self.kick(queue);
    }

    /// The number of a role's queue, if the driver has it; otherwise that of the text.
    fn queue_of(&self, role: usize) -> u16 {
        let before = ROLES.iter().take(role);
        let gaps = before.filter(|feature| self.features & **feature != **feature);
        let gaps = if self.dense { gaps.count() } else { 0 };
        u16::try_from(role - gaps).unwrap_or(0)
    }

    /// The queues of a driver that leaves no gap, a bit each.
    pub(super) fn dense_queues(&self) -> u8 {
        let present = ROLES
            .iter()
            .filter(|feature| self.features & **feature == **feature);
        !(u8::MAX << present.count())
    }

    /// A page for the buffers of the next message.
    fn next_buffer(&mut self) -> u64 {
        self.messages = self.messages.wrapping_add(1);
        crate::script::buffer(self.messages)
    }

    pub(super) fn tell(&mut self, deflate: bool, pages: &Pages, answer: u8, indirect: bool) {
        let at = self.next_buffer();
        let list: Vec<u8> = pages.0.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.host.guest.write(at, &list);
        let mut segments = vec![bytes_at(at, list.len(), false)];
        let room = pages.0.len().div_ceil(8);
        match answer % 4 {
            _ if deflate || self.features & 1 << 50 == 0 => {}
            0 => {}
            1 => segments.push(bytes_at(at + 0x800, room.saturating_sub(1), true)),
            _ => segments.push(bytes_at(at + 0x800, room, true)),
        }
        self.send(usize::from(deflate), &segments, indirect);
    }

    pub(super) fn report(&mut self, runs: &[(u8, u8)], indirect: bool) {
        let runs = runs.iter();
        let runs: Vec<_> = runs.map(|(page, count)| pages_at(*page, *count)).collect();
        self.send(REPORTING, &runs, indirect);
    }

    pub(super) fn send_statistics(&mut self, records: &[(u8, u64)]) {
        let at = self.next_buffer();
        let mut bytes = Vec::new();
        for (tag, value) in records {
            bytes.extend(u16::from(*tag).to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        self.host.guest.write(at, &bytes);
        self.send(STATISTICS, &[bytes_at(at, bytes.len(), false)], false);
    }

    pub(super) fn send_hint(&mut self, hint: Hint) {
        let mut id = [0; 4];
        if let Hint::Id(distance) = hint {
            self.device.read_config(8, &mut id);
            let shown = u32::from_le_bytes(id);
            id = shown.wrapping_add_signed(distance.into()).to_le_bytes();
        }
        let segment = if let Hint::Pages(page, count) = hint {
            pages_at(page, count)
        } else {
            let at = self.next_buffer();
            self.host.guest.write(at, &id);
            bytes_at(at, id.len(), false)
        };
        self.send(HINTS, &[segment], false);
    }

    /// Hands over an element: iovecs in guest memory, as far as they are; none that may be written to
    /// where nobody can.
    #[allow(unsafe_code, reason = "elements are memory of this process")]
    pub(super) fn submit(&mut self, queue: u16, segments: &[Segment]) {
        let mut element = Element {
            queue,
            token: self.next_token,
            ..Element::default()
        };
        let mut reported = Vec::new();
        for segment in segments {
            let gpa = segment.address.gpa();
            let Some((address, room)) = self.host.guest.host(gpa) else {
                continue;
            };
            let len = usize::try_from(segment.length.bytes())
                .unwrap_or(0)
                .min(room);
            let rom = |at: u64| self.host.guest.kind_at(at) == Some(Kind::Rom);
            let pages = (gpa..gpa.saturating_add(len as u64)).step_by(PAGE);
            let mut pages = pages.chain([gpa.saturating_add(len as u64)]);
            if queue == 0 && segment.writable && pages.any(rom) {
                continue;
            }
            // SAFETY: guest memory stays mapped; only the inflate queue writes to it, and it was just
            // seen to that it can.
            let iov = unsafe { IoVec::new(address, len) };
            if segment.writable {
                reported.push((gpa, len as u64));
                element.writable.push(iov);
            } else {
                element.readable.push(iov);
            }
        }
        if self.device.submit(vec![element]).is_ok() {
            self.elements.insert(self.next_token, reported);
            self.next_token += 1;
        }
    }

    /// Each element comes back once.
    pub(super) fn collect(&mut self, max: usize) {
        let mut completions = Vec::new();
        self.device.completions(max, &mut completions);
        assert!(completions.len() <= max, "more completions than asked for");
        for completion in completions {
            let known = self.elements.remove(&completion.token);
            assert!(
                known.is_some(),
                "{completion:?} came twice, or was never submitted"
            );
            let answers = completion.queue == 0 && self.terms.answers;
            assert!(completion.written == 0 || answers, "{completion:?}");
        }
    }
}
