//! Random sequences of guest actions and C calls against a model that is simple enough to be right:
//! a set of ballooned pages, the contents that every page should have, and the books that follow
//! (invariants I1, I2, I4).
//!
//! The seed is printed; `AEROSTAT_SEED` runs one again, `AEROSTAT_MODEL_SECONDS` runs longer.
#![expect(
    clippy::cast_possible_truncation,
    reason = "page frame numbers and sizes of these guests are small"
)]

use aerostat_tests::vmm::allocator::mix;
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::vring::Piece;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

const FRAME_PAGES: u64 = 512;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0) % bound
    }
}

/// The books that the model keeps, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Flow {
    requested: u64,
    discarded: u64,
    held: u64,
    inhibited: u64,
    outside: u64,
    duplicate: u64,
    pinned: u64,
    partial: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Books {
    balloon: Flow,
    report: Flow,
    returned: u64,
    rejected: u64,
}

struct Model {
    regions: Vec<RegionSpec>,
    ballooned: BTreeSet<u64>,
    /// The seed of each page's contents; pages that are not listed hold zeros.
    contents: BTreeMap<u64, u64>,
    inhibits: u32,
    books: Books,
}

impl Model {
    fn region(&self, pfn: u64) -> Option<&RegionSpec> {
        let gpa = pfn * PAGE_BYTES;
        let mut regions = self.regions.iter();
        regions.find(|region| (region.gpa..region.gpa + region.len_bytes).contains(&gpa))
    }

    fn has_frames(region: &RegionSpec) -> bool {
        region.page_size_bytes > PAGE_BYTES
    }

    /// What becomes of pages that are discarded, on the account of `flow`.
    fn discard(&mut self, pages: &[u64], flow: fn(&mut Books) -> &mut Flow) {
        for pfn in pages {
            let pinned = self.region(*pfn).is_some_and(|region| region.pinned);
            let flow = flow(&mut self.books);
            if self.inhibits > 0 {
                flow.inhibited += 1;
            } else if pinned {
                flow.pinned += 1;
            } else {
                flow.discarded += 1;
                self.contents.remove(pfn);
            }
        }
    }

    fn frame(pfn: u64) -> std::ops::Range<u64> {
        let start = pfn / FRAME_PAGES * FRAME_PAGES;
        start..start + FRAME_PAGES
    }

    fn give(&mut self, pfns: &[u64]) {
        let unique: BTreeSet<u64> = pfns.iter().copied().collect();
        self.books.balloon.requested += pfns.len() as u64;
        self.books.balloon.duplicate += (pfns.len() - unique.len()) as u64;
        let (mut discarded, mut frames) = (Vec::new(), BTreeSet::new());
        for pfn in unique {
            let Some(region) = self.region(pfn).filter(|region| !region.readonly) else {
                self.books.balloon.outside += 1;
                continue;
            };
            let framed = Self::has_frames(region);
            if !self.ballooned.insert(pfn) {
                self.books.balloon.duplicate += 1;
            } else if framed {
                frames.insert(Self::frame(pfn).start);
            } else {
                discarded.push(pfn);
            }
        }
        for start in frames {
            if Self::frame(start).all(|pfn| self.ballooned.contains(&pfn)) {
                discarded.extend(Self::frame(start));
            }
        }
        self.discard(&discarded, |books| &mut books.balloon);
    }

    fn take(&mut self, pfns: &[u64]) {
        for pfn in pfns {
            if self.ballooned.remove(pfn) {
                self.books.returned += 1;
            } else {
                self.books.rejected += 1;
            }
        }
    }

    fn report(&mut self, ranges: &[(u64, u64)]) {
        let all = ranges
            .iter()
            .flat_map(|(start, pages)| *start..start + pages);
        let total = all.clone().count() as u64;
        let unique: BTreeSet<u64> = all.collect();
        self.books.report.requested += total;
        self.books.report.duplicate += total - unique.len() as u64;
        let mut discarded = Vec::new();
        for pfn in &unique {
            match self.region(*pfn).filter(|region| !region.readonly) {
                None => self.books.report.outside += 1,
                Some(region) => {
                    let whole = || Self::frame(*pfn).all(|page| unique.contains(&page));
                    if Self::has_frames(region) && !whole() {
                        self.books.report.partial += 1;
                    } else {
                        discarded.push(*pfn);
                    }
                }
            }
        }
        self.discard(&discarded, |books| &mut books.report);
    }

    /// Pages in frames of which only a part is in the balloon.
    fn held(&self) -> u64 {
        let framed = |pfn: &&u64| self.region(**pfn).is_some_and(Self::has_frames);
        let mut frames: BTreeMap<u64, u64> = BTreeMap::new();
        for pfn in self.ballooned.iter().filter(framed) {
            *frames.entry(Self::frame(*pfn).start).or_default() += 1;
        }
        frames.values().filter(|pages| **pages < FRAME_PAGES).sum()
    }

    /// Compares everything that can be seen from outside.
    fn check(&mut self, guest: &Guest, what: &str) -> Result<()> {
        let counters = guest.settled_books()?;
        let flow = |flow: &aerostat::aerostat_flow| Flow {
            requested: flow.requested_bytes / PAGE_BYTES,
            discarded: flow.discarded_bytes / PAGE_BYTES,
            held: flow.held_bytes / PAGE_BYTES,
            inhibited: flow.skipped_inhibited_bytes / PAGE_BYTES,
            outside: flow.skipped_out_of_range_bytes / PAGE_BYTES,
            duplicate: flow.skipped_duplicate_bytes / PAGE_BYTES,
            pinned: flow.skipped_pinned_bytes / PAGE_BYTES,
            partial: flow.skipped_partial_bytes / PAGE_BYTES,
        };
        let seen = Books {
            balloon: flow(&counters.balloon),
            report: flow(&counters.report),
            returned: counters.returned_bytes / PAGE_BYTES,
            rejected: counters.rejected_take_bytes / PAGE_BYTES,
        };
        self.books.balloon.held = self.held();
        assert_eq!(seen, self.books, "after {what}");
        let ballooned = self.ballooned.len() as u64 * PAGE_BYTES;
        assert_eq!(
            guest.device().query()?.ballooned_bytes,
            ballooned,
            "after {what}"
        );
        assert_eq!(
            counters.broken_rings + counters.chain_errors,
            0,
            "after {what}"
        );
        Ok(())
    }

    /// Compares the contents of `pages`.
    fn check_pages(&self, guest: &Guest, pages: impl Iterator<Item = u64>, what: &str) {
        for pfn in pages {
            let as_expected = match self.contents.get(&pfn) {
                Some(seed) => guest.ram().page_is(pfn, |index| mix(seed ^ index)),
                None => guest.ram().page_is(pfn, |_| 0),
            };
            assert!(as_expected, "page {pfn:#x} after {what}");
        }
    }
}

/// Page frame numbers as a guest may send them: runs, single ones, good and bad, repeated.
fn some_pfns(random: &mut Random, model: &Model, first: u64) -> Vec<u64> {
    let mut pfns = Vec::new();
    let wanted = 1 + random.below(256) as usize;
    while pfns.len() < wanted {
        let region = model.regions[random.below(model.regions.len() as u64) as usize];
        let pages = region.len_bytes / PAGE_BYTES;
        // Up to 40 pages before or behind the region too: holes.
        let start = (region.gpa / PAGE_BYTES + random.below(pages + 80)).saturating_sub(40);
        let run = [1, 1, 8, 100, 256][random.below(5) as usize];
        pfns.extend((start..start + run).filter(|pfn| *pfn >= first));
        if random.below(8) == 0 {
            let again = pfns.first().copied();
            pfns.extend(again);
        }
    }
    pfns.truncate(wanted);
    if random.below(4) == 0 {
        pfns.reverse();
    }
    pfns
}

fn some_ranges(random: &mut Random, model: &Model, first: u64, inside: bool) -> Vec<(u64, u64)> {
    let range = |random: &mut Random| {
        let region = model.regions[random.below(model.regions.len() as u64) as usize];
        let end = (region.gpa + region.len_bytes) / PAGE_BYTES;
        let pages = region.len_bytes / PAGE_BYTES;
        let start = (region.gpa / PAGE_BYTES + random.below(pages)).max(first);
        let wanted = 1 + random.below(700);
        // A VMM that pops elements cannot map what leaves a region.
        let pages = if inside {
            wanted.min(end - start)
        } else {
            wanted
        };
        (start, pages)
    };
    (0..=random.below(8)).map(|_| range(random)).collect()
}

const REMOVABLE: u64 = 48 * MIB;

fn regions() -> Vec<RegionSpec> {
    let memfd = Backing::Memfd { offset_bytes: MIB };
    let mut frames = RegionSpec::new(16 * MIB, 4 * MIB, Backing::Anonymous);
    frames.page_size_bytes = 2 * MIB;
    let mut pinned = RegionSpec::new(20 * MIB, MIB, memfd);
    pinned.pinned = true;
    let mut rom = RegionSpec::new(21 * MIB, MIB / 2, Backing::Anonymous);
    rom.readonly = true;
    let mut huge_file = RegionSpec::new(32 * MIB, 4 * MIB, Backing::Memfd { offset_bytes: 0 });
    huge_file.page_size_bytes = 2 * MIB;
    let ordinary = RegionSpec::new(0, 4 * MIB, Backing::Anonymous);
    let file = RegionSpec::new(8 * MIB, 4 * MIB, memfd);
    vec![ordinary, file, frames, pinned, rom, huge_file, removable()]
}

fn removable() -> RegionSpec {
    RegionSpec::new(REMOVABLE, 2 * MIB, Backing::Anonymous)
}

/// One random step; says what it was.
fn step(random: &mut Random, guest: &mut Guest, model: &mut Model, first: u64) -> Result<String> {
    Ok(match random.below(20) {
        0..=6 => {
            let pfns = some_pfns(random, model, first);
            guest.driver().tell(Role::Inflate, &pfns)?;
            model.give(&pfns);
            format!("give {:x?}.. {}", pfns[0], pfns.len())
        }
        7..=10 => {
            let pfns = some_pfns(random, model, first);
            guest.driver().tell(Role::Deflate, &pfns)?;
            model.take(&pfns);
            format!("take {:x?}.. {}", pfns[0], pfns.len())
        }
        11 => {
            let pfns: Vec<u64> = model.ballooned.iter().copied().take(256).collect();
            if !pfns.is_empty() {
                guest.driver().tell(Role::Deflate, &pfns)?;
                model.take(&pfns);
            }
            format!("take {} from the bottom", pfns.len())
        }
        12..=13 => {
            let ranges = some_ranges(random, model, first, guest.config().elements);
            let piece = |(start, pages): &(u64, u64)| Piece {
                gpa: start * PAGE_BYTES,
                len: (pages * PAGE_BYTES) as u32,
                writable: true,
            };
            let pieces: Vec<Piece> = ranges.iter().map(piece).collect();
            guest.driver().exchange(Role::Reporting, &pieces)?;
            model.report(&ranges);
            format!("report {ranges:x?}")
        }
        14 => {
            guest.device().inhibit()?;
            model.inhibits += 1;
            "inhibit".to_owned()
        }
        15 => {
            let allowed = guest.device().uninhibit().is_ok();
            assert_eq!(allowed, model.inhibits > 0);
            model.inhibits = model.inhibits.saturating_sub(1);
            "uninhibit".to_owned()
        }
        16 => {
            guest.device().pause()?;
            guest.device().resume()?;
            "pause and resume".to_owned()
        }
        17 if random.below(4) == 0 => {
            guest.restart_driver()?;
            model.ballooned.clear();
            "reset".to_owned()
        }
        18 => {
            let end = (REMOVABLE + removable().len_bytes) / PAGE_BYTES;
            let pages = REMOVABLE / PAGE_BYTES..end;
            let present = model.regions.iter().any(|region| region.gpa == REMOVABLE);
            if present {
                guest.change_memory(None, Some(REMOVABLE))?;
                model.regions.retain(|region| region.gpa != REMOVABLE);
            } else {
                guest.change_memory(Some(removable()), None)?;
                model.regions.push(removable());
            }
            model.ballooned.retain(|pfn| !pages.contains(pfn));
            model.contents.retain(|pfn, _| !pages.contains(pfn));
            format!("memory {}", if present { "goes" } else { "comes" })
        }
        _ => {
            // The guest uses pages that are its own.
            for _ in 0..200 {
                let region = model.regions[random.below(model.regions.len() as u64) as usize];
                let pages = region.len_bytes / PAGE_BYTES;
                let pfn = region.gpa / PAGE_BYTES + random.below(pages);
                if pfn >= first && !model.ballooned.contains(&pfn) {
                    let seed = random.below(u64::MAX);
                    guest.ram().fill_page(pfn, |index| mix(seed ^ index));
                    model.contents.insert(pfn, seed);
                }
            }
            "write".to_owned()
        }
    })
}

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn random_sequences_agree_with_the_model() -> Result<()> {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let fresh = clock.map_or(1, |time| time.as_micros() as u64);
    let seed = number_from("AEROSTAT_SEED").unwrap_or(fresh);
    let seconds = number_from("AEROSTAT_MODEL_SECONDS").unwrap_or(4);
    println!("AEROSTAT_SEED={seed}");
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let mut random = Random(seed);
    let (mut runs, mut steps) = (0, 0);
    let vmm = Vmm::new()?;
    while Instant::now() < deadline {
        let mut config = GuestConfig::with_regions(regions());
        config.elements = random.below(3) == 0;
        let mut guest = vmm.boot(&config)?;
        let first = guest.driver().allocator.unused().next().unwrap_or(0);
        let mut model = Model {
            regions: regions(),
            ballooned: BTreeSet::new(),
            contents: BTreeMap::new(),
            inhibits: 0,
            books: Books::default(),
        };
        for _ in 0..300 {
            let what = step(&mut random, &mut guest, &mut model, first)?;
            model.check(&guest, &what)?;
            let region = model.regions[random.below(model.regions.len() as u64) as usize];
            let start = (region.gpa / PAGE_BYTES + random.below(64)).max(first);
            model.check_pages(&guest, start..start + 16, &what);
            steps += 1;
        }
        let all = guest.ram().pfns().filter(|pfn| *pfn >= first);
        model.check_pages(&guest, all, "all of it");
        runs += 1;
    }
    println!("{steps} steps in {runs} runs");
    Ok(())
}
