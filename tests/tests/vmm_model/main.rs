//! Random sequences of guest actions and C calls against a model that is simple enough to be right:
//! a set of ballooned pages, those of them that wait to be discarded, the contents that every page should
//! have, and the books that follow (invariants I1, I2, I4). Stock guests and guests that know of refusals and
//! host resets and hint free pages, with split rings, packed ones and elements, discarding at once and with
//! write-behind.
//!
//! The seed is printed; `AEROSTAT_SEED` runs one again, `AEROSTAT_MODEL_SECONDS` runs longer.
#![expect(
    clippy::cast_possible_truncation,
    reason = "page frame numbers and sizes of these guests are small"
)]

mod hints;
mod model;

use aerostat::{
    AEROSTAT_FEATURE_FREE_PAGE_HINT, AEROSTAT_FEATURE_HOST_RESET, AEROSTAT_FEATURE_PAGE_REFUSAL,
};
use aerostat_tests::vmm::allocator::mix;
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::guest::{queue_config, resumed};
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::vring::Piece;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
use model::Model;
use std::time::{Duration, Instant};

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0) % bound
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
    Ok(match random.below(30) {
        0..=6 => {
            let pfns = some_pfns(random, model, first);
            if model.refuses {
                let (_, refused) = guest.driver().offer(&pfns)?;
                assert_eq!(refused, model.offer(&pfns), "refused of {pfns:x?}");
            } else {
                guest.driver().tell(Role::Inflate, &pfns)?;
                model.give(&pfns);
            }
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
        12..=13 => report(random, guest, model, first)?,
        14 => {
            guest.device().inhibit()?;
            model.flush();
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
            model.flush();
            guest.device().resume()?;
            "pause and resume".to_owned()
        }
        17 if random.below(4) == 0 => {
            guest.restart_driver()?;
            model.clear();
            model.rounds.reset();
            model.books.acknowledged = model.books.host_resets;
            model.late = false;
            "reset".to_owned()
        }
        18 => plug(guest, model)?,
        19 => {
            model.target = random.below(model.memory_pages() + 1);
            guest.device().set_target(model.target * PAGE_BYTES)?;
            format!("target {}", model.target)
        }
        20 => {
            guest.device().flush()?;
            model.flush();
            "flush".to_owned()
        }
        21 if guest.config().offered & AEROSTAT_FEATURE_HOST_RESET != 0 => {
            guest.device().reset_balloon()?;
            model.books.host_resets += 1;
            model.books.reset_pages += model.ballooned.len() as u64;
            model.clear();
            model.late = true;
            "host reset".to_owned()
        }
        22 => {
            let (id, ack) = guest.driver().reset_fields()?;
            assert_eq!(id != ack, model.late);
            if model.late {
                guest.driver().acknowledge_reset(id)?;
                model.books.acknowledged = model.books.host_resets;
                model.late = false;
            }
            "acknowledge".to_owned()
        }
        23 => {
            let value = random.below(u64::MAX);
            guest.tell_statistics(value, Duration::from_secs(20))?;
            model.flush_if_settled();
            "statistics".to_owned()
        }
        24..=27 if guest.config().offered & AEROSTAT_FEATURE_FREE_PAGE_HINT != 0 => {
            hints::step(random, guest, model, first)?
        }
        28 => {
            let role = [Role::Inflate, Role::Deflate, Role::Reporting][random.below(3) as usize];
            stop_and_start(guest, role)?;
            model.flush();
            format!("stop and start {role:?}")
        }
        29 if model.waits => {
            guest.device().set_write_behind(1 << 40, 3_600_000)?;
            model.flush();
            "write-behind".to_owned()
        }
        _ => {
            write(random, guest, model, first);
            "write".to_owned()
        }
    })
}

/// A queue stops, and goes on where it was.
fn stop_and_start(guest: &Guest, role: Role) -> Result<()> {
    let index = guest.index_of(role)?;
    let config = queue_config(guest.driver().queue(role)?, guest.config().elements);
    let position = guest.device().stop_queue(index)?;
    guest
        .device()
        .start_queue(index, &resumed(&config, &position))
}

/// The guest reports pages as free, which stay its own.
fn report(random: &mut Random, guest: &Guest, model: &mut Model, first: u64) -> Result<String> {
    let ranges = some_ranges(random, model, first, guest.config().elements);
    let piece = |(start, pages): &(u64, u64)| Piece {
        gpa: start * PAGE_BYTES,
        len: (pages * PAGE_BYTES) as u32,
        writable: true,
    };
    let pieces: Vec<Piece> = ranges.iter().map(piece).collect();
    guest.driver().exchange(Role::Reporting, &pieces)?;
    model.report(&ranges);
    model.flush_if_settled();
    Ok(format!("report {ranges:x?}"))
}

/// The removable region goes, or comes back.
fn plug(guest: &mut Guest, model: &mut Model) -> Result<String> {
    let end = (REMOVABLE + removable().len_bytes) / PAGE_BYTES;
    let pages = REMOVABLE / PAGE_BYTES..end;
    let present = model.regions.iter().any(|region| region.gpa == REMOVABLE);
    model.flush();
    model.hurried = 0;
    if present {
        guest.change_memory(None, Some(REMOVABLE))?;
        model.regions.retain(|region| region.gpa != REMOVABLE);
    } else {
        guest.change_memory(Some(removable()), None)?;
        model.regions.push(removable());
    }
    model.ballooned.retain(|pfn| !pages.contains(pfn));
    model.contents.retain(|pfn, _| !pages.contains(pfn));
    model.unknown.retain(|pfn| !pages.contains(pfn));
    // What the driver is shown, and what limits its pages, is never more than there is.
    model.target = guest.device().query()?.target_bytes / PAGE_BYTES;
    Ok(format!("memory {}", if present { "goes" } else { "comes" }))
}

/// The guest uses pages that are its own.
fn write(random: &mut Random, guest: &Guest, model: &mut Model, first: u64) {
    for _ in 0..200 {
        let region = model.regions[random.below(model.regions.len() as u64) as usize];
        let pages = region.len_bytes / PAGE_BYTES;
        let pfn = region.gpa / PAGE_BYTES + random.below(pages);
        if pfn >= first && !model.ballooned.contains(&pfn) {
            let seed = random.below(u64::MAX);
            guest.ram().fill_page(pfn, |index| mix(seed ^ index));
            model.contents.insert(pfn, seed);
            model.unknown.remove(&pfn);
        }
    }
}

/// A guest of one of many kinds, and its model.
fn boot(random: &mut Random, vmm: &Vmm) -> Result<(Guest, Model)> {
    let waits = random.below(2) == 0;
    // A region that is pinned has everything be discarded at once.
    let wanted = |region: &RegionSpec| !(waits && region.pinned);
    let regions: Vec<RegionSpec> = regions().into_iter().filter(wanted).collect();
    let mut config = GuestConfig::with_regions(regions.clone());
    config.elements = random.below(3) == 0;
    let extensions = [0, AEROSTAT_FEATURE_PAGE_REFUSAL][random.below(2) as usize]
        | [0, AEROSTAT_FEATURE_HOST_RESET][random.below(2) as usize]
        | [0, AEROSTAT_FEATURE_FREE_PAGE_HINT][random.below(2) as usize];
    // Where the library sees rings at all.
    config.settings.packed |= random.below(2) == 0;
    config.settings.in_order |= random.below(4) == 0;
    config.offered = GuestConfig::LINUX & !AEROSTAT_FEATURE_FREE_PAGE_HINT | extensions;
    config.selected = config.offered;
    let guest = vmm.boot(&config)?;
    if waits {
        guest.device().set_write_behind(1 << 40, 3_600_000)?;
    }
    let model = Model {
        regions,
        waits,
        refuses: extensions & AEROSTAT_FEATURE_PAGE_REFUSAL != 0,
        ..Model::default()
    };
    Ok((guest, model))
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
        let (mut guest, mut model) = boot(&mut random, &vmm)?;
        let first = guest.driver().allocator.unused().next().unwrap_or(0);
        for _ in 0..300 {
            let what = step(&mut random, &mut guest, &mut model, first)?;
            model.check(&guest, &what)?;
            let region = model.regions[random.below(model.regions.len() as u64) as usize];
            let end = (region.gpa + region.len_bytes) / PAGE_BYTES;
            let start = region.gpa / PAGE_BYTES + random.below(region.len_bytes / PAGE_BYTES);
            let start = start.max(first);
            model.check_pages(&guest, start..(start + 64).min(end), &what);
            steps += 1;
        }
        let all = guest.ram().pfns().filter(|pfn| *pfn >= first);
        model.check_pages(&guest, all, "all of it");
        runs += 1;
    }
    println!("{steps} steps in {runs} runs");
    Ok(())
}
