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
    pub features: u16,
    /// Queues started at first, a bit each; with bit 5 those of the features, without gaps.
    pub queues: u8,
    /// The size of each queue, as a choice.
    pub sizes: [u8; 5],
    /// Regions in the memory table at first, a bit each.
    pub regions: u8,
    /// Write-behind at first: a choice.
    pub write_behind: u8,
    /// What happens.
    pub steps: Vec<Step>,
}

impl<'a> Arbitrary<'a> for Script {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self {
            features: input.arbitrary()?,
            queues: input.arbitrary()?,
            sizes: input.arbitrary()?,
            regions: input.arbitrary()?,
            write_behind: input.arbitrary()?,
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

/// A few items.
#[derive(Clone, Debug)]
pub struct Few<T>(pub Vec<T>);

impl<'a, T: Arbitrary<'a>> Arbitrary<'a> for Few<T> {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        list(input, MAX_LIST).map(Self)
    }
}

/// One thing that happens.
#[derive(Arbitrary, Clone, Debug)]
pub enum Step {
    /// The driver sends pages to be put into the balloon, or taken out, and kicks.
    Tell {
        /// On the deflate queue.
        deflate: bool,
        /// The pages.
        pages: Pages,
        /// Room for an answer, if pages may be refused: none, too little or as much as is needed.
        answer: u8,
        /// Whether the chain is in an indirect table.
        indirect: bool,
    },
    /// The driver reports pages as free, each run by its first page and length, and kicks.
    Report(Few<(u8, u8)>, bool),
    /// The driver sends statistics by tag, and kicks.
    Statistics(Few<(u8, u64)>),
    /// The driver sends hints, and kicks.
    Hint(Hint),
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
        segments: Few<Segment>,
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
    /// The host sets a target in pages.
    Target(u8),
    /// The VMM changes when inflated pages are discarded: a choice.
    WriteBehind(u8),
    /// The VMM has it done now.
    Flush,
    /// The host takes the balloon away.
    ResetBalloon,
    /// The driver acknowledges that.
    AcknowledgeReset,
    /// The guest goes on with another device, restored from what this one saved. The other one is first
    /// given bytes that somebody has changed, with a new checksum or without.
    Move {
        /// Where, and what is written there.
        edits: Few<(u16, u8)>,
        /// Whether the checksum is made right again.
        seal: bool,
    },
    /// How fast workers are from now on: a choice of [`Pace`].
    Pace(Pace),
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

/// What the workers get done between two steps.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Everything.
    All,
    /// Everything but what was handed to another worker.
    Alone,
    /// Nothing.
    Nothing,
}

/// A message on the queue of free page hints.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Hint {
    /// The id that the device shows, or one that is so far from it.
    Id(i8),
    /// Pages, by first page and length.
    Pages(u8, u8),
    /// The end of them.
    Stop,
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
    let mut left = u64::from(choice) % 78;
    for spec in REGIONS {
        if left < spec.pages {
            return spec.first + left;
        }
        left -= spec.pages;
    }
    OTHERS[usize::try_from(left).unwrap_or(0) % OTHERS.len()]
}
