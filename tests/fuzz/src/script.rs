//! The typed input of the device targets: how a device is set up, and a list of things that a guest
//! and its VMM then do. Numbers that matter are drawn from tables of interesting ones, so that a
//! fuzzer spends its time on what devices get wrong and not on finding the memory.

use crate::guest::{PAGE, REGIONS};
use arbitrary::{Arbitrary, Result, Unstructured};

/// How the queues are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Split rings.
    Split,
    /// Packed rings.
    Packed,
    /// Elements that the VMM popped itself.
    Elements,
}

/// The most steps of one script.
const MAX_STEPS: usize = 48;
/// The most entries of a list inside a step.
const MAX_LIST: usize = 12;

/// A whole script.
#[derive(Clone, Debug)]
pub struct Script {
    /// Optional features, a bit each, as `device::features` maps them.
    pub features: u8,
    /// Queues started at first, a bit each.
    pub queues: u8,
    /// The size of each queue, as a choice.
    pub sizes: [u8; 5],
    /// What happens.
    pub steps: Vec<Step>,
}

impl<'a> Arbitrary<'a> for Script {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self {
            features: input.arbitrary()?,
            queues: input.arbitrary()?,
            sizes: input.arbitrary()?,
            steps: list(input, MAX_STEPS)?,
        })
    }
}

/// As many items as there are, up to `max`.
fn list<'a, T: Arbitrary<'a>>(input: &mut Unstructured<'a>, max: usize) -> Result<Vec<T>> {
    let mut items = Vec::new();
    while items.len() < max && !input.is_empty() && input.ratio(15u8, 16u8)? {
        items.push(input.arbitrary()?);
    }
    Ok(items)
}

/// One thing that happens.
#[derive(Arbitrary, Clone, Debug)]
pub enum Step {
    /// The driver writes anything anywhere.
    Poke(Address, Bytes),
    /// The driver writes a list of page frame numbers into a buffer.
    List {
        /// Which of the pages for buffers.
        buffer: u8,
        /// The pages.
        pages: Pages,
    },
    /// The driver makes a chain available.
    Offer {
        /// The queue.
        queue: u8,
        /// Its buffers.
        segments: Segments,
        /// Whether they go into an indirect table.
        indirect: bool,
    },
    /// The same bad thing written where a ring's structure is.
    Spoil {
        /// The queue.
        queue: u8,
        /// Which 16 bits of its three areas.
        at: u16,
        /// What is written.
        value: u16,
    },
    /// The guest kicks.
    Kick(u8),
    /// The guest reads the configuration space.
    ReadConfig(u64, u8),
    /// The guest writes it.
    WriteConfig(u8, Bytes),
    /// The host sets a target.
    Target(u32),
    /// The VMM pauses, or resumes.
    Pause(bool),
    /// The VMM inhibits discarding, or no longer.
    Inhibit(bool),
    /// The driver resets the device; it may be set up again.
    Reset(bool),
    /// The VMM stops a queue.
    Stop(u8),
    /// The VMM starts a queue.
    Start(u8),
    /// The VMM starts a queue at an odd place.
    StartAt(u8, [Address; 3]),
    /// The VMM passes another memory table: regions, a bit each, and whether all are pinned.
    Memory(u8, bool),
    /// The host asks for statistics.
    AskStats,
    /// The host begins, ends or looks at a round of hints.
    Hints(u8),
    /// The VMM replaces a call eventfd, or takes it away.
    Call(u8, bool),
    /// The VMM collects completions of elements.
    Collect(u8),
}

/// A few bytes.
#[derive(Clone, Debug)]
pub struct Bytes(pub Vec<u8>);

impl<'a> Arbitrary<'a> for Bytes {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        let length = input.int_in_range(0..=24)?;
        let length = input.len().min(length);
        Ok(Self(input.bytes(length)?.to_vec()))
    }
}

/// The buffers of a chain.
#[derive(Clone, Debug)]
pub struct Segments(pub Vec<Segment>);

impl<'a> Arbitrary<'a> for Segments {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        list(input, MAX_LIST).map(Self)
    }
}

/// One buffer of a chain.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Segment {
    /// Where it is.
    pub address: Address,
    /// How long it is.
    pub length: Length,
    /// Whether the device may write to it.
    pub writable: bool,
    /// Flags that are turned over, seldom any: a choice.
    pub odd: u8,
}

/// A length in bytes.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Length {
    /// So many page frame numbers.
    Numbers(u8),
    /// So many pages.
    Pages(u8),
    /// So many statistics.
    Records(u8),
    /// Anything.
    Raw(u32),
}

impl Length {
    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u32 {
        match self {
            Self::Numbers(count) => u32::from(count) * 4,
            Self::Pages(count) => u32::from(count) * 4096,
            Self::Records(count) => u32::from(count) * 10,
            Self::Raw(bytes) => bytes,
        }
    }
}

/// A guest address.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Address {
    /// The start of a page for buffers.
    Buffer(u8),
    /// The start of an interesting page.
    Page(u8),
    /// Somewhere in an interesting page.
    Inside(u8, u16),
    /// Anything.
    Raw(u64),
}

impl Address {
    /// As a number.
    #[must_use]
    pub fn gpa(self) -> u64 {
        let page = PAGE as u64;
        match self {
            Self::Buffer(number) => buffer(number),
            Self::Page(choice) => interesting(choice) * page,
            Self::Inside(choice, offset) => interesting(choice) * page + u64::from(offset) % page,
            Self::Raw(gpa) => gpa,
        }
    }
}

/// The page for buffers with that number: eight pages behind those of the rings.
#[must_use]
pub fn buffer(number: u8) -> u64 {
    (0x18 + u64::from(number % 8)) * PAGE as u64
}

/// Page frame numbers, most of them of pages that exist.
#[derive(Clone, Debug)]
pub struct Pages(pub Vec<u32>);

impl<'a> Arbitrary<'a> for Pages {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        #[derive(Arbitrary)]
        enum Part {
            One(u8),
            Run(u8, u8),
            Raw(u32),
        }
        let mut pages = Vec::new();
        for part in list(input, MAX_LIST)? {
            match part {
                Part::One(choice) => pages.push(low(interesting(choice))),
                Part::Run(choice, count) => {
                    let first = low(interesting(choice));
                    pages.extend((0..u32::from(count % 40)).map(|next| first.wrapping_add(next)));
                }
                Part::Raw(number) => pages.push(number),
            }
        }
        Ok(Self(pages))
    }
}

fn low(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// A page frame number: of a page that exists for most choices, else one that is worth a try.
#[must_use]
pub fn interesting(choice: u8) -> u64 {
    const OTHERS: [u64; 8] = [0, 0xf, 0x3c, 0x7f, 0x8c, 0x94, 0xf_fffd, u32::MAX as u64];
    let mut left = u64::from(choice) % 70;
    for spec in REGIONS {
        if left < spec.pages {
            return spec.first + left;
        }
        left -= spec.pages;
    }
    OTHERS[usize::try_from(left).unwrap_or(0) % OTHERS.len()]
}
